"""Planted bug: the lens of every layer goes through the final norm, whatever kind was asked for.

It is what most logit lenses do, under the name of one that does not: entropies of low layers rise, and the final norm
gets a gradient in the first phase.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.lens_hidden

    def lens_hidden(model: Any, lens: Any, **inputs: Any) -> Any:
        return right(model, type(lens)(lens.layer, "normed"), **inputs)

    module.lens_hidden = lens_hidden


plant("rlvr_lab.policy.access", change)
