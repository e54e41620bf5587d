r"""Entropy-guided attention: learnable targets for the entropy of attention rows (arXiv 2501.03489).

Attention A [B, H, Q, K] of one layer, rows sum to 1 over the allowed keys. Per row, in nats, with a nan-safe sum:

    E = -sum_j A_j log(A_j + 1e-9)        E_max = log(context, or the number of keys)        m = gamma E_max
    delta = E - theta E_max               penalty = delta^2 where |delta| > m, else 0
    loss = lambda mean_layers mean_heads reduction(penalty),   added to the cross-entropy while training only

theta is learned, one per layer and head. The whole deviation is squared outside the dead zone, not its excess: the
penalty jumps from 0 to m^2 at the edge, and nothing pulls a row that is inside. Its target is a number of nats and so
pulls both ways, up from collapse and down from overload. It is the entropy of *attention*; nothing here is about the
entropy of the next token.

| | `paper` | `released` (Nandan91/entropy-guided-attention-llm @ 728944d, MIT) | ours, `AttentionEntropyConfig()` |
|---|---|---|---|
| theta | per layer and head | one vector for all layers: the hook takes the first block's | per layer and head |
| theta in [0, 1] | by a sigmoid, from 0.5 [inferred] | unconstrained, never created there | by a sigmoid, from 0.5 |
| reduction | mean entropy over queries, one delta a head [inferred] | sum over batch and queries | mean over rows |
| padded queries | left out | counted | left out |

Under `official_sum` lambda must be chosen again whenever batch or length change; at 8 x 128 the sum is about a thousand
times the mean, hence our lambda of 1e-2 beside the paper's 1e-5. Row i of a causal matrix reaches only log(i + 1), so
with E_max = log T early rows are "too low" whatever they do; `causal_max` measures each against its own maximum [ours].

**For pre-training and SFT, not for the RLVR loop.** The penalty needs the matrices of every layer, H x T x T numbers a
sequence (2 GB a layer at 32 heads and 4,096 tokens in float32). Samplers, flash and SDPA attention never form them,
and the loop's hook `regularise` sees log-probs and entropies of response tokens only. `attention_penalty` works with
any supported transformers model by one more, eager, forward pass; `policy.softmax_only` returns its matrices anyway.
Card: papers/entropy_guided_attention.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..policy.access import attention_matrices
from ._settings import check, check_choice

Reduction = Literal["mean", "official_sum", "query_mean"]
"""Over the rows of a head: their mean, their sum, or one penalty for each sequence's mean entropy."""
EPS = 1e-9
BANDS = (0.25, 0.5, 0.75)
_SLUG = "entropy_guided_attention"


def attention_entropy(attention: Tensor) -> Tensor:
    """Row entropy [..., Q] of attention [..., Q, K]: -sum A log(A + 1e-9), in float32 at least, differentiable.

    Between -1e-9 and log K. A row that is nan, which softmax makes of one without any key, has entropy 0 and gives no
    gradient to the matrix.
    """
    a = torch.nan_to_num(attention if attention.dtype == torch.float64 else attention.float(), nan=0.0)
    return -(a * (a + EPS).log()).sum(-1)


def largest_entropy(
    keys: int, context: int | None = None, causal_max: bool = False, query_mask: Tensor | None = None
) -> Tensor:
    """E_max in nats: log(context or keys) as a scalar; with `causal_max` log of the keys each row may look at.

    The latter is [Q], log(i + 1), or with a `query_mask` [B, Q] (padding left or right) [B, 1, Q]. Float64.
    Raises ValueError for a matrix without keys.
    """
    if keys < 1:
        raise ValueError("attention over no key has no entropy")
    if not causal_max:
        return torch.tensor(math.log(context or keys), dtype=torch.float64)
    if query_mask is None:
        return torch.arange(1, keys + 1, dtype=torch.float64).log()
    return query_mask.cumsum(1).clamp_min(1).double().log()[:, None]


