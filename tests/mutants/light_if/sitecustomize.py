"""Planted bug: the token weights follow minus the covariance, so that the bonus goes to the wrong tokens.

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
    right = module.tea_weights

    def tea_weights(logprob: Any, advantage: Any, *rest: Any, **named: Any) -> Any:
        return right(logprob, -advantage, *rest, **named)

    module.tea_weights = tea_weights  # type: ignore[attr-defined]


plant("rlvr_lab.methods.light_if", change)
