"""Entropies of a language-model policy, in nats, each named by its kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .reduce import masked_mean


def token_statistics(logits_BTV: Tensor, ids_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of the given tokens and token entropy, both [B, T], differentiable.

    With p = softmax(z / temperature): log p(a) and H = -sum_j p_j log p_j, computed in float32. Infinite negative
    logits (forbidden tokens) contribute nothing.
    """
    log_p = torch.log_softmax(logits_BTV.float() / temperature, dim=-1)
    logprob = log_p.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    return logprob, _entropy_of_log(log_p)


def softmax_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) over the last axis."""
    return _entropy_of_log(torch.log_softmax(logits.float() / temperature, dim=-1))


def _entropy_of_log(log_p: Tensor) -> Tensor:
    # a forbidden token has log p = -inf and p = 0; its term is 0, not nan
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def pooled_token_entropy(entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over all response tokens of the batch: long responses weigh more. nan where there is no token."""
    return masked_mean(entropy_BT, mask_BT)


def sequence_mean_token_entropy(entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over responses of each response's mean token entropy; empty responses do not count."""
    counts = mask_BT.sum(1)
    means = entropy_BT.masked_fill(~mask_BT, 0.0).sum(1) / counts.clamp_min(1)
    return masked_mean(means, counts > 0)


def sequence_entropy(entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Monte-Carlo estimate of the entropy of the distribution over whole responses.

    H(y) = E_y[ sum_t H(y_t | y_<t) ] by the chain rule, so the mean over sampled responses of summed token entropies
    is unbiased. Empty responses contribute 0. nan for an empty batch.
    """
    if not len(entropy_BT):
        return torch.tensor(float("nan"))
    return entropy_BT.masked_fill(~mask_BT, 0.0).sum(1).mean()


def answer_entropy(answers: Sequence[Hashable | None]) -> float:
    """Entropy of the empirical distribution of final answers; no answer (None) is one class. nan for no sample."""
    if not answers:
        return float("nan")
    counts = Counter(answers).values()
    return -sum(c / len(answers) * math.log(c / len(answers)) for c in counts) + 0.0


def top_share_entropy(entropy_BT: Tensor, mask_BT: Tensor, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Mean entropy of the `share` of tokens with the highest entropy, and the part of all entropy that they hold.

    Both nan where there is no token; the part is nan where the total entropy is 0.
    """
    values = entropy_BT[mask_BT].sort(descending=True).values
    if not len(values):
        nan = torch.tensor(float("nan"))
        return nan, nan
    top = values[: max(1, round(share * len(values)))]
    return top.mean(), top.sum() / values.sum()
