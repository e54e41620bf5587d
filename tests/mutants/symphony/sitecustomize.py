"""Planted bug: the stop-gradient in the exponent of swaddling is missing, so that beta follows the wall as well.

Beta then rests elsewhere, and the slopes are no longer those of the text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def terms(scale, beta):
        return module.omega(scale ** (1 / beta)), beta * scale * scale.log(), module.omega(beta.square())

    module.swaddling_terms = terms


plant("rlvr_lab.elsewhere.symphony", change)
