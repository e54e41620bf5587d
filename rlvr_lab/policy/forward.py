"""One forward pass of a policy over recorded responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.entropy import entropy_of_log
from ..core.head import head_statistics
from ..core.rollout import Rollout

LARGE = 4096  # vocabulary from which the tiled head pays; below it one softmax over all logits is faster
LEAST = -1e4  # of log p where squares of it are formed: p is 0 far above it, and the square must stay finite


@dataclass(frozen=True)
class Moments:
    """Sums [B, T] over the vocabulary that first-order entropy changes need, without gradient."""

    entropy: Tensor
    collision: Tensor
    """Sum of p^2."""
    cross: Tensor
    """Sum of p^2 log p."""
    slope_square: Tensor
    """Sum of (dH/dz)^2 = sum of p^2 (log p + H)^2, with z the logits divided by the temperature; nan where the tiled
    head was used, which does not sum it."""


@dataclass(frozen=True)
class TokenView:
    """What one forward pass says of the recorded tokens [B, T]. `logprob` and `entropy` carry gradient."""

    logprob: Tensor
    entropy: Tensor | None
    moments: Moments | None


def response_statistics(model: Any, rollout: Rollout, want_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy [B, T] of the recorded response tokens, at each row's behaviour temperature.

    Differentiable. Right padding needs no attention mask under causal attention; left padding of prompts does. Rows
    must share one temperature. Entries outside the mask are finite but mean nothing.
    """
    view = token_view(model, rollout, want_entropy)
    return view.logprob, view.entropy


def token_view(
    model: Any,
    rollout: Rollout,
    want_entropy: bool = True,
    want_moments: bool = False,
    live: Tensor | None = None,
) -> TokenView:
    """Log-probability, and where asked for entropy and moments, from one pass; see `response_statistics`.

    A large vocabulary goes through the head of `core.head`, which never holds [B, T, V]; `live` [B, T] then names the
    tokens that reach the loss, and no backward runs for the others. Raises `core.head.NotFinite` there.
    """
    if _has_plain_head(model):
        return _head_view(model, rollout, want_entropy, want_moments, live)
    log_p = response_log_p(model, rollout)
    logprob = log_p.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    entropy = entropy_of_log(log_p) if want_entropy else None
    return TokenView(logprob, entropy, _moments(log_p) if want_moments else None)


def _has_plain_head(model: Any) -> bool:
    """A large vocabulary behind one linear map, with nothing between it and the logits."""
    changed = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    config = model.config
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = isinstance(head, torch.nn.Linear) and not any(getattr(config, name, None) for name in changed)
    return plain and config.vocab_size >= LARGE and hasattr(model, "get_decoder")


def _head_view(model: Any, rollout: Rollout, want_entropy: bool, want_moments: bool, live: Tensor | None) -> TokenView:
    t = rollout.response_ids.shape[1]
    hidden = model.get_decoder()(**_model_inputs(rollout)).last_hidden_state[:, -t - 1 : -1]
    head = model.get_output_embeddings()
    stats = head_statistics(
        hidden, head.weight, rollout.response_ids, temperature=_one_temperature(rollout), bias=head.bias, live=live
    )
    moments = None
    if want_moments:
        entropy, collision, cross = (x.detach() for x in (stats.entropy, stats.collision, stats.cross))
        moments = Moments(entropy, collision, cross, torch.full_like(entropy, float("nan")))
    return TokenView(stats.logprob, stats.entropy if want_entropy else None, moments)


@torch.no_grad()
def _moments(log_p: Tensor) -> Moments:
    finite = log_p.clamp_min(LEAST)
    p = finite.exp()
    weighted = p * finite
    entropy, collision = -weighted.sum(-1), p.square().sum(-1)
    cross, second = (p * weighted).sum(-1), weighted.square().sum(-1)
    return Moments(entropy, collision, cross, second + 2 * entropy * cross + entropy.square() * collision)


def response_log_p(model: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities [B, T, V] of all tokens at every response position."""
    t = rollout.response_ids.shape[1]
    # the logits at position i predict token i + 1: keep those of the last prompt token up to the last but one
    logits = model(**_model_inputs(rollout), logits_to_keep=t + 1).logits[:, :-1]
    return torch.log_softmax(logits.float() / _one_temperature(rollout), -1)


def _model_inputs(rollout: Rollout) -> dict[str, Any]:
    inputs = {"input_ids": torch.cat([rollout.prompt_ids, rollout.response_ids], 1), "use_cache": False}
    if not bool(rollout.prompt_mask.all()):
        # right padding is attended to by nobody that counts, and full rows keep position ids simple
        mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.response_mask)], 1)
        inputs |= {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    return inputs


def _one_temperature(rollout: Rollout) -> float:
    values = rollout.behaviour_temperature[rollout.mask]
    if not len(values):
        return 1.0
    first = float(values[0])
    if not bool((values == first).all()):
        raise ValueError("rows of different behaviour temperatures in one forward pass")
    return first if first > 0 else 1.0


def score(model: Any, rollout: Rollout, rows: int) -> Rollout:
    """Record `old_logprob` and `token_entropy` of the current policy, `rows` responses at a time, longest first."""
    logprob, entropy = scored(model, rollout, rows)
    return rollout.with_(old_logprob=logprob).with_statistics(token_entropy=entropy)


@torch.no_grad()
def scored(model: Any, rollout: Rollout, rows: int) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, T] of the recorded tokens, zero outside the mask, without gradient."""
    b, t = rollout.response_ids.shape
    logprob = torch.zeros(b, t, device=rollout.response_ids.device)
    entropy = torch.zeros_like(logprob)
    for index in torch.split(rollout.lengths.argsort(descending=True), rows):
        part = rollout.rows(index)
        values, entropies = response_statistics(model, part)
        width = part.response_ids.shape[1]
        logprob[index, :width] = values.masked_fill(~part.mask, 0.0)
        if entropies is not None:
            entropy[index, :width] = entropies.masked_fill(~part.mask, 0.0)
    return logprob, entropy
