"""Planted bug: the nucleus always holds the token that crosses top_p, whichever convention is asked for.

That is the usual nucleus, so the mistake looks like a clean-up; the released rule, which the chapter contrasts with it,
is gone. The module is patched when it is first imported: importing it here would load torch into every process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.core.entropy"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        right = module.nucleus_entropy

        def nucleus_entropy(*args: Any, **kwargs: Any) -> Any:
            return right(*args, **{**kwargs, "include_crossing": True})

        module.nucleus_entropy = nucleus_entropy  # type: ignore[attr-defined]


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
