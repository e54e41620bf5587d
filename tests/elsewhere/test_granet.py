"""GraNet: schedules, what is cut, dropped and grown, how many masks there are, and the demonstration's controls."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.elsewhere import granet as gn
from rlvr_lab.elsewhere import granet_demo as demo
from rlvr_lab.elsewhere.granet_demo import Members, Toy, compare, draw, initial, recover
from rlvr_lab.errors import UserError

SMALL = Toy(runs=3, width=64, examples=1500, test=800, steps=300)
shares = st.floats(0.02, 1.0)


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(initial=shares, final=shares, events=st.integers(1, 40))
def test_the_schedule_falls_from_one_density_to_the_other_and_fastest_at_first(
    initial: float, final: float, events: int
) -> None:
    initial, final = max(initial, final), min(initial, final)
    path = [gn.density_at(k, events, initial, final) for k in range(events + 1)]
    assert path[0] == pytest.approx(initial)
    assert path[-1] == pytest.approx(final)
    cuts = [a - b for a, b in pairwise(path)]
    assert all(cut >= -1e-12 for cut in cuts)
    assert all(a >= b - 1e-12 for a, b in pairwise(cuts))
    assert [1 - gn.sparsity_at(k, events, initial, final) for k in range(events + 1)] == pytest.approx(path)


def test_the_rate_of_exchange_is_a_cosine_from_half_to_a_two_hundredth() -> None:
    assert gn.regeneration_rate(0.0) == 0.5
    assert gn.regeneration_rate(0.5) == pytest.approx(0.2525)
    assert gn.regeneration_rate(1.0) == pytest.approx(0.005)


@given(seed=st.integers(0, 999), density=shares)
@settings(deadline=None, max_examples=60)
def test_a_global_cut_keeps_the_largest_of_all_tensors_and_the_release_one_fewer(seed: int, density: float) -> None:
    weights = tensors(seed, (7, 9), (11,), (3, 4))
    masks, released = gn.global_prune(weights, density), gn.global_prune(weights, density, released=True)
    kept = torch.cat([w[m].abs() for w, m in zip(weights, masks, strict=True)])
    lost = torch.cat([w[~m].abs() for w, m in zip(weights, masks, strict=True)])
    count = gn.kept_count(86, density)
    assert len(kept) == count
    assert not len(lost) or float(kept.min()) >= float(lost.max())
    assert float(kept.min()) == float(gn.threshold(weights, density))
    assert sum(int(m.sum()) for m in released) in (count - 1, gn.kept_count(86, density, released=True) - 1)
    assert all(bool((r <= m).all()) for r, m in zip(released, masks, strict=True))


def test_a_whole_number_of_weights_is_not_lost_to_rounding_except_in_the_release() -> None:
    density = 1 - gn.sparsity_at(10, 10, 1.0, 0.1)
    assert density < 0.1
    assert gn.kept_count(20, density) == 2
    assert gn.kept_count(20, density, released=True) == 1


@given(seed=st.integers(0, 999), density=st.floats(0.1, 0.9), rate=st.floats(0, 0.9))
@settings(deadline=None, max_examples=60)
def test_regeneration_keeps_the_number_drops_the_smallest_and_grows_the_largest_gradients(
    seed: int, density: float, rate: float
) -> None:
    weight, grad = tensors(seed, (8, 9), (8, 9))
    (mask,) = gn.global_prune([weight], density)
    count, left, grown = gn.drop_count(mask, rate), gn.drop(weight, mask, rate), gn.regenerate(weight, grad, mask, rate)
    assert int(grown.sum()) == int(mask.sum()) == int(left.sum()) + count
    assert bool((left <= mask).all())
    assert bool((left <= grown).all())
    if count:
        assert float(weight[mask & ~left].abs().max()) <= float(weight[left].abs().min())
        new, out = grown & ~left, ~grown
        assert not bool(out.any()) or float(grad[new].abs().min()) >= float(grad[out].abs().max())


def test_what_was_dropped_may_come_back_and_ties_at_zero_are_no_active_weights() -> None:
    weight, mask = torch.tensor([3.0, 0.5, 2.0, 0.0]), torch.tensor([True, True, True, False])
    assert gn.drop(weight, mask, 0.3).tolist() == [True, False, True, False]
    assert gn.regenerate(weight, torch.tensor([0.0, 9.0, 0, 1]), mask, 0.3).tolist() == mask.tolist()
    reborn = torch.tensor([0.0, 2.0, 1.0, 0.0])  # a weight that has just grown is active and zero: it goes first
    assert gn.drop(reborn, mask, 0.3).tolist() == [False, True, True, False]


def test_a_tensor_that_would_be_emptied_is_left_alone() -> None:
    mask = torch.tensor([True, False, False])
    assert gn.drop_count(mask, 0.5) == 0
    assert gn.regenerate(torch.ones(3), torch.ones(3), mask, 0.5).tolist() == mask.tolist()


@given(density=st.floats(0.01, 1.0))
@settings(deadline=None)
def test_densities_by_layer_hold_the_whole_and_narrow_layers_are_denser(density: float) -> None:
    shapes = [(20, 128), (128, 128), (128, 8)]
    found = gn.erdos_renyi(shapes, density)
    total = sum(math.prod(s) for s in shapes)
    assert sum(d * math.prod(s) for d, s in zip(found, shapes, strict=True)) == pytest.approx(density * total)
    assert all(0 < d <= 1 for d in found)
    assert found[1] == min(found)


def test_masks_are_counted() -> None:
    assert gn.mask_entropy(5, 2) == pytest.approx(math.log(10))
    assert gn.mask_entropy(5, 0) == pytest.approx(0.0)
    for density in (0.05, 0.5):
        coin = -density * math.log(density) - (1 - density) * math.log(1 - density)
        assert gn.mask_entropy(20_000, int(20_000 * density)) == pytest.approx(20_000 * coin, rel=0.01)
    # 2 of 4 active, one exchanged: which of 2 leaves, which of then 3 comes
    assert gn.regeneration_entropy(4, 2, 0.5) == pytest.approx(math.log(6))
    assert gn.regeneration_entropy(4, 2, 0.0) == 0.0


W, M = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (gn.density_at, (3, 2), "event must lie between 0 and events"),
        (gn.density_at, (0, 0), "event must lie"),
        (gn.density_at, (1, 2, 0.1, 0.5), "final must not exceed initial"),
        (gn.sparsity_at, (1, 2, 1.0, 0.0), r"final must lie in \(0, 1\]"),
        (gn.regeneration_rate, (1.5,), "progress must lie"),
        (gn.regeneration_rate, (0.5, 0.1, 0.2), "low must not exceed high"),
        (gn.kept_count, (10, 0.01), "leaves none of 10"),
        (gn.kept_count, (10, math.nan), "density must lie"),
        (gn.global_prune, ([], 0.5), "at least one tensor"),
        (gn.global_prune, ([torch.tensor([math.nan])], 0.5), "finite"),
        (gn.drop, (W, M.float(), 0.5), "mask must be boolean"),
        (gn.drop, (W, M[:1], 0.5), r"weight's shape \(2, 2\)"),
        (gn.drop, (W, M, 1.5), "rate must lie"),
        (gn.drop, (W * math.inf, M, 0.5), "weight must be finite"),
        (gn.regrow, (W, M, 1), "inactive positions, 0, not 1"),
        (gn.regrow, (W * math.nan, M, 0), "grad must be finite"),
        (gn.erdos_renyi, ([], 0.5), "shapes must name"),
        (gn.erdos_renyi, ([(2, 2)], 0.0), "density must lie"),
        (gn.mask_entropy, (3, 4), "active must lie between 0 and total"),
        (gn.regeneration_entropy, (4, 2, 2.0), "rate must lie"),
        (Toy, (0, 0), "runs must be at least 1"),
        (recover, (SMALL, (1.5,)), "times must be shares"),
        (recover, (SMALL, (0.5,), ()), "shares must be shares"),
        (recover, (SMALL, (0.5,), (0.5,), 0.0), "rate must be positive"),
    ],
)
def test_wrong_arguments_are_refused(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        function(*arguments)


@pytest.mark.parametrize(("name", "value"), [("steps", 20), ("rate", 0.0), ("momentum", 1.0), ("teacher", 0)])
def test_wrong_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        replace(SMALL, **{name: value})


def test_masked_weights_stay_at_zero_and_have_no_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    data = draw(SMALL, generator)
    members = Members(SMALL, data, initial(3, 64, generator), 1)
    rows = torch.randint(SMALL.examples, (3, 32), generator=generator)
    members.step(rows, 0.1)
    for run in range(3):
        members.prune(run, 0.1)
    members.apply_masks()
    for _ in range(3):
        grads = members.step(rows, 0.1)
    for weight, velocity, grad, mask in zip(
        members.parameters[::2], members.velocity[::2], grads[::2], members.masks, strict=True
    ):
        assert float(weight.detach()[~mask].abs().max()) == float(velocity[~mask].abs().max()) == 0.0
        assert float(grad[~mask].abs().max()) > 0, "the gradient is dense, or nothing could grow"
    assert float(members.density().mean()) == pytest.approx(0.1, abs=0.001)


def test_members_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    data, start = draw(SMALL, generator), initial(3, 64, generator)
    rows = torch.randint(SMALL.examples, (3, 32), generator=generator)
    alone, crowd = Members(SMALL, data, start, 1), Members(SMALL, data, start, 3)
    crowd.prune(4, 0.2)
    crowd.apply_masks()
    for one in (alone, crowd):
        one.step(rows, 0.1)
    for a, b in zip(alone.parameters, crowd.parameters, strict=True):
        assert torch.allclose(a, b[:3], atol=1e-6)


def test_masks_that_move_beat_one_that_does_not_at_equal_density() -> None:
    found = compare(SMALL, (0.03,))
    for method in ("GraNet", "magnitude"):
        gain, width = seed_interval((found.accuracy[method, 0.03] - found.accuracy["static", 0.03]).tolist())
        assert gain > 0.04, (method, gain, width)
        assert float(found.reached[method, 0.03].mean()) == pytest.approx(0.03, abs=2e-4)
    assert float(found.reached["static", 0.03].mean()) == pytest.approx(0.03, abs=3e-3)
    assert float(found.dense.mean()) > float(found.accuracy["GraNet", 0.03].mean())


def test_plasticity_falls_with_the_share_pruned_and_with_time_as_long_as_the_rate_does() -> None:
    toy = replace(SMALL, steps=600, recovery=60)
    by_schedule = recover(toy, (0.2, 0.95), (0.7, 0.9)).change
    constant = recover(toy, (0.2, 0.95), (0.7, 0.9), rate=toy.rate / 2).change
    mean = {key: float(value.mean()) for key, value in by_schedule.items()}
    assert mean[0.2, 0.7, False] > mean[0.2, 0.9, False] + 0.05
    assert mean[0.2, 0.9, False] > mean[0.95, 0.9, False] + 0.07
    assert float(constant[0.95, 0.9, False].mean()) > mean[0.95, 0.9, False] + 0.07


def test_a_seed_says_everything() -> None:
    toy = replace(SMALL, runs=2, steps=120, recovery=10)
    one, two, other = (recover(t, (0.5,), (0.9,)).change for t in (toy, toy, replace(toy, seed=1)))
    key = (0.5, 0.9, True)
    assert torch.equal(one[key], two[key])
    assert not torch.equal(one[key], other[key])
    assert demo.METHODS == ("GraNet", "magnitude", "static")
