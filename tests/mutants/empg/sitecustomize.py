"""Planted bug: a step earns the bonus of its own certainty instead of the next step's, the last step included."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.modulate

    def modulate(entropy: Any, advantage: Any, row: Any, k: float = 1.0, k_bonus: float = 1.0, zeta: float = 0.1,
                 quantile: float = 0.0, eps: float = 1e-8) -> Any:  # fmt: skip
        done = right(entropy, advantage, row, k, k_bonus, zeta, quantile, eps)
        bonus = zeta * done.clarity
        modulated = advantage * done.scale + bonus
        return module.Modulation(done.entropy, done.scale, done.clarity, bonus, modulated, modulated - modulated.mean())

    module.modulate = modulate


plant("rlvr_lab.methods.empg", change)
