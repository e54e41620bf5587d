"""Break a module of the library when it is first imported: what every `tests/mutants/<slug>/sitecustomize.py` uses.

Importing the module here would load torch or numpy into every Python process, so a finder waits for its import. Modules
that take a name from the broken one get the wrong name as well. Only the mutant's own folder is on PYTHONPATH; it adds
this one, at the end of the path, where it hides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Change = Callable[[ModuleType], None]


def plant(target: str, change: Change) -> None:
    """Have `change` applied to the module `target` as soon as it has been run."""
    sys.meta_path.insert(0, _Finder(target, change))


class _Finder(MetaPathFinder):
    """Puts a planting loader in front of the target module and leaves all others alone."""

    def __init__(self, target: str, change: Change) -> None:
        self._target, self._change = target, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._target:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PlantingLoader(spec.loader, self._change)
        return spec


class _PlantingLoader(Loader):
    """Runs the real module, then changes it."""

    def __init__(self, real: Loader, change: Change) -> None:
        self._real, self._change = real, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._change(module)
