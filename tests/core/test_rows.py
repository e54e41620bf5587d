"""An order of rows that does not depend on their arrival, and joined rollouts."""

from __future__ import annotations

import pytest
import torch
from builders import make_rollout
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.rows import canonical_order, concatenate


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_shuffled_rows_come_in_one_sequence(lengths: list[int], random: object) -> None:
    rollout = make_rollout(lengths)
    shuffle = list(range(len(lengths)))
    random.shuffle(shuffle)  # type: ignore[attr-defined]
    shuffled = rollout.rows(torch.tensor(shuffle))
    width = shuffled.response_ids.shape[1]
    first = rollout.rows(canonical_order(rollout)).response_ids[:, :width]
    second = shuffled.rows(canonical_order(shuffled))
    inside = second.response_mask
    assert torch.equal(first.masked_fill(~inside, 0), second.response_ids.masked_fill(~inside, 0))


def test_padding_and_width_play_no_part() -> None:
    narrow, wide = make_rollout([2, 3, 1], width=3), make_rollout([2, 3, 1], width=3)
    spoilt = wide.with_(response_ids=wide.response_ids.masked_fill(~wide.response_mask, 99))
    assert torch.equal(canonical_order(narrow), canonical_order(spoilt))


def test_one_token_moves_a_row() -> None:
    rollout = make_rollout([4] * 8, group_size=8)
    orders = set()
    for token in range(28, 60):
        ids = rollout.response_ids.clone()
        ids[3, 2] = token
        orders.add(tuple(canonical_order(rollout.with_(response_ids=ids)).tolist()))
    assert len(orders) > 4


def test_joined_rollouts_keep_their_groups_apart() -> None:
    first, second = make_rollout([3, 1]), make_rollout([5, 2, 4, 4], seed=1)
    joined = concatenate([first, second])
    assert joined.group_id.tolist() == [0, 0, 1, 1, 2, 2]
    assert joined.lengths.tolist() == [3, 1, 5, 2, 4, 4]
    assert torch.equal(joined.response_ids[2:], second.response_ids)
    assert torch.equal(joined.statistics["token_entropy"][:2, :3], first.statistics["token_entropy"])


def test_prompts_of_different_length_are_padded_on_the_left() -> None:
    first, second = make_rollout([2]), make_rollout([2], seed=1)
    short = second.with_(prompt_ids=second.prompt_ids[:, 3:], prompt_mask=second.prompt_mask[:, 3:])
    joined = concatenate([first, short])
    assert joined.prompt_mask[1].tolist() == [False] * 3 + [True] * 5
    assert torch.equal(joined.prompt_ids[1, 3:], short.prompt_ids[0])


def test_what_does_not_fit_together_is_named() -> None:
    first = make_rollout([2, 2])
    with pytest.raises(ValueError, match="'reward' is present in one rollout and absent in another"):
        concatenate([first, first.with_(reward=None)])
    with pytest.raises(ValueError, match="'statistics' has different entries"):
        concatenate([first, first.with_(statistics={})])
    with pytest.raises(ValueError, match="no rollout to join"):
        concatenate([])
