"""Planted bug: the null compares two sets of samples that overlap by half.

Shared samples agree with themselves, so the base seems to gain and lose fewer problems against itself than two
independent draws would, and every trained model looks further from noise. The module is patched when it is first
imported: importing it here would load numpy into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def base_null(base_correct: Any, rng: Any, k: int | None = None, draws: int = 200, min_hits: int = 1) -> Any:
        k = base_correct.shape[1] // 2 if k is None else k
        counts = []
        for _ in range(draws):
            dealt = rng.permuted(base_correct, axis=1)
            second = dealt[:, k // 2 : k // 2 + k]  # should start at k
            counts.append(module.support_counts(dealt[:, :k], second, min_hits))
        return counts

    module.base_null = base_null  # type: ignore[attr-defined]


plant("rlvr_lab.evaluate.support", change)
