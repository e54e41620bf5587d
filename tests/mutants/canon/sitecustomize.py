"""Planted bug: halves are those of the batch, not of each prompt's own group."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.high_half

    def high_half(metric: Any, group: Any, order: Any = None) -> Any:
        return right(metric, group * 0, order)

    module.high_half = high_half  # type: ignore[attr-defined]


plant("rlvr_lab.methods.canon", change)
