"""Planted bug: only the K positions of highest entropy are considered, whatever reading of "top-K" was asked for.

It is the paper's sentence under the name of the code: where the highest are no words, few or no candidates are left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.candidates

    def candidates(ranked: Any, accept: Any, most: int, filter_first: bool = True) -> Any:
        return right(ranked, accept, most, False)

    module.candidates = candidates


plant("rlvr_lab.methods.cure", change)
