"""Planted bug: problems are ranked by mean accuracy instead of by its variance.

The easiest problem comes first, on which every group is equal and nothing is learnt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def variance_scores(history: Any) -> Any:
        return {key: sum(values) / len(values) for key, values in history.items()}

    module.variance_scores = variance_scores


plant("rlvr_lab.methods.one_shot", change)
