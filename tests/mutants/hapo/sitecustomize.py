"""Planted bug: entropies below the pivot are divided by the negative minimum, whatever sign was asked for.

It is the released code's form under the name of the text's: the most certain token counts like the most uncertain one.
The module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.EntropyScale.apply

    def apply(self: Any, entropy: Any, sign: str = "signed") -> Any:
        return right(self, entropy, "released")

    module.EntropyScale.apply = apply


plant("rlvr_lab.methods.hapo", change)
