"""Planted bug: the information of latent and outcome is not taken given the action.

Its penalty then removes what the latent knows about skill along with the luck, so that nothing better than the mean is
ever promised.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.conditional_information
    module.conditional_information = lambda w: right(w.sum(-3, keepdim=True))


plant("rlvr_lab.elsewhere.dichotomy_of_control", change)
