r"""Dynamic sampling: train on groups that have a signal, and sample until the batch is full of them (DAPO Eq. 11).

    keep a group iff 0 < number of correct responses < G

arXiv 2503.14476. Kept rows [b] of the rollout's B. Card: papers/baselines.md. Code compared:
PRIME-RL/Entropy-Mechanism-of-RL @ 8850579 recipe/dapo: population standard deviation of the metric above 0. At most
`max_batches` generation batches per step; surplus groups are dropped by the loop. Advantages come afterwards, and whole
groups go, so no baseline is broken.

Presets: `paper` drops a group of one, which Eq. 11 never keeps; `released` keeps it, as the code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ..core.groups import informative_groups
from ..core.rollout import Rollout
from ._settings import check, check_choice
from .base import Method

Metric = Literal["correct", "reward"]


@dataclass(frozen=True)
class DynamicSamplingConfig:
    """Settings of dynamic sampling: the metric that must vary in a group, and the most batches per step."""

    metric: Metric = "correct"
    max_batches: int = 10
    keep_singletons: bool = False

    def __post_init__(self) -> None:
        check_choice(self.metric, get_args(Metric), "dynamic_sampling.metric")
        check(self.max_batches >= 1, "dynamic_sampling.max_batches", "be at least 1", self.max_batches)


class DynamicSampling(Method):
    """Places a `filter` with refill."""

    slug: ClassVar[str] = "dynamic_sampling"
    requires: tuple[str, ...] = ("correct",)
    refill: int = 10
    config_class: ClassVar[type[DynamicSamplingConfig]] = DynamicSamplingConfig
    presets: ClassVar[Mapping[str, DynamicSamplingConfig]] = {
        "paper": DynamicSamplingConfig(),
        "released": DynamicSamplingConfig(keep_singletons=True),
    }

    def __init__(self, config: DynamicSamplingConfig | None = None) -> None:
        self.config = config or DynamicSamplingConfig()
        self.requires = (self.config.metric,)
        self.refill = self.config.max_batches

    def filter(self, rollout: Rollout) -> Rollout:
        """Only the rows of informative groups; possibly none."""
        metric = rollout.require(self.config.metric, by=self.slug)
        keep = informative_groups(metric, rollout.group_id)
        if not self.config.keep_singletons:
            alone = rollout.group_id[:, None].eq(rollout.group_id).sum(1) == 1
            keep = keep & ~alone
        return rollout.rows(keep.nonzero().squeeze(1))
