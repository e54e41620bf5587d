"""Planted bug: the clipped surrogate without its minimum, l = -A clip(r, lower, upper).

Outside the range it then has no gradient for either sign of A, so that nothing leads a token back: clipping turns into
a wall without a restoring force. Inside the range nothing changes. The module is patched when it is first imported:
importing it here would load torch into every Python process. `methods.grpo` takes its name from the patched module and
so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.clipped_surrogate

    def clipped_surrogate(
        logprob: Any, old: Any, advantage: Any, lower: Any, upper: Any, *rest: Any, **others: Any
    ) -> Any:
        found = right(logprob, old, advantage, lower, upper, *rest, **others)
        low, high = (module._bound(bound, found.ratio) for bound in (lower, upper))
        return replace(found, loss=-advantage * found.ratio.clamp(low, high))

    module.clipped_surrogate = clipped_surrogate  # type: ignore[attr-defined]


plant("rlvr_lab.core.losses", change)
