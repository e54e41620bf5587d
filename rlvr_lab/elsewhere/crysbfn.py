r"""CrysBFN: a Bayesian flow on a circle, where one observation may leave a belief less certain than before.

Wu and others, "A Periodic Bayesian Flow for Material Generation", arXiv 2502.02016, ICLR 2025. Official code:
wu-han-lin/CrysBFN @ 2db6a20. The generator keeps a von Mises belief VM(x | m, c), proportional to exp(c cos(x - m)),
about each angle of a crystal and sharpens it by noisy observations y ~ VM(x, alpha):

    m' = atan2(alpha sin y + c sin m, alpha cos y + c cos m),   c' = sqrt(alpha^2 + c^2 + 2 alpha c cos(y - m)),

the sum of two planar vectors, S' = S + alpha (cos y, sin y). Entropy (nats) is H(c) = ln(2 pi I_0(c)) - c A(c) with
A = I_1 / I_0. Accuracies do not add: c' < c where cos(y - m) < -alpha / (2 c), so entropy is no function of time and
the network is told (m, c) instead of (m, step). The pair suffices: all observations together have the likelihood
exp(c cos(x - m)).

Schedule: targets beta_i with H(beta_i) falling linearly from ln 2 pi to H(c_n); alpha_1 = beta_1, then
E_y c'(beta_{i-1}, alpha_i) = beta_i. Loss at step i: n alpha_i A(alpha_i) (1 - cos(x_hat - x)) for each angle.

Shapes: everything is element-wise and broadcasts; angles in radians; a flow is [..., steps].

The released code departs: its regression term is the wrapped squared difference (`distance="wrapped"`); its search of
accuracies puts the mean of the belief at the datum, so that the beliefs of a real flow are less certain than the target
in the middle of the schedule (reproduced here, by quadrature instead of by sampling); its default sampler throws the
belief away at each step and draws a new flow around the newest estimate (`restart=True`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ..errors import UserError

Array = NDArray[np.float64]
Distance = Literal["cosine", "wrapped"]
Predict = Callable[[Array, Array, int], Array]
"""Means m, concentrations c and the number of the step (from 1) to an estimate of the angles, same shape."""

FLAT = float(np.log(2 * np.pi))
"""Entropy of the uniform belief, in nats."""
LARGEST = 1e8
"""Concentrations above it have an entropy that float64 cannot tell from rounding."""
RELEASED_10 = (1.478, 1.587, 2.627, 5.385, 11.44, 24.55, 52.99, 114.7, 248.6, 539.0)
"""Accuracies that the official repository caches for ten steps and a final concentration of 1000."""


def _finite(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> Array:
    found = np.asarray(value.detach() if isinstance(value, Tensor) else value, dtype=float)
    if not found.size:
        raise UserError(f"{name} is empty: give at least one number")
    if not (np.isfinite(found) & (found >= low) & (found <= high)).all():
        allowed = "a finite number" if np.isinf(low) else f"a number from {low:g} to {high:g}"
        raise UserError(f"{name} must be {allowed} everywhere")
    return found


def _concentration(name: str, value: Any) -> Array:
    return _finite(name, value, 0.0, LARGEST)


def _same_shape(**values: Any) -> None:
    try:
        np.broadcast_shapes(*(np.shape(value) for value in values.values()))
    except ValueError as error:
        shapes = ", ".join(f"{name} {tuple(np.shape(value))}" for name, value in values.items())
        raise UserError(f"shapes do not fit each other: {shapes}") from error


def mean_cosine(c: Any) -> Array:
    """A(c) = I_1(c) / I_0(c), the expected cosine of the deviation from the mean; exponentially scaled."""
    c = _concentration("c", c)
    return np.asarray(special.i1e(c) / special.i0e(c))


def belief_entropy(c: Any) -> Array:
    """Differential entropy of VM(m, c) in nats: ln 2 pi at c = 0, and below zero for a sharp belief."""
    c = _concentration("c", c)
    return np.asarray(FLAT + np.log(special.i0e(c)) + c * (1 - special.i1e(c) / special.i0e(c)))


def concentration_of(entropy: Any) -> Array:
    """The concentration whose belief has this entropy in nats, by bisection. Entropies up to ln 2 pi."""
    target = _finite("entropy", entropy, float(belief_entropy(LARGEST)), FLAT + 1e-12)
    low, high = np.zeros_like(target), np.full_like(target, np.log1p(LARGEST))
    for _ in range(80):
        middle = (low + high) / 2
        flatter = belief_entropy(np.expm1(middle)) > target
        low, high = np.where(flatter, middle, low), np.where(flatter, high, middle)
    return np.asarray(np.expm1((low + high) / 2))


def bayesian_update(m: Any, c: Any, y: Any, alpha: Any) -> tuple[Array, Array]:
    """The belief (m, c) after one observation y of accuracy alpha; m' in (-pi, pi]. With c = 0: (y, alpha)."""
    m, y = _finite("m", m), _finite("y", y)
    c, alpha = _concentration("c", c), _concentration("alpha", alpha)
    _same_shape(m=m, c=c, y=y, alpha=alpha)
    mean = np.arctan2(alpha * np.sin(y) + c * np.sin(m), alpha * np.cos(y) + c * np.cos(m))
    # (alpha - c)^2 + 2 alpha c (1 + cos): the same number, without a root of a rounding error where they cancel
    return mean, np.sqrt((alpha - c) ** 2 + 4 * alpha * c * np.cos((y - m) / 2) ** 2)


