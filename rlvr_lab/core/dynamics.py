r"""How one policy-gradient step changes entropy: exact theory on softmax logits, and estimates per token.

Sources: "The Entropy Mechanism" (arXiv 2505.22617, PRIME-RL/Entropy-Mechanism-of-RL) for the covariance theorems and
the law R = -a exp(H) + b; STEER (arXiv 2510.10150) for the sampled-logit estimate. Cards: papers/entropy_mechanism.md,
papers/steer.md. Natural logarithms; every function keeps the dtype of its input.

**Logits.** For p = softmax(z) and any step dz, to first order in dz

    dH/dz_k = -p_k (log p_k + H)          dH = sum_k dH/dz_k dz_k = -Cov_p(log p, dz)

**Sampled tokens.** A loss term whose gradient with respect to log p(a) of the sampled token a is -c moves the logits by
eta c (1[k = a] - p_k): for the clipped surrogate c = I r A, with I = 0 where the clip removed the gradient. Then

    full         dH = -eta c [ p_a (log p_a + H) - sum_k p_k^2 (log p_k + H) ]        exact to first order [inferred]
    theorem      dH = -eta c   p_a (1 - p_a) (log p_a + H)                           STEER: only the sampled logit moves
    covariance   dH = -eta (log p_a - mean log p_a) (A - mean A)                     means over the tokens of the batch

All three treat the positions of a batch as independent tables of logits. A network shares parameters, so what they
give is a direction and a relative size in units of a unit logit step (eta = 1), never nats; see core.ledger for the
scale. On tabular policies with one sampled action `full` correlates 0.999 with the exact change, `theorem` 0.72-0.92,
`covariance` 0.70-0.85 (card steer, own simulation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .advantages import group_advantage
from .entropy import softmax_entropy
from .losses import importance_ratio
from .reduce import masked_mean

# ------------------------------------------------------------------------------------------------- softmax logits


def _finite_log(log_p: Tensor) -> Tensor:
    # a forbidden token has log p = -inf and p = 0: its terms are 0, not nan
    return log_p.clamp_min(torch.finfo(log_p.dtype).min)


def entropy_gradient(logits: Tensor) -> Tensor:
    """Gradient of the entropy of softmax(logits) over the last axis, dH/dz_k = -p_k (log p_k + H). Shape of `logits`.

    It sums to 0, and is 0 everywhere at a uniform distribution, where any finite step still lowers the entropy.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    p, finite = log_p.exp(), _finite_log(log_p)
    entropy = -(p * finite).sum(-1, keepdim=True)
    return -p * (finite + entropy)


def first_order_change(logits: Tensor, step: Tensor) -> Tensor:
    """Linear part of the entropy change for logits -> logits + step: sum_k dH/dz_k step_k = -Cov_p(log p, step)."""
    return (entropy_gradient(logits) * step).sum(-1)


def exact_change(logits: Tensor, step: Tensor) -> Tensor:
    """H(softmax(logits + step)) - H(softmax(logits)) over the last axis."""
    return softmax_entropy(logits + step) - softmax_entropy(logits)


