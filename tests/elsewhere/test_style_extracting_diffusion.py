"""Style-extracting diffusion: the equations, and a generator whose style varies while its layout stays."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.elsewhere import style_extracting_diffusion as sed
from rlvr_lab.elsewhere import style_extracting_diffusion_demo as demo
from rlvr_lab.errors import UserError

QUICK = demo.Settings(unlabelled=40, tested=20, images=8, hidden=64, features=8, steps=350, sampling_steps=12)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 50), how=st.sampled_from(["mean", "max"]))
def test_aggregation_does_not_know_the_order_of_images(seed: int, how: sed.Aggregation) -> None:
    features = randn(3, 4, 5, seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sed.aggregate(features, how), sed.aggregate(features[:, order], how))
    torch.testing.assert_close(sed.aggregate(features[:, :1], how), features[:, 0])
    assert bool((sed.aggregate(features, "max") >= sed.aggregate(features, "mean")).all())


def test_null_style_replaces_whole_sources() -> None:
    images, generator = randn(4000, 2, 3), torch.Generator().manual_seed(0)
    dropped = sed.drop_style(images, 0.25, generator)
    null = (dropped == sed.NULL_STYLE).all(-1).all(-1)
    assert float(null.double().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~null], images[~null])
    torch.testing.assert_close(sed.drop_style(images, 0.0, generator), images)


def test_guidance_is_linear_and_goes_through_both_ends() -> None:
    null, style = randn(5), randn(5, seed=1)
    torch.testing.assert_close(sed.guided(null, style, 0.0), null)
    torch.testing.assert_close(sed.guided(null, style, 1.0), style)
    torch.testing.assert_close(sed.guided(null, style) - style, 0.5 * (style - null))


def test_schedule_keeps_a_little_signal() -> None:
    shares = sed.signal_shares()
    assert bool((shares.diff() < 0).all())
    assert float(shares[0]) == pytest.approx(1 - 0.0015)
    assert 0 < float(shares[-1]) < 1e-3


@given(seed=st.integers(0, 50), now=st.floats(0.01, 0.99), after=st.floats(0.01, 1.0))
def test_a_ddim_step_with_the_true_noise_lands_on_the_same_pair(seed: int, now: float, after: float) -> None:
    x, eps = randn(3, 4, seed=seed), randn(3, 4, seed=seed + 100)
    at, to = (torch.full((3,), value, dtype=torch.float64) for value in (now, after))
    moved = sed.ddim_step(sed.noised(x, eps, at), eps, at[:, None], to[:, None])
    torch.testing.assert_close(moved, sed.noised(x, eps, to))


def test_loss_is_the_absolute_error() -> None:
    assert float(sed.noise_loss(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0]))) == 2.0


def test_overlap_counts() -> None:
    a, b = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(sed.overlap(a, b), torch.tensor([0.5, 1.0], dtype=torch.float64))


def test_statistics_of_pixels_cannot_hold_a_layout_and_a_plain_network_can() -> None:
    images = torch.randn(2, 1, QUICK.pixels, generator=torch.Generator().manual_seed(0))
    shuffled = images[..., torch.randperm(QUICK.pixels, generator=torch.Generator().manual_seed(1))]
    for encoder, same in (("statistics", True), ("leaky", False)):
        model = demo.Denoiser(QUICK, encoder)  # type: ignore[arg-type]
        assert torch.allclose(model.features(images), model.features(shuffled), atol=1e-5) == same


def test_mirroring_twice_is_nothing() -> None:
    images = randn(2, 3, QUICK.pixels)
    torch.testing.assert_close(demo.mirrored(demo.mirrored(images, QUICK.side), QUICK.side), images)
    assert not torch.equal(demo.mirrored(images, QUICK.side), images)


def test_patients_are_what_they_say() -> None:
    drawn = demo.patients(30, QUICK, torch.Generator().manual_seed(0))
    levels = demo.background(drawn.images, drawn.masks).mean(1)
    assert float((levels - drawn.level).abs().max()) < 0.15
    assert 0.2 < float(drawn.masks.mean()) < 0.8


def test_style_reaches_levels_that_no_labelled_patient_has_and_leaks_no_layout() -> None:
    world = demo.world(QUICK)
    made = {
        encoder: demo.generate_styled(
            demo.train_denoiser(world.labelled, QUICK, encoder), world.labelled, world.unlabelled, QUICK, 300
        )
        for encoder in ("none", "statistics")
    }
    truth = float(world.unlabelled.level.std())
    assert made["statistics"].correlation > 0.9
    assert abs(made["none"].correlation) < 0.25
    assert made["statistics"].spread > 0.8 * truth
    assert abs(made["statistics"].leak) < 0.05


def test_same_seed_same_images_and_segmenter() -> None:
    quick = replace(QUICK, steps=5)
    world = demo.world(quick)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        model = demo.train_denoiser(world.labelled, quick, "leaky")
        made = demo.generate_styled(model, world.labelled, world.unlabelled, quick, 20)
        segmenter = demo.train_segmenter(world.labelled, quick, made, offset=0.5, steps=20)
        return made.images, demo.dice_by_patient(segmenter, world.tested)

    for one, other in zip(once(), once(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_segmentation_loss_is_zero_for_a_sure_and_right_answer() -> None:
    masks = torch.tensor([[1.0, 0.0, 1.0]])
    assert float(demo.segmentation_loss(40 * (2 * masks - 1), masks)) == pytest.approx(0.0, abs=1e-6)
    assert float(demo.segmentation_loss(-40 * (2 * masks - 1), masks)) > 0.9


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sed.aggregate(torch.zeros(2, 3)), "features must be"),
        (lambda: sed.aggregate(torch.zeros(2, 0, 3)), "features must not be empty"),
        (lambda: sed.aggregate(torch.full((1, 1, 1), math.nan)), "features must be finite"),
        (lambda: sed.aggregate(torch.zeros(1, 1, 1), "sum"), "how must"),  # type: ignore[arg-type]
        (lambda: sed.drop_style(torch.zeros(1, 1, 1), 1.5, torch.Generator()), "probability must"),
        (lambda: sed.guided(torch.zeros(2), torch.zeros(3)), "shapes must be equal"),
        (lambda: sed.guided(torch.zeros(2), torch.zeros(2), -1.0), "scale must"),
        (lambda: sed.guided(torch.zeros(2), torch.full((2,), math.inf)), "style must be finite"),
        (lambda: sed.noise_loss(torch.zeros(2), torch.zeros(3)), "shapes must be equal"),
        (lambda: sed.signal_shares(1), "steps must"),
        (lambda: sed.signal_shares(10, 0.0), "first and last"),
        (lambda: sed.noised(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1.5])), "share must"),
        (lambda: sed.ddim_step(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(0.0), torch.tensor(0.5)), "now must"),
        (lambda: sed.overlap(torch.zeros(1, 2), torch.zeros(1, 3)), "shapes must be equal"),
        (lambda: demo.Settings(side=1), "side must"),
        (lambda: demo.Settings(guidance=-1.0), "guidance must"),
        (lambda: demo.train_denoiser(demo.world(QUICK).labelled, QUICK, "vit"), "encoder must"),  # type: ignore[arg-type]
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(UserError, match=word):
        call()
