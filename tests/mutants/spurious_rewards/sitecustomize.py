"""Planted bug: the clipped surrogate without its minimum, l = -A clip(r, lower, upper).

Outside the range it then has no gradient for either sign of A, so that nothing leads a token back: clipping turns into
a wall without a restoring force. Inside the range nothing changes. The module is patched when it is first imported:
importing it here would load torch into every Python process. `methods.grpo` takes its name from the patched module and
so gets the wrong one as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
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
        right = module.clipped_surrogate

        def clipped_surrogate(
            logprob: Any, old: Any, advantage: Any, lower: Any, upper: Any, *rest: Any, **others: Any
        ) -> Any:
            found = right(logprob, old, advantage, lower, upper, *rest, **others)
            low, high = (module._bound(bound, found.ratio) for bound in (lower, upper))
            return replace(found, loss=-advantage * found.ratio.clamp(low, high))

        module.clipped_surrogate = clipped_surrogate  # type: ignore[attr-defined]


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
