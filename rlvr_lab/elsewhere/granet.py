r"""GraNet: prune gradually, and after each cut let as many connections grow back as were dropped (arXiv 2106.10404).

Weights w of all prunable tensors (not biases and norms), active where the mask is 1. At event k of K:

    d_k = d_f + (d_i - d_f) (1 - k/K)^3                 density, the share of active weights
    prune:       keep the floor(d_k N) largest |w| over all tensors together, N weights in all
    regenerate:  in every tensor drop the n = ceil(rho nnz) smallest active |w|, then activate the n inactive positions
                 with the largest |dL/dw|; new weights start at 0, and what was dropped may come back
    rho = 0.005 + (0.5 - 0.005) (1 + cos(pi t / T)) / 2

after which weights and the optimizer's momentum are masked. *Pruning plasticity* is the accuracy after pruning and a
few more steps minus the accuracy just before. A sparse start takes Erdos-Renyi densities by layer (`erdos_renyi`).

In nats: a mask of density d is one of C(N, d N), so it holds ln C(N, d N) ~ N h(d), h the entropy of a coin; pruning
spends it, regeneration keeps the search for a place among these masks going. This reading is ours, not the paper's.

Card: papers/granet.md. Code compared: Shiweiliuiiiiiii/GraNet @ f338a24. It keeps |w| strictly above the threshold,
one weight fewer than asked for (`released=True`), stops pruning one event before K, and grows by the gradient that is
left from the batch of the last step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError


def _share(value: float, name: str, open_below: bool = False) -> float:
    if not (0 < value <= 1 if open_below else 0 <= value <= 1):
        raise UserError(f"{name} must lie in {'(0, 1]' if open_below else '[0, 1]'}, not {value}")
    return value


def density_at(event: int, events: int, initial: float = 1.0, final: float = 0.1) -> float:
    """Density d_k after pruning event `event` of `events`: the cubic schedule of gradual magnitude pruning."""
    _check_schedule(event, events, initial, final)
    return final + (initial - final) * (1 - event / events) ** 3


def sparsity_at(event: int, events: int, initial: float = 1.0, final: float = 0.1) -> float:
    """s_k = 1 - d_k, in the order of operations of the released code, whose rounding decides single weights."""
    _check_schedule(event, events, initial, final)
    return (1 - initial) + (initial - final) * (1 - (1 - event / events) ** 3)


def _check_schedule(event: int, events: int, initial: float, final: float) -> None:
    if events < 1 or not 0 <= event <= events:
        raise UserError(f"event must lie between 0 and events, not {event} of {events}")
    if _share(final, "final", open_below=True) > _share(initial, "initial", open_below=True):
        raise UserError(f"final must not exceed initial, {initial}, but is {final}")


def regeneration_rate(progress: float, high: float = 0.5, low: float = 0.005) -> float:
    """Share rho of a tensor's active weights that is exchanged, at `progress` of training from 0 to 1."""
    _share(progress, "progress")
    if _share(low, "low") > _share(high, "high"):
        raise UserError(f"low must not exceed high, {high}, but is {low}")
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def _checked(weights: Sequence[Tensor]) -> Tensor:
    if not len(weights) or not all(weight.numel() for weight in weights):
        raise UserError("weights must hold at least one tensor, and none without entries")
    scores = torch.cat([weight.detach().abs().flatten() for weight in weights])
    if not bool(torch.isfinite(scores).all()):
        raise UserError("weights must be finite")
    return scores


def kept_count(total: int, density: float, released: bool = False) -> int:
    """floor(d N). Raises UserError for a density that leaves nothing.

    Where d N is a whole number, rounding of the density costs no weight, but it does where `released`.
    """
    count = math.floor(total * _share(density, "density", open_below=True) * (1 if released else 1 + 1e-12))
    if count < 1:
        raise UserError(f"density {density} leaves none of {total} weights")
    return count


