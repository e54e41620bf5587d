"""The demonstration of style-extracting diffusion: patients with few labels, styles that none of them has.

A patient is a background level, a contrast and a texture; an image is background + contrast * mask + texture * noise,
and its mask a half-plane. Few patients are labelled. A small denoiser learns from them, with or without a style vector;
synthetic pairs then combine layouts of the labelled with styles of unlabelled patients, and train a segmenter.

Encoders: `none` (no style), `statistics` (mean and standard deviation over pixels of a per-pixel network: the order of
pixels is lost, so no layout can pass), and the control `leaky` (a plain network that reads the mirrored target itself).
All settings but the guidance are those of the toy. A further control needs no generator: a random brightness offset on
the few labelled images (`train_segmenter(..., offset=2.5)`), which is what training with a style is given as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from . import style_extracting_diffusion as sed

Encoder = Literal["none", "statistics", "leaky"]


@dataclass(frozen=True)
class Settings:
    """Sizes of the toy; defaults take a few seconds for each encoder and seed."""

    side: int = 8
    labelled: int = 6
    unlabelled: int = 60
    tested: int = 60
    images: int = 20
    widest_offset: float = 2.5
    hidden: int = 128
    features: int = 16
    steps: int = 700
    batch: int = 48
    learning_rate: float = 3e-3
    sampling_steps: int = 30
    guidance: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("side", "labelled", "unlabelled", "tested", "images", "steps", "batch", "sampling_steps"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} must be at least 2, got {getattr(self, name)}")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance must be a finite number from 0, got {self.guidance}")

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.side**2


@dataclass(frozen=True)
class Styled:
    """What came out of one generator."""

    images: Tensor
    layouts: Tensor
    asked: Tensor
    """Background level of the patient whose style was asked for, for each image."""
    correlation: float
    """Between the background level of an image and that of the patient whose style was asked for."""
    spread: float
    """Standard deviation of the background levels over images."""
    leak: float
    """Contrast that follows the mask of the style source, over the contrast that follows the layout asked for."""


@dataclass(frozen=True)
class Patients:
    """Images [N, M, P] and masks [N, M, P] of N patients, and each one's background level [N]."""

    images: Tensor
    masks: Tensor
    level: Tensor


def half_planes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Masks [count, side * side] of 0 and 1: one side of a random line that passes near the centre."""
    at = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(at, at, indexing="ij")
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    shift = torch.rand(count, 1, generator=generator) - 0.5
    return (angle.cos() * x.flatten() + angle.sin() * y.flatten() > shift).float()


def patients(count: int, settings: Settings, generator: torch.Generator) -> Patients:
    """Draw patients: level uniform in [-2, 2], contrast in [0.5, 1.2], texture in [0.1, 0.35]."""
    u = torch.rand(count, 3, 1, 1, generator=generator)
    level, contrast, texture = 4 * u[:, 0] - 2, 0.5 + 0.7 * u[:, 1], 0.1 + 0.25 * u[:, 2]
    masks = half_planes(count * settings.images, settings.side, generator).view(count, settings.images, -1)
    noise = torch.randn(masks.shape, generator=generator)
    return Patients(level + contrast * masks + texture * noise, masks, level.flatten())


def background(images: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pixels outside the mask, for each image."""
    outside = 1 - masks
    return (images * outside).sum(-1) / outside.sum(-1).clamp_min(1)


