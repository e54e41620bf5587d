"""Planted bug: the head never contains the token that crosses its mass, whatever was asked for.

Then the head is empty wherever the policy is sure, and its entropy 0 there as before; only positions in between change.
The module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.nucleus_entropy

    def nucleus_entropy(logits: Any, top_p: float = 0.8, top_k: int | None = None, *_: Any, **__: Any) -> Any:
        return right(logits, top_p, top_k, False)

    module.nucleus_entropy = nucleus_entropy  # type: ignore[attr-defined]


plant("rlvr_lab.core.entropy", change)
