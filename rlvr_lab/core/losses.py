"""Per-token losses, all minimised. Shapes [B, T]; log-probabilities in nats; the dtype of the input is kept.

Sequence-level losses (GSPO, GMPO) are given per token too, such that `sequence_mean_of_token_mean` of the matrix is
the published loss: masked tokens do not enter a sequence's ratio, and an empty sequence has ratio 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0
KLKind = Literal["k1", "abs", "k2", "k3"]
KL_KINDS: tuple[str, ...] = get_args(KLKind)


@dataclass(frozen=True)
class Surrogate:
    """Per-token loss, the importance ratio, and where the ratio lies beyond a bound that acts on it.

    For the clipped losses these are the tokens whose gradient a bound removed; `cispo_surrogate` keeps the gradient
    and marks the tokens whose weight is truncated. All [B, T].
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def importance_ratio(logprob_BT: Tensor, old_logprob_BT: Tensor) -> Tensor:
    """exp(log pi - log pi_old), the difference limited to +-20 so that the exponential stays finite (as verl does)."""
    return (logprob_BT - old_logprob_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Surrogate:
    """The clipped objective of PPO (arXiv 1707.06347) as used by GRPO; golden: volcengine/verl `compute_policy_loss`.

        l = max(-A min(r, delta), -A clip(r, lower, upper)),   for A < 0 with a dual clip c:   l = min(l, -A c)

    `lower` and `upper` bound the ratio itself (1 - eps and 1 + eps), as numbers or per token. `delta` is TRL's
    two-sided bound of the unclipped branch; without it the branch is r. The gradient vanishes where A > 0 and
    r > upper, where A < 0 and r < lower, and where A < 0 and r is beyond the dual clip or delta.
    Raises ValueError for a dual clip or a delta that is not above 1.
    """
    for name, value in (("dual_clip", dual_clip), ("delta", delta)):
        if value is not None and value <= 1:
            raise ValueError(f"{name} must be above 1, not {value}")
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    low, high = _bound(lower, ratio), _bound(upper, ratio)
    plain = -advantage_BT * (ratio if delta is None else ratio.clamp_max(delta))
    loss = torch.maximum(plain, -advantage_BT * ratio.clamp(low, high))
    clipped_high = (advantage_BT > 0) & (ratio > high)
    clipped_low = (advantage_BT < 0) & (ratio < low)
    if dual_clip is not None:
        loss = torch.where(advantage_BT < 0, torch.minimum(loss, -advantage_BT * dual_clip), loss)
    return Surrogate(loss, ratio, clipped_low, clipped_high)


def _bound(value: Tensor | float, like: Tensor) -> Tensor:
    """A bound as a tensor; numbers take the dtype of the ratio, so that float64 stays exact."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)


def _row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the marked tokens of each row [B, 1]; 0 for an empty row."""
    total = values_BT.masked_fill(~mask_BT, 0.0).sum(1, keepdim=True)
    return total / mask_BT.sum(1, keepdim=True).clamp_min(1)


def gspo_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    log_limit: float | None = 10.0,
) -> Surrogate:
    """Clipping of the sequence ratio (GSPO, arXiv 2507.18071; golden: volcengine/verl `compute_policy_loss_gspo`).

        log s_i = mean over the tokens of i of (log pi - log pi_old)
        s_it    = exp(sg[log s_i] + log pi_t - sg[log pi_t])          has the value s_i, and the gradient of token t
        l       = max(-A s_it, -A clip(s_it, lower, upper))

    Each token of i gets the gradient -A_i s_i / |y_i| under `sequence_mean_of_token_mean`, as from s_i itself (TRL's
    ratio of shape [B, 1]). verl limits log s_it to at most 10, from above only; `log_limit` None leaves it out.
    """
    sequence = _row_mean((logprob_BT - old_logprob_BT).detach(), mask_BT)
    # the difference first: it is exactly 0, and adding it loses nothing of a small sequence ratio
    log_ratio = sequence + (logprob_BT - logprob_BT.detach()).masked_fill(~mask_BT, 0.0)
    ratio = (log_ratio if log_limit is None else log_ratio.clamp_max(log_limit)).exp()
    low, high = _bound(lower, ratio), _bound(upper, ratio)
    loss = torch.maximum(-advantage_BT * ratio, -advantage_BT * ratio.clamp(low, high))
    return Surrogate(loss, ratio, (advantage_BT < 0) & (ratio < low), (advantage_BT > 0) & (ratio > high))


