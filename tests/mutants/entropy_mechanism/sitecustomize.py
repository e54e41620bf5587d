"""Planted bug: the exact first-order estimate forgets that the logits of the tokens not drawn move as well.

`change_full` then is STEER's theorem under another name, a mistake that leaves most signs right. The ledger of a run
uses it too. The module is patched when it is first imported, not here: importing it would load torch into every Python
process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.core.dynamics"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)

        def change_full(coefficient: Any, logprob: Any, entropy: Any, collision: Any, cross: Any) -> Any:
            return module.change_theorem(coefficient, logprob, entropy)

        module.change_full = change_full  # type: ignore[attr-defined]


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
