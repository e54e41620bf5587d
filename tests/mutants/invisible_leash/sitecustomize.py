"""Planted bug: the null compares two sets of samples that overlap by half.

Shared samples agree with themselves, so the base seems to gain and lose fewer problems against itself than two
independent draws would, and every trained model looks further from noise. The module is patched when it is first
imported: importing it here would load numpy into every Python process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.evaluate.support"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)

        def base_null(base_correct: Any, rng: Any, k: int | None = None, draws: int = 200, min_hits: int = 1) -> Any:
            k = base_correct.shape[1] // 2 if k is None else k
            counts = []
            for _ in range(draws):
                dealt = rng.permuted(base_correct, axis=1)
                second = dealt[:, k // 2 : k // 2 + k]  # should start at k
                counts.append(module.support_counts(dealt[:, :k], second, min_hits))
            return counts

        module.base_null = base_null  # type: ignore[attr-defined]


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
