"""Planted bug: the share of the possible gain that was realised, under the name of the share that was not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.Rounds.friction

    def friction(self: Any, target: float = 1.0) -> float | None:
        found = right(self, target)
        return None if found is None else 1 - found

    module.Rounds.friction = friction


plant("rlvr_lab.evaluate.feedback_friction", change)