def cispo_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
) -> Surrogate:
    """REINFORCE under a truncated importance weight (CISPO: MiniMax-M1, arXiv 2506.13585; golden: verl, TRL).

        l = -sg[clip(r, lower, upper)] A log pi

    The gradient on log pi is -clip(r) A on every token, never 0 through clipping. verl passes 1 - eps_low and
    1 + eps_high; TRL only has an upper bound, the raw eps_high, so its lower bound is 0 here.
    """
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    low, high = _bound(lower, ratio), _bound(upper, ratio)
    loss = -ratio.clamp(low, high).detach() * advantage_BT * logprob_BT
    return Surrogate(loss, ratio, ratio < low, ratio > high)


def policy_gradient(logprob_BT: Tensor, advantage_BT: Tensor) -> Surrogate:
    """l = -A log pi: REINFORCE, and the loss of GPG (arXiv 2504.02546; golden: volcengine/verl). No ratio, no clip."""
    nowhere = torch.zeros_like(logprob_BT, dtype=torch.bool)
    return Surrogate(-advantage_BT * logprob_BT, torch.ones_like(logprob_BT), nowhere, nowhere)


def sapo_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Surrogate:
    """A smooth gate in place of clipping (SAPO, arXiv 2511.20347; golden: volcengine/verl `compute_policy_loss_sapo`).

        l = -A (4 / tau) sigmoid(tau (r - 1)),   tau = tau_positive for A > 0, else tau_negative

    At r = 1 the gradient is that of -A r. Nothing is cut off, so no token is marked as clipped.
    Raises ValueError for a tau that is not positive.
    """
    if tau_positive <= 0 or tau_negative <= 0:
        raise ValueError(f"tau must be positive, not {tau_positive} and {tau_negative}")
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    tau = torch.where(advantage_BT > 0, _bound(tau_positive, ratio), _bound(tau_negative, ratio))
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-advantage_BT * 4 / tau * torch.sigmoid(tau * (ratio - 1)), ratio, nowhere, nowhere)


def gmpo_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    clip_low: Tensor | float,
    clip_high: Tensor | float,
) -> Surrogate:
    """Geometric mean of one-sidedly clipped ratios (GMPO, arXiv 2507.20673; volcengine/verl `..._loss_geo_mean`).

        d_t = min(x_t, clip_high) for A > 0,  max(x_t, -clip_low) for A < 0,   x_t = log pi - log pi_old
        l   = -A_i exp(mean over the tokens of i of d_t)                       the same on every token of i

    `clip_low` and `clip_high` are distances of the *log*-ratio from 0, both positive. A_i is the mean advantage of the
    row. The ratio returned is the sequence's.
    """
    x = logprob_BT - old_logprob_BT
    low, high = -_bound(clip_low, x), _bound(clip_high, x)
    up, down = advantage_BT > 0, advantage_BT < 0
    clipped = torch.where(up, torch.minimum(x, high), torch.where(down, torch.maximum(x, low), torch.zeros_like(x)))
    ratio = _row_mean(clipped, mask_BT).exp().expand_as(x)
    loss = -_row_mean(advantage_BT, mask_BT) * ratio
    return Surrogate(loss, ratio, down & (x < low), up & (x > high))


def kl_estimate(logprob_BT: Tensor, ref_logprob_BT: Tensor, kind: KLKind = "k3", limit: bool = True) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from sampled tokens (golden: volcengine/verl `kl_penalty`).

        d = log pi - log pi_ref:    k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) + d - 1

    With `limit`, k3 uses d within +-20 and is itself held within +-10, as verl does, which removes the gradient
    beyond; TRL does neither. As a loss, k1 has gradient 1 on every sampled log-probability, which is 0 in expectation:
    use it as a measurement.
    Raises ValueError for an unknown kind.
    """
    d = logprob_BT - ref_logprob_BT
    if kind == "k1":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "k2":
        return 0.5 * d.square()
    if kind != "k3":
        raise ValueError(f"unknown KL estimate '{kind}'; there are {', '.join(KL_KINDS)}")
    if not limit:
        return torch.expm1(-d) + d
    d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(-d) + d).clamp(-K3_LIMIT, K3_LIMIT)


def truncated_importance_weight(old_logprob_BT: Tensor, behaviour_logprob_BT: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap) [B, T] without gradient: corrects for a sampler that is not quite the policy.

    The weights of IMPALA (arXiv 1802.01561), used per token by verl and TRL for the mismatch between inference engine
    and trainer. Raises ValueError for a cap that is not positive.
    """
    if cap <= 0:
        raise ValueError(f"cap must be positive, not {cap}")
    return importance_ratio(old_logprob_BT, behaviour_logprob_BT).clamp_max(cap).detach()
