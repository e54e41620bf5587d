"""Planted bug: the hinge that reads well in a log and trains nothing, as in the released code.

Its value is right to the last digit; the entropy inside it carries no gradient.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.corridor_hinge

    def corridor_hinge(entropy: Any, reference: Any, low: float, high: float) -> Any:
        return right(entropy.detach(), reference, low, high)

    module.corridor_hinge = corridor_hinge  # type: ignore[attr-defined]


plant("rlvr_lab.methods.epo", change)
