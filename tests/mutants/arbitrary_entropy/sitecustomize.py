"""Planted bug: the controller is the wrong way round, hot above the target and cold below it.

Nothing crashes, and a single step looks right; entropy runs away from the target instead of returning to it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def control_temperature(entropy: float, target: float, high: float, low: float) -> float:
        return low if entropy <= target else high

    module.control_temperature = control_temperature  # type: ignore[attr-defined]


plant("rlvr_lab.methods.arbitrary_entropy", change)
