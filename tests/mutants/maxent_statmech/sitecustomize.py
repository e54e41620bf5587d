"""Planted bug: the soft optimum forgets its reference, an entropy bonus in the place of a KL penalty.

Every number is still a distribution that prefers reward; only what the base policy held is lost.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.soft_optimal

    def from_uniform(reference: Any, reward: Any, beta: float) -> Any:
        return right([1 / len(reference)] * len(reference), reward, beta)

    module.soft_optimal = from_uniform  # type: ignore[attr-defined]


plant("rlvr_lab.elsewhere.maxent_statmech", change)
