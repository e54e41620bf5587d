"""Replay golden files: recorded inputs through the library, results against what the official code computed.

    python -m rlvr_lab.testing.golden PATH... [--verbose]

A golden file is JSON: `source`, `function`, `notes`, and `cases`, each with `params`, `inputs`, `outputs` and, where a
gradient was recorded, `grad`. Its name is the slug of a card. One line per case is printed; the exit status is 1 where
a value or gradient differs or is missing, where no rule knows a case, or where a file cannot be read.

Adapters, `rlvr_lab/testing/adapters/<card>.py`, hold `RULES`. A rule names the keys it needs and the keys it
reproduces; names of cases play no part, so further cases of the same format replay as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import adapters
from .compare import Difference, compare, is_text, largest, number

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
ABOUT_CASE = {"name", "note", "kind", "function", "source", "params", "inputs", "outputs", "grad", "dtype"}


@dataclass(frozen=True)
class Case:
    """One recorded computation. Tensors are made in the recorded dtype: float64 unless the case says float32."""

    slug: str
    index: int
    name: str
    kind: str | None
    function: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    grad: Any = None
    """Recorded gradient without its text: one nested list, or several by key. None where none was recorded."""
    dtype: torch.dtype = torch.float64

    def tensor(self, key: str, requires_grad: bool = False) -> Tensor:
        """A new leaf tensor of an input; null becomes nan. Raises ValueError for a ragged or textual input."""
        try:
            values = torch.tensor(_numbers(self.inputs[key]), dtype=self.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"input '{key}' is no tensor: {error}") from error
        return values.requires_grad_(requires_grad)

    def leaf(self, key: str) -> Tensor:
        """An input that a gradient is taken of."""
        return self.tensor(key, requires_grad=True)

    def mask(self, key: str) -> Tensor:
        """An input as booleans."""
        return torch.tensor(self.inputs[key]).bool()

    def ids(self, key: str) -> Tensor:
        """An input as integers; labels are numbered in the order of their first appearance."""
        values = self.inputs[key]
        if any(isinstance(value, str) for value in values):
            number_of = {label: i for i, label in enumerate(dict.fromkeys(values))}
            values = [number_of[value] for value in values]
        return torch.tensor(values).long()


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else number(value)


@dataclass(frozen=True)
class Replay:
    """What an adapter computed, nested as the case's `outputs` and `grad`; tensors, numbers and lists alike."""

    outputs: Mapping[str, Any]
    grad: Any = None


@dataclass(frozen=True)
class Rule:
    """How cases with these keys are replayed. Matches where every key is present and `when` agrees."""

    slug: str
    inputs: Set[str]
    outputs: Set[str]
    run: Callable[[Case], Replay]
    params: Set[str] = frozenset()
    when: Callable[[Case], bool] | None = None

    def matches(self, case: Case) -> bool:
        """True where this rule can replay the case."""
        keys = self.inputs <= case.inputs.keys() and self.params <= case.params.keys()
        return keys and self.outputs <= case.outputs.keys() and (self.when is None or self.when(case))

    @property
    def length(self) -> int:
        """Number of keys: of several matching rules the longest is the most specific."""
        return len(self.inputs) + len(self.outputs) + len(self.params)


@dataclass(frozen=True)
class Result:
    """One row of the report."""

    slug: str
    case: str
    outputs: list[Difference] = field(default_factory=list)
    grad: list[Difference] = field(default_factory=list)
    failure: str | None = None
    """Why nothing could be compared: no rule, or an exception."""

    @property
    def problem(self) -> str | None:
        """The first thing that is wrong, or None."""
        if self.failure:
            return self.failure
        wrong = [d for d in (*self.outputs, *self.grad) if d.problem]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"{wrong[0].path} {wrong[0].problem}{more}" if wrong else None


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """d loss / d leaf, zero where the loss does not depend on it; the graph is kept for further gradients."""
    (value,) = torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if value is None else value


