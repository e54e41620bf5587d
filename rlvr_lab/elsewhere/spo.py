r"""Self-supervised preference optimisation: grades made by removing content, beside a loss that sees better or worse.

Li, Huang, Zhang, Xu, Chen, Song, Shi, Wang, Xu, arXiv 2409.17791; lijian16/SPO holds a licence file and no method.
Known from summaries: key content of the preferred response is found (RAKE), growing parts of it are removed, the model
learns to tell these copies apart from its own hidden states, and this loss is added to the alignment loss,

    L = L_align + gamma L_pd

Everything more concrete is [inferred]: D degrees; copy d = 0 .. D-1 lacks the share d / (D - 1) of the key tokens; the
mean of the last hidden states over the copy; a linear head; cross entropy. The losses themselves (DPO and the degree
loss) serve RLVR and are in `core.preference_losses`; the training demonstration is in `spo_demo`.

This module holds what can be said exactly, in nats. A signal S with K values about a quality Q has I(S; Q) <= ln K, so
a verifier's yes or no tells at most ln 2 = 0.693 nats (one bit) per response. The grade of a copy is a function of what
the model itself removed: about a person's preference it tells only what the extractor of key content knew already.
Laws: quality [K], channel [K, S] with rows P(s | q).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


def _check_law(name: str, law: Tensor) -> None:
    if not law.numel() or not bool((law >= 0).all()) or not bool(((law.sum(-1) - 1).abs() < 1e-6).all()):
        raise UserError(f"{name} must hold probabilities that are not negative and sum to 1 over the last axis")


def signal_information(quality_K: Tensor, channel_KS: Tensor) -> float:
    """I(S; Q) in nats of a signal about a quality: at most ln S, and at most H(Q)."""
    _check_law("quality", quality_K)
    _check_law("channel", channel_KS)
    if quality_K.ndim != 1 or channel_KS.shape[:-1] != quality_K.shape:
        raise UserError(
            f"channel {tuple(channel_KS.shape)} needs one row for each of {tuple(quality_K.shape)} qualities"
        )
    joint = quality_K[:, None] * channel_KS
    both, signal = torch.xlogy(joint, joint).sum(), joint.sum(0)
    found = both - torch.xlogy(quality_K, quality_K).sum() - torch.xlogy(signal, signal).sum()
    return max(float(found), 0.0)


def binary_channel(levels: int, threshold: int, flip: float = 0.0) -> Tensor:
    """A verifier [K, 2] that says yes from quality `threshold` on and errs with probability `flip`."""
    if levels < 2 or not 0 < threshold < levels:
        raise UserError(f"threshold must lie between 1 and levels - 1, not {threshold} of {levels}")
    yes = _errors("flip", flip) + (1 - 2 * flip) * (torch.arange(levels) >= threshold)
    return torch.stack([1 - yes, yes], -1)


def graded_channel(levels: int, error: float = 0.0) -> Tensor:
    """A grade [K, K] that is right with probability 1 - error, else any other level."""
    if levels < 2:
        raise UserError(f"levels must be at least 2, not {levels}")
    right = torch.eye(levels, dtype=torch.float64)
    return (1 - _errors("error", error)) * right + error * (1 - right) / (levels - 1)


def _errors(name: str, rate: float) -> Tensor:
    if not 0 <= rate <= 1:
        raise UserError(f"{name} must lie in [0, 1], not {rate}")
    return torch.tensor(rate, dtype=torch.float64)


def binomial_quality(keys: int, rate: float) -> Tensor:
    """P(q of `keys` key tokens are right) [keys + 1], each right with probability `rate` and independent."""
    if keys < 1 or not 0 <= rate <= 1:
        raise UserError(f"keys must be at least 1 and rate lie in [0, 1], not {keys} and {rate}")
    q = torch.arange(keys + 1, dtype=torch.float64)
    ways = torch.tensor([math.comb(keys, one) for one in range(keys + 1)], dtype=torch.float64)
    right = torch.tensor(rate, dtype=torch.float64)
    return ways * right**q * (1 - right) ** (keys - q)


def pair_information(quality_K: Tensor) -> float:
    """I(label; Q1, Q2) in nats of "the first is better", ties decided by a coin: (1 - P(tie)) ln 2."""
    _check_law("quality", quality_K)
    return float(1 - (quality_K**2).sum()) * math.log(2)


@dataclass(frozen=True)
class Graded:
    """Copies of one response by degree: tokens of each, and whether there was anything to remove."""

    copies: list[list[int]]
    has_content: bool


def remove_content(tokens: Sequence[int], keys: frozenset[int], degrees: int, draw: np.random.Generator) -> Graded:
    """Copies d = 0 .. D-1 of a response without round(share d / (D-1)) of its key tokens, in random order; nested.

    Halves round up, so that the first removal removes something. Without a key token all copies are the response, and
    the degree loss skips it.
    """
    if degrees < 2:
        raise UserError(f"degrees must be at least 2, not {degrees}")
    if not tokens:
        raise UserError("tokens is empty: there is no response to take copies of")
    places = [i for i, token in enumerate(tokens) if token in keys]
    order = [places[i] for i in draw.permutation(len(places))]
    copies = []
    for degree in range(degrees):
        gone = set(order[: (2 * degree * len(places) + degrees - 1) // (2 * (degrees - 1))])
        copies.append([token for i, token in enumerate(tokens) if i not in gone])
    return Graded(copies, bool(places))
