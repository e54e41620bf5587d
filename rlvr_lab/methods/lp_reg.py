r"""Lp-Reg: protect unlikely but plausible tokens from being punished away (arXiv 2510.03222).

    proxy(v) = pbar(v) / Z on {v: pbar(v) >= tau}, else 0,      tau = kappa max pbar (min-p) or kappa itself (`fixed`)
    l_t      = -A r                                        clipped to r <= 10 only, no lower clip
             + beta D_t                                     on the selected tokens
    selected : of the n tokens with A < 0, the k = floor(rho n) of smallest pi(y), as long as pi(y) < proxy(y)
    D        = clamp(e^d - d - 1, -10, 10),  d = log proxy(y) - log pi(y)        `k3`: its expected gradient is that of
    D        = KL(proxy || pi) = sum_v proxy(v) (log proxy(v) - log pi(v))       `forward`, over the whole vocabulary

Nats; all [B, T]. pbar is the policy that sampled (`proxy: old`), or the one being updated, without gradient
(`current`). k = 1 or less selects nothing (released). A < 0 counts after normalisation. With one update per rollout
d = -log Z: the pull is beta (1/Z - 1), a few per cent against |A|; it grows only once pi has moved [inferred]. The
clamp takes the gradient away where d > 2.61, just where protection is needed most; `clamp: null` keeps it (ours).

Card: papers/lp_reg.md. Code compared: CarlanLark/Lp-Reg-dev @ 33b27e2, whose percentile runs over a micro-batch; here
over the minibatch. `forward` with `proxy: old` would need every old distribution and is refused.

Presets: `paper` (forward, current proxy: on-policy), `released` (k3, old proxy), `tiny` (released with rho 0.1: with a
hundredth of a small minibatch k is 1). Controls: `beta: 0` is GRPO clipped to [0, 10]; `select: entropy` takes the
tokens of highest entropy instead, `filter: none` keeps every token in the proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError
from ._choices import EmptyChoices
from ._settings import bounds, check, check_choice
from .base import LossInputs, Method

FILTERED = -1e4  # logit of a token that the proxy leaves out
Filter = Literal["minp", "fixed", "none"]


def proxy_log_p(logits: Tensor, kappa: float, rule: Filter = "minp") -> tuple[Tensor, Tensor]:
    """Log-probabilities of the proxy over the last axis, without gradient, and its support. Takes logits or log p.

    Where a fixed threshold leaves nothing, the distribution is uniform over the filtered logits, as in the release.
    """
    value = logits.detach()
    p = torch.softmax(value, -1)
    threshold = kappa * p.amax(-1, keepdim=True) if rule == "minp" else torch.full_like(p[..., :1], kappa)
    keep = torch.ones_like(p, dtype=torch.bool) if rule == "none" else p >= threshold
    return torch.log_softmax(value.masked_fill(~keep, FILTERED), -1), keep


def protected_tokens(ranked_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """The k = max(1, floor(share n)) tokens of smallest `ranked` among the n with A < 0 [B, T]; none where k is 1."""
    negative = mask_BT & (advantage_BT < 0)
    places = negative.nonzero()
    k = max(1, int(share * len(places)))
    selected = torch.zeros_like(mask_BT)
    if k > 1:
        chosen = places[ranked_BT[negative].argsort(stable=True)[:k]]
        selected[chosen[:, 0], chosen[:, 1]] = True
    return selected


def k3_to_proxy(logprob_BT: Tensor, proxy_BT: Tensor, clamp: float | None = 10.0) -> Tensor:
    """e^d - d - 1 with d = log proxy - log pi, held within +- `clamp`; its gradient on log pi is 1 - e^d inside."""
    d = proxy_BT.detach() - logprob_BT
    value = d.exp() - d - 1
    return value if clamp is None else value.clamp(-clamp, clamp)


def forward_kl(log_p: Tensor, proxy: Tensor) -> Tensor:
    """KL(proxy || pi) over the last axis, from log-probabilities; the gradient flows through pi."""
    return (proxy.exp() * (proxy - log_p)).sum(-1)


@dataclass(frozen=True)
class LpRegConfig:
    """Settings: `share` is rho, `kappa` the threshold, `upper` the largest ratio."""

    share: float = 0.01
    kappa: float = 0.02
    beta: float = 1.0
    upper: float = 10.0
    divergence: Literal["k3", "forward"] = "k3"
    proxy: Literal["old", "current"] = "old"
    filter: Filter = "minp"
    select: Literal["probability", "entropy"] = "probability"
    clamp: float | None = 10.0

    def __post_init__(self) -> None:
        check(0 <= self.share <= 1, "lp_reg.share", "lie in [0, 1]; 1 % is 0.01", self.share)
        check(0 <= self.kappa < 1, "lp_reg.kappa", "lie in [0, 1)", self.kappa)
        check(self.beta >= 0, "lp_reg.beta", "not be negative", self.beta)
        check(self.upper >= 1, "lp_reg.upper", "be at least 1", self.upper)
        check(self.clamp is None or self.clamp > 0, "lp_reg.clamp", "be positive or null", self.clamp)
        check_choice(self.divergence, ("k3", "forward"), "lp_reg.divergence")
        check_choice(self.proxy, ("old", "current"), "lp_reg.proxy")
        check_choice(self.filter, get_args(Filter), "lp_reg.filter")
        check_choice(self.select, ("probability", "entropy"), "lp_reg.select")
        if self.divergence == "forward" and self.proxy == "old":
            raise UserError("methods.lp_reg.divergence forward needs methods.lp_reg.proxy: current; use k3 with old")


class LpReg(Method):
    """Selects in `prepare`; owns `clip`, `surrogate` and the reduction."""

    slug: ClassVar[str] = "lp_reg"
    requires: tuple[str, ...] = ("old_logprob",)
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[LpRegConfig]] = LpRegConfig
    presets: ClassVar[Mapping[str, LpRegConfig]] = {
        "paper": LpRegConfig(divergence="forward", proxy="current"),
        "released": LpRegConfig(),
        "tiny": LpRegConfig(share=0.1),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: LpRegConfig | None = None) -> None:
        self.config = config or LpRegConfig()
        remedy = (
            "methods.lp_reg.share of those with a negative advantage is one or none, or the proxy leaves out every "
            "chosen one; raise share, or lower methods.lp_reg.kappa"
        )
        self.empty = EmptyChoices(self.slug, remedy)

    def has(self, hook: str) -> bool:
        """Only the proxy of the policy that sampled is read before the update."""
        return super().has(hook) and (hook != "read_old_logits" or self.config.proxy == "old")

    def read_old_logits(self, log_p_bTV: Tensor, ids_bT: Tensor) -> dict[str, Tensor]:
        """Log-probability of the sampled token under the proxy of the policy that sampled."""
        proxy, _ = proxy_log_p(log_p_bTV, self.config.kappa, self.config.filter)
        return {"lp_reg.proxy": proxy.gather(-1, ids_bT[..., None]).squeeze(-1)}

    def read_logits(self, log_p_bTV: Tensor, ids_bT: Tensor) -> dict[str, Tensor]:
        """The same for the policy being updated, and the divergence over the whole vocabulary."""
        if self.config.proxy != "current":
            return {}
        proxy, _ = proxy_log_p(log_p_bTV, self.config.kappa, self.config.filter)
        found = {"lp_reg.proxy": proxy.gather(-1, ids_bT[..., None]).squeeze(-1)}
        return found | ({"lp_reg.forward": forward_kl(log_p_bTV, proxy)} if self.config.divergence == "forward" else {})

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`lp_reg.selected` [B, T] over the minibatch."""
        order = canonical_order(batch)
        logprob, proxy = (
            batch.require(name, by=self.slug)[order].detach() for name in ("current_logprob", "lp_reg.proxy")
        )
        ranked = logprob
        if self.config.select == "entropy":
            ranked = -batch.require("current_entropy", by=self.slug)[order].detach()
        selected = protected_tokens(ranked, advantage_BT[order], batch.mask[order], self.config.share)
        placed = torch.empty_like(selected)
        placed[order] = selected & (logprob < proxy)
        self.empty.count(int(placed.sum()), int((batch.mask & advantage_BT.lt(0)).sum()))
        return {"lp_reg.selected": placed}

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """[0, upper]."""
        return bounds(0.0, self.config.upper, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The surrogate, replaced on the selected tokens by -A r + beta D."""
        c, rollout = self.config, inputs.rollout
        selected = rollout.require("lp_reg.selected", by=self.slug).bool()
        plain = clipped_surrogate(inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper)
        if c.divergence == "forward":
            divergence = inputs.statistics["lp_reg.forward"]
        else:
            proxy = inputs.statistics.get("lp_reg.proxy", rollout.statistics.get("lp_reg.proxy"))
            assert proxy is not None
            divergence = k3_to_proxy(inputs.logprob, proxy.masked_fill(~selected, 0.0), c.clamp)
        loss = torch.where(selected, -inputs.advantage * plain.ratio + c.beta * divergence, plain.loss)
        return Surrogate(loss, plain.ratio, plain.clipped_low & ~selected, plain.clipped_high & ~selected)

    def metrics(self) -> dict[str, float]:
        """Minibatches without a chosen token."""
        return self.empty.metrics()

    def notices(self) -> list[str]:
        """Says once that a choice was empty."""
        return self.empty.notices()
