"""Planted bug: of answers with equal votes the last-seen one wins.

Without a tie nothing changes, so that only a chapter that looks at one can notice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.majority

    def majority(cluster: Any, group: Any) -> Any:
        return right(cluster.flip(0), group.flip(0)).flip(0)

    module.majority = majority


plant("rlvr_lab.methods.ettrl", change)
