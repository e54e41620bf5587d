"""Planted bug: importance weights are upside down, sampler over trainer, before they are capped.

The module is patched when it is first imported: importing it here would load torch into every Python process. The
method takes its name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.truncated_importance_weight

    def truncated_importance_weight(old: Any, behaviour: Any, cap: float) -> Any:
        return right(behaviour, old, cap)

    module.truncated_importance_weight = truncated_importance_weight  # type: ignore[attr-defined]


plant("rlvr_lab.core.losses", change)
