"""Per-token losses, all minimised. Shapes [B, T]; log-probabilities in nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Surrogate:
    """Per-token loss, the importance ratio, and where each bound removed the gradient."""

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
) -> Surrogate:
    """The clipped objective of PPO (arXiv 1707.06347) as used by GRPO; golden: volcengine/verl `compute_policy_loss`.

        l = max(-A r, -A clip(r, lower, upper)),   and for A < 0 with a dual clip c:   l = min(l, -A c)

    `lower` and `upper` bound the ratio itself (1 - eps and 1 + eps), as numbers or per token. The gradient vanishes
    where A > 0 and r > upper, where A < 0 and r < lower, and, with a dual clip, where A < 0 and r > c.
    Raises ValueError for a dual clip that is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    low, high = torch.as_tensor(lower, device=ratio.device), torch.as_tensor(upper, device=ratio.device)
    plain = -advantage_BT * ratio
    loss = torch.maximum(plain, -advantage_BT * ratio.clamp(low, high))
    clipped_high = (advantage_BT > 0) & (ratio > high)
    clipped_low = (advantage_BT < 0) & (ratio < low)
    if dual_clip is not None:
        loss = torch.where(advantage_BT < 0, torch.minimum(loss, -advantage_BT * dual_clip), loss)
    return Surrogate(loss, ratio, clipped_low, clipped_high)
