"""Planted bug: the moving average of the entropy starts at 0 instead of at the first entropy.

The usual slip of an average without a special first step: it climbs for many tokens, so that its maximum comes late and
the phase that only lowers entropy with it; and every early entropy lies above its average.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.Switch.update

    def update(self: Any, entropy_B: Any, coin_B: Any = None) -> Any:
        if not self.tokens:
            self.ema, self.tokens = entropy_B * 0, 1
        return right(self, entropy_B, coin_B)

    module.Switch.update = update


plant("rlvr_lab.inference.entropy_switch", change)
