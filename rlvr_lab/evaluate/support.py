r"""Support dynamics: which problems a trained model keeps, gains and loses (The Invisible Leash, arXiv 2507.14843).

With k samples per problem from the base model and from the trained one, a problem is in a model's empirical support
when at least `min_hits` of its samples are correct (1 in the paper). One unit per *problem*, as in all of its tables:

|             | trained hits  | trained misses     |
|-------------|---------------|--------------------|
| base hits   | P (preserved) | S (shrunk)         |
| base misses | E (expanded)  | O (out of support) |

    SRR = P / (P + S)     NDR = E / (P + E)     SDS = harmonic mean of both = 2 P E / (P^2 + 2 P E + E S)
    NSCR = (E - S) / (P + E + S)

An undefined ratio is None, never 0. Add counts over data sets first, divide afterwards. With finite k both S and E hold
sampling noise: two sample sets of the *same* model give S about equal to E, above 0. Report that null (`base_null`, or
`support_counts` on two independent sets of the base) beside every result.

**Theorem C.6 of the paper ("entropy always falls") is false as stated**: its proof uses H(pi) = H(q) - KL(pi || q),
where the identity is H(pi) = -sum pi ln q - KL(pi || q). For q = (0.9, 0.05, 0.05) with the two rare answers correct
the tilt raises the entropy from 0.394 to 1.097 at beta = 3 (`exponential_tilt`); the proof's formula would give a
negative entropy. For a binary reward with success J, and H_C, H_W the entropies among correct and among wrong answers,
tilting raises the entropy exactly while J < e^H_C / (e^H_C + e^H_W), whatever the mode is [inferred; our derivation,
checked in the chapter]. No official code. Natural logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


@dataclass(frozen=True)
class SupportCounts:
    """Numbers of problems; `a + b` adds data sets. Every ratio is None where its denominator is 0."""

    preserved: int
    expanded: int
    shrunk: int
    out_of_support: int

    def __add__(self, other: SupportCounts) -> SupportCounts:
        return SupportCounts(
            self.preserved + other.preserved,
            self.expanded + other.expanded,
            self.shrunk + other.shrunk,
            self.out_of_support + other.out_of_support,
        )

    @property
    def problems(self) -> int:
        """P + E + S + O."""
        return self.preserved + self.expanded + self.shrunk + self.out_of_support

    @property
    def support_retention(self) -> float | None:
        """SRR: share of the base model's problems that are kept."""
        return _ratio(self.preserved, self.preserved + self.shrunk)

    @property
    def net_discovery(self) -> float | None:
        """NDR: share of the trained model's problems that are new."""
        return _ratio(self.expanded, self.preserved + self.expanded)

    @property
    def dynamic_score(self) -> float | None:
        """SDS: harmonic mean of SRR and NDR, in the form that needs neither."""
        p, e, s = self.preserved, self.expanded, self.shrunk
        return _ratio(2 * p * e, p * p + 2 * p * e + e * s)

    @property
    def net_change(self) -> float | None:
        """NSCR: gains minus losses, over all problems in either support."""
        return _ratio(self.expanded - self.shrunk, self.preserved + self.expanded + self.shrunk)

    @property
    def pass_base(self) -> float | None:
        """Share of problems in the base model's support; its plain pass@k for min_hits = 1."""
        return _ratio(self.preserved + self.shrunk, self.problems)

    @property
    def pass_trained(self) -> float | None:
        """Share of problems in the trained model's support."""
        return _ratio(self.preserved + self.expanded, self.problems)


def total(counts: Iterable[SupportCounts]) -> SupportCounts:
    """Counts added over data sets."""
    return sum(counts, SupportCounts(0, 0, 0, 0))


def support_counts(base_correct: ArrayLike, trained_correct: ArrayLike, min_hits: int = 1) -> SupportCounts:
    """P, E, S, O from correctness [N problems, k samples] of each model; the two may have different k.

    Compare at equal k and temperature, and score with a lenient reader of answers: format failures look like missing
    support. Raises ValueError where the numbers of problems differ or `min_hits` is below 1.
    """
    base, trained = (np.asarray(x, dtype=bool) for x in (base_correct, trained_correct))
    if min_hits < 1:
        raise ValueError(f"min_hits must be at least 1, not {min_hits}")
    if len(base) != len(trained):
        raise ValueError(f"{len(base)} problems of the base model against {len(trained)} of the trained one")
    # an empty list of problems has no second axis
    b, t = (x.reshape(len(x), -1).sum(1) >= min_hits if len(x) else np.zeros(0, bool) for x in (base, trained))
    return SupportCounts(int((b & t).sum()), int((~b & t).sum()), int((b & ~t).sum()), int((~b & ~t).sum()))


