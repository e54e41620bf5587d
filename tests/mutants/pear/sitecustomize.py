"""Planted bug: the end-of-thinking marker counts as thinking."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.thinking_and_answer

    def thinking_and_answer(entropy: Any, mask: Any, start: Any, end: Any) -> Any:
        return right(entropy, mask, start + (start >= 0).long(), end)

    module.thinking_and_answer = thinking_and_answer  # type: ignore[attr-defined]


plant("rlvr_lab.methods.pear", change)