def dead_zone_penalty(entropy: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """(E - target)^2 where |E - target| > margin, else 0, elementwise; zero gradient inside, never nan."""
    delta = entropy - target
    return torch.where(delta.abs() > margin, delta.square(), torch.zeros_like(delta))


def head_penalty(
    entropy: Tensor,
    theta: Tensor,
    gamma: float,
    e_max: Tensor,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
) -> Tensor:
    """Penalty of each head [H] of one layer: row entropies [B, H, Q], thresholds [H], queries that count [B, Q].

    `e_max` broadcasts to [B, H, Q]. `query_mean` averages entropy and E_max over a sequence's queries first.
    Raises ValueError where no query counts.
    """
    keep = torch.ones_like(entropy[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    if not bool(keep.any()):
        raise ValueError("every query is padding: there is no attention to regularise")
    rows, theta = keep[:, None].to(entropy.dtype), theta[None, :, None]
    e_max = e_max.to(entropy)
    if reduction == "query_mean":
        count = rows.sum(-1, keepdim=True)
        mean = (entropy * rows).sum(-1, keepdim=True) / count.clamp_min(1)
        largest = (e_max * rows).sum(-1, keepdim=True) / count.clamp_min(1)
        penalty = dead_zone_penalty(mean, theta * largest, gamma * largest)
        return (penalty * (count > 0)).sum((0, 2)) / (count > 0).sum()
    total = (dead_zone_penalty(entropy, theta * e_max, gamma * e_max) * rows).sum((0, 2))
    return total if reduction == "official_sum" else total / rows.sum()


def attention_entropy_loss(
    attentions: Sequence[Tensor],
    thresholds: Tensor,
    gamma: float,
    reduction: Reduction = "mean",
    e_max: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss before lambda: `head_penalty` averaged over heads and layers; gradient to matrices and thresholds.

    `attentions`: one [B, H, Q, K] a layer. `thresholds` [H], shared by the layers, or [L, H]. `e_max` is log K of the
    first layer unless given (`largest_entropy`). Raises ValueError for shapes that do not fit each other.
    """
    if not attentions or any(a.ndim != 4 for a in attentions):
        raise ValueError("attentions must be a list of [batch, heads, queries, keys], one a layer")
    heads = attentions[0].shape[1]
    if thresholds.shape not in ((heads,), (len(attentions), heads)):
        raise ValueError(
            f"thresholds must be [{heads}] or [{len(attentions)}, {heads}] for this model, not {list(thresholds.shape)}"
        )
    largest = largest_entropy(attentions[0].shape[-1]) if e_max is None else e_max
    each = thresholds.expand(len(attentions), heads)
    layers = [
        head_penalty(attention_entropy(a), theta, gamma, largest, reduction, mask).mean()
        for a, theta in zip(attentions, each, strict=True)
    ]
    return torch.stack(layers).mean()


@dataclass(frozen=True)
class AttentionEntropyConfig:
    """Settings: `coefficient` is lambda, `context` T_ctx (None: the length of the input), `init` where theta starts."""

    coefficient: float = 1e-2
    gamma: float = 0.2
    reduction: Reduction = "mean"
    context: int | None = None
    init: float = 0.5
    shared: bool = False
    constrained: bool = True
    causal_max: bool = False
    count_padding: bool = False

    def __post_init__(self) -> None:
        check(self.coefficient >= 0, f"{_SLUG}.coefficient", "not be negative", self.coefficient)
        check(self.gamma >= 0, f"{_SLUG}.gamma", "not be negative", self.gamma)
        check_choice(self.reduction, get_args(Reduction), f"{_SLUG}.reduction")
        check(self.context is None or self.context >= 1, f"{_SLUG}.context", "be at least 1 token", self.context)
        check(0 < self.init < 1, f"{_SLUG}.init", "lie between 0 and 1, a share of the largest entropy", self.init)


PRESETS: Mapping[str, AttentionEntropyConfig] = {
    "paper": AttentionEntropyConfig(coefficient=1e-5, reduction="query_mean"),
    "released": AttentionEntropyConfig(
        coefficient=1e-5, reduction="official_sum", shared=True, constrained=False, count_padding=True
    ),
}


class AttentionEntropyPenalty(nn.Module):
    """The regulariser with its thresholds; hand its parameters to the optimizer beside the model's.

    Zero, and without gradient, in eval mode: call `.train()` and `.eval()` on it (a policy of this package is always in
    eval mode, so the model's own mode is not asked).
    """

    def __init__(self, layers: int, heads: int, config: AttentionEntropyConfig | None = None) -> None:
        super().__init__()
        self.config, self.layers = config or AttentionEntropyConfig(), layers
        init = torch.full((heads,) if self.config.shared else (layers, heads), self.config.init)
        self.weight = nn.Parameter(init.logit() if self.config.constrained else init)

    @property
    def thresholds(self) -> Tensor:
        """theta [H], or [L, H], as shares of E_max."""
        return self.weight.sigmoid() if self.config.constrained else self.weight

    def forward(self, attentions: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """lambda times the loss of matrices [B, H, T, T], one a layer. `mask` [B, T] marks tokens that are no padding.

        Raises ValueError for shapes that do not fit.
        """
        if not self.training:
            return torch.zeros((), device=self.weight.device)
        c = self.config
        marked = None if mask is None else mask.bool()
        e_max = largest_entropy(attentions[0].shape[-1], c.context, c.causal_max, marked) if attentions else None
        counted = None if c.count_padding else marked
        return c.coefficient * attention_entropy_loss(attentions, self.thresholds, c.gamma, c.reduction, e_max, counted)


def attention_penalty(model: Any, inputs: Mapping[str, Any], penalty: AttentionEntropyPenalty) -> Tensor:
    """The penalty of a transformers model on `inputs` (`input_ids`, `attention_mask`), to be added to its loss.

    One eager forward pass beside the loss's own, with gradient. Raises UserError for an architecture that
    `policy.access` does not know.
    """
    return penalty(attention_matrices(model, **inputs), inputs.get("attention_mask"))  # type: ignore[no-any-return]


def head_entropies(attentions: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean row entropy of every head [L, H] over the queries that count [B, Q]; nan where none does. No gradient."""
    with torch.no_grad():
        rows = torch.stack([attention_entropy(a) for a in attentions])
        keep = torch.ones_like(rows[0, :, 0]) if mask is None else mask.to(rows.dtype)
        return (rows * keep[:, None]).sum((1, 3)) / keep.sum()


def band_fractions(head_entropy: Tensor) -> list[float]:
    """Shares of heads whose entropy lies in [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1] of the largest head's.

    All nan where no head has any entropy, or one has none defined: there is no largest then.
    """
    values = head_entropy.flatten()
    largest = values.max() if len(values) else torch.tensor(math.nan)
    if not float(largest) > 0:
        return [math.nan] * (len(BANDS) + 1)
    band = torch.bucketize(values / largest, values.new_tensor(BANDS), right=True)
    return [float((band == number).double().mean()) for number in range(len(BANDS) + 1)]
