r"""How hard a problem is for a model: generation entropy, proxy labels, the curve over difficulty, oracle and control.

The functions of DiffAdapt (arXiv 2510.19669; no official code), natural logs, entropies in nats.

    H_t = -sum_v p_tv ln p_tv        H(sample) = mean_t H_t        H(problem) = mean over samples that have a token

Entropies for labels are of the sampling distribution at temperature 1 over the whole vocabulary. The mean over tokens
falls with length by itself where long responses have long low-entropy tails, so `sample_entropies` also gives the sum
and the mean of the first k tokens: a curve over difficulty that is not seen in these is one of length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import UserError
from .lm import Question, Response, Verify, verified

CLASSES = ("easy", "normal", "hard")
NORMAL = CLASSES.index("normal")


def generation_entropy(token_entropy: Sequence[Tensor]) -> Tensor:
    """Mean token entropy of each sample [n], from one tensor [T_i] per sample; nan for a sample without a token."""
    return torch.stack([h.mean() for h in token_entropy])


def problem_entropy(per_sample: Tensor) -> float:
    """Mean over the samples that have a token; nan where none has."""
    return float(per_sample.nanmean())


def sample_entropies(token_entropy: Sequence[float], first: int = 5) -> tuple[float, float, float]:
    """Mean over tokens, sum over tokens, and mean of the first `first` tokens, of one sample; nan means without a
    token, sum 0."""
    h = np.asarray(token_entropy, dtype=float)
    return (float(h.mean()), float(h.sum()), float(h[:first].mean())) if len(h) else (math.nan, 0.0, math.nan)


def measure(
    groups: Sequence[Sequence[Response]], questions: Sequence[Question], verify: Verify
) -> tuple[list[float], list[float]]:
    """Share of correct samples, and generation entropy, of each question from its responses."""
    rate, entropy = [], []
    for group, question in zip(groups, questions, strict=True):
        rate.append(sum(verified(group, [question] * len(group), verify) or ()) / len(group))
        entropy.append(problem_entropy(generation_entropy([torch.tensor(r.entropy) for r in group])))
    return rate, entropy


@dataclass(frozen=True)
class Thresholds:
    """alpha: share of correct samples from which a problem may be normal; beta: most entropy of a normal one; gamma:
    share of correct samples below which it is hard. The paper does not publish its values.

    Raises UserError unless 0 <= gamma <= alpha <= 1 and beta is not negative.
    """

    alpha: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= self.alpha <= 1:
            raise UserError(f"thresholds need 0 <= gamma <= alpha <= 1, not gamma {self.gamma} and alpha {self.alpha}")
        if not self.beta >= 0:
            raise UserError(f"threshold beta is an entropy in nats and at least 0, not {self.beta}")


def proxy_labels(correct_rate: Sequence[float], entropy: Sequence[float], thresholds: Thresholds) -> list[str]:
    """Label of each problem: normal if rate >= alpha and entropy <= beta; else hard if rate < gamma; else easy.

    So what is right but uncertain is easy ("overthinking"), and so is all of medium accuracy. A problem whose samples
    are all empty has an entropy of nan and is never normal. Raises ValueError where the lengths differ.
    """
    at = thresholds
    return [proxy_label(c, h, at.alpha, at.beta, at.gamma) for c, h in zip(correct_rate, entropy, strict=True)]


def proxy_label(rate: float, entropy: float, alpha: float, beta: float, gamma: float) -> str:
    """The rules on one problem, for any thresholds."""
    if rate >= alpha and entropy <= beta:
        return "normal"
    return "hard" if rate < gamma else "easy"


def tercile_thresholds(correct_rate: Sequence[float], entropy: Sequence[float]) -> Thresholds:
    """Thresholds from the scatter of training problems: alpha and gamma the upper and lower tercile of the rates, beta
    the median entropy of the problems at or above alpha.

    Ours [inferred]: the paper chooses them per model, from the same scatter, with a small validation check that it
    does not describe. Raises UserError without a problem that has an entropy.
    """
    rate, h = np.asarray(correct_rate, dtype=float), np.asarray(entropy, dtype=float)
    known = np.isfinite(h)
    if not known.any():
        raise UserError("no problem has a sample with a token, so thresholds cannot be chosen; give `thresholds`")
    gamma, alpha = (float(np.quantile(rate[known], q)) for q in (1 / 3, 2 / 3))
    return Thresholds(alpha, float(np.median(h[known & (rate >= alpha)])), gamma)


@dataclass(frozen=True)
class UCurve:
    """Entropy over levels of difficulty 1, 2, ..., from easy to hard. Percentages are nan where they divide by 0."""

    argmin_level: int
    """First level of the least entropy, counted from 1."""
    drop: float
    """Percent from the first level down to the least."""
    rise: float
    """Percent from the least up to the last level."""
    quadratic: float
    """Coefficient of level squared in the least-squares parabola."""

    @property
    def is_u_shaped(self) -> bool:
        """The least entropy lies inside, and both ends above it. Noise makes a flat curve U-shaped too: see `drop`."""
        return self.drop > 0 and self.rise > 0


def u_curve(entropy_by_difficulty: Sequence[float]) -> UCurve:
    """Summary of a curve (definitions ours [inferred]). Raises ValueError for fewer than three levels, or a nan."""
    h = np.asarray(entropy_by_difficulty, dtype=float)
    if len(h) < 3 or not np.isfinite(h).all():
        raise ValueError(f"a curve needs at least three finite levels, not {list(entropy_by_difficulty)}")
    least = int(h.argmin())
    quadratic = float(np.polyfit(np.arange(1, len(h) + 1), h, 2)[0])
    return UCurve(least + 1, _percent(h[0] - h[least], h[0]), _percent(h[-1] - h[least], h[least]), quadratic)


def _percent(part: float, whole: float) -> float:
    return float(100 * part / whole) if whole else math.nan


@dataclass(frozen=True)
class Oracle:
    """The choice per problem that knows all outcomes, and what it gives beside the normal strategy for all."""

    choice: tuple[str, ...]
    accuracy: float
    mean_tokens: float
    accuracy_normal: float
    saving: float
    """Percent of tokens saved against normal; nan where normal uses none."""


def oracle_choice(correct: ArrayLike, tokens: ArrayLike) -> NDArray[np.int64]:
    """Strategy [N] from correctness and tokens [N, 3]: the correct one with the fewest tokens, else the cheapest.

    Ties go to the first of easy, normal, hard (definition ours [inferred]). Raises ValueError for other shapes.
    """
    c, t = np.asarray(correct, dtype=bool), np.asarray(tokens, dtype=float)
    if c.shape != t.shape or c.ndim != 2 or c.shape[1] != len(CLASSES):
        raise ValueError(f"correct and tokens must both be [N, {len(CLASSES)}], not {c.shape} and {t.shape}")
    best: NDArray[np.int64] = np.where(c | ~c.any(1, keepdims=True), t, np.inf).argmin(1)
    return best


def oracle(correct: ArrayLike, tokens: ArrayLike) -> Oracle:
    """`oracle_choice` with its figures. Raises ValueError for no problem, or shapes other than [N, 3]."""
    choice = oracle_choice(correct, tokens)
    if not len(choice):
        raise ValueError("an oracle needs at least one problem")
    c, t, rows = np.asarray(correct, dtype=float), np.asarray(tokens, dtype=float), np.arange(len(choice))
    used, normal = t[rows, choice].mean(), t[:, NORMAL].mean()
    return Oracle(
        choice=tuple(CLASSES[i] for i in choice),
        accuracy=float(c[rows, choice].mean()),
        mean_tokens=float(used),
        accuracy_normal=float(c[:, NORMAL].mean()),
        saving=_percent(normal - used, normal),
    )


def matched_random(choice: Sequence[str], generator: torch.Generator) -> list[str]:
    """The same strategies dealt to the problems at random: the control with the same proportions.

    Over many deals each problem gets strategy s with its share p_s, so a figure of the control has the expectation
    sum_s p_s mean(figure of s). What an adaptive choice has beyond it is what it knows of the problems.
    """
    order = torch.randperm(len(choice), generator=generator, device=generator.device)
    return [choice[i] for i in order.tolist()]
