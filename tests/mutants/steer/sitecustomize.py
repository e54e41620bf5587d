"""Planted bug: STEER's weight forgets the absolute value, so tokens whose update lowers entropy keep the weight 1.

All weights stay in their range and padding stays 0. The module is patched when it is first imported, not here:
importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right_one = module.exponential_weights

    def exponential_weights(change_BT: Any, mask_BT: Any, least: float, floor: float = 0.0) -> Any:
        largest = float(change_BT.abs().masked_fill(~mask_BT, 0.0).max())
        return right_one(change_BT.clamp_min(0.0), mask_BT, least, max(floor, largest))

    module.exponential_weights = exponential_weights  # type: ignore[attr-defined]


plant("rlvr_lab.methods.steer", change)
