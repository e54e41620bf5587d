"""Planted bug: a response without an answer is a cluster of its own in the reward, whatever was asked for.

It is verl's convention under the name of the paper's: an unreadable response earns as much as a rare valid answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.cluster_rewards

    def cluster_rewards(
        cluster: Any, group: Any, rule: str = "frequency", unreadable: Any = 0.0, least: float = 0.0
    ) -> Any:
        return right(cluster, group, rule, None, least)

    module.cluster_rewards = cluster_rewards


plant("rlvr_lab.methods.empo", change)
