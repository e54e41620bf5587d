r"""Overlong responses: a soft punishment near the limit, or no learning from cut ones (DAPO Eq. 13, arXiv 2503.14476).

    excess = |y| - (max_length - buffer)
    R_len  = -factor min(max(excess / buffer, 0), 1)            [B], added to the reward
    filter: the tokens of a response that the limit cut leave the loss; its reward stays in the group's baseline

Card: papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5 workers/reward_manager/dapo.py. |y| counts the
tokens [B] that the policy chose: what a tool said is nothing that it could shorten. The paper's correctness reward is
+-1; under 0/1 rewards the same punishment weighs twice as much. Set `max_length` to the run's `rollout.max_tokens`.

Presets:
- `paper`: soft punishment with the floor -factor; 20480 tokens, the last 4096 of them punished.
- `released`: verl has no floor: beyond `max_length` the punishment keeps growing.
- `filtering`: no punishment; cut responses are masked instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.groups import overlong_reward
from ..core.rollout import Rollout
from ..errors import UserError
from ._settings import check
from .base import Method


@dataclass(frozen=True)
class OverlongConfig:
    """Settings: lengths in tokens, `factor` in reward; what is done is `punish`, `mask_truncated`, or both."""

    max_length: int = 20480
    buffer: int = 4096
    factor: float = 1.0
    floor: bool = True
    punish: bool = True
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        check(self.max_length > 0, "overlong.max_length", "be positive", self.max_length)
        inside = 0 < self.buffer <= self.max_length
        check(inside, "overlong.buffer", f"lie in (0, max_length] = (0, {self.max_length}]", self.buffer)
        check(self.factor >= 0, "overlong.factor", "not be negative", self.factor)
        if not (self.punish or self.mask_truncated):
            raise UserError("methods.overlong.punish and methods.overlong.mask_truncated are both off: nothing is done")


class Overlong(Method):
    """Places a `reward` and a `filter`."""

    slug: ClassVar[str] = "overlong"
    config_class: ClassVar[type[OverlongConfig]] = OverlongConfig
    presets: ClassVar[Mapping[str, OverlongConfig]] = {
        "paper": OverlongConfig(),
        "released": OverlongConfig(floor=False),
        "filtering": OverlongConfig(punish=False, mask_truncated=True),
    }

    def __init__(self, config: OverlongConfig | None = None) -> None:
        self.config = config or OverlongConfig()

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """The punishment as component `overlong`, or nothing."""
        c = self.config
        if not c.punish:
            return {}
        return {"overlong": overlong_reward(rollout.mask.sum(1), c.max_length, c.buffer, c.factor, c.floor)}

    def filter(self, rollout: Rollout) -> Rollout:
        """The rollout with the tokens of cut responses unmarked, or as it is."""
        if not self.config.mask_truncated:
            return rollout
        return rollout.with_(action_mask=rollout.action_mask & rollout.finished[:, None])
