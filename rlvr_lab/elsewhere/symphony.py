r"""Symphony: weak actions in small bounded noise, instead of strong actions in loud noise (arXiv 2512.10477).

The actor has three outputs per action dimension, (A, S, B) = tanh(net / 2), with scale S = |.| and beta B = |.| clamped
to [1e-3, 1 - 1e-3]. Shapes [..., D], natural logarithms.

    a = a_max tanh(S A + N),   N = clip(xi, -e, e) / e,  xi ~ N(0, I)
    swaddling = Omega(S^(1 / sg B)) + B S log S + Omega(B^2),   Omega(x) = log((1 + x) / (1 - x)),  sg: no gradient
    q = sum_k w_k sort(atoms)_k,   w_k ~ tanh((pi (1 - k / Q))^e): a soft minimum, k = 0 .. Q - 1 from the lowest
    ReHSE(x) = mean x tanh(x / 2),   ReHAE(x) = mean |x| tanh(x / 2), which is odd: a signed advantage
    b = phi b_prev + (1 - phi) sg q',  phi = (sqrt 5 - 1) / 2        b_prev: last step's batch mean of b
    L = -ReHAE((q' - b) / |b|) + ReHSE(atoms - (r + gamma (1 - d) sg q')) + swaddling(S', B')
    replay: transition i of n, 0 the oldest, is drawn with probability ~ tanh((pi i / n)^e)

Swaddling alone comes to rest where both derivatives vanish. While S^(1/B) is negligible that is S = 1/e, B = 1/(4e);
`rest_point` solves the complete equations, which give S = .3637.

Card: papers/symphony.md. Code compared: SuspensionRailway/symphony @ 939a9f3 (symphony.py). The release divides by |b|
without a floor, which breaks near a value of 0; here `floor` (1e-3) is added, 0 is the release.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from ..errors import UserError

LEAST, MOST = 1e-3, 1 - 1e-3
PHI = (math.sqrt(5) - 1) / 2


def _finite(values: Tensor, name: str) -> Tensor:
    if not values.numel() or not torch.isfinite(values).all():
        raise UserError(f"{name} must be finite and not empty")
    return values


def _inside(values: Tensor, name: str) -> Tensor:
    if not bool(((_finite(values, name) > 0) & (values < 1)).all()):
        raise UserError(f"{name} must lie inside (0, 1); the method clamps it to [{LEAST}, {MOST}]")
    return values


def heads(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Network output [..., 3 D] as (A, S, B), each [..., D]: A in (-1, 1), scale and beta in [1e-3, 1 - 1e-3]."""
    if output.ndim < 1 or output.shape[-1] % 3 or not output.shape[-1]:
        raise UserError(f"output must hold three numbers for each action dimension, not {tuple(output.shape)}")
    action, scale, beta = torch.tanh(output / 2).chunk(3, -1)
    return action, scale.abs().clamp(LEAST, MOST), beta.abs().clamp(LEAST, MOST)


def bounded_noise(normal: Tensor, loudness: float = 1.0) -> Tensor:
    """N = clip(xi, -e, e) / e of standard normal draws; `loudness` is a factor of our own, 1 in the method."""
    if not loudness >= 0:
        raise UserError(f"loudness must not be negative, not {loudness}")
    return loudness * normal.clamp(-math.e, math.e) / math.e


def omega(x: Tensor) -> Tensor:
    """log((1 + x) / (1 - x)), about 2 x for small x."""
    return torch.log1p(x) - torch.log1p(-x)


