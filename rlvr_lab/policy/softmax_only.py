r"""A small causal transformer whose nonlinearities can be taken away, and which returns its attention matrices.

For arXiv 2501.03489 (entropy-guided attention): without LayerNorm and without an activation in the feed-forward part,
softmax is the only nonlinearity left. One block, on the residual stream X [B, T, d]:

    X <- X + concat_h( softmax(Q_h K_h' / (t_h sqrt(d_h)) + causal mask) V_h ) W_o
    X <- X + W_2 act(W_1 X)                      with an activation
    X <- beta X + (1 / alpha) X W                without: two linear maps in a row are one, W [d, d]

A norm, where there is one, stands before each of the two and before the unembedding. The temperature t_h > 0 is a
softplus, learned per head, 1 at the start; alpha and beta are learned per layer, 1 at the start. The paper's code
has none of this: the form of temperature, scales and fusion is [inferred] (papers/entropy_guided_attention.md).
Dense matrices, a few layers, one CPU: not a policy of the training loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import UserError, nearest

Activation = Literal["gelu", "relu", "none"]
START = math.log(math.e - 1)  # softplus of it is 1


@dataclass(frozen=True)
class SoftmaxOnlyConfig:
    """Sizes and switches. The default is the usual network; `SOFTMAX_ONLY` has every switch the other way.

    `scaled` learns alpha and beta of a feed-forward part without activation; without it they stay 1.
    Raises UserError for sizes that do not fit and for an unknown activation.
    """

    vocabulary: int
    context: int
    width: int = 64
    layers: int = 3
    heads: int = 4
    norm: bool = True
    activation: Activation = "gelu"
    temperature: bool = False
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise UserError(
                f"activation '{self.activation}' is unknown; {nearest(self.activation, get_args(Activation))}"
            )
        if min(self.vocabulary, self.context, self.width, self.layers, self.heads) < 1:
            raise UserError("vocabulary, context, width, layers and heads must all be at least 1")
        if self.width % self.heads:
            raise UserError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.scaled and self.activation != "none":
            raise UserError(
                f"scaled belongs to a fused feed-forward part; set activation to none, not {self.activation}"
            )


SOFTMAX_ONLY: dict[str, Any] = {"norm": False, "activation": "none", "temperature": True, "scaled": True}
"""Settings of the softmax-only model, for `SoftmaxOnlyConfig(vocabulary, context, **SOFTMAX_ONLY)`."""


class Attention(nn.Module):
    """Causal attention with the matrices in its result; scores and softmax in float32 at least."""

    def __init__(self, config: SoftmaxOnlyConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.raw_temperature = nn.Parameter(torch.full((config.heads,), START), requires_grad=config.temperature)

    @property
    def temperature(self) -> Tensor:
        """t [heads], positive."""
        return nn.functional.softplus(self.raw_temperature)

    def forward(self, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The write [B, T, d] and the matrices [B, heads, T, T]; `allowed` [B or 1, 1, T, T] marks keys."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (self.temperature[:, None, None] * math.sqrt(d // self.heads))
        scores = scores if scores.dtype == torch.float64 else scores.float()
        # the least number and not -inf: a padded query without any key gets a flat row instead of nan
        matrix = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((matrix.to(v.dtype) @ v).transpose(1, 2).reshape(b, t, d)), matrix


class FeedForward(nn.Module):
    """What follows attention: W_2 act(W_1 X) added to the stream, or one scaled matrix without an activation."""

    def __init__(self, config: SoftmaxOnlyConfig) -> None:
        super().__init__()
        self.fused = config.activation == "none"
        d = config.width
        self.body: nn.Module = nn.Linear(d, d, bias=False)
        if not self.fused:
            act = nn.GELU() if config.activation == "gelu" else nn.ReLU()
            self.body = nn.Sequential(nn.Linear(d, 4 * d), act, nn.Linear(4 * d, d))
        self.alpha = nn.Parameter(torch.ones(()), requires_grad=config.scaled)
        self.beta = nn.Parameter(torch.ones(()), requires_grad=config.scaled)

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """The stream after this part, from the stream and its normed reading."""
        write: Tensor = self.body(normed)
        return self.beta * x + write / self.alpha


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: SoftmaxOnlyConfig) -> None:
        super().__init__()
        norms = [nn.LayerNorm(config.width) if config.norm else nn.Identity() for _ in range(2)]
        self.before_attention, self.before_ffn = norms
        self.attention, self.ffn = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The stream after the layer, and its attention matrices."""
        write, matrix = self.attention(self.before_attention(x), allowed)
        x = x + write
        return self.ffn(x, self.before_ffn(x)), matrix


class SoftmaxOnlyLM(nn.Module):
    """The language model. Weights are normal with standard deviation 0.02, projections back into the stream smaller by
    sqrt(2 layers), drawn from `seed` alone."""

    def __init__(self, config: SoftmaxOnlyConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        back = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("attention.out.weight", "body.2.weight", "body.weight"))
                parameter.normal_(0.0, back if into_stream else 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, T, V] and one attention matrix [B, heads, T, T] a layer, with gradient.

        `mask` [B, T] is False on padding: no other token attends to it. Raises UserError for a text beyond the context.
        """
        length = ids.shape[1]
        if length > self.config.context:
            raise UserError(
                f"{length} tokens exceed the context {self.config.context}; cut them or set a larger context"
            )
        allowed = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None]
        x = self.tokens(ids) + self.positions.weight[:length]
        matrices = []
        for block in self.blocks:
            x, matrix = block(x, allowed)
            matrices.append(matrix)
        return self.head(self.norm(x)), matrices
