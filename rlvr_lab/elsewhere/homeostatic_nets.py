r"""A learner whose learning rate is its vital sign: what it takes in moves the rate, and it decides what to take in.

"Need is All You Need: Homeostatic Neural Networks Adapt to Concept Shift" (Man, Damasio and Neven, 2022, arXiv
2205.08645, kingsonman/homeostatic-neural-networks, numpy, no licence file). The labels of two classes swap from time to
time, so no fixed learning rate eta is right. Objects of the classes 5 to 9 raise eta by a fixed step, the others lower
it, and the learner takes an object or leaves it, after trying both on the last n samples it has seen:

    a_leave = acc(W - eta   G / m),    a_take = acc(W - eta' G / m),    eta' = eta + s(guess) delta
    eta <- eta + s(label) delta   where a_take > a_leave, strictly;   a negative rate becomes 1e-8
    s(c) = +1 where c >= 5, else -1

The trial follows the *guess* g, the consequence follows the *label* l: a learner that does not recognise what it takes
moves its rate the wrong way. That is its vulnerability, and the reason why recognising serves it.

| symbol | meaning | shape |
|---|---|---|
| W = (W1, W2) | weights of x -> W2 elu(W1 x), without offsets | [..., H, D], [..., K, H] |
| G | gradient of the cross-entropy (nats), summed over the m samples of the batch | as W |
| eta, delta | learning rate and its step; the paper has delta = eta_0 / 10 | [...] |
| memory | the last n = 20 samples with their labels | [..., n, D], [..., n] |

Leading axes are independent learners. The released network has two hidden layers and offsets; here it has one.

Where the released code departs. It decides inside the batch loop, at a sample whose index is a multiple of 10, which is
the first one of a batch of 10: G is then the gradient of that one sample, still divided by m. Here one decision is made
for each batch, with the gradient of all of it and the batch's last sample. And the released memory reads the labels as
they are *now*, after a swap (`memory="current"` in the demonstration); as seen is the default here. The demonstration
with its controls is in `homeostatic_nets_demo`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import elu

from ..errors import UserError

FLOOR = 1e-8
"""What a negative rate is replaced by."""
Consequence = Literal["label", "guess"]


class Weights(NamedTuple):
    """Both matrices of x -> W2 elu(W1 x), or their gradients: `[..., H, D]` and `[..., K, H]`."""

    first: Tensor
    second: Tensor


class Decision(NamedTuple):
    """What the learner found and did; `[...]` each, one entry for each learner."""

    leave: Tensor
    """Accuracy on the memory after a step with the present rate."""
    take: Tensor
    """Accuracy on the memory after a step with the rate that its guess promises."""
    taken: Tensor
    """True where it took the object: `take > leave`."""
    eta: Tensor
    """Its rate from now on."""


def _check(weights: Weights, x: Tensor, y: Tensor | None = None) -> None:
    if weights.first.ndim < 2 or weights.second.ndim < 2 or weights.first.shape[-2] != weights.second.shape[-1]:
        raise UserError(f"weights must be [..., H, D] and [..., K, H]; got {tuple(weights.first.shape)} and "
                        f"{tuple(weights.second.shape)}")  # fmt: skip
    if x.ndim < 2 or not x.shape[-2] or x.shape[-1] != weights.first.shape[-1]:
        raise UserError(f"x must be [..., n, {weights.first.shape[-1]}] with n >= 1; got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise UserError("x must be finite: it holds nan or infinity")
    if y is None:
        return
    if y.shape != x.shape[:-1] or y.is_floating_point() or y.dtype == torch.bool:
        raise UserError(f"y must hold class numbers of shape {tuple(x.shape[:-1])}; got {y.dtype} {tuple(y.shape)}")
    if bool((y < 0).any() or (y >= weights.second.shape[-2]).any()):
        raise UserError(f"y must hold classes from 0 to {weights.second.shape[-2] - 1}")


def logits(weights: Weights, x: Tensor) -> Tensor:
    """W2 elu(W1 x) for samples `[..., n, D]`: `[..., n, K]`. Raises UserError where shapes do not fit."""
    _check(weights, x)
    return elu(x @ weights.first.mT) @ weights.second.mT


def gradient(weights: Weights, x: Tensor, y: Tensor) -> tuple[Weights, Tensor]:
    """Gradient of the cross-entropy in nats, **summed** over the samples, by hand; and the logits it was taken at.

    With p = softmax(z): dL/dz = p - onehot(y), and elu'(u) is 1 above 0 and e^u below.
    """
    _check(weights, x, y)
    inner = x @ weights.first.mT
    hidden = elu(inner)
    z = hidden @ weights.second.mT
    error = z.softmax(-1)
    error = error.scatter_add(-1, y.unsqueeze(-1), -torch.ones_like(error[..., :1]))
    back = (error @ weights.second) * inner.clamp(max=0).exp()
    return Weights(back.mT @ x, error.mT @ hidden), z


def step(weights: Weights, grads: Weights, eta: Tensor, batch: int) -> Weights:
    """W - eta G / batch, with one rate for each learner. Raises UserError for a batch below 1."""
    if batch < 1:
        raise UserError(f"batch must be 1 or more, not {batch}")
    rate = (eta / batch)[..., None, None]
    return Weights(weights.first - rate * grads.first, weights.second - rate * grads.second)


def accuracy(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Share of the samples whose largest logit is that of their label: `[...]`."""
    _check(weights, x, y)
    return (logits(weights, x).argmax(-1) == y).to(x.dtype).mean(-1)


def moved(eta: Tensor, kind: Tensor, size: float | Tensor, raising: int = 5) -> Tensor:
    """The rate after an object of class `kind`: up by `size` from class `raising` on, else down; negative becomes 1e-8.

    `size` is one step for all learners, or one for each. Raises UserError where a rate is negative or not finite, and
    where a step is not positive and finite.
    """
    sizes = torch.as_tensor(size)
    if not bool((torch.isfinite(sizes) & (sizes > 0)).all()):
        raise UserError(f"size must be a positive step, not {size}")
    if not bool((torch.isfinite(eta) & (eta >= 0)).all()):
        raise UserError("eta must be finite and not negative")
    raised = torch.where(kind >= raising, eta + size, eta - size)
    return torch.where(raised < 0, torch.full_like(raised, FLOOR), raised)


def decide(
    weights: Weights,
    grads: Weights,
    eta: Tensor,
    memory: tuple[Tensor, Tensor],
    guess: Tensor,
    label: Tensor,
    *,
    batch: int,
    size: float | Tensor,
    consequence: Consequence = "label",
) -> Decision:
    """Take the object or leave it: both are tried on the memory `(x [..., n, D], y [..., n])`, then one is done.

    `consequence="label"` is the paper's: the rate moves by what the object *is*. `"guess"` makes the learner
    invulnerable, as the rate moves by what it believed. A tie leaves the object. Raises UserError for an unknown
    consequence, and as `moved`, `step` and `accuracy` do.
    """
    if consequence not in get_args(Consequence):
        raise UserError(f"consequence must be 'label' or 'guess', not {consequence!r}")
    leave = accuracy(step(weights, grads, eta, batch), *memory)
    take = accuracy(step(weights, grads, moved(eta, guess, size), batch), *memory)
    taken = take > leave
    after = moved(eta, label if consequence == "label" else guess, size)
    return Decision(leave, take, taken, torch.where(taken, after, eta))
