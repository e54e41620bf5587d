"""One rollout into optimizer steps: the split into micro-batches and the savings change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from builders import sampled_rollout
from sample_methods import PlainBonus, TopEntropyOnly
from torch import Tensor

from rlvr_lab.core.reduce import reduce
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method
from rlvr_lab.policy.forward import response_statistics
from rlvr_lab.policy.load import Policy
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.update import TrainingStopped, Updater, UpdateTotals, schedule

CPU = torch.device("cpu")
FreshPolicy = Callable[[], Policy]


@pytest.fixture(scope="module")
def rollout(tiny_s: Policy) -> Rollout:
    """16 ragged responses; the first group is dead and the last response is empty."""
    return sampled_rollout(tiny_s)


@pytest.fixture(scope="module")
def moved(tiny_s: Policy) -> Any:
    """A policy some way off the one that sampled, so that ratios differ from 1 and some are clipped."""
    model = copy.deepcopy(tiny_s.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def make_updater(model: Any, methods: Sequence[Method] = (), **settings: Any) -> Updater:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    return Updater(model, optimizer, compose([build("grpo", {"preset": "released"}), *methods]), **settings)


def loss_and_gradients(
    model: Any, rollout: Rollout, methods: Sequence[Method] = (), **settings: Any
) -> tuple[float, list[Tensor], UpdateTotals]:
    updater = make_updater(model, methods, **settings)
    model.zero_grad(set_to_none=True)
    totals = UpdateTotals()
    loss = updater.accumulate(rollout, updater.pipeline.advantage(rollout), totals)
    return loss, [p.grad.clone() for p in model.parameters()], totals


METHODS = pytest.mark.parametrize(
    "methods",
    [(), (PlainBonus(0.1),), (TopEntropyOnly(),), (TopEntropyOnly(), PlainBonus(0.1))],
    ids=["grpo", "regularise", "weight", "both"],
)


@METHODS
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_the_micro_batch_size_changes_nothing(
    moved: Any, rollout: Rollout, methods: tuple[Method, ...], micro: int
) -> None:
    whole = loss_and_gradients(moved, rollout, methods, micro_batch_rows=len(rollout))
    split = loss_and_gradients(moved, rollout, methods, micro_batch_rows=micro)
    assert split[0] == pytest.approx(whole[0], abs=1e-6)
    for a, b in zip(split[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name, value in whole[2].metrics().items():
        assert split[2].metrics()[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    assert max(float(g.abs().max()) for g in whole[1]) > 1e-3  # there is something to compare


@METHODS
def test_row_order_changes_nothing(moved: Any, rollout: Rollout, methods: tuple[Method, ...]) -> None:
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3))
    plain = loss_and_gradients(moved, rollout, methods, micro_batch_rows=5)
    permuted = loss_and_gradients(moved, rollout.rows(order), methods, micro_batch_rows=5)
    assert permuted[0] == pytest.approx(plain[0], abs=1e-6)
    for a, b in zip(permuted[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@METHODS
def test_padding_changes_nothing(moved: Any, rollout: Rollout, methods: tuple[Method, ...]) -> None:
    outside = ~rollout.mask
    spoilt = rollout.with_(
        response_ids=rollout.response_ids.masked_fill(outside, 77),
        old_logprob=rollout.old_logprob.masked_fill(outside, math.nan),  # type: ignore[union-attr]
        behaviour_logprob=rollout.behaviour_logprob.masked_fill(outside, -math.inf),
        behaviour_temperature=rollout.behaviour_temperature.masked_fill(outside, 9.0),
        statistics={"token_entropy": rollout.statistics["token_entropy"].masked_fill(outside, math.nan)},
    )
    plain = loss_and_gradients(moved, rollout, methods, micro_batch_rows=5)
    garbage = loss_and_gradients(moved, spoilt, methods, micro_batch_rows=5)
    assert garbage[0] == pytest.approx(plain[0], abs=1e-6)
    for a, b in zip(garbage[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_regulariser_acts_with_the_reduction_and_its_gradient(moved: Any, rollout: Rollout) -> None:
    plain = loss_and_gradients(moved, rollout, skip_dead_rows=False)
    with_bonus = loss_and_gradients(moved, rollout, (PlainBonus(0.5),))
    moved.zero_grad(set_to_none=True)
    _, entropy = response_statistics(moved, rollout)
    assert entropy is not None
    bonus = -0.5 * reduce(entropy, rollout.mask, "token_mean")
    bonus.backward()  # type: ignore[no-untyped-call]
    assert with_bonus[0] == pytest.approx(plain[0] + float(bonus.detach()), abs=1e-5)
    for p, a, b in zip(moved.parameters(), with_bonus[1], plain[1], strict=True):
        torch.testing.assert_close(a - b, p.grad, rtol=1e-3, atol=2e-6)
    assert with_bonus[2].live_rows == len(rollout) - 1  # dead rows have entropies too, the empty one has none


def test_a_token_weight_acts(moved: Any, rollout: Rollout) -> None:
    advantage = compose([build("grpo", {"preset": "released"})]).advantage(rollout)
    weight = TopEntropyOnly().weight(rollout, advantage)
    logprob, _ = response_statistics(moved, rollout)
    assert rollout.old_logprob is not None
    method = build("grpo", {"preset": "released"})
    inputs = LossInputs(rollout, logprob, rollout.old_logprob, advantage, torch.tensor(0.8), torch.tensor(1.2))
    per_token = method.surrogate(inputs).loss * weight  # type: ignore[attr-defined]
    expected = float(reduce(per_token, rollout.mask, "token_mean").detach())
    assert loss_and_gradients(moved, rollout, (TopEntropyOnly(),))[0] == pytest.approx(expected, abs=1e-6)


def test_the_first_minibatch_has_ratio_1_and_the_loss_of_its_advantages(tiny_s: Policy, rollout: Rollout) -> None:
    """The sampling engine's log-probs are those of the updater, so an on-policy ratio is 1."""
    loss, _, totals = loss_and_gradients(tiny_s.model, rollout, skip_dead_rows=False)
    metrics = totals.metrics()
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert metrics["kl_old_new"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    advantage = compose([build("grpo", {"preset": "released"})]).advantage(rollout)
    assert loss == pytest.approx(float(-reduce(advantage, rollout.mask, "token_mean")), abs=1e-4)


def train(fresh_s: FreshPolicy, rollout: Rollout, methods: Sequence[Method] = (), **settings: Any) -> tuple[Any, Any]:
    model = fresh_s().model
    updater = make_updater(model, methods, **settings)
    metrics = updater.run(rollout, torch.Generator().manual_seed(0), Clock(CPU))
    return model, metrics


def test_skipping_dead_rows_is_exact_even_where_a_minibatch_has_no_other(
    fresh_s: FreshPolicy, rollout: Rollout
) -> None:
    """With one row per minibatch, each row of the dead group is a minibatch without gradient; AdamW's momentum must
    move the weights there all the same. One row per pass makes the arithmetic identical, so equality is exact."""
    rollout = rollout.rows(torch.arange(15))  # without the empty row, which alone would make an undefined mean
    settings: dict[str, Any] = {"minibatches": len(rollout), "micro_batch_rows": 1}
    skipped, with_skip = train(fresh_s, rollout, skip_dead_rows=True, **settings)
    full, without = train(fresh_s, rollout, skip_dead_rows=False, **settings)
    assert with_skip["rows_skipped"] == pytest.approx(4 / 15)
    assert without["rows_skipped"] == 0
    assert with_skip["loss"] == pytest.approx(without["loss"], abs=1e-7)
    for a, b in zip(skipped.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rollout_of_dead_rows_only_still_decays_and_reports_undefined_ratios(
    fresh_s: FreshPolicy, rollout: Rollout
) -> None:
    dead = rollout.with_(reward=torch.ones(len(rollout)))
    before = fresh_s().model
    model, metrics = train(fresh_s, dead, minibatches=2)
    assert metrics["rows_skipped"] == 1
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert math.isnan(metrics["ratio_mean"])
    assert math.isnan(metrics["kl_old_new"])
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b * (1 - 1e-3 * 0.01) ** 2)


def test_epochs_and_minibatches_make_that_many_optimizer_steps(fresh_s: FreshPolicy, rollout: Rollout) -> None:
    model = fresh_s().model
    updater = make_updater(model, epochs=2, minibatches=3)
    updater.run(rollout, torch.Generator().manual_seed(0), Clock(CPU))
    states = updater.optimizer.state_dict()["state"].values()
    assert {int(s["step"]) for s in states} == {6}


def test_the_gradient_is_clipped_to_its_norm(fresh_s: FreshPolicy, rollout: Rollout) -> None:
    model = fresh_s().model
    updater = make_updater(model, minibatches=1, grad_clip=1e-3)
    metrics = updater.run(rollout, torch.Generator().manual_seed(0), Clock(CPU))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert metrics["grad_norm"] > 1e-2  # the norm before clipping is what is logged
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


class Poison(Method):
    """A regulariser that is not finite."""

    slug = "poison"

    def __init__(self, value: float) -> None:
        self.value = value

    def regularise(self, inputs: LossInputs) -> Tensor:
        return inputs.logprob * self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    fresh_s: FreshPolicy, rollout: Rollout, value: float
) -> None:
    model = fresh_s().model
    before = [p.detach().clone() for p in model.parameters()]
    updater = make_updater(model, [Poison(value)])
    with pytest.raises(TrainingStopped, match=r"step 7: loss is (nan|-?inf).*Lower optimizer\.lr"):
        updater.run(rollout, torch.Generator().manual_seed(0), Clock(CPU), step=7)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
    assert not updater.optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedule(kind: str, expected: list[float]) -> None:
    assert [schedule(step, 6, 2, kind) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_schedule_without_warm_up_and_with_nothing_else() -> None:
    assert schedule(0, 10, 0, "linear") == 1
    assert [schedule(s, 3, 5, "cosine") for s in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert schedule(5, 3, 5, "linear") == 1
