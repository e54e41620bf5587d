"""Concept shift in a toy: ten Gaussian classes whose labels swap, and learners that hold or move their learning rate.

One stream of samples and one of swaps for each seed; every kind of learner sees the same. Accuracy is *online*: each
batch is guessed before it is learned. The learners:

| kind | learning rate |
|---|---|
| constant | eta_0 |
| random | with probability 1/2 takes the object, whatever follows; the step follows the label |
| homeostatic | takes it where a trial on the memory says so (`homeostatic_nets.decide`) |
| guess | as homeostatic, but the step follows its own guess: nothing can go wrong for it |

Batch, memory and relative step are the paper's; stream and network are a toy, where the paper has MNIST. The swaps
here are evenly spaced over an epoch for any number of them; the released code tests for a remainder, which comes out
evenly for some numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError
from . import homeostatic_nets as hn

Kind = Literal["constant", "random", "homeostatic", "guess"]
Memory = Literal["seen", "current"]


@dataclass(frozen=True)
class Shift:
    """Settings of the stream and of the learner."""

    classes: int = 10
    inputs: int = 40
    hidden: int = 48
    samples: int = 3000
    """In one epoch; the same ones come back in another order."""
    epochs: int = 4
    batch: int = 10
    memory: int = 20
    relative_step: float = 0.1
    """delta as a share of eta_0."""
    spread: float = 0.5
    """Standard deviation of the class means in each input."""
    noise: float = 0.5
    """Standard deviation of the samples around the mean of their class in each input."""
    labels_in_memory: Memory = "seen"
    """Labels as they were when seen, or as they are after the last swap (the released code)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        counts = {"classes": self.classes, "inputs": self.inputs, "hidden": self.hidden, "batch": self.batch,
                  "epochs": self.epochs, "memory": self.memory, "seeds": len(self.seeds)}  # fmt: skip
        for name, value in counts.items():
            if value < (2 if name == "classes" else 1):
                raise UserError(f"{name} must be at least {2 if name == 'classes' else 1}, not {value}")
        if self.samples % self.batch or self.memory % self.batch:
            raise UserError("samples and memory must be whole numbers of batches")
        if self.samples < 2 * self.memory:
            raise UserError(f"samples must be at least twice the memory of {self.memory}, not {self.samples}")
        if not (self.relative_step > 0 and self.spread > 0 and self.noise > 0):
            raise UserError("relative_step, spread and noise must be positive")
        if self.labels_in_memory not in get_args(Memory):
            raise UserError(f"labels_in_memory must be 'seen' or 'current', not {self.labels_in_memory!r}")

    @property
    def steps(self) -> int:
        """Batches in all epochs together."""
        return self.epochs * (self.samples // self.batch)


class Arm(NamedTuple):
    """One learner under one rate of shift."""

    kind: Kind
    swaps: int
    """Swaps of two labels in an epoch."""
    eta: float
    """Its learning rate at the start."""


class Run(NamedTuple):
    """What came out of some arms: `[arms, seeds]`, and the rates `[steps, arms, seeds]`."""

    accuracy: Tensor
    """Online accuracy after the first quarter."""
    taken: Tensor
    """Share of the batches whose object was taken."""
    eta: Tensor

    @property
    def mean_eta(self) -> Tensor:
        """Mean learning rate after the first quarter, `[arms, seeds]`."""
        return self.eta[len(self.eta) // 4 :].mean(0)


class Stream(NamedTuple):
    """What the learners of one seed see, before labels are given to classes."""

    x: Tensor
    """Inputs, `[steps, batch, D]`."""
    source: Tensor
    """The class that each was drawn from, `[steps, batch]`; its label is the one that the class has by then."""


def stream(settings: Shift, seed: int) -> Stream:
    """Samples of `classes` Gaussian clouds around random means, in a new order in each epoch."""
    draws = torch.Generator().manual_seed(1000 + seed)
    means = settings.spread * torch.randn(settings.classes, settings.inputs, generator=draws)
    source = torch.randint(settings.classes, (settings.samples,), generator=draws)
    x = means[source] + settings.noise * torch.randn(settings.samples, settings.inputs, generator=draws)
    order = torch.cat([torch.randperm(settings.samples, generator=draws) for _ in range(settings.epochs)])
    shape = (settings.steps, settings.batch)
    return Stream(x[order].view(*shape, -1), source[order].view(shape))


def label_maps(settings: Shift, swaps: int, seed: int) -> Tensor:
    """The label of each class at each step, `[steps, classes]`: `swaps` swaps of two random classes in an epoch.

    The times are evenly spaced. Raises UserError for a negative number, or more than one swap a batch.
    """
    per_epoch = settings.samples // settings.batch
    if not 0 <= swaps <= per_epoch:
        raise UserError(f"swaps must be between 0 and {per_epoch}, the batches of an epoch; got {swaps}")
    draws = torch.Generator().manual_seed(2000 + seed)
    current, maps = torch.arange(settings.classes), []
    for number in range(settings.steps):
        if (number + 1) * swaps // per_epoch > number * swaps // per_epoch and number:
            one, other = torch.randperm(settings.classes, generator=draws)[:2].tolist()
            current = current.clone()
            current[one], current[other] = current[other].clone(), current[one].clone()
        maps.append(current)
    return torch.stack(maps)


def _start(settings: Shift, arms: int) -> hn.Weights:
    """The same first weights for every arm of a seed: `[arms, seeds, ...]`."""
    pairs = []
    for seed in settings.seeds:
        draws = torch.Generator().manual_seed(3000 + seed)
        first = torch.randn(settings.hidden, settings.inputs, generator=draws) / settings.inputs**0.5
        second = torch.randn(settings.classes, settings.hidden, generator=draws) / settings.hidden**0.5
        pairs.append((first, second))
    first, second = (torch.stack(part).expand(arms, *(-1,) * 3).clone() for part in zip(*pairs, strict=True))
    return hn.Weights(first, second)


class _Batch(NamedTuple):
    """One step for all arms and seeds: inputs `[seeds, batch, D]`, labels `[arms, seeds, batch]`, and the memory."""

    x: Tensor
    y: Tensor
    memory: tuple[Tensor, Tensor]


def _batches(arms: Sequence[Arm], settings: Shift) -> Iterator[_Batch]:
    streams = [stream(settings, seed) for seed in settings.seeds]
    maps = torch.stack(
        [torch.stack([label_maps(settings, arm.swaps, seed) for seed in settings.seeds]) for arm in arms]
    )
    x, source = (torch.stack(part) for part in zip(*streams, strict=True))  # [seeds, steps, batch, ...]
    y = maps.gather(-1, source.expand(len(arms), *source.shape))  # [arms, seeds, steps, batch]
    back = settings.memory // settings.batch
    for t in range(settings.steps):
        seen = slice(max(0, t - back), t)
        then = y[:, :, seen]
        if settings.labels_in_memory == "current":
            then = maps[:, :, t, None].expand_as(maps[:, :, seen]).gather(-1, source[:, seen].expand_as(then))
        yield _Batch(x[:, t], y[:, :, t], (x[:, seen].flatten(1, 2), then.flatten(2)))


def _regulate(arms: Sequence[Arm], state: tuple[hn.Weights, hn.Weights, Tensor], batch: _Batch, guess: Tensor,
              settings: Shift, coin: torch.Generator) -> Tensor:  # fmt: skip
    """Move the rates in place, kind by kind, once there is something to remember; returns who took the object."""
    weights, grads, eta = state
    took = torch.zeros_like(eta, dtype=torch.bool)
    for kind in ("random", "homeostatic", "guess"):
        rows = [i for i, arm in enumerate(arms) if arm.kind == kind]
        if not rows or not batch.memory[1].shape[-1]:
            continue
        size = torch.tensor([[settings.relative_step * arms[row].eta] for row in rows])
        label, own = batch.y[rows][..., -1], eta[rows]
        if kind == "random":
            took[rows] = torch.rand(own.shape, generator=coin) < 0.5
            eta[rows] = torch.where(took[rows], hn.moved(own, label, size), own)
            continue
        done = hn.decide(
            hn.Weights(*(part[rows] for part in weights)),
            hn.Weights(*(part[rows] for part in grads)),
            own,
            (batch.memory[0].expand(len(rows), *batch.memory[0].shape), batch.memory[1][rows]),
            guess[rows][..., -1],
            label,
            batch=settings.batch,
            size=size,
            consequence="guess" if kind == "guess" else "label",
        )
        took[rows], eta[rows] = done.taken, done.eta
    return took


def simulate(arms: Sequence[Arm], settings: Shift | None = None) -> Run:
    """All arms on all seeds side by side. The same arms and settings give the same result on a CPU.

    Raises UserError for no arm, an unknown kind or a learning rate that is not positive.
    """
    settings = settings or Shift()
    if not arms or any(arm.kind not in get_args(Kind) or not arm.eta > 0 for arm in arms):
        raise UserError(f"arms must not be empty; each needs a kind of {get_args(Kind)} and a positive eta")
    weights = _start(settings, len(arms))
    eta = torch.tensor([[arm.eta] * len(settings.seeds) for arm in arms])
    coin, path, right, taken = torch.Generator().manual_seed(4000), [], [], torch.zeros_like(eta)
    for batch in _batches(arms, settings):
        grads, z = hn.gradient(weights, batch.x.expand(len(arms), *batch.x.shape), batch.y)
        guess = z.argmax(-1)
        right.append((guess == batch.y).float().mean(-1))
        took = _regulate(arms, (weights, grads, eta), batch, guess, settings, coin)
        taken += took / settings.steps
        weights = hn.step(weights, grads, eta, settings.batch)
        path.append(eta.clone())
    return Run(torch.stack(right[settings.steps // 4 :]).mean(0), taken, torch.stack(path))
