"""Planted bug: the spectrum is that of singular values under the name of eigenvalues.

Every figure stays between its bounds and looks plausible; RankMe is the other definition's, and alpha is halved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module._shares

    def shares(singular: Any, most: Any) -> Any:
        return right(singular.sqrt(), most)

    module._shares = shares


plant("rlvr_lab.evaluate.representation_geometry", change)
