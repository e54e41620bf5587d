"""Responses under way, without any engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.paths import Path, Piece, to_rollout


def piece(ids: list[int], finished: bool = False) -> Piece:
    n = len(ids)
    return Piece(ids, [-0.5] * n, [1.0] * n, [0.25] * n, [-0.5] * n, finished)


def episode() -> Path:
    """Says 5 6, is told 9 9 9, says 7, is told 8, says 4."""
    path = Path(3, 1, 2, 0, [1, 2], state=())
    for said, told in (([5, 6], [9, 9, 9]), ([7], [8]), ([4], [])):
        path.add(piece(said))
        if told:
            path.tell(told)
    return path


def test_what_is_told_is_no_action_and_belongs_to_the_turn_before() -> None:
    path = episode()
    rollout = to_rollout([path], pad_id=0, version=7)
    assert rollout.response_ids.tolist() == [[5, 6, 9, 9, 9, 7, 8, 4]]
    assert rollout.action_mask.tolist() == [[True, True, False, False, False, True, False, True]]
    assert rollout.turn_id is not None
    assert rollout.segment_id is not None
    assert rollout.turn_id.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2]]
    assert rollout.segment_id.tolist() == [[0, 0, 1, 1, 1, 2, 3, 4]]
    assert rollout.prompt_id.tolist() == [3]
    assert rollout.policy_version.tolist() == [7]
    assert path.generated == int(rollout.sampled.sum()) == 4
    assert rollout.statistics["token_entropy"][0].tolist() == [0.25, 0.25, 0, 0, 0, 0.25, 0, 0.25]


def test_a_branch_goes_on_alone() -> None:
    path = episode()
    twin = path.branch(1)
    twin.tell([3, 3])
    twin.notes["seen"] = 1
    assert len(path) == 8
    assert path.notes == {}
    assert (twin.parent, twin.prefix_length, twin.branch_position, twin.generated) == (0, 8, 8, 0)
    assert twin.turn[-3:] == [2, 2, 2]
    again = twin.branch(2)
    assert again.parent == 1
    assert again.notes == {"seen": 1}


def test_an_episode_is_not_cut_in_the_middle() -> None:
    with pytest.raises(ValueError, match="can only branch where it stands"):
        episode().branch(1, 3)
    with pytest.raises(ValueError, match="token 9 of a path of 8"):
        episode().branch(1, 9)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 24), st.booleans())
def test_every_token_is_counted_for_the_path_that_sampled_it(lengths: list[int], cut: int, learn: bool) -> None:
    root = Path(0, 0, 0, 0, [1])
    for n in lengths:
        root.add(piece([4] * n))
    cut = min(cut, len(root))
    branch = root.branch(1, cut, learn=learn)
    branch.add(piece([5, 5, 5], finished=True))
    assert not branch.open
    assert branch.finished
    rollout = to_rollout([root, branch], pad_id=0, version=0)
    assert rollout.sampled.sum(1).tolist() == [sum(lengths), 3]
    assert rollout.mask.sum(1).tolist() == [sum(lengths), 3 + cut * learn]
    assert rollout.parent_id is not None
    assert rollout.parent_id.tolist() == [-1, 0]


def test_random_numbers_have_a_place_of_their_own() -> None:
    keys = {
        Path(0, 0, place, number, [1], ids=[1] * n).start(4).key
        for place in range(3) for number in range(3) for n in range(3)
    }  # fmt: skip
    assert len(keys) == 27


def test_a_rollout_of_nothing_or_of_twins_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one path"):
        to_rollout([], pad_id=0, version=0)
    with pytest.raises(ValueError, match="same number"):
        to_rollout([episode(), episode()], pad_id=0, version=0)


def test_rows_keep_their_parents_by_number() -> None:
    root = Path(0, 0, 0, 0, [1])
    root.add(piece([4, 4, 4]))
    branches = [root.branch(n, 2) for n in (1, 2)]
    for branch in branches:
        branch.add(piece([5]))
    rollout = to_rollout([root, *branches], pad_id=0, version=0).rows(torch.tensor([2, 0]))
    assert rollout.path_id is not None
    assert rollout.parent_id is not None
    assert rollout.path_id.tolist() == [2, 0]
    assert rollout.parent_id.tolist() == [0, -1]
