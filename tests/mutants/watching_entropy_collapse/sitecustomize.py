"""Planted bug: pass@k by the plug-in formula 1 - (1 - c/n)^k, which draws the k samples with replacement.

It agrees with the unbiased estimate at k = 1, at c = 0 and at c = n, and is too small elsewhere. The module is patched
when it is first imported: importing it here would load numpy into every Python process. `evaluate.evaluation` takes its
name from the patched module and so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.evaluate.passk"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        right = module.pass_at_k

        def pass_at_k(samples: int, correct: Any, k: int) -> Any:
            # pass@1 is c/n; through it the checks of the arguments stay those of the real function
            return 1.0 - (1.0 - right(samples, correct, 1)) ** k

        module.pass_at_k = pass_at_k  # type: ignore[attr-defined]


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
