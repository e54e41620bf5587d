"""The replay buffer against a list that does the same row by row; its way through a checkpoint; the history."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlvr_lab.core.replay import ReplayBuffer, StepHistory
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError


@dataclass(frozen=True)
class Row:
    """One stored response, as plain numbers."""

    step: int
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprob: tuple[float, ...]
    advantage: tuple[float, ...]
    reward: float


def batch(lengths: list[int], seed: int) -> tuple[Rollout, torch.Tensor]:
    """Ragged responses to ragged prompts with a tool's token in each, and an advantage per token."""
    rollout = make_rollout(lengths, group_size=1, width=max([1, *lengths]), seed=seed)
    place, row = torch.arange(8).expand(len(lengths), 8), torch.arange(len(lengths))[:, None]
    action = rollout.response_mask & (torch.arange(rollout.response_ids.shape[1]) % 4 != 2)
    generator = torch.Generator().manual_seed(seed + 1)
    advantage = torch.randn(rollout.response_ids.shape, generator=generator)
    ready = rollout.with_(
        prompt_mask=place >= (seed + row) % 5,
        action_mask=action,
        answer=tuple(None if i % 3 else str(i) for i in range(len(lengths))),
        reward_components={"correct": torch.rand(len(lengths), generator=generator)},
        policy_temperature=0.7,
    )
    return ready, advantage.masked_fill(~action, 0.0)


def rows_of(rollout: Rollout, advantage: torch.Tensor, step: torch.Tensor) -> list[Row]:
    reward = rollout.require("reward", by="test")
    found = []
    for i in range(len(rollout)):
        own, said = rollout.response_mask[i], rollout.prompt_mask[i]
        found.append(
            Row(
                int(step[i]),
                tuple(rollout.prompt_ids[i][said].tolist()),
                tuple(rollout.response_ids[i][own].tolist()),
                tuple(rollout.behaviour_logprob[i][own].tolist()),
                tuple(advantage[i][own].tolist()),
                float(reward[i]),
            )
        )
    return found


