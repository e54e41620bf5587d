r"""maj@k: how often the most frequent answer of k samples is correct (self-consistency, Wang et al., arXiv 2203.11171).

From the n samples of a problem, the estimate is the expectation over all C(n, k) subsets of size k, exactly; no subset
is drawn. With votes v_j for the answers j of a subset,

    maj@k = sum_j correct_j P( j is among the most frequent ) / (number of answers that tie with it)

- **Ties** are broken uniformly at random, in expectation.
- **No answer never wins.** Samples without an answer take a place among the k and vote for nothing; a subset without
  any answer is wrong. (As a class of its own it would win wherever truncation is common, and count as wrong too; the
  two conventions differ where "no answer" would be the most frequent.)
- Answers are compared as the verifier's canonical forms, so all correct answers of a mathematical problem are one
  class; where several answers are correct (Countdown), each is a class of its own.

maj@1 is pass@1. Unlike pass@k it can fall with k, where the most frequent answer is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Votes = tuple[tuple[int, bool], ...]
"""Samples for each answer, and whether it is correct; most frequent first. Samples without an answer are left out."""


def votes_of(answers: Sequence[str | None], correct: Sequence[bool]) -> Votes:
    """Votes of one problem. An answer counts as correct where one of its samples does."""
    counts = Counter(a for a in answers if a is not None)
    right = {a for a, c in zip(answers, correct, strict=True) if c}
    return tuple((n, a in right) for a, n in sorted(counts.items(), key=lambda item: (-item[1], str(item[0]))))


def majority_at_k(samples: int, votes: Votes, ks: Sequence[int]) -> list[float]:
    """maj@k of one problem for every k; see the module.

    Raises ValueError unless 1 <= k <= samples and the votes fit into the samples.
    """
    counts = [n for n, _ in votes]
    if min(counts, default=1) < 1 or sum(counts) > samples:
        raise ValueError(f"votes {counts} do not fit into {samples} samples")
    if ks and not 1 <= min(ks) <= max(ks) <= samples:
        raise ValueError(f"maj@k needs 1 <= k <= {samples}, not {list(ks)}")
    if not any(right for _, right in votes):
        return [0.0] * len(ks)
    if samples <= _SHARED_TILT:
        won = _won(samples, votes, 0.5)
        return [_clean(won[k]) for k in ks]
    # far from k = n / 2 the weights would leave the range of floats, so every k gets its own
    return [_clean(_won(samples, votes, min(k / samples, 1 - 0.5 / samples))[k]) for k in ks]


def _clean(value: float) -> float:
    """Without the rounding of logarithms and sums, which is about 1e-14, so that 0, 1 and 3/16 are themselves."""
    return round(float(value), 12)


_SHARED_TILT = 512


def _won(samples: int, votes: Votes, p: float) -> Floats:
    """P(a correct answer wins) by subset size 0..n.

    A subset of size k is what remains of n independent draws with probability p that kept k, for any p. So the
    distribution over votes is a product of binomials, conditioned on its total; the sums over totals are convolutions.
    """
    counts = [n for n, _ in votes]
    total = np.zeros(samples + 1)
    once: dict[int, Floats] = {}  # answers with equally many samples win equally often
    for place, (count, right) in enumerate(votes):
        if right:
            if count not in once:
                others = counts[:place] + counts[place + 1 :]
                once[count] = _answer_wins(count, others, samples - sum(counts), p)
            total += once[count]
    size = binomial(samples, p)
    return np.divide(total, size, out=np.zeros_like(total), where=size > 0)


def _answer_wins(count: int, others: Sequence[int], silent: int, p: float) -> Floats:
    """P(an answer with `count` samples wins, and k are kept) by k: it has t votes, and no other answer has more.

    With s other answers at t votes it wins one time in 1 + s.
    """
    out = np.zeros(count + sum(others) + silent + 1)
    own = binomial(count, p)
    for t in range(1, count + 1):
        reach = [c for c in others if c >= t]
        free = binomial(sum(others) + silent - sum(reach), p)  # who cannot reach t
        now = own[t] * (_ties_of_one(reach, free, p) if t == 1 else _ties(reach, free, t, p))
        out[t : t + len(now)] += now
    return out


def _ties(reach: Sequence[int], free: Floats, t: int, p: float) -> Floats:
    """E[1{no answer above t} / (1 + answers at t)] by the number kept."""
    kept = [free]
    for c in reach:
        votes = binomial(c, p)[: t + 1]
        below = [np.convolve(now, votes[:t]) for now in kept]
        at = [np.concatenate([np.zeros(t), now * votes[t]]) for now in kept]
        kept = [_sum(below[s : s + 1] + at[s - 1 : s] if s else below[:1]) for s in range(len(kept) + 1)]
    return _sum([now / (1 + s) for s, now in enumerate(kept)])


def _ties_of_one(reach: Sequence[int], free: Floats, p: float) -> Floats:
    """`_ties` for t = 1, where there are most answers: each vote is a tie, so that one polynomial holds both."""
    kept = np.ones(1)
    for c in reach:
        kept = np.convolve(kept, binomial(c, p)[:2])
    return np.convolve(kept / (1 + np.arange(len(kept))), free)


def _sum(parts: Sequence[Floats]) -> Floats:
    out = np.zeros(max(map(len, parts)))
    for part in parts:
        out[: len(part)] += part
    return out


@lru_cache(maxsize=4096)
def binomial(n: int, p: float) -> Floats:
    """P(u of n) for u = 0..n, each drawn with probability p in (0, 1)."""
    u = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    ways = log_factorial[n] - log_factorial - log_factorial[::-1]
    return np.asarray(np.exp(ways + u * math.log(p) + (n - u) * math.log1p(-p)))
