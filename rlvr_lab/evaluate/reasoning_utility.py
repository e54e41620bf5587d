r"""Conditional entropy of an answer while reasoning is revealed step by step (arXiv 2508.20395; no code was released).

A scorer p reads a question X, the first k of K steps R_1..R_K, a cue, and the answer Y = y_1..y_m teacher-forced:

    H_k   = 1/m sum_j H( p(. | X, R_1..R_k, cue, y_<j) ),      H(p) = -sum_v p_v ln p_v over the whole vocabulary
    NLL_k = -1/m sum_j ln p(y_j | X, R_1..R_k, cue, y_<j)
    u_k   = H_{k-1} - H_k          step utility: positive where step k made the scorer surer

for k = 0..K, in nats. H says how sure the scorer is, NLL whether it is sure of *this* answer: on a wrong chain H can
fall while the NLL of the right answer rises. Report both, and never reward H alone: being surely wrong maximises it.

[inferred] Y is the ground truth (`span="gold"`: an oracle study); the mean is over answer tokens; k = 0 is included;
steps are paragraphs, else lines, else sentences; the cue is fixed. `span="predicted"` needs no ground truth: at each k,
Y is the scorer's own greedy answer there.

With m > 1 the scorer sees y_<j, so later answer tokens are easy whatever the reasoning said. `answer_tokens=1` looks at
the first one only, whose entropy does not depend on Y at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..core.entropy import token_statistics
from ..errors import UserError, nearest
from ..policy.load import end_tokens
from ..policy.reader import Reader

Span = Literal["gold", "predicted"]
Reduction = Literal["mean", "sum"]
Unit = Literal["auto", "paragraph", "line", "sentence"]
Text = str | Sequence[int]
"""A text, or its token ids."""
S = TypeVar("S", bound=Sequence[Any])

CUE = "\nThe answer is"

# -- what one chain gives ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """Entropies and negative log-likelihoods of the answer tokens after 0..K steps, in nats; see the module.

    Rows are equally long for one gold answer; predicted answers may differ in length. Raises ValueError for no row, or
    a row without a token.
    """

    token_entropy: tuple[tuple[float, ...], ...]
    token_nll: tuple[tuple[float, ...], ...]
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        lengths = [[len(row) for row in rows] for rows in (self.token_entropy, self.token_nll)]
        if not lengths[0] or lengths[0] != lengths[1] or 0 in lengths[0]:
            raise ValueError(f"a trajectory needs k = 0 and one answer token or more at every k, not {lengths}")

    @classmethod
    def from_logits(cls, logits: Tensor, answer: Tensor, reduction: Reduction = "mean") -> Trajectory:
        """From the scorer's logits [K + 1, m, V] that predict the answer tokens [m]."""
        logprob, entropy = token_statistics(logits, answer.expand(len(logits), -1))
        rows = [tuple(map(tuple, x.tolist())) for x in (entropy, -logprob)]
        return cls(rows[0], rows[1], reduction)

    @property
    def steps(self) -> int:
        """K."""
        return len(self.token_entropy) - 1

    @property
    def entropy(self) -> tuple[float, ...]:
        """H_k."""
        return self._reduced(self.token_entropy)

    @property
    def nll(self) -> tuple[float, ...]:
        """NLL_k."""
        return self._reduced(self.token_nll)

    @property
    def first_entropy(self) -> tuple[float, ...]:
        """Entropy of the first answer token alone, which no earlier answer token gives away."""
        return tuple(row[0] for row in self.token_entropy)

    @property
    def utility(self) -> tuple[float, ...]:
        """u_1..u_K."""
        return tuple(a - b for a, b in zip(self.entropy, self.entropy[1:], strict=False))

    @property
    def total_reduction(self) -> float:
        """H_0 - H_K; 0 without steps."""
        return self.entropy[0] - self.entropy[-1]

    @property
    def relative_reduction(self) -> float | None:
        """(H_0 - H_K) / H_0; None where H_0 = 0, which leaves nothing to reduce."""
        return self.total_reduction / self.entropy[0] if self.entropy[0] else None

    @property
    def slope(self) -> float | None:
        """Least-squares slope of H_k on k; see `slope`."""
        return slope(self.entropy)

    @property
    def fraction_decreasing(self) -> float | None:
        """Share of steps after which H is smaller; None without steps."""
        return float(np.mean([u > 0 for u in self.utility])) if self.steps else None

    @property
    def monotone(self) -> bool:
        """Whether H falls strictly at every step; true of a chain without steps, so look at `steps` too."""
        return all(u > 0 for u in self.utility)

    def _reduced(self, rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(sum(row) / (len(row) if self.reduction == "mean" else 1) for row in rows)


def slope(values: Sequence[float]) -> float | None:
    """Least-squares slope of values on 0, 1, ...; None for fewer than two, which fix no line. Negative is helpful."""
    if len(values) < 2:
        return None
    centred = np.arange(len(values)) - (len(values) - 1) / 2
    return float(centred @ np.asarray(values, dtype=float) / (centred @ centred))


# -- association with correctness -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Association:
    """How a score of chains goes with their correctness. What needs both classes is None where one is empty."""

    auroc: float | None
    point_biserial: float | None
    mean_correct: float | None
    mean_incorrect: float | None


def association(score: Sequence[float | None], correct: Sequence[bool | int]) -> Association:
    """All figures of `Association`; chains whose score is None are left out. Raises ValueError for unequal lengths."""
    pairs = [(s, bool(c)) for s, c in zip(score, correct, strict=True) if s is not None]
    values, labels = [s for s, _ in pairs], [c for _, c in pairs]
    means = [[s for s, c in pairs if c is kind] for kind in (True, False)]
    right, wrong = (float(np.mean(m)) if m else None for m in means)
    return Association(auroc(values, labels), point_biserial(values, labels), right, wrong)


def auroc(score: ArrayLike, correct: ArrayLike) -> float | None:
    """P(a correct chain scores above a wrong one), ties counting one half; None where all are right or all wrong.

    Raises ValueError for unequal lengths or a score that is nan.
    """
    s, c = _scored(score, correct)
    if not 0 < c.sum() < len(c):
        return None
    _, group, counts = np.unique(s, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[group]  # tied scores share their mean rank
    n = int(c.sum())
    return float((rank[c].sum() - n * (n + 1) / 2) / (n * (len(c) - n)))


def point_biserial(score: ArrayLike, correct: ArrayLike) -> float | None:
    """Pearson correlation of score and correctness; None where either does not vary."""
    s, c = _scored(score, correct)
    if not 0 < c.sum() < len(c) or np.ptp(s) == 0:
        return None
    return float(np.corrcoef(s, c)[0, 1])


def auroc_interval(
    score: ArrayLike, correct: ArrayLike, unit: Sequence[int], rng: np.random.Generator, draws: int = 1000
) -> tuple[float, float] | None:
    """95 % bootstrap interval of `auroc` over units (problems): chains of one problem are drawn together.

    Draws of one class only are left out; None where every draw is.
    """
    s, c = _scored(score, correct)
    rows = [np.flatnonzero(np.asarray(unit) == u) for u in dict.fromkeys(unit)]
    found = []
    for _ in range(draws):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]) if rows else np.zeros(0, int)
        value = auroc(s[drawn], c[drawn])
        found += [] if value is None else [value]
    if not found:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _scored(score: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    s, c = np.asarray(score, dtype=float), np.asarray(correct, dtype=bool)
    if s.shape != c.shape or s.ndim != 1 or np.isnan(s).any():
        raise ValueError(f"one number for each chain: scores {s.shape} without nan, correctness {c.shape}")
    return s, c


# -- steps ------------------------------------------------------------------------------------------------------------

_BOUNDARIES = {
    "paragraph": re.compile(r"\n[^\S\n]*\n\s*"),
    "line": re.compile(r"\n\s*"),
    "sentence": re.compile(r"(?<=[.!?])\s+"),
}


def split_steps(text: str, unit: Unit = "auto") -> list[str]:
    """Steps of a reasoning text, which joined give the text again; none for a blank one.

    `auto`: paragraphs where there is a blank line between two, else lines, else sentences [inferred]. A step ends
    with the white space behind it, so that tokens at its end are those of the running text.
    """
    if unit != "auto" and unit not in _BOUNDARIES:
        raise UserError(f"unit '{unit}' of steps is unknown; {nearest(unit, ['auto', *_BOUNDARIES])}")
    if not text.strip():
        return []
    names = list(_BOUNDARIES) if unit == "auto" else [unit]
    cut: list[str] = []
    for name in names:
        cut = _cut(text, _BOUNDARIES[name])
        if len(cut) > 1:
            break
    return cut


def _cut(text: str, boundary: re.Pattern[str]) -> list[str]:
    inner = len(text) - len(text.lstrip())
    ends = [m.end() for m in boundary.finditer(text) if inner < m.end() < len(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def shuffled_steps(steps: Sequence[S], rng: np.random.Generator) -> list[S]:
    """The same steps in another order: the control that keeps words and length. One step stays where it is."""
    order = list(range(len(steps)))
    while len(steps) > 1 and order == sorted(order):
        order = rng.permutation(len(steps)).tolist()
    return [steps[i] for i in order]


def irrelevant_steps(steps: Sequence[S], pool: Sequence[S], rng: np.random.Generator) -> list[S]:
    """Every step replaced by one as long from `pool`, steps of other questions: the control that keeps length.

    Raises UserError where the pool has no step of a length that is needed.
    """
    found: list[S] = []
    for step in steps:
        fitting = [other for other in pool if len(other) == len(step) and other != step]
        if not fitting:
            raise UserError(f"the pool of irrelevant steps holds none of length {len(step)}; give it more steps")
        found.append(fitting[int(rng.integers(len(fitting)))])
    return found


# -- the scorer -------------------------------------------------------------------------------------------------------


class Scorer:
    """Reads trajectories with a causal language model of transformers: `scorer(question, steps, answer)`.

    It should not be the model that wrote the chain. Question, steps, cue and answer are encoded one by one and joined,
    so that the answer has the same tokens at every k; what is given as ids is taken as it is. A question's text gets
    the tokenizer's special tokens, the rest none. Blanks between texts belong to them (`" 44"`); `split_steps` keeps
    them. Never compare entropies of different tokenizers.

    Each k takes one forward pass over step, cue and answer; cue and answer are then cut off the cache again
    (`policy.reader`). `cached=False` reads everything anew at each k. `answer_tokens`: how many of the answer's tokens
    count, all by default. `max_answer`: longest predicted answer, which ends before the end token.

    The model is put in evaluation mode (no dropout). Raises UserError for a cue without a token, an unknown span, and
    `answer_tokens` or `max_answer` below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cue: Text = CUE,
        span: Span = "gold",
        answer_tokens: int | None = None,
        max_answer: int = 16,
        reduction: Reduction = "mean",
        cached: bool = True,
    ) -> None:
        if span not in ("gold", "predicted"):
            raise UserError(f"span '{span}' is unknown; {nearest(str(span), ('gold', 'predicted'))}")
        if reduction not in ("mean", "sum"):
            raise UserError(f"reduction '{reduction}' is unknown; {nearest(str(reduction), ('mean', 'sum'))}")
        if max_answer < 1 or (answer_tokens is not None and answer_tokens < 1):
            raise UserError(f"answer_tokens and max_answer must be at least 1, not {answer_tokens} and {max_answer}")
        self.model, self.tokenizer, self.span, self.reduction = model.eval(), tokenizer, span, reduction
        self.answer_tokens, self.max_answer, self.cached = answer_tokens, max_answer, cached
        self.cue = self.ids(cue)
        if not self.cue:
            raise UserError("cue holds no token; the answer needs one to follow")
        self.eos = end_tokens(model, tokenizer, type(model).__name__) if span == "predicted" else ()

    def ids(self, text: Text, special: bool = False) -> list[int]:
        """Token ids of a text, or the ids that were given."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"] if isinstance(text, str) else text)

    @torch.no_grad()
    def __call__(self, question: Text, steps: Sequence[Text], answer: Text | None = None) -> Trajectory:
        """The trajectory of one chain. Raises UserError for a question or a gold answer without a token, and for a
        chain that exceeds the model's context."""
        start, parts = self.ids(question, special=True), [self.ids(step) for step in steps]
        if not start:
            raise UserError("the question holds no token")
        gold = self._gold(answer) if self.span == "gold" else None
        self._check_length(len(start) + sum(map(len, parts)), len(gold) if gold else self.max_answer)
        reader = Reader(self.model, start, cached=self.cached)
        found: list[Trajectory] = []
        for part in [[], *parts]:
            reader.append(part)
            logits, ids = self._read(reader, gold)
            found.append(Trajectory.from_logits(logits[None], torch.tensor([ids], device=logits.device)))
        rows = [tuple(getattr(t, name)[0] for t in found) for name in ("token_entropy", "token_nll")]
        return Trajectory(rows[0], rows[1], self.reduction)

    def _gold(self, answer: Text | None) -> list[int]:
        ids = self.ids("" if answer is None else answer)[: self.answer_tokens]
        if not ids:
            raise UserError("the answer span is empty: answer needs a token, or span='predicted'")
        return ids

    def _check_length(self, chain: int, answer: int) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and chain + len(self.cue) + answer > longest:
            raise UserError(
                f"question and steps have {chain} tokens, cue and answer {len(self.cue) + answer}: more than the "
                f"model's context of {longest}; give fewer steps"
            )

    def _read(self, reader: Reader, gold: list[int] | None) -> tuple[Tensor, list[int]]:
        """Logits [m, V] that predict the answer behind what was read so far, and its ids."""
        if gold is None:
            return greedy_answer(reader, self.cue, self.answer_tokens or self.max_answer, self.eos)
        return reader.peek([*self.cue, *gold[:-1]], len(gold)), gold


def greedy_answer(reader: Reader, cue: Sequence[int], most: int, eos: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The likeliest continuation of text and cue, token by token, and the logits [m, V] that predicted it.

    It has at least one token and at most `most`, and ends before the end token, unless that comes first. The reader's
    text stays as it was.
    """
    length, logits, answer = len(reader), list[Tensor](), list[int]()
    reader.append(cue)
    while len(answer) < most:
        now = reader.logits()[0]
        token = int(now.argmax())
        if token in eos and answer:
            break
        logits.append(now)
        answer.append(token)
        if token in eos:
            break
        reader.append([token])
    reader.rewind(length)
    return torch.stack(logits), answer
