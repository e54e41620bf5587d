"""Planted bug: the usual condition number of a random matrix is that of the square matrix of its shorter side.

Every long matrix then seems far below chance, so that a ranking "for its shape" still chooses the MLP.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.gaussian_median
    module.gaussian_median = lambda rows, columns, *rest, **named: right(*2 * (min(rows, columns),), *rest, **named)


plant("rlvr_lab.core.condition", change)
