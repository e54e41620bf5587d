"""The arena: methods and their controls under equal conditions.

`contest` runs them, `results` keeps what came out, `analysis` compares at matched steps and at matched accuracy.
"""

from __future__ import annotations

from .analysis import (
    Match,
    all_at_accuracy,
    at_accuracy,
    between_curves,
    blocks,
    difference,
    early_stopped,
    held,
    matched,
    step_cost,
    token_cost,
)
from .arms import CATALOGUE, REFERENCE, Arm, resolve
from .digests import changed_since, method_digests
from .results import Results, load_results, merge, save_results

__all__ = [
    "CATALOGUE",
    "REFERENCE",
    "Arm",
    "Match",
    "Results",
    "all_at_accuracy",
    "at_accuracy",
    "between_curves",
    "blocks",
    "changed_since",
    "difference",
    "early_stopped",
    "held",
    "load_results",
    "matched",
    "merge",
    "method_digests",
    "resolve",
    "save_results",
    "step_cost",
    "token_cost",
]
