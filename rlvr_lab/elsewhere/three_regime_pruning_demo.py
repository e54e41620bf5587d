"""Train, prune, retrain over a grid of temperature and load: a teacher's labels with noise, and a small ReLU network.

The temperature is the batch size of the dense training, at a fixed number of epochs and a fixed step: a small batch is
hot. The load is the density after pruning. Retraining is the same for every cell: batch size, epochs, step and orders.

    teacher  y = argmax of a random network of x in R^D, balanced; a share of the *training* labels is drawn anew
    dense    SGD on cross-entropy (nats), batch size T      prune  by magnitude      retrain  SGD, `copies` other orders

Two controls. The error of the dense network, which any benefit for a pruned one has to be held against. And training
for equal *steps*: at equal epochs a batch of 8 makes 32 times the steps of a batch of 256, so that heat and distance
from the start go together. All networks of a cell train side by side, along a leading axis R.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from . import three_regime_pruning as tr


@dataclass(frozen=True)
class Grid:
    """Settings of the grid. Sizes are a toy's; the paper has residual networks on CIFAR-10."""

    batches: tuple[int, ...] = (8, 32, 128, 256)
    """Batch sizes of the dense training, from hot to cold."""
    densities: tuple[float, ...] = (0.6, 0.2, 0.08, 0.04, 0.02)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    classes: int = 8
    inputs: int = 20
    hidden: int = 128
    samples: int = 1500
    tested: int = 2000
    label_noise: float = 0.2
    teacher: int = 16
    """Hidden units of the teacher."""
    epochs: int = 30
    rate: float = 0.05
    retrain_epochs: int = 15
    retrain_batch: int = 32
    retrain_rate: float = 0.05
    copies: int = 2
    """Networks that are retrained from one pruned network; two are compared."""
    scope: tr.Scope = "global"

    def __post_init__(self) -> None:
        for name in ("classes", "inputs", "hidden", "samples", "tested", "teacher", "epochs", "retrain_epochs",
                     "retrain_batch", "copies"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("batches", "densities", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} must not be empty")
        if any(not 1 <= batch <= self.samples for batch in self.batches):
            raise UserError(f"batches must lie between 1 and the {self.samples} samples; got {self.batches}")
        if any(not 0 < density <= 1 for density in self.densities):
            raise UserError(f"densities must be above 0 and at most 1; got {self.densities}")
        if not 0 <= self.label_noise < 1:
            raise UserError(f"label_noise must be at least 0 and below 1, not {self.label_noise}")
        if not (self.rate > 0 and self.retrain_rate > 0):
            raise UserError("rate and retrain_rate must be positive")


class Net(NamedTuple):
    """R networks side by side."""

    weights: list[Tensor]
    """[R, D, H], [R, H, H], [R, H, K]."""
    offsets: list[Tensor]
    """[R, 1, H], [R, 1, H], [R, 1, K]."""


class Data(NamedTuple):
    """One set for each network: training labels with noise, test labels without."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def rows(self, index: Tensor) -> Data:
        """The sets of these networks."""
        return Data(*(part[index] for part in self))


class Outcome(NamedTuple):
    """What the grid gave; axes are batch sizes T, densities D and seeds S."""

    dense: Tensor
    """Test error of the dense networks, [T, S]."""
    error: Tensor
    """Test error after pruning and retraining, mean over the copies, [T, D, S]."""
    lmc: Tensor
    """Linear mode connectivity of the first two copies, from training errors, [T, D, S]; nan for one copy."""
    cka: Tensor
    """Linear CKA of the last hidden layer of the first two copies on test inputs, [T, D, S]; nan for one copy."""
    inherited: Tensor
    """Share of the kept weights that magnitude would have kept at the start of dense training, [T, D, S]."""


def data(grid: Grid) -> Data:
    """A teacher and its data for each seed. Logits of the teacher are standardised, so that classes are balanced."""
    sets = []
    for seed in grid.seeds:
        draws = torch.Generator().manual_seed(100 + seed)
        first = torch.randn(grid.inputs, grid.teacher, generator=draws) / grid.inputs**0.5
        second = torch.randn(grid.teacher, grid.classes, generator=draws)
        x = torch.randn(grid.samples + grid.tested, grid.inputs, generator=draws)
        z = (x @ first).relu() @ second
        y = ((z - z.mean(0)) / z.std(0)).argmax(-1)
        noisy = torch.rand(grid.samples, generator=draws) < grid.label_noise
        drawn = torch.randint(grid.classes, (grid.samples,), generator=draws)
        n = grid.samples
        sets.append((x[:n], torch.where(noisy, drawn, y[:n]), x[n:], y[n:]))
    return Data(*(torch.stack(part) for part in zip(*sets, strict=True)))


def start(grid: Grid) -> Net:
    """First weights, one network for each seed: normal with variance 1 / inputs of the layer, offsets 0."""
    sizes = (grid.inputs, grid.hidden, grid.hidden, grid.classes)
    weights: list[list[Tensor]] = []
    for seed in grid.seeds:
        draws = torch.Generator().manual_seed(200 + seed)
        weights.append([torch.randn(a, b, generator=draws) / a**0.5 for a, b in pairwise(sizes)])
    offsets = [torch.zeros(len(grid.seeds), 1, size) for size in sizes[1:]]
    return Net([torch.stack(layer) for layer in zip(*weights, strict=True)], offsets)


def layers(net: Net, x: Tensor) -> list[Tensor]:
    """Inputs, hidden layers after ReLU, and logits, for x `[R, n, D]`."""
    found, last = [x], len(net.weights) - 1
    for i, (weight, offset) in enumerate(zip(*net, strict=True)):
        z = torch.baddbmm(offset, found[-1], weight)
        found.append(z if i == last else z.relu())
    return found


def error(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Share of wrong answers of each network, `[R]`."""
    return (layers(net, x)[-1].argmax(-1) != y).float().mean(-1)


def train(net: Net, x: Tensor, y: Tensor, order: Tensor, batch: int, rate: float,
          masks: Sequence[Tensor] | None = None) -> Net:  # fmt: skip
    """Plain SGD on the mean cross-entropy of the samples in `order`, `[R, visits]`; masked weights stay as they are.

    Raises UserError for a batch below 1 and a rate that is not positive.
    """
    if batch < 1 or not rate > 0:
        raise UserError(f"batch must be 1 or more and rate positive; got {batch} and {rate}")
    net = Net([weight.clone() for weight in net.weights], [offset.clone() for offset in net.offsets])
    which = torch.arange(len(x))[:, None]
    for visited in torch.split(order, batch, dim=1):
        found = layers(net, x[which, visited])
        wrong = found[-1].softmax(-1)
        wrong.scatter_add_(-1, y[which, visited].unsqueeze(-1), -torch.ones_like(wrong[..., :1]))
        wrong /= visited.shape[1]
        for i in reversed(range(len(net.weights))):
            down, offset_down = found[i].mT @ wrong, wrong.sum(1, keepdim=True)
            wrong = (wrong @ net.weights[i].mT) * (found[i] > 0)
            net.weights[i].sub_(down if masks is None else down * masks[i], alpha=rate)
            net.offsets[i].sub_(offset_down, alpha=rate)
    return net


def _orders(grid: Grid, first: int, visits: int) -> Tensor:
    """An order of visits for each seed, `[S, visits]`: whole passes, the last one cut."""
    passes = math.ceil(visits / grid.samples)
    rows = []
    for seed in grid.seeds:
        draws = torch.Generator().manual_seed(first + seed)
        rows.append(torch.cat([torch.randperm(grid.samples, generator=draws) for _ in range(passes)])[:visits])
    return torch.stack(rows)


def dense_networks(grid: Grid, steps: int | None = None) -> dict[int, Net]:
    """Dense networks by batch size, one for each seed: trained for the grid's epochs, or all for as many `steps`.

    Raises UserError for fewer than one step.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    sets, trained = data(grid), {}
    for batch in grid.batches:
        visits = grid.epochs * grid.samples if steps is None else steps * batch
        trained[batch] = train(start(grid), sets.x, sets.y, _orders(grid, 300, visits), batch, grid.rate)
    return trained


def _pruned(net: Net, density: float, scope: tr.Scope) -> tuple[Net, list[Tensor]]:
    """Each network by itself, and its masks."""
    each = [
        tr.magnitude_masks([weight[i] for weight in net.weights], density, scope) for i in range(len(net.weights[0]))
    ]
    masks = [torch.stack(layer) for layer in zip(*each, strict=True)]
    return Net([weight * mask for weight, mask in zip(net.weights, masks, strict=True)], net.offsets), masks


def _pair(one: Net, other: Net, sets: Data) -> tuple[Tensor, Tensor]:
    """LMC and CKA of two retrained copies of each network, `[R]` each."""

    def on_the_line(t: float) -> Net:
        return Net(*(tr.between(a, b, t) for a, b in zip(one, other, strict=True)))

    path = torch.stack([error(on_the_line(k / 10), sets.x, sets.y) for k in range(11)], -1)
    features = [layers(net, sets.x_test)[-2] for net in (one, other)]
    return tr.mode_connectivity(path).lmc, torch.tensor([tr.linear_cka(a, b) for a, b in zip(*features, strict=True)])


def measure(grid: Grid, dense: dict[int, Net]) -> Outcome:
    """Prune, retrain and compare dense networks (one for each seed, by batch size) at all densities of the grid.

    Raises UserError where `dense` is empty or has another number of networks than the grid has seeds.
    """
    sets, count = data(grid), len(grid.seeds)
    if not dense or any(len(net.weights[0]) != count for net in dense.values()):
        raise UserError(f"dense must hold networks by batch size, one for each of the {count} seeds")
    shape = (len(dense), count)
    everyone = torch.arange(count).repeat(len(dense))
    own = sets.rows(everyone)
    stack = Net(
        *([torch.cat(layer) for layer in zip(*part, strict=True)] for part in zip(*dense.values(), strict=True))
    )
    first, columns = start(grid), []
    for density in grid.densities:
        net, masks = _pruned(stack, density, grid.scope)
        before = [mask[everyone] for mask in _pruned(first, density, grid.scope)[1]]
        both = sum((a & b).flatten(1).sum(1) for a, b in zip(masks, before, strict=True))
        kept = sum(mask.flatten(1).sum(1) for mask in masks)
        floats, visits = [mask.float() for mask in masks], grid.retrain_epochs * grid.samples
        copies = [train(net, own.x, own.y, _orders(grid, 1000 * (copy + 1), visits)[everyone], grid.retrain_batch,
                        grid.retrain_rate, floats) for copy in range(grid.copies)]  # fmt: skip
        wrong = torch.stack([error(copy, own.x_test, own.y_test) for copy in copies]).mean(0)
        nothing = torch.full_like(wrong, math.nan)
        lmc, cka = _pair(copies[0], copies[1], own) if grid.copies > 1 else (nothing, nothing)
        columns.append([part.view(shape) for part in (wrong, lmc, cka, torch.as_tensor(both / kept))])
    found = [torch.stack(part, 1) for part in zip(*columns, strict=True)]
    return Outcome(error(stack, own.x_test, own.y_test).view(shape), *found)
