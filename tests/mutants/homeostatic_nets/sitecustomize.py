"""Planted bug: the rate moves by what the learner believes it took in, so that a wrong guess costs nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.decide

    def decide(*args: Any, **named: Any) -> Any:
        return right(*args, **(named | {"consequence": "guess"}))

    module.decide = decide


plant("rlvr_lab.elsewhere.homeostatic_nets", change)
