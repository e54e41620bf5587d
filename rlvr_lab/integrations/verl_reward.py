"""verl's reward function for recipes of `data.task: math`: our verifier behind verl's `compute_score`. Needs no verl.

reward.custom_reward_function: {path: pkg://rlvr_lab.integrations.verl_reward, name: compute_score}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tasks.math_answer import grade


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> dict[str, Any]:
    """Reward 1 for an answer equal to the reference, else 0; `acc` is what `dynamic_sampling` and verl's
    `filter_groups` read, `pred` the answer that was found (empty where none could be read).

    verl does not say whether a response was cut off; an answer that was given before the limit counts here, while
    `rlvr-lab train` counts a cut response as wrong.
    """
    verdict = grade(solution_str, ground_truth)
    return {"score": float(verdict.correct), "acc": float(verdict.correct), "pred": verdict.answer or ""}
