r"""DDAE++: a denoiser that conditions its later layers on a summary of what its middle layers see.

Xiang and others, "DDAE++: Enhancing Diffusion Models Towards Unified Generative and Discriminative Learning", arXiv
2505.10999, 2025 (retitled later). Official code: FutureXiang/ddae_plus_plus @ ec21156 holds a README only, which speaks
of fewer than ten lines on DiT. Blocks 1..L with tokens h_l [B, N, d] take a conditioning c = emb(t) by adaptive layer
norm. The feature of block m, where linear probes are best, is pooled and added to the conditioning of later blocks:

    f = (1/N) sum_n h_{m,n},      c' = c + phi(f),      blocks l > m use c';      phi = LayerNorm, then Linear.

Only later blocks see it, so nothing is circular, and the loss is the usual one:

    x_t = (1 - t) x_0 + t eps,      loss = E || v_theta(x_t, t) - (eps - x_0) ||^2.

Optional contrastive self-distillation: features of two views, one by an exponential average of the weights without
gradient, are drawn together by InfoNCE with a small weight.

[inferred]: that phi is layer norm and a linear map that starts at zero, and the choice of m; abstract and README say
pooling, projection and addition to later layers. Shapes: images as patches [B, N, P]; features [B, d]; t [B] in (0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ._checks import finite


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps, with one t in [0, 1] for each row."""
    if x.shape != eps.shape:
        raise UserError(f"x {tuple(x.shape)} and eps {tuple(eps.shape)} must have one shape")
    finite("t", t)
    if bool(((t < 0) | (t > 1)).any()):
        raise UserError("t must lie in [0, 1]")
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (1 - t) * x + t * eps


def velocity_loss(v: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the velocity eps - x."""
    if not v.shape == x.shape == eps.shape:
        raise UserError(f"v {tuple(v.shape)}, x {tuple(x.shape)} and eps {tuple(eps.shape)} must have one shape")
    return (v - (eps - x)).square().mean()


def contrast(student: Tensor, teacher: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE in nats: each student feature [B, d] finds its own teacher feature among the batch; no gradient to it."""
    finite("student", student)
    if student.shape != teacher.shape or student.dim() != 2:
        raise UserError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be [batch, d]")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature must be above 0, got {temperature}")
    scores = F.normalize(student, dim=-1) @ F.normalize(teacher.detach(), dim=-1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(student), device=student.device))


class Summary(nn.Module):
    """phi: mean over tokens, layer norm, and a linear map that starts at zero: training starts as without it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Addition to the conditioning [B, d] from tokens [B, N, d]."""
        added: Tensor = self.project(self.norm(tokens.mean(1)))
        return added


class Block(nn.Module):
    """Attention and a two-layer network, both behind layer norms that the conditioning scales, shifts and gates."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.adapt = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens [B, N, d] under the conditioning c [B, d]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adapt(F.silu(c))[:, None].chunk(6, -1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(x).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate_a * self.merge(seen)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale_m) + shift_m
        moved: Tensor = h + gate_m * self.narrow(F.gelu(self.widen(x)))
        return moved


class SelfConditionedDenoiser(nn.Module):
    """A small diffusion transformer; `after` is the block m whose summary conditions the later ones, 0 for none."""

    def __init__(self, tokens: int, patch: int, width: int = 32, layers: int = 4, heads: int = 4, after: int = 0):
        super().__init__()
        if min(tokens, patch, width, layers, heads) < 1 or width % heads or width % 2:
            raise UserError(
                "tokens, patch, width, layers and heads must be positive, width even and a multiple of heads"
            )
        if not 0 <= after < layers:
            raise UserError(
                f"after must be 0 (no summary) or a block with one behind it, 1 to {layers - 1}; got {after}"
            )
        self.after, self.width = after, width
        self.enter, self.leave = nn.Linear(patch, width), nn.Linear(width, patch)
        self.place = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.clock = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.summary = Summary(width) if after else None

    def conditionings(self, x: Tensor, t: Tensor, others: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The conditioning that each block receives, [B, d] each, and the tokens behind each, [B, N, d].

        With `others`, a permutation [B], every image gets the summary of another one: an intervention, not a method.
        """
        waves = torch.exp(torch.linspace(0, 5, self.width // 2, device=t.device))
        angles = t.to(x.dtype)[:, None] * waves
        c = self.clock(torch.cat([angles.sin(), angles.cos()], -1))
        h, told, seen = self.enter(x) + self.place, [], []
        for number, block in enumerate(self.blocks, start=1):
            told.append(c)
            h = block(h, c)
            seen.append(h)
            if self.summary is not None and number == self.after:
                added = self.summary(h)
                c = c + (added if others is None else added[others])
        return told, seen

    def forward(self, x: Tensor, t: Tensor, others: Tensor | None = None) -> Tensor:
        """Velocity [B, N, P] of patches x [B, N, P] at times t [B]."""
        v: Tensor = self.leave(F.layer_norm(self.conditionings(x, t, others)[1][-1], (self.width,)))
        return v

    @torch.no_grad()
    def features(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """The tokens behind each block, pooled over places: [B, d] for each block."""
        return [tokens.mean(1) for tokens in self.conditionings(x, t)[1]]


def ridge_probe(train: Tensor, labels: Tensor, test: Tensor, penalty: float = 1.0) -> Tensor:
    """Predicted classes [M] of test features [M, d] by ridge regression on one-hot labels, features standardised."""
    finite("train", train)
    if len(train) != len(labels) or train.shape[1] != test.shape[1]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (train, labels, test))
        raise UserError(f"train, labels and test of shapes {shapes} do not fit each other")
    if not 0 < penalty < math.inf:
        raise UserError(f"penalty must be above 0, got {penalty}")
    mean, sd = train.double().mean(0), train.double().std(0).clamp_min(1e-6)
    a, b = ((part.double() - mean) / sd for part in (train, test))
    goal = F.one_hot(labels).double()
    weights = torch.linalg.solve(a.T @ a + penalty * torch.eye(a.shape[1], dtype=a.dtype), a.T @ (goal - goal.mean(0)))
    guesses: Tensor = (b @ weights + goal.mean(0)).argmax(1)
    return guesses
