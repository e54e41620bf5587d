"""Planted bug: the ratio is never detached, as in the released code.

Every value of the loss stays what it was; the exit probabilities have no say in the gradient any more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.classifier_loss
    module.classifier_loss = lambda ce, p_exit, ratio="detached": right(
        ce, p_exit, "released" if ratio == "detached" else ratio
    )


plant("rlvr_lab.elsewhere.jei_dnn", change)
