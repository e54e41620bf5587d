"""Planted bug: confidence is the sum over tokens whatever was asked for, as in the released code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.response_certainty

    def response_certainty(certainty: Any, mask: Any, confidence: str = "mean") -> Any:
        return right(certainty, mask, "sum")

    module.response_certainty = response_certainty  # type: ignore[attr-defined]


plant("rlvr_lab.methods.ucas", change)