def held(buffer: ReplayBuffer) -> list[Row]:
    return [] if buffer.rollout is None else rows_of(buffer.rollout, buffer.advantage, buffer.step)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 9), max_size=5), st.integers(0, 4)),
        st.tuples(st.just("evict"), st.integers(0, 6), st.just(0)),
        st.tuples(st.just("draw"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.one_of(st.none(), st.integers(1, 6)))
def test_the_buffer_does_what_a_list_would(operations: list[Any], capacity: int | None) -> None:
    buffer, model, step = ReplayBuffer(capacity), list[Row](), 0
    for number, (name, what, later) in enumerate(operations):
        if name == "add":
            step += later
            rollout, advantage = batch(what, number)
            buffer.add(rollout, advantage, step)
            model += rows_of(rollout, advantage, torch.full((len(what),), step))
            model = model[-capacity:] if capacity else model
        elif name == "evict":
            young = [row for row in model if model[-1].step - row.step <= what]
            assert buffer.evict(what) == len(model) - len(young)
            model = young
        elif name == "draw" and model:
            index = buffer.sample(what, torch.Generator().manual_seed(number))
            assert len(index) == len(set(index.tolist())) == min(what, len(model))
            if len(index):
                assert rows_of(*buffer.take(index)) == [model[i] for i in index.tolist()]
        elif name == "clear":
            buffer.clear()
            model = []
        assert held(buffer) == model
        assert len(buffer) == len(model)
        assert buffer.reward.tolist() == [row.reward for row in model]
        assert buffer.ages(step).tolist() == [step - row.step for row in model]


def through_a_checkpoint(state: dict[str, Any], where: Path) -> dict[str, Any]:
    """As `train.checkpoint` does it: tensors as safetensors, the rest as JSON."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, where / "tensors.safetensors")
    plain = json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors}))
    return plain | load_file(where / "tensors.safetensors")


@pytest.mark.parametrize("sizes", [[], [[3, 0, 7]], [[3, 0, 7], [9], [2, 2]]])
def test_a_checkpoint_holds_the_whole_buffer(sizes: list[list[int]], tmp_path: Path) -> None:
    buffer, copy = ReplayBuffer(), ReplayBuffer()
    for step, lengths in enumerate(sizes):
        buffer.add(*batch(lengths, step), step)
    copy.add(*batch([4], 9), 3)
    copy.load_state_dict(through_a_checkpoint(buffer.state_dict(), tmp_path))
    assert held(copy) == held(buffer)
    if buffer.rollout is None or copy.rollout is None:
        assert buffer.rollout is copy.rollout
        return
    assert copy.rollout.answer == buffer.rollout.answer
    assert copy.rollout.policy_temperature == 0.7
    assert torch.equal(copy.rollout.action_mask, buffer.rollout.action_mask)
    assert copy.rollout.reward_components["correct"].tolist() == buffer.rollout.reward_components["correct"].tolist()
    for both in (buffer, copy):
        both.evict(1)
        both.add(*batch([5, 1], 7), 3)
    assert held(copy) == held(buffer)


def test_a_checkpoint_of_a_larger_buffer_leaves_the_newest_rows() -> None:
    buffer, smaller = ReplayBuffer(), ReplayBuffer(2)
    buffer.add(*batch([3, 4, 5], 0), 0)
    smaller.load_state_dict(buffer.state_dict())
    assert held(smaller) == held(buffer)[1:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": None}, "step"),
        ({"rollout.response_ids": None}, "response_ids"),
        ({"rollout.nonsense": 3}, "nonsense"),
        ({"rollout.reward": torch.zeros(9)}, "reward has shape"),
        ({"advantage": torch.zeros(2, 3)}, "differ in shape"),
    ],
)
def test_a_broken_checkpoint_is_refused(change: dict[str, Any], reason: str) -> None:
    buffer = ReplayBuffer()
    buffer.add(*batch([3, 4], 0), 0)
    state = {key: value for key, value in (buffer.state_dict() | change).items() if value is not None}
    with pytest.raises(UserError, match=f"replay buffer cannot be read: .*{reason}"):
        ReplayBuffer().load_state_dict(state)


def test_a_batch_larger_than_the_buffer_leaves_its_last_rows() -> None:
    buffer = ReplayBuffer(2)
    rollout, advantage = batch([1, 2, 3, 4], 0)
    buffer.add(rollout, advantage, 0)
    assert buffer.rollout is not None
    assert buffer.rollout.lengths.tolist() == [3, 4]


def test_a_draw_takes_only_candidates_and_is_its_generators() -> None:
    buffer = ReplayBuffer()
    buffer.add(*batch([1] * 20, 0), 0)
    pool = torch.arange(3, 17, 2)
    drawn = [buffer.sample(4, torch.Generator().manual_seed(seed), pool).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) < set(pool.tolist())
    assert sorted(buffer.sample(99, torch.Generator().manual_seed(0), pool).tolist()) == pool.tolist()


def test_what_is_stored_is_a_copy() -> None:
    buffer = ReplayBuffer()
    rollout, advantage = batch([3, 2], 0)
    buffer.add(rollout, advantage, 0)
    before = held(buffer)
    advantage.zero_()
    rollout.behaviour_logprob.zero_()
    assert held(buffer) == before


def test_padding_that_no_row_needs_is_dropped() -> None:
    buffer = ReplayBuffer()
    rollout, advantage = batch([9, 2, 1], 0)
    buffer.add(rollout, advantage, 0)
    rows, value, _ = buffer.take(torch.tensor([1, 2]))
    assert rows.response_ids.shape == value.shape == (2, 2)
    assert rows.prompt_ids.shape == (2, int(rollout.prompt_mask[1:].sum(1).max()))


def test_rows_that_do_not_fit_are_refused() -> None:
    buffer = ReplayBuffer()
    rollout, advantage = batch([3, 2], 0)
    with pytest.raises(ValueError, match="advantage has shape"):
        buffer.add(rollout, advantage[:, :1], 0)
    buffer.add(rollout, advantage, 4)
    with pytest.raises(ValueError, match="step 3 lies before step 4"):
        buffer.add(rollout, advantage, 3)
    with pytest.raises(ValueError, match="'old_logprob' is present in one"):
        buffer.add(rollout.with_(old_logprob=None), advantage, 5)
    with pytest.raises(ValueError, match="no response to take"):
        buffer.take(torch.tensor([], dtype=torch.long))
    assert len(buffer) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-2, 2, width=32), max_size=6), max_size=8), st.integers(1, 12))
def test_a_history_drops_whole_steps_before_it_adds_one(steps: list[list[float]], capacity: int) -> None:
    history = StepHistory(capacity)
    for values in steps:
        before = len(history)
        history.add(values)
        assert history.steps[-1] == values
        assert len(history) <= capacity + len(values)
        # nothing goes while the capacity is kept, and no more than one step too much
        if before <= capacity:
            assert len(history) == before + len(values)
    assert history.steps == steps[len(steps) - len(history.steps) :]
    flat = [value for step in history.steps for value in step]
    expected = float(torch.tensor(flat, dtype=torch.float64).quantile(0.5)) if flat else math.nan
    assert history.median() == pytest.approx(expected, nan_ok=True)
    copy = StepHistory(capacity)
    copy.load(json.loads(json.dumps(history.state())))
    assert copy.steps == history.steps


def test_an_undefined_number_is_left_out() -> None:
    history = StepHistory(4)
    history.add([math.nan, 1.0, math.inf])
    assert history.steps == [[1.0]]
