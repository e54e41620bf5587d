"""Which answers of a prompt mean the same, found without any reference: EMPO's semantic clusters (arXiv 2504.05812).

Four relations, by rising cost:

    exact         equal canonical text
    mathematics   equal integer expressions by exact arithmetic, else `math_answer.grade` under its limits
    embedding     cosine of two sentence embeddings at least `threshold` (sentence-transformers)
    entailment    each answer entails the other, for a cross-encoder trained on NLI (sentence-transformers)

Clustering is greedy: an answer joins the first cluster whose first member is related to it (`core.entropy.cluster`).
TRL's released code lets a later representative take back an answer that is clustered already (`reassign`), and asks its
verifier in one direction (`both_ways: false`); both matter only where a relation is no equivalence. In Countdown the
answer is an expression: `exact` keeps two expressions of one value apart, `mathematics` joins them, as the card's
symbolic comparison does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal, Protocol

from ..core.entropy import cluster
from ..errors import UserError
from . import math_answer
from .expressions import ExpressionError, parse

By = Literal["exact", "mathematics", "embedding", "entailment"]
NO_ANSWER, COPIED = -1, -2
"""Cluster ids of a response without an answer, and of one whose answer copies the question."""
Relation = Callable[[str, str], bool]
INSTALL = "pip install 'rlvr-lab[semantics]'"


class Clusterer(Protocol):
    """Divides the answers of one prompt."""

    def __call__(self, answers: Sequence[str], question: str) -> list[int]:
        """Cluster number of each answer, from 0 in order of appearance."""


def cluster_ids(
    answers: Sequence[str | None], clusterer: Clusterer, question: str = "", refuse_copies: bool = False
) -> list[int]:
    """Cluster id of each answer of one prompt: from 0, `NO_ANSWER` where there is none, and with `refuse_copies`
    `COPIED` where it copies the question."""
    ids = [NO_ANSWER if not answer else 0 for answer in answers]
    if refuse_copies and question:
        ids = [COPIED if answer and copies_question(answer, question) else i
               for answer, i in zip(answers, ids, strict=True)]  # fmt: skip
    places = [i for i, number in enumerate(ids) if number == 0]
    for place, number in zip(places, clusterer([answers[i] or "" for i in places], question), strict=True):
        ids[place] = number
    return ids


def greedy(count: int, same: Callable[[int, int], bool], reassign: bool = False) -> list[int]:
    """Cluster number of each of `count` things; `same(member, other)` is asked with the first member of a cluster.

    With `reassign` every first member is compared with all later things, and takes those that are the same even from
    an earlier cluster (EMPO's TRL code); clusters that lose all their members leave a gap in the numbers.
    """
    if not reassign:
        return [int(number or 0) for number in cluster(range(count), same)]
    numbers, next_number = [-1] * count, 0
    for i in range(count):
        if numbers[i] < 0:
            numbers[i] = next_number
            for j in range(i + 1, count):
                if same(i, j):
                    numbers[j] = next_number
            next_number += 1
    return numbers


_WORD = re.compile(r"\w+")
MOST_WORDS = 2_000
"""Words of answer and question that are compared."""


def copies_question(answer: str, question: str, most: float = 0.8) -> bool:
    """Whether an answer is part of the question, or the longest common subsequence of words holds more than `most` of
    its words (ROUGE-L precision; EMPO's free-form reward)."""
    if answer.strip() in question:
        return True
    a, q = ([w.lower() for w in _WORD.findall(text)[:MOST_WORDS]] for text in (answer, question))
    return bool(a) and _longest_common_subsequence(a, q) / len(a) > most


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        corner = 0
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


# -- relations by rule ------------------------------------------------------------------------------------------------


@dataclass
class ByRule:
    """Clusters by text or by mathematical equality.

    An answer whose comparisons with two others ran into the deadline of sympy is compared as text from then on: a
    hostile answer costs its time limit twice per group, however many it is compared with.
    """

    by: Literal["exact", "mathematics"] = "mathematics"
    limits: math_answer.Limits = field(default_factory=math_answer.Limits)
    reassign: bool = False

    def __call__(self, answers: Sequence[str], question: str = "") -> list[int]:
        """See `Clusterer`."""
        late = _Late()

        def same(i: int, j: int) -> bool:
            first, second = answers[i], answers[j]
            if first == second or self.by == "exact" or late.slow & {first, second}:
                return first == second
            equal, stopped = _compared(first, second, self.limits)
            if stopped:
                late.add(first, second)
            return equal

        return greedy(len(answers), same, self.reassign)


@dataclass
class _Late:
    """Which answers the deadline is due to: those with two late comparisons. Their partners are cleared again."""

    slow: set[str] = field(default_factory=set)
    partners: dict[str, set[str]] = field(default_factory=dict)

    def add(self, first: str, second: str) -> None:
        """A comparison of these two was late."""
        for one, other in ((first, second), (second, first)):
            self.partners.setdefault(one, set()).add(other)
        for one in (first, second):
            if len(self.partners[one]) > 1:
                self.slow.add(one)
                for other in self.partners[one]:
                    self.partners[other].discard(one)


def mathematically_equal(first: str, second: str, limits: math_answer.Limits = math_answer.DEFAULT_LIMITS) -> bool:
    """Whether two canonical answers have one value: by exact arithmetic where both are expressions in integers."""
    return _compared(first, second, limits)[0]


def _compared(first: str, second: str, limits: math_answer.Limits) -> tuple[bool, bool]:
    """Whether two answers are equal, and whether a deadline ended the comparison."""
    values = _value(first), _value(second)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1], False
    started = time.monotonic()
    verdict = math_answer.grade(f"\\boxed{{{second}}}", first, limits=limits)
    return verdict.correct, verdict.refused and time.monotonic() - started >= limits.seconds


def _value(text: str) -> int | None:
    try:
        return parse(text).value
    except ExpressionError:
        return None


# -- relations by model -----------------------------------------------------------------------------------------------


class ByEmbedding:
    """Clusters by cosine similarity. `encode`: texts to unit vectors [n, d]; by default the model's.

    Raises UserError where the library or the model is missing, with the command or the setting.
    """

    def __init__(self, model: str, threshold: float = 0.9, device: str = "cpu", reassign: bool = False,
                 encode: Callable[[list[str]], Any] | None = None) -> None:  # fmt: skip
        self.threshold, self.reassign = threshold, reassign
        if encode is None:
            loaded = _load("SentenceTransformer", "embedding", model, device)
            encode = partial(loaded.encode, normalize_embeddings=True, show_progress_bar=False)
        self.encode = encode

    def __call__(self, answers: Sequence[str], question: str = "") -> list[int]:
        """See `Clusterer`. Equal texts are encoded once."""
        texts = list(dict.fromkeys(answers))
        if not texts:
            return []
        place = {text: i for i, text in enumerate(texts)}
        vectors = self.encode(texts)
        cosine = vectors @ vectors.T

        def same(i: int, j: int) -> bool:
            a, b = place[answers[i]], place[answers[j]]
            return a == b or bool(cosine[a, b] >= self.threshold)

        return greedy(len(answers), same, self.reassign)


class ByEntailment:
    """Clusters by entailment between `question answer` texts, in both directions or in one.

    `entails`: pairs of texts to booleans; by default the cross-encoder's most likely label being "entailment". Raises
    UserError where the library or the model is missing, or where the model has no such label.
    """

    def __init__(self, model: str, both_ways: bool = True, device: str = "cpu", reassign: bool = False,
                 entails: Callable[[list[tuple[str, str]]], Sequence[bool]] | None = None) -> None:  # fmt: skip
        self.both_ways, self.reassign = both_ways, reassign
        self.entails = entails or _nli(model, device)

    def __call__(self, answers: Sequence[str], question: str = "") -> list[int]:
        """See `Clusterer`. All pairs of different texts are judged in one call."""
        texts = list(dict.fromkeys(answers))
        full = [f"{question} {text}".strip() for text in texts]
        pairs = [(a, b) for a in range(len(texts)) for b in range(len(texts)) if a != b and (self.both_ways or a < b)]
        judged = self.entails([(full[a], full[b]) for a, b in pairs]) if pairs else []
        holds = {pair for pair, yes in zip(pairs, judged, strict=True) if yes}
        place = {text: i for i, text in enumerate(texts)}

        def same(i: int, j: int) -> bool:
            a, b = place[answers[i]], place[answers[j]]
            return a == b or ((a, b) in holds and (not self.both_ways or (b, a) in holds))

        return greedy(len(answers), same, self.reassign)


def _nli(model: str, device: str) -> Callable[[list[tuple[str, str]]], Sequence[bool]]:
    loaded = _load("CrossEncoder", "entailment", model, device)
    labels = {str(name).lower(): int(i) for i, name in loaded.config.id2label.items()}
    if "entailment" not in labels:
        raise UserError(f"data.clusters.model '{model}' has labels {sorted(labels)} and no 'entailment'; choose a "
                        "cross-encoder trained on natural language inference")  # fmt: skip
    return lambda pairs: loaded.predict(pairs, show_progress_bar=False).argmax(-1) == labels["entailment"]


def _load(kind: str, by: str, model: str | None, device: str) -> Any:
    if not model:
        raise UserError(f"data.clusters.by={by} needs data.clusters.model, a directory or hub name for {kind}")
    try:
        library = import_module("sentence_transformers")
    except ImportError as error:
        raise UserError(f"data.clusters.by={by} needs sentence-transformers: {INSTALL}") from error
    try:
        return getattr(library, kind)(model, device=device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.clusters.model '{model}' is no {kind} of sentence-transformers: {reason}") from error


def make_clusterer(
    by: By = "mathematics",
    model: str | None = None,
    threshold: float = 0.9,
    both_ways: bool = True,
    reassign: bool = False,
    device: str = "cpu",
) -> Clusterer:
    """The clusterer of `data.clusters`. Raises UserError where its library or model is missing."""
    if by == "embedding":
        return ByEmbedding(model or "", threshold, device, reassign)
    if by == "entailment":
        return ByEntailment(model or "", both_ways, device, reassign)
    return ByRule(by, reassign=reassign)
