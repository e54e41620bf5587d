"""Planted bug: an upper bound without gradient, which is PPO's clip under another name.

Every value of the loss stays as it is. The module is patched when it is first imported, not here: importing it would
load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def without_gradient(
        logprob: Any, old: Any, advantage: Any, lower: Any, upper: Any, dual: Any = 3.0, preserved: Any = True
    ) -> Any:
        return module.clipped_surrogate(logprob, old, advantage, lower, upper, dual)

    module.balanced_surrogate = without_gradient  # type: ignore[attr-defined]


plant("rlvr_lab.methods.agentic_aepo", change)
