"""Pruning while training, and what a network wins back after a cut: the smallest run of GraNet with its controls.

Eight classes named by a random teacher with two hidden layers in R^20, 4,000 examples, networks of 20-128-128-8 by
momentum descent with a cosine rate. `compare` trains a dense network, GraNet, gradual magnitude pruning (the same
without regeneration) and a static random mask of the same final density (Erdos-Renyi by layer), from the same weights
on the same batches. `recover` cuts the dense network at several times and rates and trains it on, by the rate that the
schedule has at that time or, as a control, by one rate at all times: is it time that ends plasticity, or the rate?

Networks run at once as members: weights have a first axis, and a member's gradient does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..errors import UserError
from ._networks import cross_entropy, forward, stacked_mlp
from .granet import density_at, erdos_renyi, global_prune, regenerate, regeneration_rate

INPUTS, CLASSES = 20, 8
METHODS = ("GraNet", "magnitude", "static")


@dataclass(frozen=True)
class Toy:
    """Settings. `events`: prunings, between a tenth and seven tenths of the steps; `recovery`: steps after a cut."""

    seed: int = 0
    runs: int = 5
    width: int = 128
    teacher: int = 16
    examples: int = 4000
    test: int = 2000
    steps: int = 1200
    batch: int = 64
    rate: float = 0.05
    momentum: float = 0.9
    events: int = 12
    recovery: int = 120

    def __post_init__(self) -> None:
        for name in ("runs", "width", "teacher", "examples", "test", "batch", "events", "recovery"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.steps < 10 * self.events:
            raise UserError(f"steps must be at least ten times events, {10 * self.events}, not {self.steps}")
        if not self.rate > 0 or not 0 <= self.momentum < 1:
            raise UserError(f"rate must be positive and momentum in [0, 1), not {self.rate} and {self.momentum}")

    def rate_at(self, step: int) -> float:
        """Cosine from `rate` to a hundredth of it."""
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2)


def initial(runs: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases by turns, of a network with two hidden layers for every run."""
    return stacked_mlp(runs, (INPUTS, width, width, CLASSES), generator)


@dataclass(frozen=True)
class Data:
    """Inputs [runs, n, d] and labels [runs, n], to train on and to test."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor


def draw(toy: Toy, generator: torch.Generator) -> Data:
    """A teacher for every run, and its labels of Gaussian inputs."""
    teacher = initial(toy.runs, toy.teacher, generator)
    x = torch.randn(toy.runs, toy.examples + toy.test, INPUTS, generator=generator)
    scores = forward(teacher, x)
    # an untrained teacher prefers some classes: without its mean no class is half of the data
    labels = (scores - scores.mean(1, keepdim=True)).argmax(-1)
    n = toy.examples
    return Data(x[:, :n], labels[:, :n], x[:, n:], labels[:, n:])


class Members:
    """Networks that train at once, `copies` of every run one after another, with masks and momentum of their own."""

    def __init__(self, toy: Toy, data: Data, parameters: Sequence[Tensor], copies: int) -> None:
        self.toy, self.data, self.copies = toy, data, copies
        self.parameters = [p.detach().repeat(copies, 1, 1).requires_grad_() for p in parameters]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.masks = [torch.ones_like(p, dtype=torch.bool) for p in self.parameters[::2]]

    def fork(self, copies: int) -> Members:
        """New members from these, momentum included."""
        made = Members(self.toy, self.data, self.parameters, copies)
        made.velocity = [v.repeat(copies, 1, 1) for v in self.velocity]
        made.masks = [m.repeat(copies, 1, 1) for m in self.masks]
        return made

    @torch.enable_grad()
    def gradient(self, rows: Tensor) -> list[Tensor]:
        """Of the mean cross-entropy of the batch `rows` [runs, b], dense: inactive weights have one too."""
        x = self.data.x.gather(1, rows[..., None].expand(-1, -1, INPUTS)).repeat(self.copies, 1, 1)
        labels = self.data.labels.gather(1, rows).repeat(self.copies, 1)
        return list(torch.autograd.grad(cross_entropy(forward(self.parameters, x), labels), self.parameters))

    @torch.no_grad()
    def step(self, rows: Tensor, rate: float) -> list[Tensor]:
        """One step of momentum descent behind the masks; returns its gradient."""
        grads = self.gradient(rows)
        for p, v, g in zip(self.parameters, self.velocity, grads, strict=True):
            v.mul_(self.toy.momentum).add_(g)
            p.sub_(v, alpha=rate)
        self.apply_masks()
        return grads

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set inactive weights and their momentum to 0; without the second, dropped weights would come back."""
        for i, mask in enumerate(self.masks):
            self.parameters[2 * i].mul_(mask)
            self.velocity[2 * i].mul_(mask)

    def prune(self, member: int, density: float, exchange: float = 0.0, grads: Sequence[Tensor] = ()) -> None:
        """Cut one member to a density over all its weights; with `exchange` regenerate every tensor by its gradient."""
        weights = [p.detach()[member] for p in self.parameters[::2]]
        for i, mask in enumerate(global_prune(weights, density)):
            grown = regenerate(weights[i], grads[2 * i][member], mask, exchange) if exchange else mask
            self.masks[i][member] = grown

    def accuracy(self) -> Tensor:
        """Share of right answers on the test inputs, [copies, runs]."""
        with torch.no_grad():
            right = forward(self.parameters, self.data.test_x.repeat(self.copies, 1, 1)).argmax(-1)
        return (right == self.data.test_labels.repeat(self.copies, 1)).double().mean(-1).view(self.copies, -1)

    def density(self) -> Tensor:
        """Share of active weights, [copies, runs]."""
        every = torch.cat([mask.flatten(1) for mask in self.masks], 1)
        return every.double().mean(1).view(self.copies, -1)


