r"""Clip-higher: more room above 1 than below, so that unlikely tokens can grow (DAPO, arXiv 2503.14476).

    1 - clip_low <= r <= 1 + clip_high,        clip_low 0.2, clip_high 0.28

The bounds are scalars that hold for every token [B, T]. With r = 1 throughout (strictly on-policy) they have no effect.
Card: papers/baselines.md. Code compared: BytedTsinghua-SIA/DAPO @ 33fe317, volcengine/verl @ b178a3cd5. DAPO is this
with `grpo` (reduction token_mean), `dynamic_sampling` and `overlong`, without KL and entropy terms. DAPO-type scripts
of verl also raise the dual clip to 10: that is `grpo.dual_clip`.

Presets: `paper` and `released` are the same; `symmetric` is the control 0.2 / 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.rollout import Rollout
from ._settings import bounds, check
from .base import Method


@dataclass(frozen=True)
class ClipHigherConfig:
    """Settings of clip-higher: distances of the ratio from 1."""

    clip_low: float = 0.2
    clip_high: float = 0.28

    def __post_init__(self) -> None:
        check(0 <= self.clip_low <= 1, "clip_higher.clip_low", "lie in [0, 1]", self.clip_low)
        check(self.clip_high >= 0, "clip_higher.clip_high", "not be negative", self.clip_high)


class ClipHigher(Method):
    """Owner of `clip`."""

    slug: ClassVar[str] = "clip_higher"
    config_class: ClassVar[type[ClipHigherConfig]] = ClipHigherConfig
    presets: ClassVar[Mapping[str, ClipHigherConfig]] = {
        "paper": ClipHigherConfig(),
        "released": ClipHigherConfig(),
        "symmetric": ClipHigherConfig(clip_high=0.2),
    }

    def __init__(self, config: ClipHigherConfig | None = None) -> None:
        self.config = config or ClipHigherConfig()

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant asymmetric bounds."""
        return bounds(1 - self.config.clip_low, 1 + self.config.clip_high, advantage_BT)
