"""Planted bug: the point of the line that departs most is sought without the absolute value.

Then a barrier, whose departure is negative, is never found: the largest departure is that of an end, about 0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def mode_connectivity(path):  # type: ignore[no-untyped-def]
        departure = (path[..., :1] + path[..., -1:]) / 2 - path
        return module.Connectivity(*departure.max(-1))

    module.mode_connectivity = mode_connectivity


plant("rlvr_lab.elsewhere.three_regime_pruning", change)
