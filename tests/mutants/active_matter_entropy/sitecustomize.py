"""Planted bug: the velocity of the probability flow is the drift; the score is forgotten.

A trap at rest then seems to produce entropy, because its walkers fall to the centre.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    module.probability_velocity = lambda drift, score, diffusion: drift + 0 * score


plant("rlvr_lab.elsewhere.active_matter_entropy", change)
