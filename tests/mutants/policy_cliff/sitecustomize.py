"""Planted bug: the end of a response collects an entropy bonus, as if the policy went on choosing there for ever.

Terminal states lose their value 0 in `value_iteration`. Hard values do not change, as the rewards there are 0; soft and
KL values do: ending early becomes worth more than it should. The module is patched when it is first imported, not
here: importing it would load torch into every Python process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.value_iteration

    def value_iteration(mdp: Any, *args: Any, **kwargs: Any) -> Any:
        return right(module.replace(mdp, terminal=mdp.terminal & False), *args, **kwargs)

    module.value_iteration = value_iteration  # type: ignore[attr-defined]


plant("rlvr_lab.methods.policy_cliff", change)