def kl_von_mises(m1: Any, c1: Any, m2: Any, c2: Any) -> Array:
    """KL(VM(m1, c1) || VM(m2, c2)) in nats."""
    m1, m2 = _finite("m1", m1), _finite("m2", m2)
    c1, c2 = _concentration("c1", c1), _concentration("c2", c2)
    _same_shape(m1=m1, c1=c1, m2=m2, c2=c2)
    normalisers = np.log(special.i0e(c2)) + c2 - np.log(special.i0e(c1)) - c1
    return np.asarray(normalisers + mean_cosine(c1) * (c1 - c2 * np.cos(m1 - m2)))


def step_loss(x_hat: Tensor, x: Tensor, alpha: Tensor, steps: int, distance: Distance = "cosine") -> Tensor:
    """steps * alpha * A(alpha) * d per angle, with d = 1 - cos (paper) or the wrapped squared difference (released).

    The paper sums over the angles of a crystal and takes the mean over crystals; the released code takes one mean.
    """
    _concentration("alpha", alpha)
    _finite("x_hat", x_hat)
    _finite("x", x)
    _same_shape(x_hat=x_hat, x=x, alpha=alpha)
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if distance not in ("cosine", "wrapped"):
        raise UserError(f"distance must be 'cosine' or 'wrapped', got '{distance}'")
    off = x_hat - x
    if distance == "cosine":
        apart = 1 - torch.cos(off)
    else:
        apart = (off - 2 * torch.pi * torch.round(off.detach() / (2 * torch.pi))) ** 2
    resultant: Tensor = torch.special.i1e(alpha) / torch.special.i0e(alpha)
    return steps * alpha * resultant * apart


def normalised_log_concentration(c: Any, final: float, epsilon: float = 1e-7) -> Array:
    """What the network is given instead of the clock: 0 at the prior, 1 at the final concentration."""
    c, final = _concentration("c", c), float(_finite("final", final, 1e-3, LARGEST))
    return np.asarray((np.log(c + epsilon) - np.log(epsilon)) / (np.log(final) - np.log(epsilon)))


def target_concentrations(steps: int, final: float = 1000.0) -> Array:
    """beta_1 to beta_n, [steps]: the entropies of these beliefs fall linearly from ln 2 pi to that of `final`."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    share = np.arange(1, steps + 1) / steps
    return concentration_of((1 - share) * FLAT + share * belief_entropy(_finite("final", final, 1e-3, LARGEST)))


def expected_concentration(c: Any, alpha: Any, nodes: int = 400) -> Array:
    """E c' for a belief whose mean lies at the datum, as the released search assumes; by quadrature over y."""
    c, alpha = _concentration("c", c), _concentration("alpha", alpha)
    _same_shape(c=c, alpha=alpha)
    widest = np.minimum(np.pi, 9 / np.sqrt(np.maximum(alpha, 1e-3)))[..., None]
    off = widest * (np.arange(nodes) + 0.5) / nodes
    weight = np.exp(alpha[..., None] * (np.cos(off) - 1))
    a, b = np.broadcast_arrays(alpha, c)
    after = np.sqrt((a - b)[..., None] ** 2 + 4 * (a * b)[..., None] * np.cos(off / 2) ** 2)
    return np.asarray((after * weight).sum(-1) / weight.sum(-1))


def accuracy_schedule(steps: int, final: float = 1000.0) -> Array:
    """alpha_1 to alpha_n, [steps]: each brings the expected concentration from one target to the next."""
    beta = target_concentrations(steps, final)
    low, high = np.full(steps - 1, -16.0), np.full(steps - 1, np.log(4 * final))
    for _ in range(50):
        middle = (low + high) / 2
        short = expected_concentration(beta[:-1], np.exp(middle)) < beta[1:]
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return np.concatenate([beta[:1], np.exp((low + high) / 2)])


def flow(x: Any, alphas: Any, rng: np.random.Generator) -> tuple[Array, Array]:
    """Beliefs about x after each observation: means and concentrations, [..., steps], by one cumulative sum."""
    x, alphas = _finite("x", x), _concentration("alphas", np.atleast_1d(alphas))
    y = rng.vonmises(x[..., None], alphas, (*x.shape, len(alphas)))
    total = np.cumsum(alphas * np.exp(1j * y), -1)
    return np.angle(total), np.abs(total)


def generate(
    predict: Predict, alphas: Any, count: int, rng: np.random.Generator, restart: bool = False
) -> tuple[Array, Array]:
    """Sample `count` angles: estimate, observe the estimate with noise, update. Also the entropies, [steps, count].

    `restart` is the released default: the belief at the next step is a new flow from the prior around the estimate.
    """
    alphas = _concentration("alphas", np.atleast_1d(alphas))
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    m, c, entropies = rng.uniform(-np.pi, np.pi, count), np.zeros(count), []
    for i, alpha in enumerate(alphas, start=1):
        x_hat = predict(m, c, i)
        if restart:
            means, concentrations = flow(x_hat, alphas[:i], rng)
            m, c = means[..., -1], concentrations[..., -1]
        else:
            m, c = bayesian_update(m, c, rng.vonmises(x_hat, alpha), alpha)
        entropies.append(belief_entropy(c))
    return x_hat, np.array(entropies)
