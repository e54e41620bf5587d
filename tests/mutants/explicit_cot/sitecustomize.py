"""Planted bug: where the second relation is exchanged, the first is exchanged with it.

It is what the released first-stage script does: a second assignment overwrites the first, and r2 seems to matter for
the bridge. The module is patched when it is first imported, not here: importing it would load torch into every Python
process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.exchanged

    def exchanged(chain: Any, site: str, world: Any, generator: Any) -> Any:
        new = right(chain, site, world, generator)
        if site != "r2" or new is None:
            return new
        return right(new, "r1", world, generator) or new

    module.exchanged = exchanged  # type: ignore[attr-defined]


plant("rlvr_lab.evaluate.explicit_cot", change)
