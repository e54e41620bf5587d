"""The demonstration of `open_set_tta`: one adapting network, and what decides which samples sharpen it.

Gaussian classes, a network with two batch-normalised layers, and a shifted world: a rotation, an offset, and in every
batch a share of unknowns that belong to no class. The arms differ in one line, the mask of the entropy loss:

| arm | samples kept |
|---|---|
| `none` | the network does not adapt |
| `tent` | all |
| `filter` | confidence in the source model's class has not fallen (the paper) |
| `random` | a random half: fewer samples, no choice. The control |
| `matched` | as many as the filter would keep in this batch, at random |
| `stayed` | the preferred class is still the source model's |
| `adapted` | the filter with the class that the adapting model prefers: the wrong reading |
| `oracle` | known classes only, by their labels |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest
from .open_set_tta import auroc, entropy_split, filtered_entropy, wisdom_filter


@dataclass(frozen=True)
class Settings:
    """The toy world and the adaptation. Sizes count samples, `rate` is the learning rate of SGD with momentum."""

    classes: int = 20
    dim: int = 32
    hidden: int = 64
    spread: float = 1.0
    """Length scale of the class centres; the noise of a sample has scale 1."""
    pretrain_steps: int = 150
    smoothing: float = 0.05
    angle: float = 0.9
    offset: float = 0.5
    unknown: float = 0.5
    """Share of each batch that belongs to no class."""
    unknown_scale: float = 0.8
    batch: int = 200
    batches: int = 200
    rate: float = 0.5
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "hidden", "pretrain_steps", "batch", "batches", "rate", "spread"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.unknown < 1 or not 0 <= self.smoothing < 1 or not 0 <= self.momentum < 1:
            raise UserError("unknown, smoothing and momentum must lie in [0, 1)")
        if self.batch - round(self.unknown * self.batch) < 2 or self.classes < 2:
            raise UserError("batch must leave two samples of known classes, and classes must be at least 2")


class World(NamedTuple):
    """Centres of the classes `[C, D]`, and the map to the target domain: x -> x @ rotation + offset."""

    centres: Tensor
    rotation: Tensor
    offset: Tensor


class Batch(NamedTuple):
    """Samples of the target domain `[B, D]`; label -1 is an unknown. Labels are for scoring, and for the oracle."""

    x: Tensor
    label: Tensor


class Crowd(NamedTuple):
    """What a mask may look at: logits of both models, labels, and a generator for the random controls."""

    original: Tensor
    adapted: Tensor
    label: Tensor
    rng: torch.Generator


class Trace(NamedTuple):
    """One arm, one entry a batch; all figures are of the known classes but `kept` and `shares` (whole batch)."""

    accuracy: list[float]
    entropy: list[float]
    """Mean entropy of the samples (nats)."""
    marginal: list[float]
    """Entropy of the mean prediction (nats)."""
    kept: list[float]
    flipped: list[float]
    """Of the samples that the filter drops, the share whose preferred class has changed; nan where none is dropped."""
    shares: list[list[float]]
    """How often each class is predicted."""
    detects: float
    """AUROC of the change of confidence for "the prediction is correct", over the whole stream; nan for `none`."""


def _random(crowd: Crowd, share: float) -> Tensor:
    count = len(crowd.label)
    chosen = torch.randperm(count, generator=crowd.rng)[: round(share * count)]
    return torch.zeros(count, dtype=torch.bool).index_fill(0, chosen, True)


def _matched(crowd: Crowd) -> Tensor:
    return _random(crowd, float(wisdom_filter(crowd.original, crowd.adapted).keep.double().mean()))


MASKS: dict[str, Callable[[Crowd], Tensor]] = {
    "tent": lambda crowd: torch.ones_like(crowd.label, dtype=torch.bool),
    "filter": lambda crowd: wisdom_filter(crowd.original, crowd.adapted).keep,
    "random": lambda crowd: _random(crowd, 0.5),
    "matched": _matched,
    "stayed": lambda crowd: crowd.original.argmax(-1) == crowd.adapted.argmax(-1),
    "adapted": lambda crowd: wisdom_filter(crowd.original, crowd.adapted, "adapted").keep,
    "oracle": lambda crowd: crowd.label >= 0,
}
"""The arms that adapt, by what they keep; `none` is the further one."""


def make_world(settings: Settings) -> World:
    """Centres and shift from the settings' seed."""
    rng = torch.Generator().manual_seed(10 * settings.seed)
    centres = settings.spread * torch.randn(settings.classes, settings.dim, generator=rng)
    raw = torch.randn(settings.dim, settings.dim, generator=rng) / settings.dim**0.5
    rotation = torch.linalg.matrix_exp(settings.angle * (raw - raw.T) / 2**0.5)
    return World(centres, rotation, settings.offset * torch.randn(settings.dim, generator=rng))


