"""Two teachers, one student and an attack on Gaussian classes: the smallest faithful run of MTARD, with its control.

Six classes with unit noise in ten dimensions. A clean and an adversarially trained network teach a smaller one on
inputs that are attacked within an L-infinity ball around them. The control is the same run with both temperatures held
at 1; everything else, draws included, is shared. A third arm holds the clean teacher at about the temperature that the
controller finds. Several repetitions run at once: weights have a first axis M of members, and a member's gradient does
not depend on the others. Student and teachers train by SGD with momentum .9 as in the paper, on KL summed over classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UserError
from ._networks import cross_entropy, forward
from .mtard import Balance, teacher_kl, temperature_step, tempered_entropy, weight_step

CLASSES, DIMENSIONS = 6, 10


@dataclass(frozen=True)
class Toy:
    """Settings. `spread`: standard deviation of the class centres; `radius`: of the ball that the attack stays in;
    `held`: temperature of the clean teacher in the third arm."""

    seed: int = 0
    runs: int = 3
    spread: float = 1.1
    held: float = 3.2
    radius: float = 0.5
    attack_steps: int = 5
    batch: int = 64
    teacher_steps: int = 300
    student_steps: int = 600
    teacher_width: int = 48
    student_width: int = 16
    rate: float = 0.05
    balance: Balance = field(default_factory=lambda: Balance(temperature_step=0.01))

    def __post_init__(self) -> None:
        for name in ("runs", "batch", "student_steps", "teacher_steps", "attack_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("spread", "radius", "rate", "held"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")


class Members:
    """M small networks with one hidden layer, [M, n, in] -> [M, n, out]."""

    def __init__(self, members: int, sizes: Sequence[int], generator: torch.Generator) -> None:
        self.parameters: list[Tensor] = []
        for rows, columns in pairwise(sizes):
            weight = torch.randn(members, rows, columns, generator=generator) / rows**0.5
            self.parameters += [weight.requires_grad_(), torch.zeros(members, 1, columns).requires_grad_()]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""
        return forward(self.parameters, x)

    def copied(self, times: int) -> Members:
        """The members `times` times in a row, with weights of their own."""
        copy = object.__new__(Members)
        copy.parameters = [p.detach().repeat(times, 1, 1).requires_grad_() for p in self.parameters]
        return copy


@dataclass(frozen=True)
class Classes:
    """Gaussian classes of every run: centres [R, C, d]."""

    centres: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [R, n, d] and labels [R, n]."""
        runs = len(self.centres)
        labels = torch.randint(CLASSES, (runs, count), generator=generator)
        noise = torch.randn(runs, count, DIMENSIONS, generator=generator)
        return self.centres.gather(1, labels[..., None].expand(-1, -1, DIMENSIONS)) + noise, labels


def attack(network: Members, x: Tensor, labels: Tensor, toy: Toy, start: Tensor) -> Tensor:
    """Projected sign-gradient ascent of the network's own cross-entropy from x + start, inside the ball."""
    shift = start.clone()
    for _ in range(toy.attack_steps):
        shift.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(network(x + shift), labels), shift)
        shift = (shift.detach() + 2 * toy.radius / toy.attack_steps * slope.sign()).clamp(-toy.radius, toy.radius)
    return x + shift


def _start(x: Tensor, toy: Toy, generator: torch.Generator) -> Tensor:
    return toy.radius * (2 * torch.rand(x.shape, generator=generator) - 1)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def teachers(toy: Toy, classes: Classes, generator: torch.Generator) -> tuple[Members, Members]:
    """The robust and the clean teacher of every run."""
    sizes = (DIMENSIONS, toy.teacher_width, toy.teacher_width, CLASSES)
    robust, clean = (Members(toy.runs, sizes, generator) for _ in range(2))

    for network in (robust, clean):
        optimizer = torch.optim.SGD(network.parameters, lr=toy.rate, momentum=0.9)
        for _ in range(toy.teacher_steps):
            x, labels = classes.draw(toy.batch, generator)
            if network is robust:
                x = attack(network, x, labels, toy, _start(x, toy, generator))
            _descend(optimizer, cross_entropy(network(x), labels))
    return robust, clean


