"""Planted bug: group-relative advantages with the wrong sign, so that right responses are pushed down.

The module is patched when it is first imported, not here: importing it would load torch into every Python process.
`methods.grpo` takes its name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.group_advantage

    def group_advantage(*args: Any, **kwargs: Any) -> Any:
        return -right(*args, **kwargs)

    module.group_advantage = group_advantage  # type: ignore[attr-defined]


plant("rlvr_lab.core.advantages", change)
