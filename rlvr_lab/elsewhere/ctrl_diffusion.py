r"""CTRL: a new condition for a diffusion model by KL-regularised RL (arXiv 2406.12120, ICLR 2025; zhaoyl18/CTRL).

The idea: keep a pre-trained sampler, pay it ln p(y|x) for its last state and charge the KL to what it was. The optimum
needs no search: a backward recursion tilts every step, and the tilted sampler draws exactly from the posterior.

    maximise  E [ gamma ln p(y|x_0) ] - alpha sum_t E KL(pi_t || p_t) - alpha KL(pi_T || p_T)
    V_0 = (gamma/alpha) ln p(y|x_0),   V_t(x_t) = ln sum_x p_t(x|x_t) exp V_{t-1}(x)
    pi_t(x|x_t) = p_t(x|x_t) exp(V_{t-1}(x) - V_t(x_t)),   pi_T = p_T exp(V_T) / Z
    law of x_0     p(x_0) p(y|x_0)^(gamma/alpha) / Z;   optimal value alpha ln Z

gamma = alpha gives Bayes' posterior. If the initial law p_T is kept as it was, the law of x_0 is biased, unless T is so
long that x_T says nothing about x_0. With normal steps KL = |mu_pi - mu_p|^2 / (2 sigma^2), and the tilt is the
guidance sigma^2 grad V. Replace "denoising step" by "token": `kernels` may be rectangular, from
prefixes to longer prefixes.

Shapes: S states, T steps; kernels [S_t, S_{t-1}] with rows "from", in the order in which they are run, noise first;
reward [S_0] and values in nats. gamma and alpha only enter the law of x_0 by their ratio.

Where the released code departs: the KL of a step is the *mean* over latent dimensions, so that the alpha that acts is
w_kl / (w_r dimensions) (`released_alpha`); both sides of it are guided predictions (classifier-free, weight 7.5); the
reward is ln(p + 1e-6) (`log_label(..., floor=1e-6)`); KL is 0 where DDIM's eta is 0; gradients reach back a random
number of steps; and the initial law is not tilted, since it is the sampler's fixed normal noise [inferred].

The demonstration is the exact one on a line, as in the card [independent re-run]; its bumps and its label are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from ..errors import UserError
from ._checks import positive
from .maxent_statmech import entropy, kl

Array = NDArray[np.float64]


def _stochastic(name: str, values: ArrayLike, ndim: int) -> Array:
    p = np.asarray(values, dtype=float)
    if p.ndim != ndim or not p.size or not np.isfinite(p).all():
        raise UserError(f"{name} must be a finite array of {ndim} dimensions, and must not be empty")
    if (p < 0).any() or np.abs(p.sum(-1) - 1).max() > 1e-6:
        raise UserError(f"{name} must hold probabilities that sum to 1 along the last axis")
    return p


# The pre-trained sampler


def forward_laws(data: ArrayLike, noising: ArrayLike, steps: int) -> list[Array]:
    """Laws of x_0, x_1, ..., x_T under the noising kernel [S, S], whose rows are "from"."""
    p, q = _stochastic("data", data, 1), _stochastic("noising", noising, 2)
    if q.shape != (len(p), len(p)):
        raise UserError(f"noising must have shape {(len(p), len(p))}, not {q.shape}")
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    laws = [p]
    for _ in range(steps):
        laws.append(laws[-1] @ q)
    return laws


def reverse_kernels(data: ArrayLike, noising: ArrayLike, steps: int) -> tuple[Array, list[Array]]:
    """The initial law p_T [S] and the exact reverse kernels by Bayes' rule, noise first: T arrays [S, S]."""
    laws, q = forward_laws(data, noising, steps), np.asarray(noising, dtype=float)
    if min(law.min() for law in laws[1:]) <= 0:
        raise UserError("noising must reach every state, or the reverse step from it is undefined")
    kernels = [laws[t][None] * q.T / laws[t + 1][:, None] for t in reversed(range(steps))]
    return laws[-1], kernels


