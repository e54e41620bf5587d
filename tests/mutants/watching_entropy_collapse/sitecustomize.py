"""Planted bug: pass@k by the plug-in formula 1 - (1 - c/n)^k, which draws the k samples with replacement.

It agrees with the unbiased estimate at k = 1, at c = 0 and at c = n, and is too small elsewhere. The module is patched
when it is first imported: importing it here would load numpy into every Python process. `evaluate.evaluation` takes its
name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.pass_at_k

    def pass_at_k(samples: int, correct: Any, k: int) -> Any:
        # pass@1 is c/n; through it the checks of the arguments stay those of the real function
        return 1.0 - (1.0 - right(samples, correct, 1)) ** k

    module.pass_at_k = pass_at_k  # type: ignore[attr-defined]


plant("rlvr_lab.evaluate.passk", change)
