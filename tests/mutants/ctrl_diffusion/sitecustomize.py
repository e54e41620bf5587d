"""Planted bug: the controlled sampler starts from the initial law that it was trained with.

Each step is tilted as it should be; only the tilt of the start is forgotten, so that no posterior comes out.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.soft_control

    def kept_start(initial: Any, kernels: Any, *rest: Any, **named: Any) -> Any:
        found = right(initial, kernels, *rest, **named)
        return replace(found, initial=initial) if len(kernels) else found  # without a step it is the target itself

    module.soft_control = kept_start  # type: ignore[attr-defined]


plant("rlvr_lab.elsewhere.ctrl_diffusion", change)
