"""Which responses an adaptive cold start keeps: long ones for hard prompts, short ones for easy (ARES, 2510.08457).

    L(0), L(1)   median length of the responses to prompts that are never, and always, solved
    L_target(p)  = (1 - p) L(0) + p L(1)        p: the prompt's rate of success

Lengths in tokens. Kept are right responses whose length is near the target of their prompt, in equal parts from every
bracket of p. The paper does not say how near; here within a share `tolerance` of the target, and a bracket with more
than the median bracket is thinned to it at random [inferred]. A pool is one data source. The paper's traces come from
stronger models; ours from the model itself, so that a prompt that it never solves has a target and nothing to keep.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def length_ends(rows: Iterable[Row], rates: Sequence[float]) -> tuple[float, float]:
    """L(0) and L(1); nan where no prompt is never, or always, solved."""
    lengths: dict[float, list[int]] = {0.0: [], 1.0: []}
    for row in rows:
        if rates[row["problem"]] in lengths:
            lengths[rates[row["problem"]]].append(len(row["ids"]))
    never, always = (float(median(found)) if found else math.nan for found in lengths.values())
    return never, always


def length_target(rate: float, never: float, always: float) -> float:
    """L_target of a rate of success. Raises ValueError for what is no rate."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of success lies in [0, 1], not {rate}")
    return (1 - rate) * never + rate * always


def adaptive_rows(
    rows: Iterable[Row], rates: Sequence[float], ends: tuple[float, float], tolerance: float, per_prompt: int,
    least_tokens: int, generator: np.random.Generator,
) -> list[Row]:  # fmt: skip
    """Right responses near their target, each text once, of a prompt the `per_prompt` nearest, brackets in equal parts.

    A bracket is a rate of success. Rows keep their order.
    """
    nearest: dict[int, list[tuple[float, int]]] = defaultdict(list)
    listed, seen = list(rows), set()
    for place, row in enumerate(listed):
        target, key = length_target(rates[row["problem"]], *ends), (row["problem"], *row["ids"])
        distance = abs(len(row["ids"]) - target)
        if not row["correct"] or key in seen or len(row["ids"]) < least_tokens or not distance <= tolerance * target:
            continue
        seen.add(key)
        nearest[row["problem"]].append((distance, place))
    brackets: dict[float, list[int]] = defaultdict(list)
    for problem, found in nearest.items():
        brackets[rates[problem]] += [place for _, place in sorted(found)[:per_prompt]]
    if not brackets:
        return []
    most = math.ceil(median(len(places) for places in brackets.values()))
    kept: list[int] = []
    for _, places in sorted(brackets.items()):
        drawn = generator.permutation(len(places))[:most]
        kept += [places[i] for i in drawn.tolist()]
    return [listed[place] for place in sorted(kept)]