def run(initial: ArrayLike, kernels: Sequence[Array]) -> Array:
    """The law of the last state."""
    law = _stochastic("initial", initial, 1)
    for kernel in kernels:
        law = law @ kernel
    return law


# Soft-optimal control


@dataclass(frozen=True)
class Controlled:
    """The optimum: values [V_0, ..., V_T], tilted kernels in the order of a run, tilted initial law, ln Z."""

    values: list[Array]
    kernels: list[Array]
    initial: Array
    log_partition: float


def soft_control(
    initial: ArrayLike, kernels: Sequence[ArrayLike], reward: ArrayLike, alpha: float = 1.0, gamma: float = 1.0
) -> Controlled:
    """The backward recursion. A reward of -inf forbids a last state; one must remain possible.

    A kernel's row that leads to forbidden states only is kept as it was: the tilted sampler never gets there.
    """
    positive(alpha=alpha, gamma=gamma)
    start = _stochastic("initial", initial, 1)
    steps = [_stochastic("kernels", kernel, 2) for kernel in kernels]
    value = np.asarray(reward, dtype=float) * (gamma / alpha)
    sizes = [len(start), *(kernel.shape[1] for kernel in steps)]
    if [len(kernel) for kernel in steps] != sizes[:-1] or value.shape != (sizes[-1],):
        raise UserError(f"kernels and reward must fit together: the states of a run are {sizes}, reward {value.shape}")
    if np.isnan(value).any() or (value == math.inf).any():
        raise UserError("reward must be finite, or -inf where a state is forbidden")
    values, tilted = [value], []
    with np.errstate(divide="ignore", invalid="ignore"):
        for kernel in reversed(steps):
            joint = np.log(kernel) + values[-1]
            value = logsumexp(joint, axis=1)
            tilted.append(np.where(np.isneginf(value)[:, None], kernel, np.exp(joint - value[:, None])))
            values.append(value)
        joint = np.log(start) + values[-1]
    log_z = float(logsumexp(joint))
    if log_z == -math.inf:
        raise UserError("reward must allow a state that the sampler can reach")
    return Controlled(values, tilted[::-1], np.exp(joint - log_z), log_z)


def tilted_target(law: ArrayLike, reward: ArrayLike, alpha: float = 1.0, gamma: float = 1.0) -> Array:
    """law exp(gamma r / alpha) / Z: what the controlled sampler must draw from."""
    return soft_control(law, [], reward, alpha, gamma).initial


def objective(
    policy: tuple[ArrayLike, Sequence[ArrayLike]],
    pretrained: tuple[ArrayLike, Sequence[ArrayLike]],
    reward: ArrayLike,
    alpha: float = 1.0,
    gamma: float = 1.0,
) -> float:
    """What is maximised, for any policy given as (initial law, kernels); at the optimum alpha ln Z."""
    positive(alpha=alpha, gamma=gamma)
    if len(policy[1]) != len(pretrained[1]):
        raise UserError(f"policy must have the {len(pretrained[1])} kernels of the other, not {len(policy[1])}")
    law, base = _stochastic("policy", policy[0], 1), _stochastic("pretrained", pretrained[0], 1)
    cost = kl(law, base)
    for own, other in zip(policy[1], pretrained[1], strict=True):
        k, p = _stochastic("policy", own, 2), _stochastic("pretrained", other, 2)
        cost += float(sum(w * kl(a, b) for w, a, b in zip(law, k, p, strict=True) if w > 0))
        law = law @ k
    gained = np.where(law > 0, np.asarray(reward, dtype=float), 0.0)
    return float(gamma * law @ gained - alpha * cost)