def read_cases(path: Path) -> list[Case]:
    """The cases of a golden file. Raises UserError where it cannot be read or has another format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list) or not data["cases"]:
        raise UserError(f"{path}: no golden file: it has no list 'cases'")
    return [_case(path, data, raw, index) for index, raw in enumerate(data["cases"])]


def _case(path: Path, data: dict[str, Any], raw: Any, index: int) -> Case:
    for key in ("inputs", "outputs"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), dict):
            raise UserError(f"{path}: case {index} has no mapping '{key}'")
    params = raw.get("params") or {}
    if not isinstance(params, dict):
        raise UserError(f"{path}: case {index} has no mapping 'params'")
    about = next((str(text) for text in (raw.get("name"), raw.get("note"), params.get("desc")) if text), "")
    kind = raw.get("kind", params.get("kind"))
    stated = str(raw.get("dtype") or params.get("dtype") or data.get("dtype") or "float64")
    # further blocks of recorded numbers beside `outputs`, such as another form of the same formula
    beside = {key: value for key, value in raw.items() if key not in ABOUT_CASE and not is_text(value)}
    return Case(
        slug=path.name.removesuffix(".json"),
        index=index,
        name=about,
        kind=None if kind is None else str(kind),
        function=str(raw.get("function") or data.get("function") or ""),
        params=params,
        inputs=raw["inputs"],
        outputs=raw["outputs"] | beside,
        grad=_recorded_gradient(raw.get("grad")),
        dtype=torch.float32 if stated.startswith("float32") else torch.float64,
    )


def _recorded_gradient(grad: Any) -> Any:
    """`{wrt: text, value: ...}` as its value, `{key: ...}` without what is text."""
    if not isinstance(grad, dict):
        return grad
    if "value" in grad:
        return grad["value"]
    return {key: value for key, value in grad.items() if not is_text(value)}


def adapter_names() -> list[str]:
    """Slugs of the cards that have an adapter."""
    return sorted(module.name for module in iter_modules(adapters.__path__))


def rules_of(slug: str) -> list[Rule]:
    """The rules of one adapter; none where the slug has no adapter."""
    if slug not in adapter_names():
        return []
    rules: list[Rule] = import_module(f"{adapters.__name__}.{slug}").RULES
    return rules


def find_rule(case: Case) -> Rule | None:
    """The most specific rule that matches: of the card's own adapter, else of any."""
    own = _most_specific(rules_of(case.slug), case)
    others = (rule for slug in adapter_names() if slug != case.slug for rule in rules_of(slug))
    return own or _most_specific(others, case)


def _most_specific(rules: Iterable[Rule], case: Case) -> Rule | None:
    return max((rule for rule in rules if rule.matches(case)), key=lambda rule: rule.length, default=None)


def replay(case: Case) -> Result:
    """Run one case and compare. Never raises: an exception of an adapter is a failure that names it."""
    label = f"{case.index} {case.name}".strip()
    try:
        rule = find_rule(case)
        if rule is None:
            keys = f"{', '.join(sorted(case.inputs))} -> {', '.join(sorted(case.outputs))}"
            return Result(case.slug, label, failure=f"unknown case: no rule for {keys}")
        done = rule.run(case)
        outputs = list(compare(done.outputs, case.outputs, TOLERANCE[case.dtype]))
        grad = list(_compare_gradient(done.grad, case)) if case.grad is not None else []
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return Result(case.slug, label, failure=f"{type(error).__name__}: {text}")
    nothing = None if outputs or grad else "nothing was compared"
    return Result(case.slug, label, outputs, grad, nothing)


def _compare_gradient(grad: Any, case: Case) -> Iterator[Difference]:
    if grad is None:
        yield Difference("grad", math.inf, "is missing")
        return
    if isinstance(case.grad, dict) and len(case.grad) == 1 and not isinstance(grad, Mapping):
        grad = {next(iter(case.grad)): grad}
    yield from compare(grad, case.grad, TOLERANCE[case.dtype], "grad")


def replay_file(path: Path) -> list[Result]:
    """Replay every case of a golden file. Raises UserError where it cannot be read."""
    return [replay(case) for case in read_cases(path)]


def _files(paths: Sequence[Path]) -> list[Path]:
    """Folders stand for the JSON files in them."""
    found = [(sorted(path.glob("*.json")) or [path]) if path.is_dir() else [path] for path in paths]
    return [path for group in found for path in group]


def _row(slug: str, case: str, outputs: str, grad: str, verdict: str) -> str:
    return f"{slug:<24} {case[:44]:<44} {outputs:>9} {grad:>9}  {verdict}"


def _worst(differences: Sequence[Difference]) -> str:
    worst = largest(differences)
    return "-" if worst is None else f"{worst:.1e}"


def _print(result: Result, verbose: bool) -> None:
    verdict = f"FAIL {result.problem}" if result.problem else "ok"
    print(_row(result.slug, result.case, _worst(result.outputs), _worst(result.grad), verdict))
    if verbose:
        by_key: dict[str, list[Difference]] = {}
        for difference in (*result.outputs, *result.grad):
            by_key.setdefault(difference.key, []).append(difference)
        for key, differences in by_key.items():
            problem = next((f"  {d.path} {d.problem}" for d in differences if d.problem), "")
            print(f"    {key:<64} {largest(differences):9.1e}{problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay files and print one line per case; 0 where everything was reproduced, else 1."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lab.testing.golden", description="Replay golden files.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="golden files, or folders of them")
    parser.add_argument("--verbose", action="store_true", help="also print the largest error of every key")
    options = parser.parse_intermixed_args(arguments)
    print(_row("card", "case", "outputs", "gradients", "verdict"))
    results, unreadable = [], 0
    for path in _files(options.paths):
        try:
            results += (found := replay_file(path))
        except UserError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        for result in found:
            _print(result, options.verbose)
    failed = sum(result.problem is not None for result in results)
    print(f"{len(results)} cases, {failed} failed" + (f", {unreadable} files unreadable" if unreadable else ""))
    return int(failed > 0 or unreadable > 0)


if __name__ == "__main__":
    # adapters import this module by its name, which is not __main__: use that one, so that there is one of each class
    from rlvr_lab.testing.golden import main as _main

    sys.exit(_main())
