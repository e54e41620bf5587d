"""Planted bug: a problem is normal where it is right often enough, however uncertain the model was.

The second condition, entropy at most beta, is what tells "overthought" problems from others; without it nothing
crashes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.proxy_label

    def proxy_label(rate: float, entropy: float, alpha: float, beta: float, gamma: float) -> str:
        return str(right(rate, 0.0, alpha, beta, gamma))

    module.proxy_label = proxy_label


plant("rlvr_lab.inference.difficulty", change)