def swaddling_terms(scale: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms element by element: wall near S = 1, entropy-like well, pull on beta. Raises UserError outside
    (0, 1)."""
    if scale.shape != beta.shape:
        raise UserError(f"beta must have the shape of scale {tuple(scale.shape)}, not {tuple(beta.shape)}")
    scale, beta = _inside(scale, "scale"), _inside(beta, "beta")
    return omega(scale ** (1 / beta.detach())), beta * scale * scale.log(), omega(beta.square())


def swaddling(scale: Tensor, beta: Tensor) -> Tensor:
    """The regulariser: mean of the sum of its terms over batch and action dimensions."""
    wall, well, pull = swaddling_terms(scale, beta)
    return (wall + well + pull).mean()


def swaddling_slopes(scale: float, beta: float) -> tuple[float, float]:
    """Derivatives of one element with respect to scale and to beta, with the stop-gradient in the exponent."""
    if not (0 < scale < 1 and 0 < beta < 1):
        raise UserError(f"scale and beta must lie inside (0, 1), not {scale}, {beta}")
    power = math.exp(math.log(scale) / beta)
    wall = 2 / (1 - power**2) * power / (beta * scale)
    return wall + beta * (math.log(scale) + 1), scale * math.log(scale) + 4 * beta / (1 - beta**4)


def rest_beta(scale: float) -> float:
    """The beta at which swaddling stops pulling for a given scale; about -S log S / 4."""
    return float(brentq(lambda beta: swaddling_slopes(scale, beta)[1], 1e-9, 0.9, xtol=1e-14))


def rest_point() -> tuple[float, float]:
    """Scale and beta at which both derivatives of swaddling vanish, to rounding."""
    scale = float(brentq(lambda s: swaddling_slopes(s, rest_beta(s))[0], 0.05, 0.95, xtol=1e-14))
    return scale, rest_beta(scale)


def descend(scale: float, beta: float, steps: int = 4000, rate: float = 0.05) -> np.ndarray:
    """Path [steps + 1, 2] of (scale, beta) under plain gradient descent on swaddling alone, with the clamps."""
    if steps < 0 or not rate > 0:
        raise UserError(f"steps must not be negative and rate be positive, not {steps}, {rate}")
    path = [(scale, beta)]
    for _ in range(steps):
        slopes = swaddling_slopes(*path[-1])
        scale, beta = (value - rate * slope for value, slope in zip(path[-1], slopes, strict=True))
        path.append((min(max(scale, LEAST), MOST), min(max(beta, LEAST), MOST)))
    return np.array(path)


def rehse(errors: Tensor) -> Tensor:
    """mean x tanh(x / 2): quadratic for small errors, absolute for large ones."""
    return (_finite(errors, "errors") * torch.tanh(errors / 2)).mean()


def rehae(advantages: Tensor) -> Tensor:
    """mean |x| tanh(x / 2): as `rehse`, with the sign of x."""
    return (_finite(advantages, "advantages").abs() * torch.tanh(advantages / 2)).mean()


def _ramp(count: int) -> Tensor:
    """tanh((pi i / n)^e), i = 0 .. n - 1."""
    if count < 2:
        raise UserError(f"count must be at least 2, not {count}")
    return torch.tanh((math.pi * torch.arange(count, dtype=torch.float64) / count) ** math.e)


def atom_weights(count: int) -> Tensor:
    """Weights [Q] of the sorted atoms, the lowest first; the highest get least."""
    if count < 2:
        raise UserError(f"count must be at least 2, not {count}")
    weights = torch.tanh((math.pi * (1 - torch.arange(count, dtype=torch.float64) / count)) ** math.e)
    return weights / weights.sum()


def soft_value(atoms: Tensor) -> Tensor:
    """Value [...] of atoms [..., Q]: a weighted mean of the sorted atoms that drops the optimistic tail."""
    if atoms.ndim < 1 or atoms.shape[-1] < 2:
        raise UserError(f"atoms must have shape [..., Q] with Q of at least 2, not {tuple(atoms.shape)}")
    return (_finite(atoms, "atoms").sort(-1).values * atom_weights(atoms.shape[-1]).to(atoms)).sum(-1)


def fading_probabilities(count: int) -> Tensor:
    """Probability [n] of each transition in the replay buffer, the oldest first; the oldest is never drawn."""
    weights = _ramp(count)
    return weights / weights.sum()


def temporal_advantage(value: Tensor, previous: Tensor, floor: float = 1e-3) -> tuple[Tensor, Tensor]:
    """(q' - b) / (|b| + floor), and b = phi b_prev + (1 - phi) sg q'. `previous` broadcasts against `value`.

    Since b holds a share of the value, the numerator has the size phi (q' - b_prev), and the whole gradient of q'.
    """
    if not floor >= 0:
        raise UserError(f"floor must not be negative, not {floor}")
    base = PHI * previous + (1 - PHI) * value.detach()
    return (value - base) / (base.abs() + floor), base


def squashed_entropy_change(signal: Tensor, nodes: int = 2001) -> Tensor:
    """Entropy that tanh takes from the noise, E log(1 - tanh(signal + N)^2), nats per dimension, of any shape.

    The noise is the same for every signal, so this is what a stronger signal costs. At most 0. By quadrature of the
    normal density over the clipped range, with the two masses of the clip at -1 and 1; because of these the entropies
    before and after are not defined as those of densities, while their difference is.
    """
    x = torch.linspace(-math.e, math.e, nodes, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    mass = density * (x[1] - x[0])
    mass[[0, -1]] /= 2
    mass[[0, -1]] += 0.5 * math.erfc(math.e / math.sqrt(2))
    mass = mass / mass.sum()
    place = _finite(signal, "signal").double()[..., None] + x / math.e
    log_slope = -2 * (place.abs() + torch.nn.functional.softplus(-2 * place.abs()) - math.log(2))
    return (mass * log_slope).sum(-1)
