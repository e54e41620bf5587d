"""The demonstration of `jei_dnn`: four exits over easy and hard samples, gates against thresholds.

A share of the samples is easy, labelled by a linear map; the others by a random network of three layers. A flag in the
first coordinate says which. A residual network of four blocks is trained and frozen; what is compared sits on top:

| what | arms |
|---|---|
| rule that stops | learned gates; one threshold for all exits on entropy, largest probability or margin |
| training of the three early heads | weights P with the ratio detached; as released, which is unweighted |

Heads and gates see cached features, so that a run is a few linear models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import UserError
from . import jei_dnn as jei

BLOCKS = 4


@dataclass(frozen=True)
class Settings:
    """Sizes count samples, steps are optimiser steps, rates are of Adam."""

    dim: int = 16
    classes: int = 8
    width: int = 48
    easy: float = 0.6
    train: int = 4000
    test: int = 5000
    backbone_steps: int = 800
    warmup_steps: int = 100
    rounds: int = 10
    phase_steps: int = 60
    batch: int = 250
    backbone_rate: float = 3e-3
    rate: float = 1e-2
    gate_rate: float = 0.05
    decay: float = 0.05
    """Weight decay of backbone and heads (AdamW)."""
    balanced: bool = False
    """Weigh positive gate targets by zeros over ones, as the released code does."""
    seen: tuple[int, ...] = (0, 1, 2, 3)
    """Which of `jei_dnn.MEASURES` the gates look at; (1,) is entropy alone."""
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("dim", "classes", "width", "train", "test", "backbone_steps", "warmup_steps", "rounds", "phase_steps")
        for name in (*whole, "batch", "backbone_rate", "rate", "gate_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.seen or not set(self.seen) <= set(range(len(jei.MEASURES))):
            raise UserError(f"seen must name gate inputs, 0 to {len(jei.MEASURES) - 1}; got {self.seen}")
        if not 0 <= self.easy <= 1 or self.dim < 2 or self.classes < 2 or self.batch > self.train:
            raise UserError("easy must lie in [0, 1], dim and classes must be at least 2, batch at most train")


class Data(NamedTuple):
    """Features after each block `[BLOCKS, N, W]`, labels `[N]`, and which samples are easy `[N]`."""

    features: Tensor
    label: Tensor
    easy: Tensor


class World(NamedTuple):
    """A frozen network's features, and the logits `[N, C]` of its own head at the last exit."""

    train: Data
    test: Data
    final_train: Tensor
    final_test: Tensor


class Trained(NamedTuple):
    """Early heads and gates of one arm at one moment, by their outputs on the test samples."""

    step: int
    logits: Tensor
    """`[BLOCKS, N, C]`, the final head included."""
    gate_logits: Tensor
    """`[N, BLOCKS - 1]`."""


class Outcome(NamedTuple):
    """Test figures of one stopping rule."""

    accuracy: float
    cost: float
    calibration: float
    """Expected calibration error of the predictions at the exits that were taken."""
    overconfidence: float
    """Mean confidence minus accuracy: below 0 where the predictions are too modest."""
    shares: list[float]
    """Share of samples that leaves at each exit."""


def _teacher(settings: Settings, count: int, rng: torch.Generator, weights: list[Tensor]) -> tuple[Tensor, ...]:
    x = torch.randn(count, settings.dim, generator=rng)
    easy = torch.rand(count, generator=rng) < settings.easy
    x[:, 0] = torch.where(easy, 1.0, -1.0)
    hidden = x[:, 1:]
    for weight in weights[1:-1]:
        hidden = (hidden @ weight).tanh()
    label = torch.where(easy, (x[:, 1:] @ weights[0]).argmax(1), (hidden @ weights[-1]).argmax(1))
    return x, label, easy


