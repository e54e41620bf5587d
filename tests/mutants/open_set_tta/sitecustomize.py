"""Planted bug: the filter asks for the class that the adapting model prefers, not the one of the frozen source model.

A sample that has changed its mind is then confident in its new class, so that it is kept and helps the collapse along.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.wisdom_filter
    module.wisdom_filter = lambda original, adapted, reference="original": right(original, adapted, "adapted")


plant("rlvr_lab.elsewhere.open_set_tta", change)
