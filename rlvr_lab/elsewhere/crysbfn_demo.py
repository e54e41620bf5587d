"""The demonstration of CrysBFN: what the concentration of a belief tells that the number of the step does not.

No network is trained. On a grid of the circle both posteriors of the datum are exact, but for sampled concentrations:

    p(x | m, c) ~ p(x) exp(c cos(x - m)),      p(x | m, step i) ~ p(x) f_i(m - x),   f_i(d) = E_{c | i} VM(d | 0, c),

because given x the mean of a belief of concentration c is distributed as VM(x, c). The expected difference of the
log-losses is the information I(x; c | m, step), in nats: what a perfect network loses that is told only the clock.

Control: with ten steps c hardly varies given the step, and nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ..errors import UserError
from .crysbfn import FLAT, Array, Predict, accuracy_schedule, flow


@dataclass(frozen=True)
class Settings:
    """Three bumps on a circle, a schedule, and the numbers of updates after which the posteriors are compared."""

    steps: int = 1000
    final: float = 1000.0
    updates: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320, 640)
    centres: tuple[float, ...] = (-2.0, 0.4, 1.6)
    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    concentration: float = 40.0
    grid: int = 360
    draws: int = 3000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.updates or not all(1 <= update <= self.steps for update in self.updates):
            raise UserError(f"updates must be numbers from 1 to steps ({self.steps}), got {self.updates}")
        if len(self.centres) != len(self.weights) or min(self.weights, default=0) <= 0:
            raise UserError("centres and weights must be of one length, and the weights above 0")
        if self.grid < 60 or self.draws < 2:
            raise UserError("grid must be at least 60 and draws at least 2")


def rising_share(alphas: Array, draws: int, rng: np.random.Generator) -> Array:
    """Share of updates that raise the entropy of the belief, [steps]; the first, from the flat prior, never does."""
    _, c = flow(np.zeros(draws), alphas, rng)
    return np.concatenate([[0.0], (np.diff(c, axis=-1) < 0).mean(0)])


def rising_share_gaussian(alphas: Array) -> Array:
    """The same for a Gaussian belief, whose precision is the sum of the accuracies whatever is observed: always 0."""
    precision = np.concatenate([[0.0], np.cumsum(alphas)])
    return (np.diff(precision) < 0).astype(float)


def ring(settings: Settings) -> tuple[Array, Array]:
    """Angles of the grid and the logarithm of the probability of each."""
    x = -np.pi + 2 * np.pi * np.arange(settings.grid) / settings.grid
    waves = settings.concentration * (np.cos(x[:, None] - np.array(settings.centres)) - 1)
    log_p = special.logsumexp(waves, axis=1, b=np.array(settings.weights))
    return x, log_p - special.logsumexp(log_p)


def log_mean_density(c: Array, offsets: Array) -> Array:
    """ln f_i at the offsets: the logarithm of the mean of VM(d | 0, c) over the concentrations of one step."""
    log_density = c * (np.cos(offsets[:, None]) - 1) - np.log(special.i0e(c)) - FLAT
    return np.asarray(special.logsumexp(log_density, axis=1) - np.log(len(c)))


def _log_loss(log_p: Array, log_likelihood: Array, true: NDArray[np.int64]) -> Array:
    joint = log_p + log_likelihood
    return np.asarray(special.logsumexp(joint, axis=1) - joint[np.arange(len(true)), true])


@dataclass(frozen=True)
class Gap:
    """Mean log-losses (nats) of both posteriors after each number of updates, and the mean difference per draw."""

    updates: tuple[int, ...]
    told_concentration: Array
    told_step: Array
    spread: Array
    """Standard deviation of c over its mean, given the step."""

    @property
    def gap(self) -> Array:
        """What is lost by being told the step in place of the concentration, in nats."""
        return self.told_step - self.told_concentration


def oracle_gap(settings: Settings) -> Gap:
    """Compare both posteriors on fresh data from the ring; the densities f_i come from other draws than the losses."""
    rng = np.random.default_rng(settings.seed)
    x, log_p = ring(settings)
    alphas = accuracy_schedule(settings.steps, settings.final)[: max(settings.updates)]
    _, other_c = flow(np.zeros(settings.draws), alphas, rng)
    true = rng.choice(settings.grid, settings.draws, p=np.exp(log_p))
    m, c = flow(x[true], alphas, rng)
    fine = np.linspace(0, np.pi, 1500)
    told_c, told_i, spread = [], [], []
    for i in np.array(settings.updates) - 1:
        off = m[:, i, None] - x
        told_c.append(_log_loss(log_p, c[:, i, None] * np.cos(off), true).mean())
        folded = np.abs(np.angle(np.exp(1j * off)))
        table = log_mean_density(other_c[:, i], fine)
        told_i.append(_log_loss(log_p, np.interp(folded, fine, table), true).mean())
        spread.append(c[:, i].std() / c[:, i].mean())
    return Gap(settings.updates, np.array(told_c), np.array(told_i), np.array(spread))


def exact_network(settings: Settings) -> Predict:
    """What a perfectly trained network answers: the circular mean of p(x | m, c), which minimises the loss 1 - cos."""
    x, log_p = ring(settings)
    cosine, sine = np.cos(x), np.sin(x)

    def predict(m: Array, c: Array, step: int) -> Array:
        joint = log_p + np.outer(c * np.cos(m), cosine) + np.outer(c * np.sin(m), sine)
        weights = np.exp(joint - joint.max(1, keepdims=True))
        return np.asarray(np.arctan2(weights @ sine, weights @ cosine))

    return predict


def shares_and_widths(x: Array, settings: Settings) -> tuple[Array, Array]:
    """Share of the samples nearest to each bump, and their standard deviation about its centre, [bumps] each."""
    off = np.angle(np.exp(1j * (np.asarray(x)[:, None] - np.array(settings.centres))))
    nearest = np.abs(off).argmin(1)
    counts = np.bincount(nearest, minlength=len(settings.centres))
    squares = np.bincount(nearest, off[np.arange(len(off)), nearest] ** 2, minlength=len(counts))
    return counts / len(off), np.sqrt(squares / np.maximum(counts, 1))
