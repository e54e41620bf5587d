"""Planted bug: the k3 term is taken the other way round, with policy and proxy exchanged.

Its minimum is the same and it still pulls up, but with 1 - pi / proxy, which is never above 1: the token that has
fallen furthest is no longer pulled the hardest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def k3_to_proxy(logprob: Any, proxy: Any, clamp: float | None = 10.0) -> Any:
        d = logprob - proxy.detach()
        value = d.exp() - d - 1
        return value if clamp is None else value.clamp(-clamp, clamp)

    module.k3_to_proxy = k3_to_proxy  # type: ignore[attr-defined]


plant("rlvr_lab.methods.lp_reg", change)
