"""Planted bug: the "entropy" of an answer is the negative log-likelihood of its own tokens.

It is what the name "expected negative log-likelihood" invites to: right wherever the scorer is sure of this answer, and
wrong wherever it is sure of another one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from plant import plant


def change(module: ModuleType) -> None:
    right = module.token_statistics

    def token_statistics(*args: Any, **kwargs: Any) -> Any:
        logprob, _ = right(*args, **kwargs)
        return logprob, -logprob

    module.token_statistics = token_statistics


plant("rlvr_lab.evaluate.reasoning_utility", change)
