"""Planted bug: a row that took over a prefix counts it as sampled again, so that generated tokens are counted twice."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    module.Rollout.sampled = property(lambda self: self.mask)


plant("rlvr_lab.core.rollout", change)