@dataclass(frozen=True)
class Outcome:
    """What a student's training left, by arm. Pairs are (robust, clean); entropies in nats, of the tempered teachers
    on the training batch: [steps, R, 2] like temperatures and weights. Accuracies [R] on fresh inputs."""

    entropies: Tensor
    temperatures: Tensor
    weights: Tensor
    clean_accuracy: Tensor
    robust_accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """Entropy of the robust teacher minus that of the clean one, [steps, R]."""
        return self.entropies[..., 0] - self.entropies[..., 1]


ARMS = ("controller", "both at 1", "clean teacher held hot")


def run(toy: Toy | None = None) -> dict[str, Outcome]:
    """Train all arms, students of equal first weights on equal batches; the attack is on each student's own loss."""
    toy = toy or Toy()
    generator = torch.Generator().manual_seed(toy.seed)
    classes = Classes(toy.spread * torch.randn(toy.runs, CLASSES, DIMENSIONS, generator=generator))
    both = tuple(network.copied(len(ARMS)) for network in teachers(toy, classes, generator))
    student = Members(toy.runs, (DIMENSIONS, toy.student_width, CLASSES), generator).copied(len(ARMS))
    optimizer = torch.optim.SGD(student.parameters, lr=toy.rate, momentum=0.9)
    steered, temperatures = _arms(toy)
    weights, first = torch.full_like(temperatures, 0.5), torch.empty(0)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(toy.student_steps):
        losses, entropies = _lesson(both, student, temperatures, _both(toy, classes, toy.batch, generator), toy)
        kept.append((entropies, temperatures, weights))
        first = losses.detach() if step == 0 else first
        temperatures = torch.where(steered, temperature_step(entropies, temperatures, toy.balance), temperatures)
        weights = weight_step(losses.detach(), first, weights, toy.balance)
        _descend(optimizer, (weights * losses).sum())
    return _outcomes(toy, kept, _accuracies(toy, student, classes, generator))


def _arms(toy: Toy) -> tuple[Tensor, Tensor]:
    """Whether a member is steered [M, 1], and its first temperatures [M, 2]."""
    steered = torch.tensor([True, False, False]).repeat_interleave(toy.runs)[:, None]
    start = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, toy.held]]).repeat_interleave(toy.runs, 0)
    return steered, start


def _lesson(
    both: tuple[Members, ...], student: Members, temperatures: Tensor, data: tuple[Tensor, Tensor, Tensor], toy: Toy
) -> tuple[Tensor, Tensor]:
    """Losses with gradient and entropies of the tempered teachers, each [M, 2]."""
    x, labels, start = data
    losses, entropies = [], []
    for i, inputs in enumerate((attack(student, x, labels, toy, start), x)):
        with torch.no_grad():
            teacher = both[i](inputs)
        losses.append(teacher_kl(teacher, student(inputs), temperatures[:, i]))
        entropies.append(tempered_entropy(teacher, temperatures[:, i]))
    return torch.stack(losses, -1), torch.stack(entropies, -1)


def _both(toy: Toy, classes: Classes, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and starts of the attack, the same for every arm."""
    x, labels = classes.draw(count, generator)
    start = _start(x, toy, generator)
    return x.repeat(len(ARMS), 1, 1), labels.repeat(len(ARMS), 1), start.repeat(len(ARMS), 1, 1)


def _accuracies(toy: Toy, student: Members, classes: Classes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, labels, start = _both(toy, classes, 2000, generator)
    attacked = attack(student, x, labels, toy, start)
    with torch.no_grad():
        right = [(student(each).argmax(-1) == labels).float().mean(-1) for each in (x, attacked)]
    return right[0], right[1]


def _outcomes(
    toy: Toy, kept: list[tuple[Tensor, Tensor, Tensor]], accuracies: tuple[Tensor, Tensor]
) -> dict[str, Outcome]:
    entropies, temperatures, weights = (
        torch.stack(values).view(-1, len(ARMS), toy.runs, 2) for values in zip(*kept, strict=True)
    )
    clean, robust = (values.view(len(ARMS), toy.runs) for values in accuracies)
    return {
        arm: Outcome(entropies[:, i], temperatures[:, i], weights[:, i], clean[i], robust[i])
        for i, arm in enumerate(ARMS)
    }
