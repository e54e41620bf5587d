"""Planted bug: the style is averaged over the batch as well as over the images of one source.

Every target then gets the same style, so that no level that is asked for arrives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.aggregate
    module.aggregate = lambda features, how="mean": right(features.mean(0, keepdim=True).expand_as(features), how)


plant("rlvr_lab.elsewhere.style_extracting_diffusion", change)
