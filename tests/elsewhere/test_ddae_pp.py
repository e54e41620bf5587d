"""DDAE++: only later blocks are told, training starts as without the summary, and the probe reads what is there."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.elsewhere import ddae_pp as dd
from rlvr_lab.elsewhere import ddae_pp_demo as demo
from rlvr_lab.errors import UserError

QUICK = demo.Settings(images=400, held_out=200, steps=6, batch=16, width=16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser(after: int, layers: int = 4) -> dd.SelfConditionedDenoiser:
    """One that has moved away from its start, where every block and the summary are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dd.SelfConditionedDenoiser(9, 4, width=16, layers=layers, after=after)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model


@given(t=st.floats(0, 1))
def test_interpolation_ends_at_image_and_noise(t: float) -> None:
    x, eps = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    at = dd.interpolate(x, eps, torch.full((2,), t))
    torch.testing.assert_close(at, x + t * (eps - x))
    assert float(dd.velocity_loss(eps - x, x, eps)) == 0
    assert float(dd.velocity_loss(eps - x + 2, x, eps)) == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_only_later_blocks_are_told_what_the_image_is(after: int) -> None:
    model, x, t = denoiser(after), randn(5, 9, 4), torch.full((5,), 0.4)
    told, _ = model.conditionings(x, t)
    for number, c in enumerate(told, start=1):
        same = torch.allclose(c, c[:1].expand_as(c), atol=1e-6)
        assert same == (number <= after), "the clock is the same for all, the summary is not"


def test_a_plain_denoiser_is_told_the_clock_only() -> None:
    told, _ = denoiser(0).conditionings(randn(5, 9, 4), torch.full((5,), 0.4))
    assert all(torch.allclose(c, c[:1].expand_as(c)) for c in told)


def test_summary_starts_at_nothing_and_has_a_gradient() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        phi = dd.Summary(8)
    tokens = randn(3, 5, 8)
    assert bool((phi(tokens) == 0).all())
    (phi(tokens) - 1).square().sum().backward()
    assert float(phi.project.weight.grad.abs().max()) > 0


def test_summary_does_not_know_the_order_of_tokens() -> None:
    phi = denoiser(2).summary
    tokens = randn(3, 9, 16)
    torch.testing.assert_close(phi(tokens), phi(tokens.flip(1)), atol=1e-5, rtol=1e-4)


def test_exchanged_summaries_matter_only_behind_the_block() -> None:
    model, x, t, others = denoiser(2), randn(5, 9, 4), torch.full((5,), 0.4), torch.arange(5).roll(1)
    own, theirs = model.conditionings(x, t)[1], model.conditionings(x, t, others)[1]
    for a, b in zip(own[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(own[2], theirs[2])
    torch.testing.assert_close(model(x, t, torch.arange(5)), model(x, t))
    torch.testing.assert_close(denoiser(0)(x, t, others), denoiser(0)(x, t))


def test_contrast_is_least_for_equal_pairs_and_gives_the_teacher_no_gradient() -> None:
    student, teacher = torch.eye(4, requires_grad=True), torch.eye(4, requires_grad=True)
    equal, other = dd.contrast(student, teacher), dd.contrast(student, teacher.roll(1, 0))
    assert equal.item() < math.log(4) < other.item()
    other.backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0
    alike = torch.ones(4, 3)
    assert float(dd.contrast(alike, alike)) == pytest.approx(math.log(4), abs=1e-5)


def test_probe_reads_classes_that_are_linear_and_none_that_are_not_there() -> None:
    labels = torch.arange(300) % 3
    features = 2 * torch.nn.functional.one_hot(labels).float() + 0.1 * randn(300, 3)
    assert bool((dd.ridge_probe(features[:200], labels[:200], features[200:]) == labels[200:]).all())
    noise = dd.ridge_probe(randn(200, 3), labels[:200], randn(100, 3, seed=1))
    assert float((noise == labels[200:]).double().mean()) < 0.55


def test_images_hold_their_template_whatever_the_place() -> None:
    drawn = demo.data(replace(QUICK, noise=0.0), 50, torch.Generator().manual_seed(0))
    images = drawn.patches.reshape(50, 3, 3, 3, 3).transpose(2, 3).reshape(50, 81)
    lit = (images > 0).sum(1)
    by_class = {int(label): {int(n) for n in lit[drawn.labels == label]} for label in drawn.labels}
    assert all(len(counts) == 1 for counts in by_class.values()), "one template has one number of lit pixels"


def test_same_seed_same_network_and_training_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    known, tested = demo.data(QUICK, QUICK.images, generator), demo.data(QUICK, QUICK.held_out, generator)
    one, other = (demo.held_out_loss(demo.train(QUICK, known, 2), tested, QUICK) for _ in range(2))
    assert one == other
    longer = demo.train(replace(QUICK, steps=60), known, 2)
    assert demo.held_out_loss(longer, tested, QUICK) < one - 0.05
    accuracies = demo.probe(longer, known, tested, QUICK, 0.1)
    assert len(accuracies) == QUICK.layers
    assert min(accuracies) > 0.14  # chance is 0.125


@pytest.mark.slow
def test_the_summary_is_used_and_the_loss_hardly_changes() -> None:
    settings = demo.Settings()
    generator = torch.Generator().manual_seed(0)
    known, tested = demo.data(settings, settings.images, generator), demo.data(settings, settings.held_out, generator)
    plain, told = (demo.train(settings, known, after) for after in (0, settings.after))
    loss = demo.held_out_loss(told, tested, settings)
    assert abs(loss - demo.held_out_loss(plain, tested, settings)) < 0.03
    assert demo.held_out_loss(told, tested, settings, exchanged=True) > loss + 0.001


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: dd.interpolate(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1)), "one shape"),
        (lambda: dd.interpolate(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1.2])), "t must lie"),
        (lambda: dd.interpolate(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([math.nan])), "t must be finite"),
        (lambda: dd.velocity_loss(torch.zeros(1), torch.zeros(2), torch.zeros(2)), "one shape"),
        (lambda: dd.contrast(torch.zeros(2, 3), torch.zeros(3, 3)), "must both be"),
        (lambda: dd.contrast(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature must"),
        (lambda: dd.contrast(torch.zeros(0, 3), torch.zeros(0, 3)), "student must not be empty"),
        (lambda: dd.SelfConditionedDenoiser(9, 4, width=15), "width even"),
        (lambda: dd.SelfConditionedDenoiser(9, 4, layers=4, after=4), "after must"),
        (lambda: dd.ridge_probe(torch.zeros(3, 2), torch.zeros(4).long(), torch.zeros(1, 2)), "do not fit"),
        (lambda: dd.ridge_probe(torch.ones(2, 2), torch.zeros(2).long(), torch.zeros(1, 2), -1.0), "penalty must"),
        (lambda: demo.Settings(side=10), "multiple of patch"),
        (lambda: demo.Settings(steps=1), "must be at least 2"),
        (lambda: demo.Settings(probe_time=2.0), "probe_time must"),
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(UserError, match=word):
        call()