def _mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """Predicts the noise from z, time and layout; the style is added to every hidden layer, as the time is."""

    def __init__(self, settings: Settings, encoder: Encoder) -> None:
        super().__init__()
        p, h, f = settings.pixels, settings.hidden, settings.features
        self.kind: Encoder = encoder
        self.enter = nn.Linear(2 * p, h)
        self.layers = nn.ModuleList(nn.Linear(h, h) for _ in range(2))
        self.time = _mlp(8, h, h)
        self.leave, self.spread = nn.Linear(h, p), nn.Linear(h, 1)
        self.read = _mlp(p, h, f) if encoder == "leaky" else _mlp(1, 8, f)
        self.style = nn.Linear(2 * f if encoder == "statistics" else f, h)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, n, F] of style images [B, n, P]."""
        if self.kind == "leaky":
            read: Tensor = self.read(images)
            return read
        each = self.read(images[..., None])
        return torch.cat([each.mean(-2), each.std(-2)], -1)

    def forward(self, z: Tensor, share: Tensor, layout: Tensor, images: Tensor) -> Tensor:
        """Noise [B, P] for z [B, P] at alpha-bar share [B], layout [B, P] and style images [B, n, P]."""
        snr = (torch.log(share / (1 - share)) / 4).float()[:, None]
        waves = torch.cat([torch.sin(snr * k) for k in (1, 2, 4)] + [torch.cos(snr * k) for k in (1, 2, 4)], -1)
        told = self.time(torch.cat([snr, snr**2, waves], -1))
        if self.kind != "none":
            told = told + self.style(sed.aggregate(self.features(images)))
        h = self.enter(torch.cat([z, layout], -1))
        for layer in self.layers:
            h = h + layer(F.silu(h + told))
        mean, spread = self.leave(F.silu(h + told)), self.spread(told).exp()
        s = share.float()[:, None]
        # exact for pixels that are normal about `mean` with variance `spread`; the network learns both
        noise: Tensor = (1 - s).sqrt() * (z - s.sqrt() * mean) / (s * spread + 1 - s)
        return noise


def mirrored(images: Tensor, side: int) -> Tensor:
    """Images with left and right exchanged: no pixel is in place, and the layout is still there to read."""
    return images.reshape(*images.shape[:-1], side, side).flip(-1).flatten(-2)


def train_denoiser(known: Patients, settings: Settings, encoder: Encoder) -> Denoiser:
    """Learn from labelled patients. With a style, image and style source share a random brightness offset."""
    if encoder not in get_args(Encoder):
        raise UserError(f"encoder must be one of {', '.join(get_args(Encoder))}, got '{encoder}'")
    generator = torch.Generator().manual_seed(settings.seed + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Denoiser(settings, encoder)
    shares = sed.signal_shares()
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    for _ in range(settings.steps):
        who = torch.randint(len(known.images), (settings.batch,), generator=generator)
        which = torch.randint(known.images.shape[1], (3, settings.batch), generator=generator)
        x, layout = known.images[who, which[0]], known.masks[who, which[0]]
        if encoder == "leaky":
            source = mirrored(x, settings.side)[:, None]
        else:
            source = torch.stack([known.images[who, which[1]], known.images[who, which[2]]], 1)
        if encoder != "none":
            offset = settings.widest_offset * (2 * torch.rand(settings.batch, 1, generator=generator) - 1)
            x, source = x + offset, source + offset[:, None]
            source = sed.drop_style(source, 0.25, generator)
        share = shares[torch.randint(len(shares), (settings.batch,), generator=generator)]
        eps = torch.randn(x.shape, generator=generator)
        loss = sed.noise_loss(model(sed.noised(x, eps, share), share, layout, source), eps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


@torch.no_grad()
def synthesise(model: Denoiser, layout: Tensor, styles: Tensor, settings: Settings) -> Tensor:
    """Images [B, P] with the layouts [B, P] and the style of the images [B, n, P], by DDIM."""
    generator = torch.Generator().manual_seed(settings.seed + 2)
    every = sed.signal_shares()
    at = torch.linspace(len(every) - 1, 0, settings.sampling_steps).round().long()
    path = torch.cat([every[at], torch.ones(1, dtype=every.dtype)])
    z: Tensor = torch.randn(layout.shape, generator=generator)
    nothing = torch.full_like(styles, sed.NULL_STYLE)
    for now, after in pairwise(path):
        share = now.expand(len(z))
        eps = model(z, share, layout, styles)
        if settings.guidance != 1 and model.kind != "none":
            eps = sed.guided(model(z, share, layout, nothing), eps, settings.guidance)
        z = sed.ddim_step(z, eps, now, after)
    return z


def _contrasts(images: Tensor, layouts: Tensor, others: Tensor) -> Tensor:
    """Least-squares coefficients [2] of the images on both masks, all with their means over pixels removed."""
    columns = [mask - mask.mean(1, keepdim=True) for mask in (layouts, others)]
    flat = torch.stack([column.flatten() for column in columns], 1).double()
    target = (images - images.mean(1, keepdim=True)).flatten().double()
    coefficients: Tensor = torch.linalg.lstsq(flat, target).solution
    return coefficients


def generate_styled(model: Denoiser, known: Patients, others: Patients, settings: Settings, count: int) -> Styled:
    """Layouts of labelled patients in the styles of others, who take turns."""
    generator = torch.Generator().manual_seed(settings.seed + 3)
    layouts = known.masks.flatten(0, 1)
    layouts = layouts[torch.randint(len(layouts), (count,), generator=generator)]
    who = torch.arange(count) % len(others.level)
    which = (torch.arange(count) // len(others.level)) % (others.images.shape[1] - 1)
    styles, mask = torch.stack([others.images[who, which], others.images[who, which + 1]], 1), others.masks[who, which]
    if model.kind == "leaky":
        styles = mirrored(styles[:, :1], settings.side)
    images = synthesise(model, layouts, styles, settings)
    levels = background(images, layouts)
    correlation = torch.corrcoef(torch.stack([levels, others.level[who]]))[0, 1]
    asked, leaked = _contrasts(images, layouts, mask)
    return Styled(images, layouts, others.level[who], float(correlation), float(levels.std()), float(leaked / asked))


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """0.1 cross-entropy + 0.9 (1 - soft Dice), as released."""
    p = torch.sigmoid(logits)
    dice = 2 * (p * masks).sum(1) / (p.sum(1) + masks.sum(1)).clamp_min(1e-6)
    return 0.1 * F.binary_cross_entropy_with_logits(logits, masks) + 0.9 * (1 - dice).mean()


def train_segmenter(
    known: Patients, settings: Settings, synthetic: Styled | None = None, offset: float = 0.0, steps: int = 400
) -> nn.Module:
    """A small network from images to masks; with synthetic pairs, four of five images of a batch are synthetic."""
    generator = torch.Generator().manual_seed(settings.seed + 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _mlp(settings.pixels, 96, 96, settings.pixels)
    real_images, real_masks = known.images.flatten(0, 1), known.masks.flatten(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-5)
    of_real = settings.batch if synthetic is None else settings.batch // 5
    for _ in range(steps):
        at = torch.randint(len(real_images), (of_real,), generator=generator)
        x, y = real_images[at], real_masks[at]
        if synthetic is not None:
            at = torch.randint(len(synthetic.images), (settings.batch - of_real,), generator=generator)
            x, y = torch.cat([x, synthetic.images[at]]), torch.cat([y, synthetic.layouts[at]])
        if offset:
            x = x + offset * (2 * torch.rand(len(x), 1, generator=generator) - 1)
        loss = segmentation_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class World:
    """The three groups of patients of one seed."""

    labelled: Patients
    unlabelled: Patients
    tested: Patients


def world(settings: Settings) -> World:
    """Draw all patients of a seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    counts = (settings.labelled, settings.unlabelled, settings.tested)
    return World(*(patients(count, settings, generator) for count in counts))


@torch.no_grad()
def dice_by_patient(model: nn.Module, tested: Patients) -> Tensor:
    """Mean Dice over the images of each patient, [N]."""
    logits = model(tested.images.flatten(0, 1))
    return sed.overlap(logits > 0, tested.masks.flatten(0, 1)).view(tested.masks.shape[:2]).mean(1)
