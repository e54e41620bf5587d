"""Planted bug: the target of a bucket is the mean of the batch that is being rewarded, so that nothing is ever shaped.

It is what the text says; the module is patched when it is first imported, not here: importing it would load torch into
every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    strengths = module.ARES._strengths

    def own_mean(self: Any, seen: Any) -> Any:
        self.targets = list(seen.mean)
        return strengths(self, seen)

    module.ARES._strengths = own_mean  # type: ignore[attr-defined]


plant("rlvr_lab.methods.ares", change)
