"""Planted bug: a trend in which a step that was not measured counts as 0.

Early and late levels of a complete column stay right; where steps are missing they are too small, and the spread too
large. The module is patched when it is first imported: importing it here would load numpy into every Python process.
`doctor_rules` takes its name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.trend

    def trend(values: Any) -> Any:
        return right(module.np.nan_to_num(values))

    module.trend = trend  # type: ignore[attr-defined]


plant("rlvr_lab.train.doctor_record", change)
