"""Planted bug: the criterion is evaluated at 1 - lower and 1 + upper, as if the bounds were distances from 1.

The first public version of the method searched like that while its loss used the bounds themselves; nothing crashes,
the search merely ends elsewhere. The module is patched when it is first imported, not here: importing it would load
torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.positive_share

    def positive_share(ratio: Any, advantage: Any, weight: Any, lower: float, upper: float) -> float:
        return float(right(ratio, advantage, weight, 1 - lower, 1 + upper))

    module.positive_share = positive_share  # type: ignore[attr-defined]


plant("rlvr_lab.methods.bapo", change)
