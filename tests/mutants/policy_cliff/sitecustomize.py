"""Planted bug: the end of a response collects an entropy bonus, as if the policy went on choosing there for ever.

Terminal states lose their value 0 in `value_iteration`. Hard values do not change, as the rewards there are 0; soft and
KL values do: ending early becomes worth more than it should. The module is patched when it is first imported, not
here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TARGET = "rlvr_lab.methods.policy_cliff"


class _PlantingLoader(Loader):
    """Runs the real module, then replaces one function."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        right = module.value_iteration

        def value_iteration(mdp: Any, *args: Any, **kwargs: Any) -> Any:
            return right(module.replace(mdp, terminal=mdp.terminal & False), *args, **kwargs)

        module.value_iteration = value_iteration  # type: ignore[attr-defined]


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