def base_null(
    base_correct: ArrayLike, rng: np.random.Generator, k: int | None = None, draws: int = 200, min_hits: int = 1
) -> list[SupportCounts]:
    """The base model against itself: what S, E and NSCR look like when nothing was trained.

    Each draw deals every problem's samples into two disjoint sets of k (default: half of them) and compares the two.
    The sets are independent samples of one model, so E and S have equal means. Set it against a trained model measured
    at the same k. Raises ValueError where a problem has fewer than 2k samples.
    """
    correct = np.asarray(base_correct, dtype=bool)
    k = correct.shape[1] // 2 if k is None else k
    if not 1 <= k <= correct.shape[1] // 2:
        raise ValueError(f"two disjoint sets of {k} need {2 * max(k, 1)} samples; there are {correct.shape[1]}")
    counts = []
    for _ in range(draws):
        dealt = rng.permuted(correct, axis=1)
        counts.append(support_counts(dealt[:, :k], dealt[:, k : 2 * k], min_hits))
    return counts


def pass_at_k_plug_in(samples: int, correct: Sequence[int] | NDArray[np.int64], k: int) -> Floats:
    """1 - (1 - c / n)^k: biased low for 1 < k, unlike `passk.pass_at_k`, but defined for k > n.

    Raises ValueError where samples or k is below 1, or a count is outside 0..samples.
    """
    c = np.asarray(correct, dtype=float)
    if samples < 1 or k < 1 or (len(c) and (c.min() < 0 or c.max() > samples)):
        raise ValueError(f"needs samples >= 1, k >= 1 and counts in 0..samples, not {samples}, {k}")
    return np.asarray(1 - (1 - c / samples) ** k)


def detection_threshold(k: int, zeta: float = 0.05, exact: bool = False) -> float:
    """Largest probability that an answer never seen in k samples may have, with confidence 1 - zeta.

    -ln(zeta) / k, the paper's bound (above 1, so empty, for small k), or exactly 1 - zeta^(1/k).
    Raises ValueError unless k >= 1 and 0 < zeta < 1.
    """
    if k < 1 or not 0 < zeta < 1:
        raise ValueError(f"needs k >= 1 and zeta in (0, 1), not {k} and {zeta}")
    return -math.expm1(math.log(zeta) / k) if exact else -math.log(zeta) / k


def empirical_support(probabilities: ArrayLike, correct: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Which answers are correct and likelier than the threshold, where p(y|x) can be computed exactly."""
    return np.asarray(correct, dtype=bool) & (np.asarray(probabilities, dtype=float) > threshold)


def entropy(p: Floats) -> float:
    """-sum p ln p of a distribution; impossible outcomes count 0."""
    inside = p[p > 0]
    return float(-(inside * np.log(inside)).sum()) + 0.0


@dataclass(frozen=True)
class Tilt:
    """The KL-regularised optimum and the quantities of both versions of Theorem C.6."""

    beta: float
    pi: Floats
    entropy_base: float
    entropy: float
    kl: float
    """KL(pi || q)."""
    cross_entropy: float
    """-sum pi ln q; the true identity is entropy = cross_entropy - kl."""
    expected_reward: float
    inside_base: bool
    """Whether pi > 0 only where q > 0."""

    @property
    def claimed_entropy(self) -> float:
        """H(q) - KL(pi || q), the wrong right-hand side in the paper's proof."""
        return self.entropy_base - self.kl

    @property
    def entropy_fell(self) -> bool:
        """Whether the entropy did not rise (up to rounding)."""
        return self.entropy <= self.entropy_base + 1e-12


def exponential_tilt(q: ArrayLike, reward: ArrayLike, beta: float) -> Tilt:
    """pi ~ q exp(beta R) (C.4); for beta = inf, q restricted to the largest reward inside its support (C.5).

    Raises ValueError where q is no distribution or the lengths differ.
    """
    base, r = np.asarray(q, dtype=float), np.asarray(reward, dtype=float)
    if base.shape != r.shape or base.ndim != 1 or base.min() < 0 or not math.isclose(base.sum(), 1, abs_tol=1e-6):
        raise ValueError("q must be a distribution and reward equally long")
    best = r[base > 0].max()
    weights = base * (r == best) if math.isinf(beta) else base * np.exp(beta * (np.where(base > 0, r, best) - best))
    pi = weights / weights.sum()
    inside = pi > 0
    kl = float((pi[inside] * np.log(pi[inside] / base[inside])).sum())
    cross = float(-(pi[inside] * np.log(base[inside])).sum())
    return Tilt(beta, pi, entropy(base), entropy(pi), kl, cross, float(pi @ r), bool((base[inside] > 0).all()))


def trace_perplexity(logprobs: Sequence[ArrayLike]) -> list[float]:
    """exp(mean negative log-likelihood) of each reference trace under a model; nan for a trace without tokens."""
    traces = [np.asarray(x, dtype=float) for x in logprobs]
    return [float(np.exp(-t.mean())) if t.size else math.nan for t in traces]
