r"""Information theory and statistical mechanics revisited (arXiv 1105.5662, 2011; J. Stat. Phys. 145, 385). No code.

The idea, after Jaynes: the least committed distribution that agrees with what you know is a re-weighting of a
reference, one multiplier for each thing known. Adding constraints one after another costs entropy in steps that add
up; how an average responds to its multiplier is its fluctuation; and a random step loses information, which is entropy
production.

    p = argmin KL(p||q)  s.t.  E_p f_k = F_k     p_i = q_i exp(-sum_k lambda_k f_k(i)) / Z(lambda)
    dual, convex         ln Z(lambda) + sum_k lambda_k F_k;     gradient F - E_p f,   Hessian Cov_p(f, f)
    response             dF_k / dlambda_l = -Cov_p(f_k, f_l)
    entropy              H(p) = ln Z + sum_k lambda_k F_k - E_p ln q
    nested constraints   KL(p2||q) = KL(p2||p1) + KL(p1||q)
    one constraint       with f = r and lambda = -1/beta:   p = q exp(r / beta) / Z,   dE_p r / d(1/beta) = Var_p r
    Markov step          KL(pK||pi) <= KL(p||pi),   sigma = sum_ij pi_i K_ij ln(pi_i K_ij / (pi_j K_ji)) >= 0
    paths (caliber)      K_ij = K0_ij exp(-mu J_ij) v_j / (rho v_i);   d<J>/dmu = -sum_t Cov(J_0, J_t)  (Green-Kubo)

Shapes: n states, K constraints: features [K, n], targets [K], q and p [n], kernels [n, n] with rows "from". Entropies
in nats, sigma in nats per step; lambda in nats per unit of f, with the sign of an energy: a *positive* multiplier
makes small f likely. v, rho: right eigenvector and largest eigenvalue of K0 exp(-mu J).

The formulas are standard results that the paper builds on [paper/derived]; its ion channel is not reproduced here, and
the trajectory version is written for a finite chain in discrete time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, rel_entr

from ..errors import UserError

Array = NDArray[np.float64]


def _array(name: str, values: ArrayLike, ndim: int) -> Array:
    found = np.asarray(values, dtype=float)
    if found.ndim != ndim or not found.size or not np.isfinite(found).all():
        raise UserError(f"{name} must be a finite array of {ndim} dimensions, and must not be empty")
    return found


def _distribution(name: str, values: ArrayLike) -> Array:
    p = _array(name, values, 1)
    if (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise UserError(f"{name} must be probabilities that sum to 1")
    normed: Array = p / p.sum()
    return normed


def _kernel(values: ArrayLike) -> Array:
    kernel = _array("kernel", values, 2)
    if kernel.shape[0] != kernel.shape[1] or (kernel < 0).any() or np.abs(kernel.sum(1) - 1).max() > 1e-6:
        raise UserError("kernel must be square with rows of probabilities that sum to 1")
    normed: Array = kernel / kernel.sum(1, keepdims=True)
    return normed


def entropy(p: ArrayLike) -> float:
    """-sum p ln p in nats; 0 ln 0 counts as 0."""
    return float(-rel_entr(_distribution("p", p), 1.0).sum())


def kl(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p||q) in nats; infinite where p has mass and q has none, which is its value and no error."""
    p, q = _distribution("p", p), _distribution("q", q)
    if p.shape != q.shape:
        raise UserError(f"q must have the {len(p)} states of p, not {len(q)}")
    return float(rel_entr(p, q).sum())


# Maximum entropy


@dataclass(frozen=True)
class MaxEnt:
    """The least committed distribution that meets the constraints."""

    p: Array
    multipliers: Array
    log_partition: float
    covariance: Array
    entropy: float
    kl_to_reference: float


def tilt(reference: ArrayLike, features: ArrayLike, multipliers: ArrayLike) -> tuple[Array, float]:
    """p = q exp(-lambda f) / Z and ln Z, without overflow; states that q excludes stay excluded."""
    q = _distribution("reference", reference)
    f, lam = _array("features", features, 2), _array("multipliers", multipliers, 1)
    if f.shape != (len(lam), len(q)):
        raise UserError(f"features must have shape {(len(lam), len(q))}, not {f.shape}")
    with np.errstate(divide="ignore"):
        weight = np.log(q) - lam @ f
    log_z = float(logsumexp(weight))
    return np.exp(weight - log_z), log_z


