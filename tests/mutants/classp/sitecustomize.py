"""Planted bug: the gate of the released code for every run. It looks at whole tensors, so that no weight is spared."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.gate
    module.gate = lambda grad, threshold, rule="paper": right(grad, min(threshold, 0.5), "released")


plant("rlvr_lab.core.classp", change)
