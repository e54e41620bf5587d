"""Planted bug: the sampler that keeps signs takes the score in x for the score of ln x: the Jacobian's 1 is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.reverse_step

    def reverse_step(x, h, z, sigma, dt, rule="sign_kept"):
        return right(x, h - 1 if rule == "sign_kept" else h, z, sigma, dt, rule)

    module.reverse_step = reverse_step


plant("rlvr_lab.elsewhere.dale_langevin", change)
