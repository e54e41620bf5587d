"""Planted bug: the degree loss asks every copy for degree 0, as if its labels had been lost.

The head then needs no hidden state: copies that are all alike cost less than ln D.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def degree_loss(pooled, weight, bias=None):
        return -module.F.linear(pooled, weight, bias).log_softmax(-1)[..., 0].mean(-1)

    module.degree_loss = degree_loss


plant("rlvr_lab.core.preference_losses", change)
