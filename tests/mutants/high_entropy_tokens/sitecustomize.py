"""Planted bug: `denominator: selected` divides by all tokens, so that the released preset is the paper's.

The selection stays right, and so does the direction of the gradient; it is five times too short. The module is patched
when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def selected_weights(selected_BT: Any, mask_BT: Any, reduction: str, dtype: Any) -> Any:
        return selected_BT.to(dtype)

    module.selected_weights = selected_weights  # type: ignore[attr-defined]


plant("rlvr_lab.methods.high_entropy_tokens", change)
