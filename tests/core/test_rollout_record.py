from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import make_rollout

from rlvr_lab.core.rollout import PROVIDED_BY, Rollout, pad
from rlvr_lab.errors import UserError

LENGTHS = [3, 1, 2, 4]
B, T = 4, 4


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout(LENGTHS)


@pytest.mark.parametrize(
    "name",
    ["prompt_id", "group_id", "finished", "policy_version", "bundle_id", "parent_id", "branch_position",
     "prefix_length", "difficulty", "reward", "correct"],
)  # fmt: skip
def test_a_field_per_response_of_wrong_length_is_named(rollout: Rollout, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape \(3,\), expected \(4,\)"):
        rollout.with_(**{name: torch.zeros(3)})


@pytest.mark.parametrize(
    "name",
    ["response_mask", "action_mask", "behaviour_logprob", "behaviour_temperature", "turn_id", "segment_id",
     "old_logprob"],
)  # fmt: skip
def test_a_field_per_token_of_wrong_width_is_named(rollout: Rollout, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape \(4, 5\), expected \(4, 4\)"):
        rollout.with_(**{name: torch.zeros(B, T + 1, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": torch.zeros(B)}, "response_ids and prompt_ids must be"),
        ({"prompt_ids": torch.zeros(B)}, "response_ids and prompt_ids must be"),
        ({"prompt_mask": torch.ones(B, 9, dtype=torch.bool)}, r"^prompt_mask has shape \(4, 9\), expected \(4, 8\)"),
        ({"prompt_ids": torch.zeros(5, 8)}, r"^prompt_ids has shape"),
        ({"response_mask": torch.ones(B, T)}, "^response_mask must be boolean, not torch.float32"),
        ({"action_mask": torch.ones(B, T)}, "^action_mask must be boolean"),
        ({"prompt_mask": torch.ones(B, 8)}, "^prompt_mask must be boolean"),
        ({"finished": torch.ones(B)}, "^finished must be boolean"),
        ({"correct": torch.ones(B)}, "^correct must be boolean"),
        ({"action_mask": torch.ones(B, T, dtype=torch.bool)}, "^action_mask marks a token outside response_mask"),
        ({"reward_components": {"length": torch.zeros(B, 1)}}, r"^reward component 'length' has shape \(4, 1\)"),
        ({"statistics": {"surprise": torch.zeros(B)}}, r"^statistic 'surprise' has shape \(4,\), expected \(4, 4\)"),
        ({"answer": ("1", None)}, "^answer has 2 entries, expected 4"),
    ],
)
def test_what_does_not_fit_is_named(rollout: Rollout, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout.with_(**changes)


def test_a_mask_with_a_hole_is_refused(rollout: Rollout) -> None:
    mask = rollout.response_mask.clone()
    mask[0, 0] = False
    with pytest.raises(ValueError, match="response_mask must be a prefix"):
        rollout.with_(response_mask=mask, action_mask=mask)


@pytest.mark.parametrize("name", ["behaviour_logprob", "old_logprob"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_log_probs_must_be_finite_on_response_tokens_only(rollout: Rollout, name: str, bad: float) -> None:
    value: torch.Tensor = getattr(rollout, name).clone()
    value[~rollout.mask] = bad
    rollout.with_(**{name: value})  # padding is inert
    value[2, 1] = bad
    with pytest.raises(ValueError, match=f"^{name} is not finite on a response token"):
        rollout.with_(**{name: value})


@pytest.mark.parametrize("name", sorted(PROVIDED_BY))
def test_a_missing_field_names_method_field_and_setting(rollout: Rollout, name: str) -> None:
    bare = rollout.with_(reward=None, old_logprob=None, statistics={})
    with pytest.raises(UserError) as caught:
        bare.require(name, by="pear")
    message = str(caught.value)
    assert "'pear'" in message
    assert f"'{name}'" in message
    assert PROVIDED_BY[name] in message


def test_a_missing_statistic_without_a_known_setting_asks_for_a_scoring_pass(rollout: Rollout) -> None:
    with pytest.raises(UserError, match=r"update\.recompute_old_logprob: true"):
        rollout.require("nucleus_entropy", by="pear")


def test_require_returns_fields_and_statistics(rollout: Rollout) -> None:
    assert rollout.require("reward", by="x") is rollout.reward
    assert rollout.require("token_entropy", by="x") is rollout.statistics["token_entropy"]


def test_rows_are_trimmed_to_their_own_longest(rollout: Rollout) -> None:
    rollout = rollout.with_(answer=("a", "b", None, "d"), reward_components={"r": torch.arange(4.0)})
    part = rollout.rows(torch.tensor([2, 1]))
    assert part.response_ids.shape == (2, 2)
    assert part.lengths.tolist() == [2, 1]
    assert torch.equal(part.response_ids, rollout.response_ids[[2, 1], :2])
    assert torch.equal(part.statistics["token_entropy"], rollout.statistics["token_entropy"][[2, 1], :2])
    assert part.answer == (None, "b")
    assert part.reward_components["r"].tolist() == [2, 1]
    assert part.prompt_ids.shape == (2, 8)
    assert torch.equal(part.group_id, rollout.group_id[[2, 1]])


def test_every_tensor_field_is_taken_along(rollout: Rollout) -> None:
    """A field forgotten in the list of per-token fields would keep its full width and be refused here."""
    token, response = torch.zeros(B, T, dtype=torch.long), torch.arange(B)
    full = rollout.with_(
        turn_id=token, segment_id=token, bundle_id=response, parent_id=response, branch_position=response,
        prefix_length=response, difficulty=response.float(), correct=response > 1,
    )  # fmt: skip
    part = full.rows(torch.tensor([1]))
    assert part.turn_id is not None
    assert part.segment_id is not None
    assert part.turn_id.shape == part.segment_id.shape == (1, 1)
    assert part.parent_id is not None
    assert part.parent_id.tolist() == [1]
    assert full.to("cpu").answer == full.answer


def test_a_response_of_no_tokens_is_a_valid_row() -> None:
    rollout = make_rollout([0, 2])
    assert rollout.lengths.tolist() == [0, 2]
    empty = rollout.rows(torch.tensor([0]))
    assert empty.response_ids.shape == (1, 1)
    assert not empty.mask.any()
    assert len(rollout.rows(torch.tensor([], dtype=torch.long))) == 0


def test_tool_output_is_a_response_but_no_action() -> None:
    rollout = make_rollout([4, 4])
    action = rollout.action_mask.clone()
    action[:, 1:3] = False
    with_tool = rollout.with_(action_mask=action)
    assert with_tool.lengths.tolist() == [4, 4]
    assert with_tool.mask.sum(1).tolist() == [2, 2]


def test_a_changed_copy_leaves_the_record_alone(rollout: Rollout) -> None:
    changed = rollout.with_statistics(token_entropy=torch.zeros(B, T), other=torch.ones(B, T))
    assert set(changed.statistics) == {"token_entropy", "other"}
    assert set(rollout.statistics) == {"token_entropy"}
    assert not torch.equal(rollout.statistics["token_entropy"], changed.statistics["token_entropy"])


def test_pad_fills_right_or_left() -> None:
    assert pad([[1, 2], [3]], 0, torch.long).tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], 9, torch.long, left=True).tolist() == [[1, 2], [9, 3]]
    assert pad([[], []], 7, torch.long).tolist() == [[7], [7]]
    assert pad([], 0, torch.long).shape == (0, 1)
