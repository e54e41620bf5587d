"""Planted bug: KL-Cov ranks its tokens by the magnitude of the centred product instead of its value.

Half of what it then penalises are unlikely tokens of right responses, the opposite of what the method is for; the
loss still trains and looks plausible. The module is patched when it is first imported, not here: importing it would
load torch into every Python process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.methods.entropy_mechanism"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        right = module.select_kl_cov

        def select_kl_cov(covariance: Any, mask: Any, number: int) -> Any:
            return right(covariance.abs(), mask, number)

        module.select_kl_cov = select_kl_cov  # type: ignore[attr-defined]


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
