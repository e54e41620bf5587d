"""Planted bug: a curve is read at the last evaluation before it reaches an accuracy, not between two of them.

GRPO then looks less trained, and so more diverse, than it was at that accuracy. The module is patched when it is first
imported: importing it here would load numpy into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.at_accuracy

    def at_accuracy(curve: Any, accuracy: float, metric: str) -> float | None:
        if right(curve, accuracy, metric) is None:
            return None
        reached = next(i for i, row in enumerate(curve) if row["pass@1"] >= accuracy)
        return float(curve[max(reached - 1, 0)][metric])

    module.at_accuracy = at_accuracy  # type: ignore[attr-defined]


plant("rlvr_lab.arena.analysis", change)
