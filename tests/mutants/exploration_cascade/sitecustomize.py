"""Planted bug: the released penalty counts softly and so has a gradient, where the release has none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def corridor_indicator(entropy: Any, reference: Any, low: float, high: float) -> Any:
        import torch

        return torch.sigmoid(4 * (low * reference - entropy)) + torch.sigmoid(4 * (entropy - high * reference))

    module.corridor_indicator = corridor_indicator


plant("rlvr_lab.methods.epo", change)
