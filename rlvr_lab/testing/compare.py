"""Nested comparison of computed values with recorded ones, where text is skipped and nothing numeric may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NON_FINITE = {"nan", "inf", "-inf", "infinity", "-infinity"}


@dataclass(frozen=True)
class Difference:
    """One compared value: where it stands, how far it is off (relative above 1, else absolute), and what is wrong."""

    path: str
    error: float = 0.0
    problem: str | None = None

    @property
    def key(self) -> str:
        """The path without positions in lists: `steps.value` for `steps[3].value`."""
        return ".".join(part.split("[")[0] for part in self.path.split("."))


def compare(actual: Any, expected: Any, tolerance: float, path: str = "") -> Iterator[Difference]:
    """Compare every number of `expected` with `actual`; both may nest mappings, lists and (actual) tensors.

    Floats: |a - b| <= tolerance * max(1, |b|). Booleans, and integers where an integer was computed, are exact. A
    recorded null stands for an undefined value: None or nan. Text is compared where `actual` has text too, and skipped
    where `actual` lacks it. Keys of `actual` that were not recorded are ignored.
    """
    actual = plain(actual)
    if isinstance(expected, Mapping):
        yield from _compare_mapping(actual, expected, tolerance, path)
    elif isinstance(expected, list):
        if not isinstance(actual, list):
            yield Difference(path, math.inf, f"has {_shown(actual)} where a list was recorded")
        elif len(actual) != len(expected):
            yield Difference(path, math.inf, f"has {len(actual)} entries where {len(expected)} were recorded")
        else:
            for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
                yield from compare(a, e, tolerance, f"{path}[{i}]")
    else:
        yield _compare_leaf(actual, number(expected), tolerance, path)


def _compare_mapping(actual: Any, expected: Mapping[str, Any], tolerance: float, path: str) -> Iterator[Difference]:
    if not isinstance(actual, Mapping):
        yield Difference(path, math.inf, f"has {_shown(actual)} where keys were recorded: {', '.join(expected)}")
        return
    found = {str(key): value for key, value in actual.items()}  # keys of JSON are text, even those that are numbers
    for key, value in expected.items():
        below = f"{path}.{key}" if path else key
        if key in found:
            yield from compare(found[key], value, tolerance, below)
        elif not is_text(value):
            yield Difference(below, math.inf, "is missing")


def _compare_leaf(actual: Any, expected: Any, tolerance: float, path: str) -> Difference:
    actual = number(actual)
    if isinstance(expected, str):
        return Difference(path) if actual == expected else _off(path, actual, expected, math.inf)
    if _undefined(expected) or _undefined(actual):
        return Difference(path) if _undefined(expected) and _undefined(actual) else _off(path, actual, expected)
    if not isinstance(actual, int | float):
        return _off(path, actual, expected)
    if actual == expected:  # covers infinities
        return Difference(path)
    exact = isinstance(expected, bool) or (isinstance(expected, int) and isinstance(actual, int))
    scale = 1.0 if isinstance(expected, int) else max(1.0, abs(expected))
    error = abs(actual - expected) / scale
    return _off(path, actual, expected, error) if exact or not error <= tolerance else Difference(path, error)


def _off(path: str, actual: Any, expected: Any, error: float = math.inf) -> Difference:
    return Difference(path, error, f"is {_shown(actual)} where {_shown(expected)} was recorded")


def _undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)[:40]


def number(value: Any) -> Any:
    """A float for text that spells a non-finite number, as some recorders write it; anything else as it is."""
    return float(value) if isinstance(value, str) and value.lower() in NON_FINITE else value


def plain(value: Any) -> Any:
    """Tensors and arrays as lists or numbers, other sequences as lists."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple | range) else value


def is_text(value: Any) -> bool:
    """True where a recorded value holds text and no number, so that it need not be reproduced."""
    leaves = list(_leaves(value))
    return any(isinstance(x, str) for x in leaves) and all(x is None or isinstance(x, str) for x in leaves)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield number(value)


def largest(differences: Iterable[Difference]) -> float | None:
    """The largest error, or None where nothing was compared."""
    return max((difference.error for difference in differences), default=None)
