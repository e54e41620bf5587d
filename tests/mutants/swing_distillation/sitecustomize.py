"""Planted bug: the temperature is that of the largest score, the same for every token.

Heat everywhere costs perplexity and hides nothing: order within a context survives it, and the rivals are heated too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.token_temperature
    module.token_temperature = lambda score, *rest, **named: right(0 * score + score.max(), *rest, **named)


plant("rlvr_lab.elsewhere.swing_distillation", change)
