"""Planted bug: the thought that holds the answer has a process reward too.

Then nothing undoes the reward of the last run, and the return is off by r_c, or by the outcome, before it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    def process_rewards(label: Any, ends: Any, correct: Any, outcome: Any, scale: Any) -> Any:
        import torch

        good = label > 0.5
        right = torch.where(good, scale[:, None], -scale[:, None])
        wrong = torch.where(good, -outcome[:, None], outcome[:, None])
        return torch.where(ends, torch.where(correct[:, None], right, wrong), torch.zeros_like(right))

    module.process_rewards = process_rewards


plant("rlvr_lab.methods.tp_grpo", change)