class _Backbone(nn.Module):
    def __init__(self, settings: Settings, rng: torch.Generator) -> None:
        super().__init__()
        self.enter = nn.Linear(settings.dim, settings.width)
        self.blocks = nn.ModuleList(nn.Linear(settings.width, settings.width) for _ in range(BLOCKS))
        self.head = nn.Linear(settings.width, settings.classes)
        for parameter in self.parameters():
            size = parameter.shape[1] if parameter.ndim == 2 else 1
            nn.init.normal_(parameter, std=size**-0.5 if parameter.ndim == 2 else 0.0, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        h, seen = self.enter(x), []
        for block in self.blocks:
            h = h + block(h).relu()
            h = h / (1e-6 + h.square().mean(-1, keepdim=True)).sqrt()
            seen.append(h)
        return torch.stack(seen)


def make_world(settings: Settings) -> World:
    """Data from the seed, and the frozen features of a backbone trained with its last head on other samples.

    Features of samples that the backbone was trained on would make every late exit look better than it is.
    """
    rng = torch.Generator().manual_seed(10 * settings.seed)
    inner, classes = settings.dim - 1, settings.classes
    shapes = [(inner, classes), *pairwise((inner, 32, 32, classes))]
    weights = [2 * torch.randn(shape, generator=rng) / shape[0] ** 0.5 for shape in shapes]
    parts = [_teacher(settings, count, rng, weights) for count in (settings.train, settings.test)]
    backbone = _Backbone(settings, rng)
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=settings.backbone_rate, weight_decay=settings.decay)
    for _ in range(settings.backbone_steps):
        x, label, _ = _teacher(settings, settings.batch, rng, weights)
        _step(optimiser, cross_entropy(backbone.head(backbone(x)[-1]), label))
    with torch.no_grad():
        data = [Data(backbone(x), label, easy) for x, label, easy in parts]
        return World(data[0], data[1], *(backbone.head(part.features[-1]) for part in data))


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


class _Exits(nn.Module):
    """Linear heads and gates of the early exits, all exits in one product."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        early, self.seen = BLOCKS - 1, list(settings.seen)
        self.head = nn.Parameter(torch.zeros(early, settings.width, settings.classes))
        self.offset = nn.Parameter(torch.zeros(early, 1, settings.classes))
        self.gate = nn.Parameter(torch.zeros(early, len(self.seen)))
        self.gate_offset = nn.Parameter(torch.zeros(early))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[BLOCKS - 1, B, C]` of features `[BLOCKS, B, W]`."""
        return torch.baddbmm(self.offset, features[:-1], self.head)

    def gates(self, logits: Tensor) -> Tensor:
        """Gate logits `[B, BLOCKS - 1]` of class logits; no gradient reaches the heads."""
        return torch.einsum("lbm,lm->bl", jei.gate_inputs(logits)[..., self.seen], self.gate) + self.gate_offset


