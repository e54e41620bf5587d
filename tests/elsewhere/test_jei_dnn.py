"""JEI-DNN: exit probabilities, gate targets, what the ratio does to the gradient, and the small early-exit network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.elsewhere import jei_dnn as jei
from rlvr_lab.elsewhere import jei_dnn_demo as demo
from rlvr_lab.errors import UserError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gate_inputs_by_their_definitions() -> None:
    z = normal(0, 7, 5).requires_grad_()
    found = jei.gate_inputs(z)
    p = z.detach().softmax(-1)
    q = p**2 / (p**2).sum(-1, keepdim=True)
    top = p.sort(-1, descending=True).values
    assert torch.allclose(found[:, 0], top[:, 0])
    assert torch.allclose(found[:, 1], -(p * p.log()).sum(-1))
    assert torch.allclose(found[:, 2], top[:, 0] - top[:, 1])
    assert torch.allclose(found[:, 3], -(q * q.log()).sum(-1))
    assert not found.requires_grad
    assert bool((found[:, 3] <= found[:, 1]).all()), "squaring sharpens"
    uniform = jei.gate_inputs(torch.zeros(1, 8, dtype=torch.float64))[0]
    assert torch.allclose(uniform, torch.tensor([1 / 8, math.log(8), 0, math.log(8)], dtype=torch.float64))


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([0.3, 2.0, 40.0]))
@settings(max_examples=40, deadline=None)
def test_exit_probabilities_are_probabilities_and_agree_with_the_code_s_product(
    seed: int, gates: int, scale: float
) -> None:
    p = jei.exit_probabilities(scale * normal(seed, 9, gates))
    assert bool((p >= 0).all())
    assert bool((p.sum(1) <= 1 + 1e-12).all())
    conditional = jei.conditional_probabilities(p)
    product = torch.ones(9, dtype=torch.float64)
    for level in range(gates):  # chances to leave and to go on multiply back to P
        assert torch.allclose(product * conditional[:, level], p[:, level], atol=1e-12)
        product = product * (1 - conditional[:, level])
    taken = jei.hard_exit(p)
    for row, leave in zip(conditional.tolist(), taken.tolist(), strict=True):
        assert leave == next((level for level, chance in enumerate(row) if chance >= 0.5), gates)


def test_small_gates_add_up_to_an_exit() -> None:
    p = jei.exit_probabilities(torch.logit(torch.tensor([[0.4, 0.4, 0.1]], dtype=torch.float64)))
    assert torch.allclose(jei.conditional_probabilities(p)[0, :2], torch.tensor([0.4, 2 / 3], dtype=torch.float64))
    assert int(jei.hard_exit(p)[0]) == 1, "no gate reaches one half, and the sample leaves"


def test_thresholds_and_ties() -> None:
    certainty = torch.tensor([[0.2, 0.9], [0.5, 0.1], [0.1, 0.1]])
    assert jei.threshold_exit(certainty, 0.5).tolist() == [1, 0, 2]
    assert jei.cheapest_exit(torch.ones(2, 3), torch.zeros(3), 1.0).tolist() == [0, 0]


@given(st.integers(0, 10_000), st.floats(0, 5))
@settings(max_examples=25, deadline=None)
def test_targets_are_monotone_and_a_higher_price_never_leaves_later(seed: int, trade: float) -> None:
    ce, cost = normal(seed, 8, 4).abs(), jei.exit_costs(4)
    best = jei.cheapest_exit(ce, cost, trade)
    targets = jei.gate_targets(best, 4)
    assert targets.shape == (8, 3)
    assert bool((targets[:, 1:] >= targets[:, :-1]).all())
    assert torch.equal(targets.sum(1).long(), 3 - best)
    assert bool((jei.cheapest_exit(ce, cost, trade + 1) <= best).all())
    assert jei.cheapest_exit(ce, cost, 1e6).tolist() == [0] * 8


def test_gate_loss_weighs_positives() -> None:
    z, t = normal(1, 6, 3), (normal(2, 6, 3) > 0).double()
    weight = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    by_hand = -(weight * t * z.sigmoid().log() + (1 - t) * (-z).sigmoid().log()).mean()
    assert math.isclose(float(jei.gate_loss(z, t, weight)), float(by_hand))
    assert jei.balance(torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 0, 1.0]])).tolist() == [2, 1, 1]


def gradients(ce: Tensor, p: Tensor, ratio: jei.Ratio) -> tuple[float, Tensor]:
    leaf = ce.clone().requires_grad_()
    loss = jei.classifier_loss(leaf, p, ratio)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_released_ratio_cancels_the_gates(seed: int) -> None:
    ce, p = normal(seed, 5, 3).abs() + 0.01, jei.exit_probabilities(normal(seed + 1, 5, 3))
    values = {ratio: gradients(ce, p, ratio) for ratio in ("released", "none", "detached", "unscaled")}
    assert math.isclose(values["released"][0], values["none"][0])
    assert math.isclose(values["detached"][0], values["none"][0]), "one value, and another gradient"
    assert torch.allclose(values["released"][1], values["none"][1], atol=1e-12)
    assert not torch.allclose(values["detached"][1], values["none"][1], atol=1e-4)
    # detached is the gradient of sum_k CE_k (held) times ln sum_l P_l CE_l
    leaf = ce.clone().requires_grad_()
    logarithm = (ce.sum(1) * (p * leaf).sum(1).log()).sum() / ce.numel()
    assert torch.allclose(values["detached"][1], torch.autograd.grad(logarithm, leaf)[0], atol=1e-12)
    assert torch.allclose(values["unscaled"][1], p / p.numel())


def test_a_sample_that_always_goes_to_the_end_counts_nothing() -> None:
    ce, p = normal(3, 2, 3).abs(), torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0]], dtype=torch.float64)
    for ratio in ("detached", "released"):
        value, gradient = gradients(ce, p, ratio)
        assert math.isfinite(value)
        assert bool((gradient[0] == 0).all())
    leaf = p.clone().requires_grad_()
    assert not jei.classifier_loss(ce, leaf).requires_grad, "no gradient goes to the gates"


def test_the_log_of_the_cross_entropy_asks_for_more_confidence_than_is_due() -> None:
    truth, p = 0.7, torch.linspace(0.05, 0.999, 400, dtype=torch.float64)
    proper = truth * -p.log() + (1 - truth) * -(1 - p).log()
    logarithm = truth * (-p.log()).log() + (1 - truth) * (-(1 - p).log()).log()
    assert abs(float(p[proper.argmin()]) - truth) < 0.01
    assert float(p[logarithm.argmin()]) > 0.95


def test_calibration_error() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, True, True, False])
    assert math.isclose(jei.calibration_error(confidence, correct, 10), 0.05, abs_tol=1e-6)
    assert math.isclose(jei.calibration_error(confidence, correct, 1), 0.0, abs_tol=1e-6)
    assert jei.calibration_error(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 1


P, CE = jei.exit_probabilities(normal(0, 4, 3)), normal(1, 4, 3).abs()
LONG = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: jei.gate_inputs(torch.zeros(3, 1)), "two classes"),
        (lambda: jei.gate_inputs(torch.full((3, 2), math.nan)), "finite"),
        (lambda: jei.exit_probabilities(torch.zeros(3)), "gate_logits"),
        (lambda: jei.conditional_probabilities(-P), "p_exit"),
        (lambda: jei.hard_exit(2 * P + 1), "p_exit"),
        (lambda: jei.threshold_exit(P[:0], 0.5), "certainty"),
        (lambda: jei.exit_costs(1), "exits"),
        (lambda: jei.cheapest_exit(CE, jei.exit_costs(4), 1.0), "cost"),
        (lambda: jei.cheapest_exit(CE, jei.exit_costs(3), -1.0), "lambda"),
        (lambda: jei.gate_targets(LONG, 3), "best"),
        (lambda: jei.balance(torch.zeros(0, 2)), "targets"),
        (lambda: jei.gate_loss(CE, P[:2]), "targets"),
        (lambda: jei.gate_loss(CE, P, [1.0, -1.0, 1.0]), "positive"),
        (lambda: jei.classifier_loss(CE, P[:, :2]), "p_exit"),
        (lambda: jei.classifier_loss(CE, P, "fixed"), "ratio"),  # type: ignore[arg-type]
        (lambda: jei.classifier_loss(CE * math.nan, P), "ce"),
        (lambda: jei.calibration_error(torch.tensor([1.5]), torch.tensor([True])), "confidence"),
        (lambda: demo.Settings(rounds=0), "rounds"),
        (lambda: demo.Settings(easy=1.2), "easy"),
        (lambda: demo.Settings(seen=(4,)), "seen"),
        (lambda: demo.at_cost([], 0.5), "cost"),
    ],
)
def test_what_is_refused(call: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        call()  # type: ignore[operator]


SMALL = demo.Settings(rounds=4, backbone_steps=400, test=3000)


@pytest.fixture(scope="module")
def world() -> demo.World:
    return demo.make_world(SMALL)


def test_learned_gates_beat_a_threshold_on_entropy_at_equal_cost(world: demo.World) -> None:
    trained = demo.train(SMALL, world, 1.0, "released")[-1]
    gates = demo.by_gates(world, trained)
    assert 0.25 < gates.cost < 0.6
    assert math.isclose(sum(gates.shares), 1)
    curve = demo.by_threshold(world, trained)
    assert gates.accuracy > demo.at_cost(curve, gates.cost) + 0.004
    with pytest.raises(UserError, match="measure"):
        demo.by_threshold(world, trained, 4)
    with pytest.raises(UserError, match="outside"):
        demo.at_cost(curve, 2.0)


def test_detached_weights_raise_confidence(world: demo.World) -> None:
    runs = {ratio: demo.train(SMALL, world, 1.0, ratio) for ratio in ("detached", "released", "unscaled", "none")}
    over = {ratio: demo.by_gates(world, run[-1]).overconfidence for ratio, run in runs.items()}
    assert over["detached"] > over["released"] + 0.02
    assert abs(over["unscaled"] - over["released"]) < 0.02, "the weights P alone do not do it"
    assert math.isclose(over["none"], over["released"], abs_tol=0.01)


def test_a_high_price_sends_everything_out_at_once_and_seeds_repeat(world: demo.World) -> None:
    quick = replace(SMALL, rounds=1, balanced=True, seen=(1,))
    one, other = (demo.train(quick, world, 50.0)[-1] for _ in range(2))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.gate_logits, other.gate_logits)
    dear = demo.by_gates(world, demo.train(replace(quick, balanced=False), world, 50.0)[-1])
    assert dear.shares[0] > 0.99
    assert math.isclose(dear.cost, 0.25, abs_tol=0.01)
