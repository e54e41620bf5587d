"""Planted bug: "early" and "late" are means over half of the steps each, not over a fifth.

Trends become flatter, so what a run paid for its entropy comes out too small. The module is patched when it is first
imported: importing it here would load numpy into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    module.window = lambda count: max(1, count // 2)  # type: ignore[attr-defined]


plant("rlvr_lab.train.doctor_record", change)
