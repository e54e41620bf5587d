"""Planted bug: the summary is pooled over the images of the batch as well, so that it holds nothing of one image."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.Summary.forward
    module.Summary.forward = lambda self, tokens: right(self, tokens.mean(0, keepdim=True).expand_as(tokens))


plant("rlvr_lab.elsewhere.ddae_pp", change)