def _batch(toy: Toy, generator: torch.Generator) -> Tensor:
    return torch.randint(toy.examples, (toy.runs, toy.batch), generator=generator)


@dataclass(frozen=True)
class Comparison:
    """Final accuracies: `dense` [runs], `accuracy` by (method, density) [runs]; `reached`: the densities, likewise."""

    dense: Tensor
    accuracy: dict[tuple[str, float], Tensor]
    reached: dict[tuple[str, float], Tensor]


def compare(toy: Toy | None = None, densities: Sequence[float] = (0.05, 0.02)) -> Comparison:
    """Train every method at every final density, and a dense network beside them."""
    toy = toy or Toy()
    generator = torch.Generator().manual_seed(toy.seed)
    data = draw(toy, generator)
    arms = [("dense", 1.0), *product(METHODS, densities)]
    members = Members(toy, data, initial(toy.runs, toy.width, generator), len(arms))
    for i, (method, density) in enumerate(arms):
        if method == "static":
            _random_mask(members, slice(i * toy.runs, (i + 1) * toy.runs), density, generator)
    members.apply_masks()
    first, last = toy.steps // 10, 7 * toy.steps // 10
    when = {first + round((last - first) * k / toy.events): k for k in range(1, toy.events + 1)}
    for step in range(toy.steps):
        grads = members.step(_batch(toy, generator), toy.rate_at(step))
        if (event := when.get(step)) is not None:
            _event(members, arms, grads, event, regeneration_rate(step / toy.steps))
    found, reached = members.accuracy(), members.density()
    pairs = list(enumerate(arms))[1:]
    return Comparison(found[0], {arm: found[i] for i, arm in pairs}, {arm: reached[i] for i, arm in pairs})


def _event(
    members: Members, arms: Sequence[tuple[str, float]], grads: Sequence[Tensor], event: int, exchange: float
) -> None:
    toy = members.toy
    for i, (method, density) in enumerate(arms):
        if method in ("GraNet", "magnitude"):
            for run in range(toy.runs):
                now = density_at(event, toy.events, 1.0, density)
                members.prune(i * toy.runs + run, now, exchange if method == "GraNet" else 0.0, grads)
    members.apply_masks()


def _random_mask(members: Members, rows: slice, density: float, generator: torch.Generator) -> None:
    """Erdos-Renyi densities by layer, positions at random."""
    shapes = [tuple(mask.shape[1:]) for mask in members.masks]
    for mask, share in zip(members.masks, erdos_renyi(shapes, density), strict=True):
        mask[rows] = torch.rand(mask[rows].shape, generator=generator) < share


@dataclass(frozen=True)
class Recovery:
    """Accuracy after a cut and some steps minus accuracy just before, by (time, share pruned, regenerated) [runs]."""

    change: dict[tuple[float, float, bool], Tensor]
    before: dict[float, Tensor]


def recover(
    toy: Toy | None = None,
    times: Sequence[float] = (0.2, 0.6, 0.95),
    shares: Sequence[float] = (0.7, 0.9, 0.97),
    rate: float | None = None,
    exchange: float = 0.5,
) -> Recovery:
    """Pruning plasticity of the dense network at shares of its training, with and without one regeneration.

    `rate` None: recovery goes on along the schedule; a number: at this rate whatever the time.
    """
    toy = toy or Toy()
    for name, values in (("times", times), ("shares", shares)):
        if not values or not all(0 < value < 1 for value in values):
            raise UserError(f"{name} must be shares between 0 and 1, not {list(values)}")
    if rate is not None and not rate > 0:
        raise UserError(f"rate must be positive, not {rate}")
    generator = torch.Generator().manual_seed(toy.seed)
    data = draw(toy, generator)
    dense = Members(toy, data, initial(toy.runs, toy.width, generator), 1)
    stops = {round(time * toy.steps): time for time in times}
    arms = list(product(shares, (False, True)))
    found = Recovery({}, {})
    for step in range(max(stops) + 1):
        grads = dense.step(_batch(toy, generator), toy.rate_at(step))
        if (time := stops.get(step)) is None:
            continue
        found.before[time] = dense.accuracy()[0]
        cut = dense.fork(len(arms))
        for i, (share, again) in enumerate(arms):
            for run in range(toy.runs):
                own = [g[run : run + 1].expand(len(arms) * toy.runs, -1, -1) for g in grads]
                cut.prune(i * toy.runs + run, 1 - share, exchange if again else 0.0, own)
        cut.apply_masks()
        draws = torch.Generator().manual_seed(toy.seed + step)
        for later in range(1, toy.recovery + 1):
            cut.step(_batch(toy, draws), toy.rate_at(step + later) if rate is None else rate)
        after = cut.accuracy()
        found.change.update({(time, *arm): after[i] - found.before[time] for i, arm in enumerate(arms)})
    return found
