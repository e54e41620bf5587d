"""Entropies of a language-model policy, in nats, each named by its kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .reduce import masked_mean

A = TypeVar("A")
Missing = Literal["leave_out", "one_class", "separate"]


def _full(logits: Tensor) -> Tensor:
    # bf16 and fp16 logits lose entropy; float64 stays what it is
    return logits if logits.dtype == torch.float64 else logits.float()


def token_statistics(logits_BTV: Tensor, ids_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of the given tokens and token entropy, both [B, T], differentiable.

    With p = softmax(z / temperature): log p(a) and H = -sum_j p_j log p_j, computed in float32, or in
    float64 where the logits are. Infinite negative logits (forbidden tokens) contribute nothing.
    """
    log_p = torch.log_softmax(_full(logits_BTV) / temperature, dim=-1)
    logprob = log_p.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    return logprob, entropy_of_log(log_p)


def softmax_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) over the last axis."""
    return entropy_of_log(torch.log_softmax(_full(logits) / temperature, dim=-1))


def entropy_of_log(log_p: Tensor) -> Tensor:
    """Entropy over the last axis of normalised log-probabilities."""
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


def answer_entropy(answers: Sequence[Hashable | None], count_missing: bool = True) -> float:
    """Entropy of the empirical distribution of final answers; no answer (None) is one class. nan for no sample.

    With `count_missing=False` samples without an answer are dropped before shares are taken (arXiv 2507.14843 counts
    them: else truncation would look like certainty). From N samples of M answers it is biased low by about
    (M - 1) / 2N.
    """
    kept = answers if count_missing else [a for a in answers if a is not None]
    return _entropy_of_counts(list(Counter(kept).values()), len(kept))


def _entropy_of_counts(counts: Sequence[int], total: int) -> float:
    if not counts or not total:
        return float("nan")
    return -sum(c / total * math.log(c / total) for c in counts) + 0.0


def cluster(answers: Sequence[A | None], equivalent: Callable[[A, A], bool] | None = None) -> list[int | None]:
    """Cluster number of each answer, from 0 in order of appearance; None where there is no answer.

    Greedy: an answer joins the first cluster whose first member is `equivalent` to it (EMPO, arXiv 2504.05812,
    QingyangZhang/EMPO). The default is equality. The relation is asked in one direction, member first; for one that is
    not symmetric or not transitive the clusters depend on the order of the answers.
    """
    same = equivalent or (lambda a, b: a == b)
    first: list[A] = []
    numbers: list[int | None] = []
    for answer in answers:
        if answer is None:
            numbers.append(None)
            continue
        found = next((i for i, member in enumerate(first) if same(member, answer)), len(first))
        if found == len(first):
            first.append(answer)
        numbers.append(found)
    return numbers


def semantic_entropy(clusters: Sequence[Hashable | None], missing: Missing = "leave_out") -> float:
    """Entropy over meanings: -sum_j p_j ln p_j with p_j the share of a prompt's G samples in cluster j (see `cluster`).

    Samples without an answer (None): `leave_out` gives them no term and keeps G as the denominator, `one_class` makes
    them one cluster, `separate` makes each its own (EMPO's released code). nan where nothing is left to count.
    """
    counts = list(Counter(c for c in clusters if c is not None).values())
    absent = sum(c is None for c in clusters)
    if missing == "one_class" and absent:
        counts.append(absent)
    elif missing == "separate":
        counts += [1] * absent
    return _entropy_of_counts(counts, len(clusters))


def nucleus_entropy(
    logits: Tensor, top_p: float = 0.8, top_k: int | None = None, include_crossing: bool = False, eps: float = 1e-12
) -> Tensor:
    """Entropy of the renormalised head of softmax(logits) over the last axis (SIREN, arXiv 2509.25133, Linn3a/siren).

    Tokens are taken in order of probability while their cumulative mass stays below `top_p`:

        q = p 1[nucleus] / (sum of p over the nucleus + eps),    H = -sum q log(q + eps)

    The released code leaves out the token whose mass crosses `top_p`, so the nucleus is empty, and H is 0, wherever one
    token holds `top_p` or more; `include_crossing=True` is the usual nucleus, which always has a member. Only the
    `top_k` likeliest tokens are considered. Membership is a constant: no gradient reaches tokens outside the nucleus.
    """
    p = torch.softmax(_full(logits), dim=-1)
    values = p.topk(min(top_k or p.shape[-1], p.shape[-1]), dim=-1).values
    reached = values.detach().cumsum(-1)
    keep = (reached - values.detach() if include_crossing else reached) < top_p
    head = values * keep
    q = head / (head.sum(-1, keepdim=True) + eps)
    return -(q * (q + eps).log()).sum(-1)


def window_entropy(entropy_BT: Tensor, mask_BT: Tensor, window: int = 4, offset: int = 0) -> Tensor:
    """Mean token entropy of the `window` tokens t + offset, ..., t + offset + window - 1, for every t [B, T].

    nan where a token of the window lies outside the mask, so that the window is not complete. ARES (arXiv 2510.08457)
    starts at t itself (offset 0) in the paper and after t (offset 1) in its code. Raises ValueError for window < 1.
    """
    if window < 1 or offset < 0:
        raise ValueError(f"window must be at least 1 and offset at least 0, not {window} and {offset}")
    steps = entropy_BT.shape[1]
    values = torch.nn.functional.pad(entropy_BT.masked_fill(~mask_BT, 0.0), (0, window + offset))
    marked = torch.nn.functional.pad(mask_BT, (0, window + offset))
    means = values.unfold(1, window, 1)[:, offset : offset + steps].mean(-1)
    complete = marked.unfold(1, window, 1)[:, offset : offset + steps].all(-1)
    return means.masked_fill(~complete, float("nan"))


def first_position(ids_BT: Tensor, mask_BT: Tensor, token: int) -> Tensor:
    """Index of the first marked occurrence of `token` in each row [B], -1 where there is none."""
    found = (ids_BT == token) & mask_BT
    return torch.where(found.any(1), found.long().argmax(1), -1)


def phase_entropy(entropy_BT: Tensor, mask_BT: Tensor, boundary_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token entropy before and after the end-of-thinking token at index `boundary_B`, both [B] (PEAR, 2510.08026).

    The token itself belongs to neither phase. Boundary -1 means that the response never stopped thinking: all of it is
    the first phase. A phase without tokens has no mean: nan (PEAR puts 0 in its place).
    """
    position = torch.arange(entropy_BT.shape[1], device=entropy_BT.device)[None]
    boundary = torch.where(boundary_B < 0, entropy_BT.shape[1], boundary_B)[:, None]

    def mean(phase_BT: Tensor) -> Tensor:
        counts = phase_BT.sum(1)
        means = entropy_BT.masked_fill(~phase_BT, 0.0).sum(1) / counts.clamp_min(1)
        return means.masked_fill(counts == 0, float("nan"))

    return mean(mask_BT & (position < boundary)), mean(mask_BT & (position > boundary))


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
