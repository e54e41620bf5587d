"""Figures of episodes, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from builders import make_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.train.metrics import rollout_metrics, turn_metrics


def episodes() -> Rollout:
    """Turns of one action and one told token. Row 0: four turns, the last one unanswered; row 1: two; row 2: one."""
    rollout = make_rollout([7, 4, 2, 0], width=7)
    place = torch.arange(7).expand(4, 7)
    entropy = torch.tensor([[8.0, 9, 4, 9, 2, 9, 1], [6, 9, 3, 9, 9, 9, 9], [5, 9, 9, 9, 9, 9, 9], [9] * 7])
    return rollout.with_(
        turn_id=(place // 2) * rollout.response_mask,
        action_mask=rollout.response_mask & (place % 2 == 0),
        correct=torch.tensor([True, False, False, True]),
        answer=("a", "b", None, "a"),
        statistics={"token_entropy": entropy},
    )


def test_turns_and_entropies_by_hand() -> None:
    found = turn_metrics(episodes())
    assert found["turns"] == (4 + 2 + 1 + 0) / 4
    assert found["tool_calls"] == (3 + 2 + 1) / 4
    # thirds of four turns: turns 0 and 1, and 2 and 3; of two turns: one each; a single turn is neither
    assert found["early_token_entropy"] == pytest.approx((8 + 4 + 6) / 3)
    assert found["late_token_entropy"] == pytest.approx((2 + 1 + 3) / 3)


def test_turns_are_counted_by_what_was_said_not_by_their_numbers() -> None:
    """A turn whose tokens a filter unmarked is gone, and so is one with a negative number."""
    rollout = episodes()
    assert rollout.turn_id is not None
    action = rollout.action_mask.clone()
    action[0, 0] = False
    found = turn_metrics(rollout.with_(action_mask=action))
    assert found["turns"] == (3 + 2 + 1) / 4
    assert found["early_token_entropy"] == pytest.approx((4 + 6) / 2)
    outside = torch.where(rollout.turn_id == 3, -1, rollout.turn_id)
    assert turn_metrics(rollout.with_(turn_id=outside))["turns"] == (3 + 2 + 1) / 4


def test_single_turns_have_no_early_and_late_entropy() -> None:
    found = turn_metrics(episodes().rows(torch.tensor([2, 3])))
    assert math.isnan(found["early_token_entropy"])
    assert math.isnan(found["late_token_entropy"])


def test_actions_that_could_not_be_read_are_told_where_the_environment_charges_for_them() -> None:
    assert "invalid_episodes" not in turn_metrics(episodes())
    charged = episodes().with_(reward_components={"invalid": torch.tensor([-0.2, 0.0, -0.1, 0.0])})
    assert turn_metrics(charged)["invalid_episodes"] == 0.5


def test_what_was_told_is_in_no_figure_and_single_turn_runs_have_none() -> None:
    rollout = episodes()
    entropy = rollout.statistics["token_entropy"].masked_fill(~rollout.mask, 1e6)
    assert turn_metrics(rollout.with_statistics(token_entropy=entropy)) == turn_metrics(rollout)
    assert turn_metrics(rollout.with_(turn_id=None)) == {}
    assert turn_metrics(rollout).keys() <= rollout_metrics(rollout).keys()
    assert not turn_metrics(rollout).keys() & rollout_metrics(rollout.with_(turn_id=None)).keys()