def network(settings: Settings) -> nn.Sequential:
    """Two batch-normalised layers and a head, with random weights of the settings' seed."""
    rng = torch.Generator().manual_seed(10 * settings.seed + 1)
    sizes = (settings.dim, settings.hidden, settings.hidden, settings.classes)
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in linear:
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5, generator=rng)
        nn.init.zeros_(layer.bias)
    norms = [nn.BatchNorm1d(settings.hidden, track_running_stats=False) for _ in range(2)]
    return nn.Sequential(linear[0], norms[0], nn.ReLU(), linear[1], norms[1], nn.ReLU(), linear[2])


def pretrain(settings: Settings, world: World) -> nn.Sequential:
    """The source model: trained with labels on the source domain, without shift and without unknowns."""
    rng = torch.Generator().manual_seed(10 * settings.seed + 2)
    model = network(settings)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(settings.pretrain_steps):
        label = torch.randint(settings.classes, (settings.batch,), generator=rng)
        x = world.centres[label] + torch.randn(settings.batch, settings.dim, generator=rng)
        loss = nn.functional.cross_entropy(model(x), label, label_smoothing=settings.smoothing)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


def stream(settings: Settings, world: World) -> list[Batch]:
    """The target domain, in batches; the same for every arm."""
    rng = torch.Generator().manual_seed(10 * settings.seed + 3)
    strangers = round(settings.unknown * settings.batch)
    batches = []
    for _ in range(settings.batches):
        label = torch.randint(settings.classes, (settings.batch,), generator=rng)
        x = world.centres[label] + torch.randn(settings.batch, settings.dim, generator=rng)
        x[:strangers] = settings.unknown_scale * torch.randn(strangers, settings.dim, generator=rng)
        label[:strangers] = -1
        batches.append(Batch(x @ world.rotation + world.offset, label))
    return batches


def affine(model: nn.Module) -> list[nn.Parameter]:
    """What TENT trains: gains and offsets of the normalisation layers."""
    return [p for layer in model.modules() if isinstance(layer, nn.BatchNorm1d) for p in layer.parameters()]


def adapt(settings: Settings, source: nn.Sequential, batches: list[Batch], arm: str) -> Trace:
    """Run one arm over the stream: predict a batch, then take one step on it. The source model is left as it is.

    Raises UserError for an unknown arm. Both models normalise by the statistics of the batch.
    """
    if arm != "none" and arm not in MASKS:
        raise UserError(f"arm must be one of none, {', '.join(MASKS)}; {nearest(arm, [*MASKS, 'none'])}")
    if not batches:
        raise UserError("batches must hold at least one batch")
    model, rng = copy.deepcopy(source), torch.Generator().manual_seed(10 * settings.seed + 4)
    optimiser = torch.optim.SGD(affine(model), lr=settings.rate, momentum=settings.momentum)
    trace, scores, correct = Trace([], [], [], [], [], [], 0.0), [], []
    for x, label in batches:
        with torch.no_grad():
            original = source(x)
        adapted = model(x)
        crowd = Crowd(original, adapted.detach(), label, rng)
        keep = torch.zeros_like(label, dtype=torch.bool) if arm == "none" else MASKS[arm](crowd)
        _observe(trace, crowd, keep, settings.classes)
        scores.append(wisdom_filter(original, adapted).change)
        correct.append(crowd.adapted.argmax(-1) == label)
        if arm != "none":
            optimiser.zero_grad()
            filtered_entropy(adapted, keep).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    detects = float("nan") if arm == "none" else auroc(torch.cat(scores[1:]), torch.cat(correct[1:]))
    return trace._replace(detects=detects)


def _observe(trace: Trace, crowd: Crowd, keep: Tensor, classes: int) -> None:
    known, guess = crowd.label >= 0, crowd.adapted.argmax(-1)
    inside, overall = entropy_split(crowd.adapted[known])
    dropped = ~wisdom_filter(crowd.original, crowd.adapted).keep
    flips = (guess != crowd.original.argmax(-1))[dropped].double().mean()
    trace.accuracy.append(float((guess == crowd.label)[known].double().mean()))
    trace.entropy.append(inside)
    trace.marginal.append(overall)
    trace.kept.append(float(keep.double().mean()))
    trace.flipped.append(float(flips))
    trace.shares.append((guess.bincount(minlength=classes) / len(guess)).tolist())


def run(settings: Settings, arms: tuple[str, ...] = ("none", "tent", "filter", "random")) -> dict[str, Trace]:
    """All arms on one world, one source model and one stream."""
    world = make_world(settings)
    source, batches = pretrain(settings, world), stream(settings, world)
    return {arm: adapt(settings, source, batches, arm) for arm in arms}
