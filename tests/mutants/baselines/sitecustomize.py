"""Planted bug: CISPO's truncated weight carries gradient, as if the stop-gradient had been forgotten.

The value of the loss stays exactly right; only its gradient is wrong, wherever the ratio is inside the bounds. The
module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def cispo_surrogate(logprob: Any, old_logprob: Any, advantage: Any, lower: Any, upper: Any) -> Any:
        ratio = module.importance_ratio(logprob, old_logprob)
        low, high = module._bound(lower, ratio), module._bound(upper, ratio)
        loss = -ratio.clamp(low, high) * advantage * logprob
        return module.Surrogate(loss, ratio, ratio < low, ratio > high)

    module.cispo_surrogate = cispo_surrogate  # type: ignore[attr-defined]


plant("rlvr_lab.core.losses", change)
