"""Planted bug: the natural baseline q_alpha - q_beta is forgotten.

Expected gradients stay what they were, and no run fails; but advantages of good scores are then positive, and scores at
the upper quantile are no longer left alone. The module is patched when it is first imported, not here: importing it
would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.window

    def window(score: Any, low: Any, high: Any, baseline: bool = True) -> Any:
        return right(score, low, high, False)

    module.window = window  # type: ignore[attr-defined]


plant("rlvr_lab.methods.riskpo", change)
