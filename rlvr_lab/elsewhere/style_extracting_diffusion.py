r"""Style-extracting diffusion (STEDM): variety goes into the style of an image and not into its layout.

Oettl and others, "Style-Extracting Diffusion Models for Semi-Supervised Histopathology Segmentation", arXiv 2403.14429,
ECCV 2024. Official code: OettlM/STEDM @ bae93bf (no licence file). A generator that was trained on few labelled sources
repeats their look. Here an encoder e reads a style from images of any source, labelled or not, and the denoiser gets

    phi = Agg(e(s_1), ..., e(s_n)),        loss = E | eps - eps_theta(z_t, t, layout, phi) |        (L1, noise target),

so that unseen styles combine with known layouts. Classifier-free guidance acts on the style alone: in training its
images are replaced with probability 1/4 by a constant image of value -2 (outside the range of the data), and sampling
uses eps_null + w (eps_style - eps_null), w = 1.5, by DDIM with eta = 0; the layout stays in both branches.

The style images must not be the target, pixel by pixel: what they tell of the layout, the denoiser takes from them.

Shapes: z, eps [B, P]; images of the style source [B, n, P]; features [B, n, F]; layout [B, P] of 0 and 1; t [B].

The released code departs: the null style is that constant image sent through the encoder and no zero vector; all
classes but the background are one foreground channel of the layout; the attention layers of the UNet are removed in
favour of the residual blocks that take the style. Aggregation by a linear block or a set transformer is left out here.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from ._checks import finite

Aggregation = Literal["mean", "max"]
NULL_STYLE = -2.0
"""Value of every pixel of the null style image."""


def _equal_shapes(**values: Tensor) -> None:
    if len({tuple(value.shape) for value in values.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        raise UserError(f"shapes must be equal: {shapes}")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} must be from 0 to 1, got {value}")


def aggregate(features: Tensor, how: Aggregation = "mean") -> Tensor:
    """Style vector [B, F] of the features [B, n, F] of n images from one source; the order of the images is inert."""
    finite("features", features)
    if features.dim() != 3:
        raise UserError(f"features must be [batch, images, features], got {tuple(features.shape)}")
    if how not in get_args(Aggregation):
        raise UserError(f"how must be 'mean' or 'max', got '{how}'")
    return features.mean(1) if how == "mean" else features.amax(1)


def drop_style(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Style images [B, n, P] with, for a random part of the batch, every pixel set to the null style."""
    finite("images", images)
    _probability("probability", probability)
    dropped = torch.rand(len(images), generator=generator) < probability
    return torch.where(dropped.view(-1, *[1] * (images.dim() - 1)), torch.full_like(images, NULL_STYLE), images)


def guided(null: Tensor, style: Tensor, scale: float = 1.5) -> Tensor:
    """eps_null + scale (eps_style - eps_null): 0 ignores the style, 1 conditions on it, more exaggerates it."""
    finite("null", null)
    finite("style", style)
    _equal_shapes(null=null, style=style)
    if not 0 <= scale < float("inf"):
        raise UserError(f"scale must be a finite number from 0, got {scale}")
    return null + scale * (style - null)


def noise_loss(eps_hat: Tensor, eps: Tensor) -> Tensor:
    """Mean absolute error of the predicted noise."""
    _equal_shapes(eps_hat=eps_hat, eps=eps)
    return (eps_hat - eps).abs().mean()


def signal_shares(steps: int = 1000, first: float = 0.0015, last: float = 0.0205) -> Tensor:
    """alpha-bar after each of the steps, [steps], for a linear schedule of the variances beta."""
    if steps < 2:
        raise UserError(f"steps must be at least 2, got {steps}")
    if not 0 < first <= last < 1:
        raise UserError(f"first and last must satisfy 0 < first <= last < 1, got {first} and {last}")
    return torch.cumprod(1 - torch.linspace(first, last, steps, dtype=torch.float64), 0)


def noised(x: Tensor, eps: Tensor, share: Tensor) -> Tensor:
    """sqrt(share) x + sqrt(1 - share) eps, with one alpha-bar for each row."""
    _equal_shapes(x=x, eps=eps)
    _shares("share", share)
    share = share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return share.sqrt() * x + (1 - share).sqrt() * eps


def _shares(name: str, value: Tensor) -> None:
    finite(name, value)
    if not bool(((value > 0) & (value <= 1)).all()):
        raise UserError(f"{name} must lie above 0 and at most at 1")


def ddim_step(z: Tensor, eps: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """One step of DDIM with eta = 0, from alpha-bar `now` to `after`; with the true noise it stays on the line to x."""
    _equal_shapes(z=z, eps=eps)
    _shares("now", now)
    _shares("after", after)
    now, after = now.to(z.dtype), after.to(z.dtype)
    x = (z - (1 - now).sqrt() * eps) / now.sqrt()
    return after.sqrt() * x + (1 - after).sqrt() * eps


def overlap(mask: Tensor, other: Tensor) -> Tensor:
    """Dice of two masks for each row, 2 |a and b| / (|a| + |b|); 1 where both are empty, since they agree."""
    _equal_shapes(mask=mask, other=other)
    a, b = mask.bool().flatten(1), other.bool().flatten(1)
    total = (a.sum(1) + b.sum(1)).double()
    return torch.where(total > 0, 2 * (a & b).sum(1) / total.clamp_min(1), torch.ones_like(total))
