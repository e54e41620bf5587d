"""Planted bug: connections grow where the gradient asks for them least."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.regrow
    module.regrow = lambda grad, mask, count: right(1 / (grad.abs() + 1e-30), mask, count)


plant("rlvr_lab.elsewhere.granet", change)
