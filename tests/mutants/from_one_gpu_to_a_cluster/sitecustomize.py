"""Planted bug: reduction weights normalise each half of the minibatch by its own tokens.

The token mean becomes the mean of two means, as if two ranks had each averaged their own. Training goes on and looks
plausible. The module is patched when it is first imported, not here: importing it would load torch into every Python
process. `update` takes its name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.reduction_weights

    def reduction_weights(mask: Any, reduction: str, constant: Any = None, dtype: Any = None) -> Any:
        given = {} if dtype is None else {"dtype": dtype}
        weights = right(mask, reduction, constant, **given)
        half = len(mask) // 2
        if reduction != "token_mean" or not half or not bool(mask[:half].any() and mask[half:].any()):
            return weights
        for part in (slice(0, half), slice(half, None)):
            weights[part] = weights[part] / weights[part].sum() / 2
        return weights

    module.reduction_weights = reduction_weights  # type: ignore[attr-defined]


plant("rlvr_lab.core.reduce", change)
