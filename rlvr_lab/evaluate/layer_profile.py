"""What every layer of a model does to the next-token distribution: entropy changes of attention, FFN and layer, beside
both lenses and the length of the stream (measurements of BuPO, arXiv 2512.19673; card papers/bupo.md).

Read from one ordinary forward pass through `policy.access`; means over the recorded response tokens, at the positions
that predict them, in nats, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..core.rollout import Rollout
from ..methods.bupo import LayerStates, entropy_changes, layer_entropy, write_cosines
from ..policy.access import What, parts, record

ALL: tuple[What, ...] = ("residual", "attention_write", "ffn_write", "attention_input", "ffn_input")


@dataclass(frozen=True)
class LayerProfile:
    """Means of one layer. Of layer 0, the embedding stream, only what a stream has; the rest is nan."""

    layer: int
    raw_entropy: float
    """Entropy of the stream times the unembedding, without a norm: the published profile."""
    normed_entropy: float
    """The same through the final norm; of the last layer, the model's own token entropy."""
    stream_rms: float
    """Root mean square of the stream's entries: what the raw lens cannot tell from certainty."""
    cosine_to_last: float
    """cos(H_l, H_L), both without norm."""
    attention_change: float = float("nan")
    ffn_change: float = float("nan")
    layer_change: float = float("nan")
    attention_cosine: float = float("nan")
    ffn_cosine: float = float("nan")


@torch.no_grad()
def entropy_profile(model: Any, rollout: Rollout) -> list[LayerProfile]:
    """Layers 0 to L on the responses of a rollout, at temperature 1.

    Raises UserError for an architecture that cannot be looked into, ValueError for a rollout without a token.
    """
    if not bool(rollout.mask.any()):
        raise ValueError("no response token: there is nothing to average over")
    found = parts(model)
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    attended = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.response_mask)], 1)
    positions = (attended.long().cumsum(1) - 1).clamp_min(0)
    first = rollout.prompt_ids.shape[1] - 1
    with record(model, ALL) as seen:
        found.model.get_decoder()(
            input_ids=ids, attention_mask=attended.long(), position_ids=positions, use_cache=False
        )

    def tokens(states: Tensor) -> Tensor:
        """States [n, d] at the positions that predict the recorded tokens."""
        return states[:, first:-1][rollout.mask].float()

    streams = [tokens(seen.residual[layer]) for layer in range(found.depth + 1)]
    profiles = []
    for layer, stream in enumerate(streams):
        states = None
        if layer:
            names = ("attention_input", "attention_write", "ffn_input", "ffn_write")
            states = LayerStates(streams[layer - 1], *(tokens(getattr(seen, name)[layer]) for name in names))
        profiles.append(_profile(model, layer, stream, streams[-1], states))
    return profiles


def _profile(model: Any, layer: int, stream: Tensor, last: Tensor, states: LayerStates | None) -> LayerProfile:
    weight = parts(model).head.weight.float()
    means = [
        layer_entropy(stream, weight),
        layer_entropy(parts(model).final_norm(stream), weight),
        stream.square().mean(-1).sqrt(),
        cosine_similarity(stream, last, dim=-1),
    ]
    if states is not None:
        change = entropy_changes(states, weight)
        means += [change.attention, change.ffn, change.layer, *write_cosines(states)]
    return LayerProfile(layer, *(float(value.mean()) for value in means))