def threshold(weights: Sequence[Tensor], density: float, released: bool = False) -> Tensor:
    """The smallest |w| among the floor(d N) largest, over all tensors."""
    scores = _checked(weights)
    return scores.topk(kept_count(len(scores), density, released)).values[-1]


def global_prune(weights: Sequence[Tensor], density: float, released: bool = False) -> list[Tensor]:
    """Masks, boolean, of the largest |w| over all tensors together; one tensor may lose everything.

    `released`: strictly above the threshold, so one weight fewer, and none of those that are tied with it.
    """
    scores = _checked(weights)
    if released:
        limit = threshold(weights, density, released)
        return [weight.detach().abs() > limit for weight in weights]
    flat = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    flat[scores.topk(kept_count(len(scores), density)).indices] = True
    parts = torch.split(flat, [weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _fits(values: Tensor, mask: Tensor, name: str) -> None:
    if mask.dtype != torch.bool or values.shape != mask.shape:
        raise UserError(f"mask must be boolean and of {name}'s shape {tuple(values.shape)}, not {tuple(mask.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{name} must be finite")


def drop_count(mask: Tensor, rate: float) -> int:
    """ceil(rho nnz); 0 where fewer than one weight would remain, so that the tensor is left alone."""
    active = int(mask.sum())
    count = math.ceil(_share(rate, "rate") * active)
    return count if active - count >= 1 else 0


def drop(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
    """The mask without the ceil(rho nnz) active positions of smallest |w|."""
    _fits(weight, mask, "weight")
    scores = weight.detach().abs().masked_fill(~mask, math.inf).flatten()
    left = mask.clone()
    left.view(-1)[scores.topk(drop_count(mask, rate), largest=False).indices] = False
    return left


def regrow(grad: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask with `count` more positions: the inactive ones with the largest |dL/dw|."""
    _fits(grad, mask, "grad")
    if not 0 <= count <= int((~mask).sum()):
        raise UserError(f"count must lie between 0 and the inactive positions, {int((~mask).sum())}, not {count}")
    scores = grad.detach().abs().masked_fill(mask, -1.0).flatten()
    grown = mask.clone()
    grown.view(-1)[scores.topk(count).indices] = True
    return grown


def regenerate(weight: Tensor, grad: Tensor, mask: Tensor, rate: float) -> Tensor:
    """Zero-cost regeneration of one tensor: drop, then grow as many. The number of active weights stays."""
    return regrow(grad, drop(weight, mask, rate), drop_count(mask, rate))


def erdos_renyi(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Densities by layer, proportional to sum(shape) / prod(shape), at most 1, that hold `density` N weights in all."""
    _share(density, "density", open_below=True)
    if not shapes or not all(shape and min(shape) >= 1 for shape in shapes):
        raise UserError(f"shapes must name at least one layer with positive sides, not {list(shapes)}")
    sizes, raw = [math.prod(shape) for shape in shapes], [sum(shape) / math.prod(shape) for shape in shapes]
    full: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in full]
        rest = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = rest / sum(raw[i] * sizes[i] for i in free) if free else 0.0
        over = {i for i in free if scale * raw[i] > 1}
        if not over:
            return [1.0 if i in full else scale * raw[i] for i in range(len(shapes))]
        full |= over


def mask_entropy(total: int, active: int) -> float:
    """ln C(N, n) in nats: how many masks have `active` of `total` weights."""
    if not 0 <= active <= total:
        raise UserError(f"active must lie between 0 and total, {total}, not {active}")
    return math.lgamma(total + 1) - math.lgamma(active + 1) - math.lgamma(total - active + 1)


def regeneration_entropy(total: int, active: int, rate: float) -> float:
    """Nats of the choice that one regeneration makes: which n to drop, and which n of the then inactive to grow."""
    room = mask_entropy(total, active)  # refuses counts that do not fit
    count = math.ceil(_share(rate, "rate") * active)
    return mask_entropy(active, count) + mask_entropy(total - active + count, count) if room else 0.0
