"""Planted bug: every entropy of a distribution over tokens comes out in bits, not in nats (a factor of 1/ln 2).

Only `rlvr_lab.core.entropy` is wrong. The sampling engine has its own formula and stays right, as it would if somebody
"cleaned up" one of the two. The module is patched when it is imported: importing torch here would slow every process.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.entropy_of_log
    module.entropy_of_log = lambda log_p: right(log_p) / math.log(2)


plant("rlvr_lab.core.entropy", change)
