"""Planted bug: there is one expert for all points, however many are asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.split
    module.split = lambda points, experts: right(points, 1)


plant("rlvr_lab.elsewhere.pi_hc_moe", change)
