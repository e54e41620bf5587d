"""Planted bug: a stored success is not judged again, its reward stands in for its advantage.

Where everybody fails the two agree, and every step of the loop still runs. The module is patched when it is first
imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def unjudged(reward: Any, mean: float, std: float | None = None, eps: float = 1e-6) -> Any:
        return reward

    module.recalibrated = unjudged  # type: ignore[attr-defined]


plant("rlvr_lab.methods._self_imitation", change)
