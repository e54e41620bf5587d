"""Planted bug: KL-Cov ranks its tokens by the magnitude of the centred product instead of its value.

Half of what it then penalises are unlikely tokens of right responses, the opposite of what the method is for; the
loss still trains and looks plausible. The module is patched when it is first imported, not here: importing it would
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
    right = module.select_kl_cov

    def select_kl_cov(covariance: Any, mask: Any, number: int) -> Any:
        return right(covariance.abs(), mask, number)

    module.select_kl_cov = select_kl_cov  # type: ignore[attr-defined]


plant("rlvr_lab.methods.entropy_mechanism", change)
