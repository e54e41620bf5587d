"""CLASSP: its rule element by element, what it equals at the ends, what it refuses, and its state."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.classp import Classp, advance, gate
from rlvr_lab.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "classp.json").read_text())["cases"]


def walk(start: Tensor, grads: list[Tensor], **named: Any) -> tuple[Tensor, Classp]:
    weight = torch.nn.Parameter(start.clone())
    optimizer = Classp([weight], **named)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach(), optimizer


def draws(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize(("rule", "key"), [("paper", "paper_rule"), ("released", "official_code")])
def test_the_optimizer_walks_the_recorded_trajectories(case: dict[str, Any], rule: str, key: str) -> None:
    p = case["params"]
    names = {"lr": p["lr"], "threshold": p["threshold"], "eps": p["epsilon"], "power": p["power"]}
    grads = [torch.tensor(g, dtype=torch.float64) for g in case["inputs"]["grads"]]
    start = torch.tensor(case["inputs"]["w0"], dtype=torch.float64)
    for length, expected in enumerate(case["outputs"][f"{key}_trajectory"], start=1):
        found, optimizer = walk(start, grads[:length], rule=rule, scaling=p["apply_scaling"], **names)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    (state,) = optimizer.state.values()
    assert state["history"].tolist() == pytest.approx(case["outputs"][f"{key}_accumulator"], abs=1e-6)


def test_without_a_threshold_and_with_power_two_it_is_adagrad() -> None:
    start, *grads = draws(8, 5)
    found, _ = walk(start, grads, lr=0.1, threshold=0.0, power=2.0, eps=1e-12)
    weight = torch.nn.Parameter(start.clone())
    adagrad = torch.optim.Adagrad([weight], lr=0.1, eps=0.0)
    for grad in grads:
        weight.grad = grad.clone()
        adagrad.step()
    assert torch.allclose(found, weight.detach(), atol=1e-9)


def test_without_scaling_an_open_gate_is_plain_descent_and_history_is_kept() -> None:
    start, *grads = draws(4, 5)
    found, optimizer = walk(start, grads, lr=0.1, threshold=0.0, scaling=False)
    assert torch.allclose(found, start - 0.1 * torch.stack(grads).sum(0))
    (state,) = optimizer.state.values()
    assert torch.allclose(state["history"], torch.stack(grads).abs().sum(0))


@given(threshold=st.floats(0, 4), power=st.floats(0.5, 4), decay=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_closed_weight_keeps_its_value_and_history_to_the_bit(
    threshold: float, power: float, decay: float, seed: int
) -> None:
    weight, grad, history = draws(3, 20, seed=seed)
    history.abs_()
    before = weight.clone(), history.clone()
    passed = advance(weight, grad, history, lr=0.1, threshold=threshold, power=power, weight_decay=decay)
    assert torch.equal(passed, grad.square() > threshold)
    assert torch.equal(weight[~passed], before[0][~passed])
    assert torch.equal(history[~passed], before[1][~passed])
    assert bool((history[passed] > before[1][passed]).all())
    if not decay:
        moved = weight - before[0]
        assert bool((torch.sign(moved[passed]) == -torch.sign(grad[passed])).all())


@given(scale=st.floats(0.1, 10), power=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_scaled_step_does_not_see_the_unit_of_the_loss(scale: float, power: float, seed: int) -> None:
    """Where the threshold is in the unit too: theta scales with the square."""
    start, *grads = draws(6, 8, seed=seed)
    plain, _ = walk(start, grads, threshold=0.3, power=power, eps=1e-14)
    scaled, _ = walk(start, [scale * g for g in grads], threshold=0.3 * scale**2, power=power, eps=1e-14)
    assert torch.allclose(plain, scaled, atol=1e-5)


def test_with_power_one_the_k_th_equal_step_is_the_first_over_k() -> None:
    """Adjustment is suppressed: the way after k equal gradients grows like log k, and never faster."""
    grads = [torch.full((1,), 2.0, dtype=torch.float64)] * 50
    found, _ = walk(torch.zeros(1, dtype=torch.float64), grads, lr=0.1, threshold=0.0, eps=1e-12)
    assert float(found) == pytest.approx(-0.1 * sum(1 / k for k in range(1, 51)))


def test_the_released_gate_is_one_for_the_whole_tensor() -> None:
    grad = torch.tensor([0.0, 1e-3])
    assert bool(gate(grad, 0.5, "released"))
    assert not bool(gate(grad, 1.0, "released"))
    assert not bool(gate(torch.zeros(2), 0.5, "released"))
    assert gate(grad, 0.5).tolist() == [False, False]
    assert gate(torch.tensor([0.5, 0.0]), 0.25).tolist() == [False, False], "only above the threshold"
    assert gate(torch.zeros(2), 0.0).tolist() == [False, False], "what has no gradient does not move"
    start, *grads = draws(5, 6)
    one, other = (walk(start, grads, threshold=t, rule=rule)[0] for t, rule in ((0.9, "released"), (0.0, "paper")))
    assert torch.allclose(one, other)


def test_decay_is_decoupled_and_stays_behind_the_gate() -> None:
    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    grads = [torch.tensor([2.0, 0.1], dtype=torch.float64)]
    plain, _ = walk(start, grads, lr=0.1)
    decayed, _ = walk(start, grads, lr=0.1, weight_decay=0.5)
    assert (plain - decayed).tolist() == pytest.approx([0.1 * 0.5, 0.0])


def test_the_share_that_moved_is_counted() -> None:
    weights = [
        torch.nn.Parameter(torch.zeros(4)),
        torch.nn.Parameter(torch.zeros(6)),
        torch.nn.Parameter(torch.ones(9)),
    ]
    optimizer = Classp(weights, threshold=0.5)
    assert math.isnan(optimizer.moved_share())
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1, 1, 0, 0, 0])
    optimizer.step()
    assert optimizer.moved_share() == pytest.approx(4 / 10)
    assert weights[2] not in optimizer.state, "what has no gradient has no history"
    optimizer.param_groups[0]["rule"] = "released"
    optimizer.step()
    assert optimizer.moved_share() == 1.0


def test_a_state_dictionary_brings_everything_back() -> None:
    start, *grads = draws(9, 3, 4)
    whole, straight = walk(start, grads, lr=0.1, threshold=0.2, power=2.0)
    first, optimizer = walk(start, grads[:4], lr=0.1, threshold=0.2, power=2.0)
    weight = torch.nn.Parameter(first.clone())
    fresh = Classp([weight])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.param_groups[0]["threshold"] == 0.2
    for grad in grads[4:]:
        weight.grad = grad.clone()
        fresh.step()
    assert torch.equal(weight.detach(), whole)
    assert torch.equal(fresh.state_dict()["state"][0]["history"], straight.state_dict()["state"][0]["history"])


def test_groups_have_settings_of_their_own() -> None:
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Classp([{"params": [one], "threshold": 0.0}, {"params": [two]}], lr=0.1, threshold=4.0)
    one.grad, two.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert one.tolist() == pytest.approx([-0.1, -0.1], abs=1e-4)
    assert two.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"lr": -1.0}, "CLASSP's lr must be finite and not negative, not -1.0"),
        ({"threshold": -0.1}, "threshold must be finite and not negative"),
        ({"threshold": math.nan}, "threshold must be finite"),
        ({"weight_decay": math.inf}, "weight_decay must be finite"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"power": 0.0}, "power must be positive"),
        ({"rule": "code"}, "rule must be one of paper, released, not 'code'"),
    ],
)
def test_settings_that_cannot_work_are_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Classp([torch.nn.Parameter(torch.zeros(2))], **named)


def test_half_precision_closures_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(UserError, match="bfloat16 cannot hold such a sum"):
        Classp([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = Classp([weight])
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    weight.grad = torch.zeros(2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