def _losses(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropies `[B, exits]` of logits `[exits, B, C]`."""
    return cross_entropy(logits.permute(1, 2, 0), label[:, None].expand(-1, len(logits)), reduction="none")


def train(settings: Settings, world: World, trade: float, ratio: jei.Ratio = "detached") -> list[Trained]:
    """Warm-up of the early heads, then gates and heads in turns; what there is after the warm-up and after each round.

    `trade` is lambda, `ratio` as in `classifier_loss`. Gates learn in the warm-up as well: every entry has some.
    """
    rng = torch.Generator().manual_seed(10 * settings.seed + 1)
    exits, label = _Exits(settings), world.train.label
    for_heads = torch.optim.AdamW([exits.head, exits.offset], lr=settings.rate, weight_decay=settings.decay)
    for_gates = torch.optim.Adam([exits.gate, exits.gate_offset], lr=settings.gate_rate)
    early, round_steps = torch.arange(BLOCKS, 1, -1.0), 2 * settings.phase_steps
    found = []
    for step in range(settings.warmup_steps + settings.rounds * round_steps):
        rows = torch.randint(settings.train, (settings.batch,), generator=rng)
        features, since = world.train.features[:, rows], step - settings.warmup_steps
        if since < 0:
            _step(for_heads, (_losses(exits(features), label[rows]) * early).mean() / early.mean())
        if since < 0 or since % round_steps < settings.phase_steps:
            _step(for_gates, _gate_phase(settings, exits, features, world.final_train[rows], label[rows], trade))
        else:
            logits = exits(features)
            p_exit = jei.exit_probabilities(exits.gates(logits).detach())
            _step(for_heads, jei.classifier_loss(_losses(logits, label[rows]), p_exit, ratio))
        if since == -1 or (since >= 0 and (since + 1) % round_steps == 0):
            found.append(_snapshot(step + 1, exits, world))
    return found


def _gate_phase(
    settings: Settings, exits: _Exits, features: Tensor, final: Tensor, label: Tensor, trade: float
) -> Tensor:
    with torch.no_grad():
        logits = exits(features)
        ce = _losses(torch.cat((logits, final[None])), label)
        targets = jei.gate_targets(jei.cheapest_exit(ce, jei.exit_costs(BLOCKS), trade), BLOCKS)
    return jei.gate_loss(exits.gates(logits), targets, jei.balance(targets) if settings.balanced else None)


def _snapshot(step: int, exits: _Exits, world: World) -> Trained:
    with torch.no_grad():
        logits = exits(world.test.features)
        return Trained(step, torch.cat((logits, world.final_test[None])), exits.gates(logits))


def outcome(logits: Tensor, label: Tensor, exit_taken: Tensor) -> Outcome:
    """Score a stopping rule: exits `[N]` over test logits `[BLOCKS, N, C]`."""
    rows = torch.arange(len(label))
    confidence, guess = logits[exit_taken, rows].softmax(-1).max(-1)
    correct = guess == label
    shares = exit_taken.bincount(minlength=len(logits)).double() / len(label)
    cost = float((shares * jei.exit_costs(len(logits))).sum())
    error = jei.calibration_error(confidence.clamp(0, 1), correct)
    accuracy = float(correct.double().mean())
    return Outcome(accuracy, cost, error, float(confidence.double().mean()) - accuracy, shares.tolist())


def by_gates(world: World, trained: Trained) -> Outcome:
    """The learned gates, hard inference."""
    taken = jei.hard_exit(jei.exit_probabilities(trained.gate_logits))
    return outcome(trained.logits, world.test.label, taken)


def by_threshold(world: World, trained: Trained, measure: int = 1, points: int = 40) -> list[Outcome]:
    """One threshold on one of `MEASURES` for all exits, at `points` quantiles, from least cost to most."""
    if not 0 <= measure < len(jei.MEASURES) or points < 2:
        raise UserError(f"measure must be 0 to {len(jei.MEASURES) - 1}, and points at least 2")
    sign = -1 if measure % 2 else 1  # entropies fall with certainty
    certainty = sign * jei.gate_inputs(trained.logits[:-1])[..., measure].T
    levels = certainty.flatten().quantile(torch.linspace(0, 1, points)).tolist()
    return [outcome(trained.logits, world.test.label, jei.threshold_exit(certainty, level)) for level in levels]


def at_cost(curve: list[Outcome], cost: float) -> float:
    """Accuracy of a family of rules at a cost, on the straight line between the two nearest: one may draw lots there.

    Raises UserError where the cost lies outside the curve.
    """
    points = sorted((one.cost, one.accuracy) for one in curve)
    if not points or not points[0][0] - 1e-9 <= cost <= points[-1][0] + 1e-9:
        raise UserError(f"cost {cost:.3f} lies outside the costs of the curve")
    for (c0, a0), (c1, a1) in pairwise(points):
        if c0 <= cost <= c1:
            return a0 if c1 == c0 else a0 + (a1 - a0) * (cost - c0) / (c1 - c0)
    return points[0][1] if cost < points[0][0] else points[-1][1]
