"""Planted bug: the score of a segment is the mean over its steps and no longer their sum.

The loss still falls and prefers what was preferred, but the policy that it leads to is not the soft optimum.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.segment_score

    def averaged(logprob: Any, *rest: Any, **named: Any) -> Any:
        return right(logprob, *rest, **named) / logprob.shape[1]

    module.segment_score = averaged  # type: ignore[attr-defined]


plant("rlvr_lab.core.cpl", change)