def policy_covariance(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Population covariance of x and y under p = softmax(logits), over the last axis."""
    p = torch.softmax(logits, dim=-1)
    return (p * (x - expectation(logits, x)) * (y - expectation(logits, y))).sum(-1)


def expectation(logits: Tensor, x: Tensor) -> Tensor:
    """E_p[x] under p = softmax(logits), last axis kept with size 1."""
    return (torch.softmax(logits, dim=-1) * x).sum(-1, keepdim=True)


def policy_gradient_step(logits: Tensor, q_values: Tensor, eta: float) -> Tensor:
    """Exact vanilla policy gradient on a table (Prop. 1 of 2505.22617): dz_a = eta p_a A_a with A = Q - E_p Q.

    Its first-order entropy change is -eta Cov_p(log p, p A) (Theorem 1).
    """
    return torch.softmax(logits, dim=-1) * natural_gradient_step(logits, q_values, eta)


def natural_gradient_step(logits: Tensor, q_values: Tensor, eta: float) -> Tensor:
    """Natural policy gradient on a table: dz_a = eta A_a. First-order change -eta Cov_p(log p, A) (Theorem 2)."""
    return eta * (q_values - expectation(logits, q_values))


# ------------------------------------------------------------------------------------------------ sampled tokens


def token_covariance(logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Centred product (log p - mean log p)(A - mean A) of every marked token, 0 elsewhere; Eq. 10 of 2505.22617.

    The means run over the marked tokens that are given, so hand in the whole optimizer minibatch, never a micro-batch
    (the released code does the latter, which makes the method depend on the micro-batch size). No gradient.
    """
    logprob, advantage = logprob_BT.detach(), advantage_BT.detach()
    product = (logprob - masked_mean(logprob, mask_BT)) * (advantage - masked_mean(advantage, mask_BT))
    return product.masked_fill(~mask_BT, 0.0)


def clip_indicator(
    ratio_BT: Tensor,
    advantage_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual_clip: float | None = None,
) -> Tensor:
    """False [B, T] where the clipped surrogate has no gradient: A > 0 and r > upper, or A < 0 and r < lower.

    With a dual clip c also where A < 0 and r > c.
    """
    stopped = ((advantage_BT > 0) & (ratio_BT > upper)) | ((advantage_BT < 0) & (ratio_BT < lower))
    if dual_clip is not None:
        stopped = stopped | ((advantage_BT < 0) & (ratio_BT > dual_clip))
    return ~stopped


def surrogate_coefficient(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual_clip: float | None = None,
) -> Tensor:
    """c = I r A [B, T] of the clipped surrogate, without gradient; see the module's head."""
    ratio = importance_ratio(logprob_BT.detach(), old_logprob_BT.detach())
    return clip_indicator(ratio, advantage_BT, lower, upper, dual_clip) * ratio * advantage_BT


def coefficient_of_loss(loss_BT: Tensor, logprob_BT: Tensor) -> Tensor:
    """c = -d loss / d log p(a) [B, T] of any per-token loss of log-probabilities, by automatic differentiation.

    `loss_BT` must have been computed from `logprob_BT`, a tensor that requires grad. It covers every surrogate and
    every penalty on the sampled token's log-probability, whoever wrote it, but no term that depends on the other
    logits (such as an entropy bonus). All zeros where the loss does not depend on the log-probabilities.
    """
    if not loss_BT.requires_grad:
        return torch.zeros_like(logprob_BT)
    (gradient,) = torch.autograd.grad(loss_BT.sum(), logprob_BT, allow_unused=True, retain_graph=True)
    return torch.zeros_like(logprob_BT) if gradient is None else -gradient


def change_full(
    coefficient_BT: Tensor, logprob_BT: Tensor, entropy_BT: Tensor, collision_BT: Tensor, cross_BT: Tensor
) -> Tensor:
    """Exact first-order entropy change [B, T] at each token's own state for a unit logit step. [inferred]

        -c [ p_a (log p_a + H) - (cross + H collision) ],    collision = sum_k p_k^2,   cross = sum_k p_k^2 log p_k

    Not in the STEER paper; derived from dH/dz and checked against automatic differentiation.
    """
    own = logprob_BT.exp() * (logprob_BT + entropy_BT)
    return -coefficient_BT * (own - cross_BT - entropy_BT * collision_BT)


def change_theorem(coefficient_BT: Tensor, logprob_BT: Tensor, entropy_BT: Tensor) -> Tensor:
    """STEER's Theorem 1 for a unit step [B, T]: -c p_a (1 - p_a)(log p_a + H). The other logits are taken as fixed."""
    p = logprob_BT.exp()
    return -coefficient_BT * p * (1 - p) * (logprob_BT + entropy_BT)


def change_covariance(
    logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, active_BT: Tensor | None = None
) -> Tensor:
    """The covariance estimate for a unit step [B, T]: minus `token_covariance`, 0 where `active_BT` (a
    `clip_indicator`) is False. Its sum is positive in almost every training step, also where entropy does not fall
    (research/tiny_lab.md), so its sign explains nothing."""
    change = -token_covariance(logprob_BT, advantage_BT, mask_BT)
    return change if active_BT is None else change.masked_fill(~active_BT, 0.0)


def second_moments(logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """collision = sum_k p_k^2 and cross = sum_k p_k^2 log p_k over the last axis, as `change_full` needs them."""
    log_p = torch.log_softmax(logits_BTV, dim=-1)
    squares = (2 * log_p).exp()
    return squares.sum(-1), (squares * _finite_log(log_p)).sum(-1)


# ------------------------------------------------------------------------------- whole responses (the bandit view)


@dataclass(frozen=True)
class BanditCovariance:
    """Covariances inside each group [G] (sorted group ids) and their plain means over groups."""

    group_id: Tensor
    mean_logprob: Tensor
    """Mean over the group of the length-normalised log-probability."""
    cov_logprob_advantage: Tensor
    cov_logprob_weighted_advantage: Tensor
    """Covariance with pi A, where pi = exp(length-normalised log-probability)."""

    @property
    def mean_cov(self) -> float:
        """Mean over groups of Cov(log pi, A)."""
        return float(self.cov_logprob_advantage.mean())

    @property
    def mean_cov_weighted(self) -> float:
        """Mean over groups of Cov(log pi, pi A)."""
        return float(self.cov_logprob_weighted_advantage.mean())


def bandit_covariance(
    logprob_BT: Tensor, mask_BT: Tensor, reward_B: Tensor, group_id_B: Tensor, eps: float = 1e-6
) -> BanditCovariance:
    """The paper's diagnostic (Eq. 8-9 of 2505.22617): prompt = state, whole response = action.

    log pi(y|x) is replaced by the mean token log-probability; covariances are population covariances inside the group;
    advantages are GRPO's (sample standard deviation + eps; 0 for equal rewards). The paper does not say how pi enters
    the product pi A: exp of the length-normalised log-probability is our reading [inferred]. A response without tokens
    has no log-probability and is left out; nan for a group in which none remains.
    """
    advantage_B = group_advantage(reward_B, group_id_B, "sample", eps)
    counts_B = mask_BT.sum(1)
    logprob_B = logprob_BT.detach().masked_fill(~mask_BT, 0.0).sum(1) / counts_B.clamp_min(1)
    ids = torch.unique(group_id_B)
    rows = [(group_id_B == i) & (counts_B > 0) for i in ids]

    def covariance(y_B: Tensor) -> Tensor:
        centred = [(logprob_B[r] - logprob_B[r].mean()) * (y_B[r] - y_B[r].mean()) for r in rows]
        return torch.stack([c.mean() for c in centred])

    means = torch.stack([logprob_B[r].mean() for r in rows])
    return BanditCovariance(ids, means, covariance(advantage_B), covariance(logprob_B.exp() * advantage_B))


# ------------------------------------------------------------------------------------------------------- the law


Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class LawFit:
    """R = -a exp(H) + b fitted to points; intervals are nan where no generator was given."""

    a: float
    b: float
    ceiling: float
    """Performance at H = 0, b - a: what is left when all entropy is spent."""
    rmse: float
    r2: float
    a_interval: Interval = UNKNOWN
    b_interval: Interval = UNKNOWN
    ceiling_interval: Interval = UNKNOWN

    def predict(self, entropy: float) -> float:
        """R at this entropy."""
        return self.b - self.a * math.exp(entropy)

    def slope(self, entropy: float) -> float:
        """dR/dH = -a exp(H) at this entropy."""
        return -self.a * math.exp(entropy)


def fit_law(
    entropy: Sequence[float] | NDArray[np.float64],
    performance: Sequence[float] | NDArray[np.float64],
    rng: np.random.Generator | None = None,
    level: float = 0.95,
    draws: int = 2000,
) -> LawFit:
    """Linear least squares of performance on (-exp(H), 1), the law of arXiv 2505.22617 (Eq. 6).

    `rmse` divides by the number of points. With `rng`, percentile intervals by resampling points; neighbouring steps
    of one run are correlated, so these intervals are too narrow for a run and right only for independent points.
    a and b are nan where all entropies are equal, r2 where all performances are.
    Raises ValueError where the lengths differ, no point is given, or a value is not finite.
    """
    x, y = np.exp(np.asarray(entropy, dtype=float)), np.asarray(performance, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"entropy and performance must be equally long lists, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("entropy and performance must be finite")
    a, b = _line(x[None], y[None])
    residual = y - (b - a * x)
    total = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((residual**2).sum()) / total if total > 0 else math.nan
    fit = (float(a[0]), float(b[0]), float(b[0] - a[0]), float(np.sqrt((residual**2).mean())), r2)
    if rng is None:
        return LawFit(*fit)
    index = rng.integers(0, len(x), (draws, len(x)))
    a, b = _line(x[index], y[index])
    return LawFit(*fit, *(_interval(v, level) for v in (a, b, b - a)))


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of x and y: the a and b of y = b - a x, nan where x is constant."""
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    spread = (dx**2).sum(1)
    flat = np.ptp(x, axis=1) == 0
    a = -(dx * dy).sum(1) / np.where(flat, np.nan, spread)
    return a, y.mean(1) + a * x.mean(1)


def _interval(values: NDArray[np.float64], level: float) -> Interval:
    # a resample that drew one point again and again has no slope
    known = values[np.isfinite(values)]
    if not len(known):
        return UNKNOWN
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
