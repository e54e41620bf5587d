r"""BuPO: a short first phase of RL on the policy of a low layer, then ordinary GRPO (arXiv 2512.19673).

    pi_l  = softmax(H_l E^T / tau),   l < L;   pi_L is the model's real policy, through the final norm
    r     = exp(log pi_l,new - log pi_l,old)                     both of layer l: 1 on the first minibatch
    loss  = max(-A r, -A clip(r, 1 - eps, 1 + eps)),   where A < 0 at most -A c      c: `dual_clip`
    steps s = 1 ... s_inter use pi_l (InterGRPO), all later ones pi_L (GRPO)

H_l [B, T, d]: residual stream after layer l (counted from 1), without any norm; E [V, d]: unembedding; A: GRPO's
advantage; tau: the sampling temperature. Responses come from the full policy, and nothing corrects for the difference
between it and pi_l. The gradient reaches layers up to l, the embedding and E; layers above l and the final norm have
none, so that neither momentum nor weight decay moves them. With tied embeddings E is the input embedding too. The
optimizer's state is kept at the change of phase, as in the release.

Entropies are in nats. A module's entropy change is the entropy of what it writes minus that of its normed input; a
layer's is that of the stream behind it minus before it, both raw:

    dH_ATTN = H(A_l) - H(LN1(H_{l-1})),   dH_FFN = H(F_l) - H(LN2(H_{l-1} + A_l)),   dH_layer = H(H_l) - H(H_{l-1})

Without the final norm the entropy of a stream falls with the stream's length, trained or not: look at both lenses.

Card: papers/bupo.md. Code compared: Trae1ounG/BuPO @ d3a85c6, whose `internal_layer` k is layer k + 1 here. Presets:
`paper` (mean per response, no dual clip) and `released` (token mean, dual clip 10), both with the (layer, s_inter) of
Qwen3-4B, (6, 30); the others' are (6, 20) Qwen3-8B, (27, 20) and (31, 20) Llama 3B and 8B. `tiny`: 3 layers.
Control: `layer: last`, which is GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..core.entropy import softmax_entropy, token_statistics
from ..core.lens import Lens
from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import Reduction
from ..errors import UserError
from ._settings import check, check_choice
from .base import LossInputs, Method

LAST = "last"


def internal_policy(
    hidden: Tensor, unembedding_VH: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of `ids` and entropy, both [...], under softmax(hidden unembedding^T / temperature).

    hidden [..., d] is a stream or a module's write, without norm. Differentiable to both; in float32 or float64.
    """
    return token_statistics(hidden @ unembedding_VH.T, ids, temperature)


def layer_entropy(hidden: Tensor, unembedding_VH: Tensor) -> Tensor:
    """Entropy [...] of softmax(hidden unembedding^T) for states [..., d]."""
    return softmax_entropy(hidden @ unembedding_VH.T)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """weight x / rms(x) over the last axis: the norm that these models put before modules and before the head."""
    return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class LayerStates:
    """What one layer reads and writes, each [..., d]: stream in, normed input and write of attention, the same of the
    FFN, stream out (in + both writes)."""

    stream_in: Tensor
    attention_input: Tensor
    attention_write: Tensor
    ffn_input: Tensor
    ffn_write: Tensor

    @property
    def middle(self) -> Tensor:
        """The stream between attention and FFN."""
        return self.stream_in + self.attention_write

    @property
    def stream_out(self) -> Tensor:
        """The stream behind the layer."""
        return self.middle + self.ffn_write


@dataclass(frozen=True)
class EntropyChanges:
    """Entropy changes [...] of a layer's modules in nats: positive widens the choice, negative narrows it."""

    attention: Tensor
    ffn: Tensor
    layer: Tensor


def entropy_changes(states: LayerStates, unembedding_VH: Tensor) -> EntropyChanges:
    """See the head of this file."""

    def entropy(hidden: Tensor) -> Tensor:
        return layer_entropy(hidden, unembedding_VH)

    return EntropyChanges(
        entropy(states.attention_write) - entropy(states.attention_input),
        entropy(states.ffn_write) - entropy(states.ffn_input),
        entropy(states.stream_out) - entropy(states.stream_in),
    )