def soft_optimal(reference: ArrayLike, reward: ArrayLike, beta: float) -> Array:
    """argmax of E_p r - beta KL(p||q): q exp(r / beta) / Z, the case of one constraint with lambda = -1 / beta."""
    if not (math.isfinite(beta) and beta > 0):
        raise UserError(f"beta must be a positive number, not {beta}")
    r = _array("reward", reward, 1)
    return tilt(reference, (r - r.max())[None], [-1.0 / beta])[0]


def maximum_entropy(
    features: ArrayLike,
    targets: ArrayLike,
    reference: ArrayLike | None = None,
    tolerance: float = 1e-10,
    iterations: int = 200,
) -> MaxEnt:
    """Damped Newton on the multipliers; the reference is uniform unless given.

    Redundant constraints get the smallest multipliers. Raises UserError where the constraints cannot be met, which
    includes averages at the very end of their range: these need infinite multipliers.
    """
    f, target = _array("features", features, 2), _array("targets", targets, 1)
    q = np.full(f.shape[1], 1 / f.shape[1]) if reference is None else _distribution("reference", reference)
    if f.shape != (len(target), len(q)):
        raise UserError(f"features must have shape {(len(target), len(q))}, not {f.shape}")
    live = f[:, q > 0]
    constant = live.max(1) == live.min(1)
    if ((target <= live.min(1)) | (target >= live.max(1)))[~constant].any() or (np.abs(target - live.min(1)) > 1e-9)[
        constant
    ].any():
        raise UserError("targets must lie inside the range that their features take where the reference is positive")
    lam = _newton(f, target, q, tolerance, iterations)
    p, log_z = tilt(q, f, lam)
    return MaxEnt(p, lam, log_z, covariance(p, f), entropy(p), kl(p, q))


def covariance(p: ArrayLike, features: ArrayLike) -> Array:
    """Cov_p(f_k, f_l) [K, K]; minus the response of the averages to the multipliers."""
    p, f = _distribution("p", p), _array("features", features, 2)
    away = f - (f @ p)[:, None]
    found: Array = (away * p) @ away.T
    return found


def _newton(f: Array, target: Array, q: Array, tolerance: float, iterations: int) -> Array:
    lam = np.zeros(len(target))
    scale = np.maximum(1.0, np.abs(f).max(1))
    for _ in range(iterations):
        p, log_z = tilt(q, f, lam)
        gap = f @ p - target
        if (np.abs(gap) / scale).max() < tolerance:
            return lam
        step = np.linalg.lstsq(covariance(p, f), gap, rcond=1e-13)[0]
        dual, size = log_z + lam @ target, 1.0
        while size > 1e-8 and not tilt(q, f, lam + size * step)[1] + (lam + size * step) @ target <= (
            dual - 1e-4 * size * (gap @ step) + 1e-14 * abs(dual)
        ):
            size /= 2
        lam = lam + size * step
        if not np.isfinite(lam).all() or np.abs(lam * scale).max() > 1e6:
            break
    raise UserError("targets must be met by some distribution: no finite multipliers were found, they contradict")


def successive(features: ArrayLike, targets: ArrayLike, reference: ArrayLike | None = None) -> list[MaxEnt]:
    """The distributions with the first constraint, the first two, and so on."""
    f, target = _array("features", features, 2), _array("targets", targets, 1)
    return [maximum_entropy(f[:k], target[:k], reference) for k in range(1, len(target) + 1)]


