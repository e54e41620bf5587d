"""Planted bug: every micro-batch divides by its own weight instead of the minibatch's, as gradient accumulation often
does.

The loss is still a mean and still trains; for micro-batches of unequal length its gradient is that of another goal.
The module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.Updater._backward

    def _backward(self: Any, whole: Any, rows: Any, totals: Any) -> float:
        local = {name: w / w[rows].sum().clamp_min(1e-12) for name, w in whole.reductions.items()}
        return float(right(self, replace(whole, reductions=local), rows, totals))

    module.Updater._backward = _backward  # type: ignore[attr-defined]


plant("rlvr_lab.train.update", change)
