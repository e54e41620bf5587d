r"""REINFORCE++: discounted token returns, whitened over the whole batch instead of within a group (arXiv 2501.03262).

    rho_t = R on the last token, minus kl_penalty (log pi_old - log pi_ref) on every token
    G_t   = sum_{s >= t} gamma^(s - t) rho_s
    A_t   = (G_t - mean) / sqrt(var + eps)             mean and unbiased variance over the batch

The `baseline` variant subtracts the group mean from R first and whitens that. Shapes: R [B]; rho, G, A [B, T]. Card:
papers/baselines.md. Code compared: volcengine/verl @ b178a3cd5, OpenRLHF/OpenRLHF @ 3c3be623. Statistics span the whole
rollout, so that minibatches do not change them. A rollout of one token (or response) is a ValueError.

Presets:
- `paper`: every response counts alike in mean and variance [inferred: the paper normalises over the batch of responses
  and does not say how tokens are weighed].
- `released`: verl: every token counts alike, so that long responses weigh more; no KL in the reward by default.
- `baseline`: verl's REINFORCE++-baseline; a group of one keeps its reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ..core.advantages import (
    Singleton,
    Weigh,
    final_token_reward,
    reinforce_plus_plus_baseline,
    token_returns,
    whiten,
)
from ..core.losses import kl_estimate
from ..core.rollout import Rollout
from ..errors import UserError
from ._settings import check, check_choice
from .base import Method

Variant = Literal["returns", "baseline"]


@dataclass(frozen=True)
class ReinforcePlusPlusConfig:
    """Settings of REINFORCE++. `kl_penalty` is the coefficient of the k1 estimate inside the token reward."""

    variant: Variant = "returns"
    gamma: float = 1.0
    kl_penalty: float = 0.0
    weigh: Weigh = "token"
    eps: float = 1e-8
    singleton: Singleton = "raw"

    def __post_init__(self) -> None:
        check_choice(self.variant, get_args(Variant), "reinforce_plus_plus.variant")
        check(0 <= self.gamma <= 1, "reinforce_plus_plus.gamma", "lie in [0, 1]", self.gamma)
        check(self.kl_penalty >= 0, "reinforce_plus_plus.kl_penalty", "not be negative", self.kl_penalty)
        check_choice(self.weigh, get_args(Weigh), "reinforce_plus_plus.weigh")
        check(self.eps > 0, "reinforce_plus_plus.eps", "be positive", self.eps)
        check_choice(self.singleton, get_args(Singleton), "reinforce_plus_plus.singleton")
        if self.variant == "baseline" and (self.kl_penalty or self.gamma != 1):
            raise UserError(
                "methods.reinforce_plus_plus.kl_penalty and gamma act on token returns; variant 'baseline' has none"
            )


class ReinforcePlusPlus(Method):
    """Owner of `advantage`."""

    slug: ClassVar[str] = "reinforce_plus_plus"
    requires: tuple[str, ...] = ("reward",)
    config_class: ClassVar[type[ReinforcePlusPlusConfig]] = ReinforcePlusPlusConfig
    presets: ClassVar[Mapping[str, ReinforcePlusPlusConfig]] = {
        "paper": ReinforcePlusPlusConfig(weigh="response"),
        "released": ReinforcePlusPlusConfig(),
        "baseline": ReinforcePlusPlusConfig(variant="baseline"),
    }

    def __init__(self, config: ReinforcePlusPlusConfig | None = None) -> None:
        self.config = config or ReinforcePlusPlusConfig()
        if self.config.kl_penalty:
            # only then does the loop have to keep a reference policy
            self.requires = ("reward", "old_logprob", "ref_logprob")

    def advantage(self, rollout: Rollout) -> Tensor:
        """Whitened returns [B, T]."""
        reward, c = rollout.require("reward", by=self.slug), self.config
        if c.variant == "baseline":
            return reinforce_plus_plus_baseline(
                reward, rollout.group_id, rollout.mask, c.eps, singleton=c.singleton, weigh=c.weigh
            )
        # over the response mask, which has no holes: a reward must reach the turns before a tool's output
        rho = final_token_reward(reward, rollout.response_mask)
        if c.kl_penalty:
            old = rollout.require("old_logprob", by=self.slug)
            kl = kl_estimate(old, rollout.require("ref_logprob", by=self.slug), "k1")
            rho = rho - c.kl_penalty * kl.masked_fill(~rollout.mask, 0.0)
        returns = token_returns(rho, rollout.response_mask, c.gamma)
        return whiten(returns, rollout.mask, c.eps, c.weigh)
