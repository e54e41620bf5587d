from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.advantages import dead_groups, group_advantage

GROUPS = st.lists(
    st.tuples(st.integers(0, 3), st.floats(-3, 3, width=32, allow_subnormal=False)), min_size=1, max_size=12
)


def test_a_group_of_one_has_advantage_zero_where_verl_returns_the_raw_reward() -> None:
    reward, group = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([5, 1, 1])
    for std in ("sample", "population", "none"):
        assert group_advantage(reward, group, std)[0] == 0
    verl = reward[0] / (1 + 1e-6)
    assert verl == pytest.approx(0.7, abs=1e-5)  # the convention that is not followed


def test_equal_rewards_give_exactly_zero() -> None:
    reward, group = torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long)
    assert torch.equal(group_advantage(reward, group), torch.zeros(4))


@given(GROUPS)
def test_advantages_sum_to_zero_in_every_group(rows: list[tuple[int, float]]) -> None:
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    for std in ("sample", "population", "none"):
        advantage = group_advantage(reward, group, std, eps=1e-2)
        assert torch.isfinite(advantage).all()
        for g in group.unique():
            assert float(advantage[group == g].sum()) == pytest.approx(0, abs=1e-3)


@given(GROUPS, st.randoms(use_true_random=False), st.integers(1, 1000))
def test_row_order_and_names_of_groups_are_inert(rows: list[tuple[int, float]], random: object, shift: int) -> None:
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    plain = group_advantage(reward, group, eps=1e-2)
    renamed = group_advantage(reward[order], (group[order] * 7 + shift), eps=1e-2)
    torch.testing.assert_close(renamed, plain[order], rtol=1e-4, atol=1e-5)


@given(GROUPS)
def test_dead_groups_are_those_of_one_reward(rows: list[tuple[int, float]]) -> None:
    rewards: dict[int, set[float]] = {}
    for g, r in rows:
        rewards.setdefault(g, set()).add(r)
    group, reward = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    assert dead_groups(reward, group).tolist() == [len(rewards[g]) == 1 for g, _ in rows]


def test_no_responses_give_no_advantages() -> None:
    empty = torch.empty(0)
    assert group_advantage(empty, empty.long()).shape == (0,)
    assert dead_groups(empty, empty.long()).shape == (0,)
