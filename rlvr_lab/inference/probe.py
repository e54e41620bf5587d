r"""The two-layer probe of DiffAdapt (arXiv 2510.19669) on a prompt's final hidden state.

    p(class | h) = softmax(W2 relu(W1 h + b1) + b2)        loss = mean cross-entropy over problems

with h [d] the last token's state after prefill. Only W1 [m, d], b1, W2 [3, m], b2 are trained; no class weights. The
width m is not published: 256, or d / 2 where the model is narrower than 512 [inferred]. No official code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from .difficulty import CLASSES


def probe_logits(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """W2 relu(W1 h + b1) + b2 for states [N, d]: logits [N, 3] in the order easy, normal, hard."""
    return nn.functional.linear(nn.functional.linear(hidden, w1, b1).relu(), w2, b2)


def probe_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over problems; labels [N] are places in `CLASSES`."""
    return nn.functional.cross_entropy(logits, labels)


class Probe(nn.Module):
    """The probe as a module; `width` is d, `hidden` is m."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        m = hidden or min(256, max(1, width // 2))
        self.first, self.second = nn.Linear(width, m), nn.Linear(m, len(CLASSES))

    @property
    def width(self) -> int:
        """Size of the states that it reads."""
        return self.first.in_features

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [N, 3] of states [N, d]."""
        return probe_logits(hidden, self.first.weight, self.first.bias, self.second.weight, self.second.bias)

    @torch.no_grad()
    def predict(self, hidden: Tensor) -> list[str]:
        """The most likely class of each state."""
        return [CLASSES[i] for i in self(hidden).argmax(-1).tolist()]


@dataclass(frozen=True)
class ProbeSettings:
    """AdamW of the paper's recipe; rows of a batch and weight decay (torch's) are not published [inferred]."""

    lr: float = 1e-3
    epochs: int = 100
    rows: int = 32
    weight_decay: float = 0.01
    hidden: int | None = None


@dataclass(frozen=True)
class Assessment:
    """How a probe does on labelled problems. `confusion[i][j]`: problems of class i that were called class j."""

    confusion: tuple[tuple[int, ...], ...]

    @property
    def problems(self) -> int:
        """Number of problems."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """Share of problems called by their class; nan without a problem."""
        return _share(sum(row[i] for i, row in enumerate(self.confusion)), self.problems)

    @property
    def proportions(self) -> tuple[float, ...]:
        """Share of each class among the labels."""
        return tuple(_share(sum(row), self.problems) for row in self.confusion)

    @property
    def called(self) -> tuple[float, ...]:
        """Share of each class among the calls; 1 for one class is the collapse to the majority."""
        return tuple(_share(sum(column), self.problems) for column in zip(*self.confusion, strict=True))

    @property
    def majority(self) -> float:
        """Accuracy of always calling the most frequent class of these labels."""
        return max(self.proportions)

    def __str__(self) -> str:
        lines = [f"{self.problems} problems, accuracy {self.accuracy:.3f}, majority class {self.majority:.3f}"]
        lines.append(f"{'label':<8}" + "".join(f"{name:>8}" for name in CLASSES) + "   (called)")
        lines += [
            f"{name:<8}" + "".join(f"{n:>8}" for n in row) for name, row in zip(CLASSES, self.confusion, strict=True)
        ]
        return "\n".join(lines)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def assess(called: Sequence[str], labels: Sequence[str]) -> Assessment:
    """Count calls against labels. Raises ValueError where the lengths differ."""
    counts = Counter(zip(labels, called, strict=True))
    return Assessment(tuple(tuple(counts[i, j] for j in CLASSES) for i in CLASSES))


def fit_probe(
    states: Tensor,
    labels: Sequence[str],
    generator: torch.Generator,
    settings: ProbeSettings | None = None,
) -> Probe:
    """Train a probe on states [N, d] and their labels; initial weights and order of batches are the generator's.

    Raises UserError where all labels are one class, which no probe can learn anything from, and for states that are
    not finite.
    """
    settings = settings or ProbeSettings()
    if len(set(labels)) < 2:
        only = labels[0] if labels else "none"
        raise UserError(
            f"all {len(labels)} problems have one label, '{only}': a probe needs two classes; change thresholds alpha, "
            "beta, gamma, or give problems of more different difficulty"
        )
    if not bool(torch.isfinite(states).all()):
        raise UserError("hidden states are not finite: the model's weights are broken")
    probe = _initial(states.shape[1], settings.hidden, generator).to(states.dtype)
    y = torch.tensor([CLASSES.index(label) for label in labels])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for _ in range(settings.epochs):
        for rows in torch.split(torch.randperm(len(y), generator=generator), settings.rows):
            optimizer.zero_grad()
            probe_loss(probe(states[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return probe.eval()


def _initial(width: int, hidden: int | None, generator: torch.Generator) -> Probe:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return Probe(width, hidden)
