"""Planted bug: CISPO's truncated weight carries gradient, as if the stop-gradient had been forgotten.

The value of the loss stays exactly right; only its gradient is wrong, wherever the ratio is inside the bounds. The
module is patched when it is first imported, not here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.core.losses"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)

        def cispo_surrogate(logprob: Any, old_logprob: Any, advantage: Any, lower: Any, upper: Any) -> Any:
            ratio = module.importance_ratio(logprob, old_logprob)
            low, high = module._bound(lower, ratio), module._bound(upper, ratio)
            loss = -ratio.clamp(low, high) * advantage * logprob
            return module.Surrogate(loss, ratio, ratio < low, ratio > high)

        module.cispo_surrogate = cispo_surrogate  # type: ignore[attr-defined]


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
