"""Planted bug: the two teachers are exchanged in the temperature step, so that the sharper one is cooled.

The floor of 1 then holds the clean teacher, and the robust one is heated: the entropy gap widens instead of closing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.more_uncertain
    module.more_uncertain = lambda entropies: right(entropies).flip(-1)


plant("rlvr_lab.elsewhere.mtard", change)
