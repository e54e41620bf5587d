"""Planted bug: the frame does not move: the place has to keep still, while the state still has to be constant."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.lagrangian_residuals

    def at_rest(u_t, u_x, u_xx, place, speed, *rest):  # type: ignore[no-untyped-def]
        return right(u_t, u_x, u_xx, place, 0 * speed, *rest)

    module.lagrangian_residuals = at_rest


plant("rlvr_lab.elsewhere.lagrangian_pinns", change)