def log_label(probability: ArrayLike, floor: float = 0.0) -> Array:
    """The reward ln(p(y|x) + floor); the release has a floor of 1e-6. Without one, p = 0 gives -inf."""
    p = np.asarray(probability, dtype=float)
    if not np.isfinite(p).all() or (p < 0).any() or (p > 1).any() or floor < 0:
        raise UserError("probability must lie between 0 and 1, and floor must not be negative")
    with np.errstate(divide="ignore"):
        found: Array = np.log(p + floor)
    return found


def gaussian_step_kl(mean: ArrayLike, base: ArrayLike, sigma: float, average: bool = False) -> float:
    """KL of two normal steps of equal spread, |mean - base|^2 / (2 sigma^2), in nats.

    With `average` the mean over dimensions in place of the sum; at sigma = 0 (DDIM with eta 0) it is 0: as released.
    """
    a, b = np.asarray(mean, dtype=float), np.asarray(base, dtype=float)
    if a.shape != b.shape or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("mean and base must be finite arrays of one shape")
    if not sigma >= 0:
        raise UserError(f"sigma must not be negative, and is {sigma}")
    if sigma == 0:
        return 0.0
    squares = (a - b) ** 2 / (2 * sigma**2)
    return float(squares.mean() if average else squares.sum())


def released_alpha(w_kl: float, w_reward: float, dimensions: int) -> float:
    """The alpha of the formulas that the released weights stand for, with gamma = 1."""
    positive(w_kl=w_kl, w_reward=w_reward, dimensions=dimensions)
    return w_kl / dimensions / w_reward


# The demonstration: three bumps on a line


@dataclass(frozen=True)
class Line:
    """A line of points with three bumps, a random walk as noise, and a label that becomes likely to the right."""

    points: int = 21
    steps: int = 12
    bumps: tuple[tuple[float, float], ...] = ((4.0, 0.45), (10.0, 0.35), (16.0, 0.2))
    width: float = 1.2
    edge: float = 12.0
    slope: float = 1.0
    reach: int = 2

    def data(self) -> Array:
        """p(x_0) [points]."""
        positive(points=self.points, width=self.width)
        x = np.arange(self.points)
        p = sum(weight * np.exp(-((x - centre) ** 2) / (2 * self.width**2)) for centre, weight in self.bumps)
        law: Array = np.asarray(p / np.sum(p), dtype=float)
        return law

    def noising(self) -> Array:
        """A walk by up to `reach` points to either side, all equally likely, held at the ends [points, points]."""
        positive(points=self.points, reach=self.reach)
        walk = np.zeros((self.points, self.points))
        for jump in range(-self.reach, self.reach + 1):
            goal = np.clip(np.arange(self.points) + jump, 0, self.points - 1)
            walk[np.arange(self.points), goal] += 1 / (2 * self.reach + 1)
        return walk

    def label(self) -> Array:
        """p(y = 1 | x) [points], a logistic step at `edge`."""
        positive(slope=self.slope)
        logistic: Array = 1 / (1 + np.exp(-self.slope * (np.arange(self.points) - self.edge)))
        return logistic


@dataclass(frozen=True)
class Outcome:
    """One alpha: laws with tilted and with kept start, and what they cost and bring, in nats."""

    alpha: float
    law: Array
    kept_start: Array
    kl_to_target: float
    kept_start_to_target: float
    kl_to_posterior: float
    entropy: float
    reward: float


def outcome(line: Line, alpha: float) -> Outcome:
    """Control the line's sampler with gamma = 1, with the initial law tilted and with it kept as it was."""
    data, reward = line.data(), log_label(line.label())
    initial, kernels = reverse_kernels(data, line.noising(), line.steps)
    best = soft_control(initial, kernels, reward, alpha)
    law, kept = run(best.initial, best.kernels), run(initial, best.kernels)
    target, posterior = tilted_target(data, reward, alpha), tilted_target(data, reward)
    return Outcome(
        alpha, law, kept, kl(law, target), kl(kept, target), kl(law, posterior), entropy(law), float(law @ reward)
    )
