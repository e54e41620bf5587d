"""Minibatches that are not finite, or whose gradient is far too large, are left out where the guard is told to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN, sampled_rollout
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method
from rlvr_lab.policy.load import Policy
from rlvr_lab.train import loop
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.config import load_config
from rlvr_lab.train.guard import ENOUGH, Guard
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.update import TrainingStopped, Updater


class Faulty(Method):
    """Adds `value` times the log-prob in the minibatches `at`."""

    slug = "faulty"

    def __init__(self, value: float, at: tuple[int, ...]) -> None:
        self.value, self.at, self.seen = value, at, -1

    def prepare(self, batch: Rollout, advantage: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        self.seen += 1
        return {}

    def regularise(self, inputs: LossInputs) -> Tensor:
        return inputs.logprob * (self.value if self.seen in self.at else 0.0)


@pytest.fixture(scope="module")
def rollout(tiny_s: Policy) -> Rollout:
    return sampled_rollout(tiny_s)


def update(policy: Policy, rollout: Rollout, faulty: Faulty, guard: Guard, minibatches: int = 4) -> Any:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    pipeline = compose([build("grpo", {"preset": "released"}), faulty])
    updater = Updater(policy.model, optimizer, pipeline, minibatches=minibatches, guard=guard)
    metrics = updater.run(rollout, torch.Generator().manual_seed(0), Clock(torch.device("cpu")), step=3)
    steps = {int(s["step"]) for s in optimizer.state_dict()["state"].values()}
    return metrics, steps


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_minibatch_that_is_not_finite_is_left_out_and_counted(
    fresh_s: Callable[[], Policy], rollout: Rollout, value: float
) -> None:
    policy = fresh_s()
    metrics, steps = update(policy, rollout, Faulty(value, (1,)), Guard(skip_nonfinite=True))
    assert steps == {3}
    assert metrics["skipped_updates"] == 1
    for name in ("loss", "grad_norm", "ratio_mean", "kl_old_new"):
        assert math.isfinite(metrics[name]), name
    assert all(bool(torch.isfinite(p).all()) for p in policy.model.parameters())


def test_a_run_of_bad_minibatches_stops_and_says_how_many(fresh_s: Callable[[], Policy], rollout: Rollout) -> None:
    guard = Guard(skip_nonfinite=True, stop_after=2)
    with pytest.raises(TrainingStopped, match=r"step 3: 2 minibatches in a row .*loss is nan.*Lower optimizer\.lr"):
        update(fresh_s(), rollout, Faulty(math.nan, (1, 2)), guard)
    guard = Guard(skip_nonfinite=True, stop_after=2)
    metrics, _ = update(fresh_s(), rollout, Faulty(math.nan, (0, 2)), guard)  # never two in a row
    assert metrics["skipped_updates"] == 2


def test_without_the_switch_the_first_bad_minibatch_stops(fresh_s: Callable[[], Policy], rollout: Rollout) -> None:
    with pytest.raises(TrainingStopped, match="step 3: loss is nan"):
        update(fresh_s(), rollout, Faulty(math.nan, (1,)), Guard(spike_factor=5.0))


def test_a_spike_is_left_out_once_the_usual_size_is_known(fresh_s: Callable[[], Policy], rollout: Rollout) -> None:
    rollout = rollout.rows(torch.arange(15))  # without the empty response
    settings: dict[str, Any] = {"minibatches": 15}
    spike = Faulty(100.0, (2, 12))
    metrics, steps = update(fresh_s(), rollout, spike, Guard(spike_factor=20.0), **settings)
    assert ENOUGH <= 12
    assert metrics["skipped_updates"] == 1  # the early one passes: nothing to compare with
    assert steps == {14}
    metrics, steps = update(fresh_s(), rollout, Faulty(100.0, (2, 12)), Guard(), **settings)
    assert (metrics["skipped_updates"], steps) == (0, {15})


def test_a_minibatch_left_out_leaves_no_trace(fresh_s: Callable[[], Policy], rollout: Rollout) -> None:
    """As if the optimizer had been given the others only."""
    kept, other = fresh_s(), fresh_s()
    update(kept, rollout, Faulty(math.nan, (3,)), Guard(skip_nonfinite=True))
    optimizer = torch.optim.AdamW(other.model.parameters(), lr=1e-3)
    pipeline = compose([build("grpo", {"preset": "released"}), Faulty(0.0, ())])
    updater = Updater(other.model, optimizer, pipeline, minibatches=4)
    apply, number = updater._minibatch, iter(range(4))
    updater._minibatch = lambda *a: None if next(number) == 3 else apply(*a)  # type: ignore
    updater.run(rollout, torch.Generator().manual_seed(0), Clock(torch.device("cpu")))
    for a, b in zip(kept.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_guard_remembers_across_a_checkpoint() -> None:
    guard = Guard(spike_factor=3.0, stop_after=4)
    for norm in (1.0, 2.0, 3.0) * 3:
        guard.applied(norm)
    guard.skipped()
    again = Guard(spike_factor=3.0, stop_after=4)
    again.load_state_dict(guard.state_dict())
    assert again == guard
    assert again.spike(6.1) is not None
    assert again.spike(6.0) is None
    assert Guard().state_dict() == {}


def test_a_run_logs_what_it_left_out_and_goes_on_after_a_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "compose", lambda methods: compose([*methods, Faulty(math.nan, (1,))]))
    settings = [*TINY_RUN, "optimizer.guard.skip_nonfinite=true", "optimizer.guard.spike_factor=100", "steps=2"]
    rows = Trainer(load_config("grpo/tiny", settings), tmp_path / "run").run().history
    assert [row["skipped_updates"] for row in rows] == [1, 0]
    resumed = Trainer(load_config("grpo/tiny", [*settings, "steps=3"]), tmp_path / "run", resume=True)
    assert len(resumed.updater.guard.norms) == 3
