"""Decoding settings by class of difficulty (DiffAdapt, arXiv 2510.19669), and the two tables that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import UserError
from .difficulty import CLASSES


@dataclass(frozen=True)
class Strategy:
    """One decoding setting. `style` is the prompt, with `{question}` in it exactly once.

    Raises UserError for a negative temperature, a fraction outside (0, 1], or another style.
    """

    temperature: float
    budget_fraction: float
    style: str = "{question}"

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.budget_fraction <= 1:
            raise UserError(f"a strategy needs temperature >= 0 and 0 < budget_fraction <= 1, not {self}")
        if self.style.count("{question}") != 1:
            raise UserError(f"a strategy's style must hold {{question}} exactly once: {self.style[:60]!r}")

    def prompt(self, question: str) -> str:
        """The question in this style; no other braces are special."""
        before, after = self.style.split("{question}")
        return before + question + after

    def max_tokens(self, most: int) -> int:
        """floor(fraction x most)."""
        return math.floor(self.budget_fraction * most)


Table = Mapping[str, Strategy]
"""A strategy for each of `CLASSES`."""

PLAIN: Table = MappingProxyType({"easy": Strategy(0.5, 0.4), "normal": Strategy(0.8, 1.0), "hard": Strategy(0.4, 0.5)})
"""Temperatures and budgets without words around the question, for models that know no instructions."""
PAPER: Table = MappingProxyType(
    {
        "easy": Strategy(0.5, 0.4, "{question}\n\nSolve this directly in few words. Then check the result once."),
        "normal": Strategy(0.8, 1.0, "{question}\n\nThink step by step, then state the final answer."),
        "hard": Strategy(
            0.4,
            0.5,
            "{question}\n\nThis may be out of reach. Outline the most promising approach first, spend little on it, "
            "and give your best answer as soon as it fails.",
        ),
    }
)
"""The paper's table; its prompts are described, not printed, so the words are ours [inferred]."""


def check_table(table: Table, max_tokens: int) -> Table:
    """The table itself. Raises UserError where it lacks a class, has another, or leaves one without a token."""
    if set(table) != set(CLASSES):
        raise UserError(f"table must have the classes {', '.join(CLASSES)}, not {', '.join(sorted(table)) or 'none'}")
    for name, strategy in table.items():
        if strategy.max_tokens(max_tokens) < 1:
            raise UserError(f"max_tokens {max_tokens} leaves strategy '{name}' no token; raise it")
    return table
