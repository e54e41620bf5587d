"""Planted bug: W-REINFORCE weakens blame instead of praise: lambda stands on the wrong responses.

Signs and all other modes stay right. The module is patched when it is first imported, not here: importing it would load
torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right_one = module.sign_advantage

    def sign_advantage(correct_B: Any, mode: str, right: float = 0.1, *rest: Any, **named: Any) -> Any:
        if mode != "weighted":
            return right_one(correct_B, mode, right, *rest, **named)
        return -right_one(~correct_B, mode, right, *rest, **named)

    module.sign_advantage = sign_advantage  # type: ignore[attr-defined]


plant("rlvr_lab.methods.negative_reinforcement", change)
