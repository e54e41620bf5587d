"""Planted bug: the exact first-order estimate forgets that the logits of the tokens not drawn move as well.

`change_full` then is STEER's theorem under another name, a mistake that leaves most signs right. The ledger of a run
uses it too. The module is patched when it is first imported, not here: importing it would load torch into every Python
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
    def change_full(coefficient: Any, logprob: Any, entropy: Any, collision: Any, cross: Any) -> Any:
        return module.change_theorem(coefficient, logprob, entropy)

    module.change_full = change_full  # type: ignore[attr-defined]


plant("rlvr_lab.core.dynamics", change)
