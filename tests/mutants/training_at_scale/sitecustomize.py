"""Planted bug: every micro-batch divides by its own weight instead of the minibatch's, as gradient accumulation often
does.

The loss is still a mean and still trains; for micro-batches of unequal length its gradient is that of another goal.
The module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.train.update"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one method."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        right = module.Updater._backward

        def _backward(self: Any, whole: Any, rows: Any, totals: Any) -> float:
            local = {name: w / w[rows].sum().clamp_min(1e-12) for name, w in whole.reductions.items()}
            return float(right(self, replace(whole, reductions=local), rows, totals))

        module.Updater._backward = _backward  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    """Puts the planting loader in front of the target module and leaves all others alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PlantingLoader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
