"""Planted bug: one clipped loss of the mixed advantage in place of two clipped losses.

Where both advantages have one sign, or the ratio lies within its range, nothing changes. The module is patched when it
is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def blended(
        logprob: Any, old: Any, local: Any, among: Any, weight: Any, lower: Any, upper: Any, dual: Any = 3.0,
        coefficient: float = 1.0,
    ) -> Any:  # fmt: skip
        mixed = weight * local + (1 - weight) * coefficient * among
        return module.clipped_surrogate(logprob, old, mixed, lower, upper, dual)

    module.blended_surrogate = blended  # type: ignore[attr-defined]


plant("rlvr_lab.methods.copo", change)
