"""Planted bug: every entropy of a distribution over tokens comes out in bits, not in nats (a factor of 1/ln 2).

Only `rlvr_lab.core.entropy` is wrong. The sampling engine has its own formula and stays right, as it would if somebody
"cleaned up" one of the two. The module is patched when it is imported: importing torch here would slow every process.
"""

import importlib.abc
import importlib.machinery
import math
import sys

TARGET = "rlvr_lab.core.entropy"


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        right = module.entropy_of_log
        module.entropy_of_log = lambda log_p: right(log_p) / math.log(2)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