def alternatives(fit: MaxEnt, features: ArrayLike, n: int, generator: np.random.Generator) -> Array:
    """n random distributions [n, states] with the same averages as `fit`, all with its support: the control.

    Each moves from the fit in a random direction that changes no average, to a random point before the first
    probability becomes negative.
    """
    f = _array("features", features, 2)
    rows = np.vstack([np.ones(f.shape[1]), f])
    kept = np.eye(f.shape[1]) - np.linalg.pinv(rows) @ rows
    found = []
    for _ in range(n):
        away = kept @ generator.standard_normal(f.shape[1])
        limit = (fit.p[away < 0] / -away[away < 0]).min()
        found.append(np.clip(fit.p + generator.uniform(0, 1) * limit * away, 0, None))
    return np.array(found)


# Information that a random step loses


def stationary(kernel: ArrayLike) -> Array:
    """The law that the kernel leaves as it is [n]. Raises UserError where it is not unique."""
    k = _kernel(kernel)
    n = len(k)
    system = np.vstack([k.T - np.eye(n), np.ones(n)])
    if np.linalg.matrix_rank(system[:-1], tol=1e-10) < n - 1:
        raise UserError("kernel must connect its states: it has more than one stationary law")
    pi: Array = np.clip(np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0], 0, None)
    normed: Array = pi / pi.sum()
    return normed


def entropy_production(kernel: ArrayLike) -> float:
    """sigma in nats per step in the stationary state: 0 exactly under detailed balance, infinite for a one-way step."""
    k = _kernel(kernel)
    flow = stationary(k)[:, None] * k
    return float(rel_entr(flow, flow.T).sum())


def relaxation(kernel: ArrayLike, start: ArrayLike, steps: int) -> Array:
    """KL to the stationary law before the first step and after each of the others, `steps` values in nats."""
    k, p = _kernel(kernel), _distribution("start", start)
    if len(p) != len(k) or steps < 1:
        raise UserError(f"start must have {len(k)} states, and steps must be at least 1")
    pi, found = stationary(k), []
    for _ in range(steps):
        found.append(kl(p, pi))
        p = p @ k
    return np.array(found)


def ring(n: int, forward: float, backward: float) -> Array:
    """A driven ring [n, n]: one step forward, one backward, or none. sigma = (a - b) ln(a / b)."""
    if n < 3 or min(forward, backward) <= 0 or forward + backward > 1:
        raise UserError("n must be at least 3, and forward and backward positive with a sum of at most 1")
    eye = np.eye(n)
    return forward * np.roll(eye, 1, 1) + backward * np.roll(eye, -1, 1) + (1 - forward - backward) * eye


# Paths


def _with_current(kernel: ArrayLike, current: ArrayLike) -> tuple[Array, Array]:
    k, j = _kernel(kernel), _array("current", current, 2)
    if j.shape != k.shape:
        raise UserError(f"current must have the shape {k.shape} of the kernel, not {j.shape}")
    return k, j


def tilted_chain(kernel: ArrayLike, current: ArrayLike, mu: float) -> tuple[Array, float]:
    """The chain of largest path entropy, relative to `kernel`, with its mean current: K [n, n] and ln rho."""
    k, j = _with_current(kernel, current)
    if not math.isfinite(mu):
        raise UserError(f"mu must be finite, not {mu}")
    weight = k * np.exp(-mu * j)
    values, vectors = np.linalg.eig(weight)
    top = int(np.argmax(values.real))
    rho, v = float(values[top].real), np.abs(vectors[:, top].real)
    return weight * v[None] / (rho * v[:, None]), math.log(rho)


def mean_current(kernel: ArrayLike, current: ArrayLike) -> float:
    """<J>, the stationary average of a current that each step carries."""
    k, j = _with_current(kernel, current)
    return float((stationary(k)[:, None] * k * j).sum())


def green_kubo(kernel: ArrayLike, current: ArrayLike) -> float:
    """Sum over all times of Cov(J_0, J_t), both signs of t: minus the response of <J> to mu."""
    k, j = _with_current(kernel, current)
    pi = stationary(k)
    away = j - mean_current(k, j)
    ahead, after = (k * away).sum(1), (pi[:, None] * k * away).sum(0)  # mean from a state, flow into a state
    later = np.linalg.solve(np.eye(len(pi)) - k + np.outer(np.ones(len(pi)), pi), ahead)
    return float((pi[:, None] * k * away**2).sum() + 2 * after @ later)
