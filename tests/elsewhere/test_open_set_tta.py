"""Open-set test-time adaptation: the filter, its loss and gradient, and the collapse that it stops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.dynamics import entropy_gradient
from rlvr_lab.core.entropy import softmax_entropy
from rlvr_lab.elsewhere import open_set_tta as tta
from rlvr_lab.elsewhere import open_set_tta_demo as demo
from rlvr_lab.errors import UserError


def logits(seed: int, rows: int = 6, classes: int = 5) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_equal_models_keep_everything_and_shifts_of_logits_change_nothing(seed: int) -> None:
    one, other = logits(seed), logits(seed + 1)
    assert bool(tta.wisdom_filter(one, one.clone()).keep.all())
    shifted = tta.wisdom_filter(one + 3, other - 7)
    assert torch.allclose(shifted.change, tta.wisdom_filter(one, other).change)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_filter_by_its_definition(seed: int) -> None:
    one, other = logits(seed), logits(seed + 1)
    choice = tta.wisdom_filter(one, other)
    for i in range(len(one)):
        c = int(one[i].argmax())
        assert bool(choice.keep[i]) == bool(other[i].softmax(0)[c] >= one[i].softmax(0)[c])
    # the wrong reading never drops more: its class is the adapting model's best, where its confidence is highest
    wrong = tta.wisdom_filter(one, other, "adapted")
    assert bool((wrong.change >= choice.change - 1e-12).all())
    assert bool((~choice.keep | wrong.keep).all())


def test_pixels_are_filtered_one_by_one() -> None:
    one, other = logits(0, 12).reshape(3, 4, 5), logits(1, 12).reshape(3, 4, 5)
    flat = tta.wisdom_filter(one.reshape(12, 5), other.reshape(12, 5))
    assert torch.equal(tta.wisdom_filter(one, other).keep.flatten(), flat.keep)


def test_the_gradient_by_hand_is_that_of_autograd_and_of_a_finite_difference() -> None:
    z = logits(3).requires_grad_()
    (found,) = torch.autograd.grad(softmax_entropy(z).sum(), z)
    by_hand = entropy_gradient(z.detach())
    assert torch.allclose(found, by_hand, atol=1e-12)
    assert torch.allclose(by_hand.sum(-1), torch.zeros(len(z), dtype=z.dtype), atol=1e-12)
    step = torch.zeros_like(z.detach())
    step[0, 2] = 1e-6
    difference = (softmax_entropy(z.detach() + step) - softmax_entropy(z.detach() - step))[0] / 2e-6
    assert math.isclose(float(difference), float(by_hand[0, 2]), abs_tol=1e-8)
    best = z.detach().argmax(-1, keepdim=True)
    assert bool((by_hand.gather(-1, best) < 0).all()), "down the entropy the largest logit rises, right or wrong"


def test_dropped_samples_have_no_gradient_and_the_mean_is_over_the_batch() -> None:
    z = logits(4).requires_grad_()
    keep = torch.tensor([True, False, True, False, False, False])
    loss = tta.filtered_entropy(z, keep)
    (found,) = torch.autograd.grad(loss, z)
    assert bool((found[~keep] == 0).all())
    assert math.isclose(loss.item(), float(softmax_entropy(z.detach())[keep].sum() / 6))
    assert math.isclose(tta.filtered_entropy(z, keep, "kept").item(), float(softmax_entropy(z.detach())[keep].mean()))


@pytest.mark.parametrize("average", ["batch", "kept"])
def test_nothing_kept_is_a_loss_of_zero(average: tta.Average) -> None:
    z = logits(5).requires_grad_()
    loss = tta.filtered_entropy(z, torch.zeros(6, dtype=torch.bool), average)
    (found,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0
    assert not bool(found.any())


def test_the_entropy_of_the_mean_is_never_below_the_mean_entropy() -> None:
    inside, overall = tta.entropy_split(logits(6, 40))
    assert 0 < inside < overall < math.log(5)
    same = logits(7, 1).expand(9, 5)
    inside, overall = tta.entropy_split(same)
    assert math.isclose(inside, overall), "equal predictions hold no information about the sample"


def test_auroc_counts_pairs() -> None:
    score, positive = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([False, True, False, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in (2, 3) for b in (1, 2)]
    assert tta.auroc(score, positive) == sum(pairs) / 4
    assert tta.auroc(-score, positive) == 1 - sum(pairs) / 4
    assert tta.auroc(torch.zeros(4), positive) == 0.5


GOOD, KEEP = logits(0), torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tta.wisdom_filter(GOOD, GOOD[:3]), "shape"),
        (lambda: tta.wisdom_filter(GOOD, GOOD * math.nan), "adapted"),
        (lambda: tta.wisdom_filter(GOOD[:0], GOOD[:0]), "original"),
        (lambda: tta.wisdom_filter(GOOD.long(), GOOD.long()), "floating-point"),
        (lambda: tta.wisdom_filter(GOOD, GOOD, "crowd"), "reference"),  # type: ignore[arg-type]
        (lambda: tta.filtered_entropy(GOOD, KEEP[:3]), "keep"),
        (lambda: tta.filtered_entropy(GOOD, KEEP.double()), "keep"),
        (lambda: tta.filtered_entropy(GOOD, KEEP, "all"), "average"),  # type: ignore[arg-type]
        (lambda: tta.entropy_split(GOOD * math.inf), "finite"),
        (lambda: tta.entropy_split(GOOD[0]), "logits"),
        (lambda: tta.auroc(GOOD[:, 0], KEEP), "at least one"),
        (lambda: tta.auroc(GOOD[:, 0] * math.nan, GOOD[:, 0] > 0), "nan"),
        (lambda: tta.auroc(GOOD, GOOD > 0), "shape"),
        (lambda: demo.Settings(rate=0.0), "rate"),
        (lambda: demo.Settings(unknown=1.0), "unknown"),
        (lambda: demo.Settings(batch=2), "batch"),
        (lambda: demo.run(demo.Settings(batches=1, pretrain_steps=1), ("filtre",)), "did you mean 'filter'"),
        (lambda: demo.adapt(demo.Settings(), demo.network(demo.Settings()), [], "tent"), "batches"),
    ],
)
def test_what_is_refused(call: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        call()  # type: ignore[operator]


SMALL = demo.Settings(batches=100)


def end(trace: demo.Trace) -> float:
    return sum(trace.accuracy[-20:]) / 20


def test_the_collapse_the_filter_and_the_random_half() -> None:
    found = demo.run(SMALL, ("none", "tent", "filter", "random", "stayed"))
    start = sum(found["tent"].accuracy[:5]) / 5
    assert start > 0.55
    assert end(found["tent"]) < start - 0.25, "entropy minimisation collapses"
    assert end(found["filter"]) > end(found["none"]) - 0.06
    assert end(found["random"]) < end(found["filter"]) - 0.15, "fewer samples are not what helps"
    assert abs(end(found["stayed"]) - end(found["filter"])) < 0.05
    assert sum(found["tent"].entropy[-20:]) / 20 < 0.25, "while the loss looks well"
    assert sum(found["tent"].marginal[-20:]) < sum(found["filter"].marginal[-20:]) - 10


def test_without_unknowns_nothing_collapses() -> None:
    found = demo.run(demo.Settings(batches=100, unknown=0.0), ("none", "tent"))
    assert end(found["tent"]) > end(found["none"]) - 0.02


def test_the_same_seed_is_the_same_run_and_the_source_stays() -> None:
    tiny = demo.Settings(batches=4, pretrain_steps=5, seed=3)
    world = demo.make_world(tiny)
    source, batches = demo.pretrain(tiny, world), demo.stream(tiny, world)
    before = [p.clone() for p in source.parameters()]
    one, other = (demo.adapt(tiny, source, batches, "random") for _ in range(2))
    assert repr(one) == repr(other)  # nan is not equal to itself
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert torch.allclose(world.rotation @ world.rotation.T, torch.eye(32), atol=1e-4)
    assert {int(label) for label in batches[0].label} >= {-1}
    assert float((batches[0].label < 0).double().mean()) == 0.5


def test_arms_keep_what_they_say() -> None:
    tiny = demo.Settings(batches=3, pretrain_steps=5)
    found = demo.run(tiny, ("none", *demo.MASKS))
    assert found["none"].kept == [0, 0, 0]
    assert found["tent"].kept == [1, 1, 1]
    assert found["random"].kept == found["oracle"].kept == [0.5] * 3
    assert found["filter"].kept[0] == found["matched"].kept[0] == 1
    assert math.isnan(found["none"].detects)
