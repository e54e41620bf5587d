"""Planted bug: concentrations add like precisions, as they would for a normal belief, whatever is observed.

Then no update raises the entropy, and the step tells all that the concentration tells.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.flow

    def flow(x, alphas, rng):
        means, concentrations = right(x, alphas, rng)
        return means, 0 * concentrations + alphas.cumsum()

    module.flow = flow


plant("rlvr_lab.elsewhere.crysbfn", change)
