"""Connectivity, similarity and pruning; and the batch size that helps a network which keeps much, and harms another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlvr_lab.elsewhere import three_regime_pruning as tr
from rlvr_lab.elsewhere import three_regime_pruning_demo as demo
from rlvr_lab.elsewhere.three_regime_pruning_demo import Grid
from rlvr_lab.errors import UserError

TINY = Grid(batches=(8, 64), densities=(0.5, 0.1), seeds=(0, 1), hidden=16, samples=128, tested=64, epochs=3,
            retrain_epochs=2)  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_barrier_is_negative_and_a_valley_positive() -> None:
    bump = 0.3 * torch.sin(math.pi * torch.linspace(0, 1, 11, dtype=torch.float64))
    lmc, place = tr.mode_connectivity(torch.stack([0.2 + bump, 0.6 - bump]))
    assert lmc.tolist() == pytest.approx([-0.3, 0.3])
    assert place.tolist() == [5, 5]


def test_unequal_ends_alone_give_half_their_difference_by_the_first_end() -> None:
    up = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    lmc, place = tr.mode_connectivity(torch.stack([up, up.flip(0)]))
    assert lmc.tolist() == [0.5, -0.5]
    assert place.tolist() == [0, 0]


def test_of_equal_departures_the_first_counts() -> None:
    lmc, place = tr.mode_connectivity(torch.tensor([0.5, 1.0, 0.5, 0.0, 0.5]))
    assert (float(lmc), int(place)) == (-0.5, 1)


@given(shift=st.floats(-2, 2), seed=st.integers(0, 30))
def test_connectivity_sees_no_constant_and_flips_with_the_sign(shift: float, seed: int) -> None:
    path = draw(11, seed=seed)
    lmc, place = tr.mode_connectivity(path)
    moved, turned = tr.mode_connectivity(path + shift), tr.mode_connectivity(-path)
    assert float(moved.lmc) == pytest.approx(float(lmc))
    assert int(moved.place) == int(place)
    assert float(turned.lmc) == pytest.approx(-float(lmc))


@given(seed=st.integers(0, 30), scale=st.floats(1e-3, 1e3))
def test_cka_sees_no_rotation_scale_or_shift(seed: int, scale: float) -> None:
    x, y = draw(12, 4, seed=seed), draw(12, 3, seed=seed + 1)
    turn = torch.linalg.qr(draw(4, 4, seed=seed + 2))[0]
    same = tr.linear_cka(x, y)
    assert 0 <= same <= 1 + 1e-12
    assert tr.linear_cka(scale * x @ turn + 5, y) == pytest.approx(same, rel=1e-6)
    assert tr.linear_cka(y, x) == pytest.approx(same)
    assert tr.linear_cka(x, scale * x @ turn) == pytest.approx(1)


def test_cka_of_unrelated_directions_is_zero() -> None:
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert tr.linear_cka(x, y) == pytest.approx(0, abs=1e-12)


def test_a_cka_of_very_large_and_very_small_features_is_finite() -> None:
    x = draw(12, 4)
    assert tr.linear_cka(1e150 * x, 1e-150 * x) == pytest.approx(1)


@given(density=st.floats(0.01, 1.0), seed=st.integers(0, 30))
def test_masks_keep_the_largest(density: float, seed: int) -> None:
    weights = [draw(5, 6, seed=seed), 3 * draw(4, 5, seed=seed + 1)]
    masks = tr.magnitude_masks(weights, density)
    assert sum(int(mask.sum()) for mask in masks) == max(1, round(density * 50))
    kept = torch.cat([w[m].abs() for w, m in zip(weights, masks, strict=True)])
    gone = torch.cat([w[~m].abs() for w, m in zip(weights, masks, strict=True)])
    assert not len(gone) or float(kept.min()) >= float(gone.max())
    wider = tr.magnitude_masks(weights, min(1.0, density * 1.5))
    assert all(bool((b | ~a).all()) for a, b in zip(masks, wider, strict=True)), "masks are nested"


def test_within_layers_each_has_its_share_and_over_all_the_larger_scale_wins() -> None:
    weights = [draw(10, 10), 100 * draw(10, 10, seed=1)]
    assert [int(mask.sum()) for mask in tr.magnitude_masks(weights, 0.3, "layer")] == [30, 30]
    assert int(tr.magnitude_masks(weights, 0.3)[1].sum()) > 55


def test_ends_and_middle_of_a_line() -> None:
    a, b = [draw(3, 2)], [draw(3, 2, seed=1)]
    assert torch.equal(tr.between(a, b, 0)[0], a[0])
    assert torch.equal(tr.between(a, b, 1)[0], b[0])
    assert torch.allclose(tr.between(a, b, 0.5)[0], (a[0] + b[0]) / 2)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: tr.mode_connectivity(torch.tensor([0.1, 0.2])), "three or more"),
    (lambda: tr.mode_connectivity(torch.tensor([0, 1, 2])), "three or more"),
    (lambda: tr.mode_connectivity(torch.tensor([0.1, math.nan, 0.2])), "finite"),
    (lambda: tr.linear_cka(draw(4), draw(4, 2)), "x must be"),
    (lambda: tr.linear_cka(draw(4, 2), draw(1, 2)), "y must be"),
    (lambda: tr.linear_cka(draw(4, 2), draw(5, 2)), "same inputs"),
    (lambda: tr.linear_cka(draw(4, 2), torch.full((4, 2), 0.1)), "constant"),
    (lambda: tr.linear_cka(draw(4, 2) * math.inf, draw(4, 2)), "x must be"),
    (lambda: tr.between([draw(2)], [draw(2)], 1.5), "t must"),
    (lambda: tr.between([draw(2)], [draw(3)], 0.5), "same shapes"),
    (lambda: tr.magnitude_masks([draw(3)], 0.0), "density"),
    (lambda: tr.magnitude_masks([draw(3)], 1.1), "density"),
    (lambda: tr.magnitude_masks([draw(3)], math.nan), "density"),
    (lambda: tr.magnitude_masks([], 0.5), "weights"),
    (lambda: tr.magnitude_masks([draw(3) * math.nan], 0.5), "weights"),
    (lambda: tr.magnitude_masks([draw(3)], 0.5, "row"), "scope"),
    (lambda: Grid(hidden=0), "hidden"),
    (lambda: Grid(seeds=()), "seeds"),
    (lambda: Grid(batches=(0,)), "batches"),
    (lambda: Grid(densities=(1.5,)), "densities"),
    (lambda: Grid(label_noise=1.0), "label_noise"),
    (lambda: Grid(rate=0.0), "rate"),
    (lambda: demo.dense_networks(TINY, steps=0), "steps"),
    (lambda: demo.train(demo.start(TINY), *demo.data(TINY)[:2], torch.zeros(2, 4).long(), 0, 0.1), "batch"),
    (lambda: demo.measure(TINY, {}), "dense"),
    (lambda: demo.measure(TINY, demo.dense_networks(replace(TINY, seeds=(0,)))), "dense"),
])  # fmt: skip
def test_refusals(call: object, match: str) -> None:
    with pytest.raises(UserError, match=match):
        call()  # type: ignore[operator]


def test_one_step_of_training_is_that_of_autograd_and_masked_weights_stay() -> None:
    sets, net = demo.data(TINY), demo.start(TINY)
    order = torch.arange(16).repeat(2, 1)
    masks = [(draw(*weight.shape) > 0).float() for weight in net.weights]
    moved = demo.train(net, sets.x, sets.y, order, 16, 0.1, masks)
    leaves = [part.clone().requires_grad_() for group in net for part in group]
    z = demo.layers(demo.Net(leaves[:3], leaves[3:]), sets.x[:, :16])[-1]
    loss = sum(cross_entropy(z[i], sets.y[i, :16]) for i in range(2))
    grads = torch.autograd.grad(loss, leaves)
    for i, (before, after, grad) in enumerate(zip(net.weights, moved.weights, grads[:3], strict=True)):
        assert torch.allclose(after, before - 0.1 * grad * masks[i], atol=1e-6)
    assert all(torch.allclose(b - 0.1 * g, a, atol=1e-6) for b, a, g in zip(net[1], moved[1], grads[3:], strict=True))


def test_labels_are_noisy_in_training_only_and_classes_are_balanced() -> None:
    grid = Grid(seeds=(0,), tested=4000)
    noisy, clean = demo.data(grid), demo.data(replace(grid, label_noise=0.0))
    assert torch.equal(noisy.y_test, clean.y_test)
    assert torch.equal(noisy.x, clean.x)
    changed = float((noisy.y != clean.y).float().mean())
    assert changed == pytest.approx(0.2 * 7 / 8, abs=0.03)
    assert float(clean.y_test[0].bincount(minlength=8).max()) / 4000 < 0.25


def test_the_same_grid_gives_the_same_figures_and_density_one_changes_no_start() -> None:
    one, two = (demo.measure(TINY, demo.dense_networks(TINY)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.error.shape == (2, 2, 2)
    assert one.dense.shape == (2, 2)
    whole = demo.measure(replace(TINY, densities=(1.0,), copies=1), demo.dense_networks(TINY))
    assert bool((whole.inherited == 1).all())
    assert bool(whole.lmc.isnan().all())


def test_the_largest_weights_of_a_network_that_did_not_train_are_those_of_its_start() -> None:
    found = demo.measure(replace(TINY, copies=1), {8: demo.start(TINY)})
    assert bool((found.inherited == 1).all())


@pytest.fixture(scope="module")
def flip() -> dict[str, demo.Outcome]:
    grid = Grid(batches=(8, 256), densities=(0.6, 0.04), seeds=(0, 1, 2), copies=1)
    return {"epochs": demo.measure(grid, demo.dense_networks(grid)),
            "steps": demo.measure(grid, demo.dense_networks(grid, steps=350))}  # fmt: skip


def test_small_batches_harm_what_keeps_much_and_help_what_keeps_little(flip: dict[str, demo.Outcome]) -> None:
    hot_minus_cold = (flip["epochs"].error[0] - flip["epochs"].error[1]).mean(-1)
    assert float(hot_minus_cold[0]) > 0
    assert float(hot_minus_cold[1]) < -0.04


def test_at_equal_steps_small_batches_do_no_harm_at_low_load(flip: dict[str, demo.Outcome]) -> None:
    assert float((flip["steps"].error[0] - flip["steps"].error[1])[0].mean()) < 0.01
    hot, cold = flip["epochs"].inherited[:, 1].mean(-1).tolist()
    assert hot < 0.65 < 0.85 < cold, "a cold network is pruned by its first weights"
    hot, cold = flip["steps"].inherited[:, 1].mean(-1).tolist()
    assert abs(hot - cold) < 0.05
