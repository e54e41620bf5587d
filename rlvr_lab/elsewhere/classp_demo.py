"""Two tasks in a row, and what the second leaves of the first: the smallest run of CLASSP with its controls.

Five Gaussian classes in R^32. The centres of task B are half those of A under other labels, half new ones, so that the
tasks conflict [inferred: the card says no more than that]. Every arm trains A by plain descent and gathers its history
meanwhile, as the paper's recipe has it, then B with its own rule at every rate of a sweep. Arms without a gate start B
from the same weights, and all draws are shared. Controls: descent without history; "no gate" with the history of A
forgotten, which scales the steps of B and remembers nothing; AdaGrad, the history with p = 2 and without a gate; and
the released gate of whole tensors, which must equal "no gate" to the bit.

Networks of all seeds and rates run at once; a member's gradient does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ._networks import cross_entropy, forward, stacked_mlp
from .classp import Classp

CLASSES, DIMENSIONS = 5, 32


def _sweep(low: float, high: float, count: int = 7) -> tuple[float, ...]:
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


@dataclass(frozen=True)
class Arm:
    """How B is learned: rates of B, settings of `Classp` for both tasks, whether B divides by the history, and whether
    the history of A is carried over or B starts its own."""

    rates: tuple[float, ...]
    settings: Mapping[str, Any]
    scaling: bool = True
    carried: bool = True


ARMS: Mapping[str, Arm] = {
    "descent": Arm(_sweep(0.002, 0.06), {"threshold": 0.0}, scaling=False),
    "AdaGrad": Arm(_sweep(0.001, 0.02), {"threshold": 0.0, "power": 2.0}),
    "no gate": Arm(_sweep(0.007, 0.12), {"threshold": 0.0}),
    "theta 1e-4": Arm(_sweep(0.007, 0.12), {"threshold": 1e-4}),
    "forgotten": Arm(_sweep(0.003, 0.03), {"threshold": 0.0}, carried=False),
}


RELEASED = {"released gate": Arm(ARMS["no gate"].rates, {"threshold": 0.5, "rule": "released"})}
"""The gate of the released code, at the rates of the arm that it should equal."""


@dataclass(frozen=True)
class TwoTasks:
    """Settings of the toy. `spread`: standard deviation of the centres, under unit noise."""

    seed: int = 0
    runs: int = 5
    spread: float = 0.95
    width: int = 128
    first_steps: int = 300
    second_steps: int = 200
    batch: int = 32
    first_rate: float = 0.2
    test: int = 1500
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)

    def __post_init__(self) -> None:
        for name in ("runs", "width", "first_steps", "second_steps", "batch", "test"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("spread", "first_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if not self.arms or not all(arm.rates and min(arm.rates) > 0 for arm in self.arms.values()):
            raise UserError("arms must name at least one arm, each with positive rates")


@dataclass(frozen=True)
class Curve:
    """One arm. Accuracies on fresh inputs: `first` of A before B [runs], `kept` of A and `learned` of B after it
    [runs, rates]; `moved` is the mean share of weights with an open gate in a step of B [rates]."""

    rates: tuple[float, ...]
    first: Tensor
    kept: Tensor
    learned: Tensor
    moved: Tensor


Layers = list[Tensor]


def network(runs: int, width: int, generator: torch.Generator) -> Layers:
    """An MLP with two hidden layers for every run."""
    return stacked_mlp(runs, (DIMENSIONS, width, width, CLASSES), generator)


@dataclass(frozen=True)
class Task:
    """Centres [runs, classes, dimensions]."""

    centres: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [runs, n, d] and labels [runs, n]."""
        labels = torch.randint(CLASSES, (len(self.centres), count), generator=generator)
        means = self.centres.gather(1, labels[..., None].expand(-1, -1, DIMENSIONS))
        return means + torch.randn(means.shape, generator=generator), labels


def tasks(toy: TwoTasks, generator: torch.Generator) -> tuple[Task, Task]:
    """A, and B whose classes stand half way from A's next class to places of their own, equally far apart."""
    old, new = toy.spread * torch.randn(2, toy.runs, CLASSES, DIMENSIONS, generator=generator)
    return Task(old), Task(0.5 * old.roll(1, dims=1) + 0.75**0.5 * new)


def accuracy(layers: Sequence[Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers, [members]."""
    with torch.no_grad():
        return (forward(layers, x).argmax(-1) == labels).double().mean(-1)


def _train(optimizer: Classp, groups: Sequence[Layers], task: Task, steps: int, toy: TwoTasks, seed: int) -> float:
    """Steps of the optimizer on mean cross-entropies in nats, one for every member; `groups` are the parameters of each
    rate. Returns the mean share of weights that moved."""
    generator, share = torch.Generator().manual_seed(seed), 0.0
    for _ in range(steps):
        x, labels = (values.repeat(len(groups), *[1] * (values.ndim - 1)) for values in task.draw(toy.batch, generator))
        stacked = [torch.cat(parts) for parts in zip(*groups, strict=True)]
        optimizer.zero_grad()
        cross_entropy(forward(stacked, x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        share += optimizer.moved_share() / steps
    return share


def run(toy: TwoTasks | None = None) -> dict[str, Curve]:
    """Train every arm on A, then on B at each of its rates."""
    toy = toy or TwoTasks()
    generator = torch.Generator().manual_seed(toy.seed)
    a, b = tasks(toy, generator)
    start = network(toy.runs, toy.width, generator)
    tests = a.draw(toy.test, generator), b.draw(toy.test, generator)
    return {name: _arm(toy, arm, a, b, start, tests) for name, arm in toy.arms.items()}


def _arm(
    toy: TwoTasks, arm: Arm, a: Task, b: Task, start: Layers, tests: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Curve:
    layers = [p.clone().requires_grad_() for p in start]
    first = Classp(layers, toy.first_rate, scaling=False, **arm.settings)
    _train(first, [layers], a, toy.first_steps, toy, toy.seed + 1)
    before = accuracy(layers, *tests[0])
    copies = [[p.detach().clone().requires_grad_() for p in layers] for _ in arm.rates]
    groups = [{"params": own, "lr": rate} for own, rate in zip(copies, arm.rates, strict=True)]
    second = Classp(groups, scaling=arm.scaling, **arm.settings)
    for own in copies:
        for p, old in zip(own, layers, strict=True):
            if arm.carried:
                second.state[p]["history"] = first.state[old]["history"].clone()
    moved = _train(second, copies, b, toy.second_steps, toy, toy.seed + 2)
    kept, learned = (torch.stack([accuracy(own, *test) for own in copies], 1) for test in tests)
    return Curve(arm.rates, before, kept, learned, torch.tensor(moved))
