"""Planted bug: the nucleus always holds the token that crosses top_p, whichever convention is asked for.

That is the usual nucleus, so the mistake looks like a clean-up; the released rule, which the chapter contrasts with it,
is gone. The module is patched when it is first imported: importing it here would load torch into every process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.nucleus_entropy

    def nucleus_entropy(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **{**kwargs, "include_crossing": True})

    module.nucleus_entropy = nucleus_entropy  # type: ignore[attr-defined]


plant("rlvr_lab.core.entropy", change)
