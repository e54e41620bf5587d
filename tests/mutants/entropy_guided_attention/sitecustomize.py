"""Planted bug: outside the dead zone only the excess over the tolerance is squared, not the whole deviation.

The penalty then rises from 0 at the edge instead of jumping: it looks smoother, still trains, and is another loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def excess_only(entropy: Any, target: Any, margin: Any) -> Any:
        return ((entropy - target).abs() - margin).relu().square()

    module.dead_zone_penalty = excess_only


plant("rlvr_lab.methods.entropy_guided_attention", change)