def write_cosines(states: LayerStates) -> tuple[Tensor, Tensor]:
    """cos(A_l, H_{l-1}) and cos(F_l, H_{l-1} + A_l), each [...]; 0 for a write of length 0."""
    return (
        cosine_similarity(states.attention_write, states.stream_in, dim=-1),
        cosine_similarity(states.ffn_write, states.middle, dim=-1),
    )


def is_internal(step: int, s_inter: int) -> bool:
    """Whether step `step`, counted from 1, belongs to the first phase."""
    return step <= s_inter


def target_layer(mean_ffn_change: Sequence[float], tolerance: float = 0.05) -> int | None:
    """The last layer of the exploration region: the largest l, from 1, whose mean dH_FFN exceeds `tolerance`; None
    where none does. The tolerance is the card's [inferred]: many layers lie near 0. nan exceeds nothing."""
    above = [layer for layer, change in enumerate(mean_ffn_change, 1) if change > tolerance]
    return max(above, default=None)


@dataclass(frozen=True)
class BuPOConfig:
    """Settings: `layer` from 1, or `last`; `s_inter` steps of the first phase; 0 leaves it out."""

    layer: int | str = 6
    s_inter: int = 30
    dual_clip: float | None = None
    reduction: Reduction = "sequence_mean_of_token_mean"

    def __post_init__(self) -> None:
        number = _number(self.layer)
        check(number is None or number >= 1, "bupo.layer", "be at least 1, or 'last'", self.layer)
        whole = isinstance(self.s_inter, int) and not isinstance(self.s_inter, bool)
        check(whole and self.s_inter >= 0, "bupo.s_inter", "be a number of steps from 0", self.s_inter)
        check(self.dual_clip is None or self.dual_clip > 1, "bupo.dual_clip", "be above 1 or null", self.dual_clip)
        check_choice(self.reduction, ("token_mean", "sequence_mean_of_token_mean"), "bupo.reduction")


def _number(layer: object) -> int | None:
    """A layer as a number, None for the last one."""
    if layer == LAST:
        return None
    text = str(layer)
    check(not isinstance(layer, bool) and text.lstrip("-").isdigit(), "bupo.layer", f"be a number or '{LAST}'", layer)
    return int(text)


class BuPO(Method):
    """Owner of `lens`, `surrogate` and the reduction; advantage and clip bounds are the base's."""

    slug: ClassVar[str] = "bupo"
    rescored: ClassVar[bool] = True  # the sampler's log-probs are the full policy's
    config_class: ClassVar[type[BuPOConfig]] = BuPOConfig
    presets: ClassVar[Mapping[str, BuPOConfig]] = {
        "paper": BuPOConfig(),
        "released": BuPOConfig(dual_clip=10.0, reduction="token_mean"),
        "tiny": BuPOConfig(layer=1, s_inter=8, dual_clip=10.0, reduction="token_mean"),
    }

    def __init__(self, config: BuPOConfig | None = None) -> None:
        self.config = config or BuPOConfig()
        self.reduction = self.config.reduction
        self._used: Lens | None = None
        self._pending: list[str] = []

    def lens(self, step: int, depth: int) -> Lens | None:
        """The layer's policy in the first phase, None for the real one. Raises UserError for a layer that a model of
        `depth` layers lacks."""
        number = _number(self.config.layer)
        if number is not None and number > depth:
            raise UserError(f"methods.bupo.layer is {number}, but the model has {depth} layers: "
                            f"choose 1 to {depth}, or '{LAST}'")  # fmt: skip
        internal = number is not None and number < depth and is_internal(step + 1, self.config.s_inter)
        self._used = Lens(number) if internal and number is not None else None
        return self._used

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """GRPO's clipped surrogate, of whichever policy the log-probs are."""
        bounds = inputs.lower, inputs.upper
        return clipped_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, *bounds, dual_clip=self.config.dual_clip
        )

    def check_run(self, vocabulary: int, steps: int) -> None:
        """A first phase that outlasts the run is said, not refused."""
        if self.config.s_inter >= steps:
            self._pending = [
                f"methods.bupo.s_inter is {self.config.s_inter} and the run has {steps} steps: the full policy is "
                "never trained; the paper's runs collapse when the first phase is long"
            ]

    def notices(self) -> list[str]:
        """Says once that the run has no second phase."""
        found, self._pending = self._pending, []
        return found

    def metrics(self) -> dict[str, float]:
        """`layer`: the one whose policy this step trained; nan for the real policy."""
        return {"layer": math.nan if self._used is None else float(self._used.layer)}
