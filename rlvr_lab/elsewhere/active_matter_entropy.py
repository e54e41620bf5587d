r"""Entropy production of a driven system from its score (Boffi and Vanden-Eijnden, arXiv 2309.12991).

Self-propelled particles are stationary without being in equilibrium: the density stands still, probability runs
round. How irreversible that is, in nats per unit of time, follows from drift and score; a network can learn the score.

    dz = b(z) dt + sqrt(2 D) dW          z [d], D [d, d] symmetric positive definite, stationary density rho
    s = grad log rho,  v = b - D s       score and velocity of the probability flow; current j = rho v
    div v + v . s = 0                    stationarity, at every point
    rate = E[v^T D^-1 v] >= 0            total entropy production (nats / time), 0 exactly under detailed balance
    E[div v] = 0                         entropy -E log rho is a state function: it does not change

Particle i owns v_i^T D_i^-1 v_i. Swimmers: dx = (v0 g - A x) dt (+ sqrt(2 eps) dW), dg = -gamma g dt +
sqrt(2 gamma) dW, and soft repulsion between neighbours. Without translational noise D is singular: v_x = b_x exactly,
and the maps use the divergence form below.

Losses: implicit score matching E[|s|^2 + 2 div s]; denoising with antithetic pairs z' = z + b dt +- sigma xi, where the
step of the simulator is the noise (sigma^2 = 2 D dt); penalties on stationarity. Each has its minimum at the score.

Linear ground truth, b = -M z: M S + S M^T = 2 D, s = -S^-1 z, v = (D S^-1 - M) z and
rate = tr(M^T D^-1 M S) - tr M; 2 w^2 for the rotating trap, v0^2 gamma / (eps (A + gamma)) for a trapped swimmer.

Code: github.com/nmboffi/active_pflows (2369074, jax). What it reports as "entropy" is, for orientations, the divergence
-gamma d - gamma div_g s_g and, for positions without noise, the divergence of the drift (`entropy_utils.py`), not the
rate above; forces may be smoothed by a softplus or discontinuous. The closed forms are derived here, not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError

Field = Callable[[Tensor], Tensor]
"""A vector field: points [..., d] to vectors [..., d], each point by itself."""
Penalty = Literal["mean_divergence", "mean_work", "pointwise"]


@dataclass(frozen=True)
class LinearProcess:
    """dz = -M z dt + sqrt(2 D) dW in its stationary state; score and velocity are z -> matrix z."""

    drift: Tensor
    """M [d, d]."""
    diffusion: Tensor
    """D [d, d]."""
    covariance: Tensor
    """S [d, d] of the stationary density N(0, S)."""
    score: Tensor
    """-S^-1 [d, d]."""
    velocity: Tensor
    """D S^-1 - M [d, d]; 0 under detailed balance."""
    rate: float
    """E[v^T D^-1 v] in nats per unit of time."""


def _matrix(name: str, value: Tensor) -> Tensor:
    square = isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == value.shape[1] and value.numel() > 0
    if not square or not bool(value.isfinite().all()):
        raise UserError(f"{name} must be a square matrix [d, d] of finite numbers")
    return value if value.is_floating_point() else value.double()


def _diffusion(value: Tensor, dimension: int) -> Tensor:
    matrix = _matrix("diffusion", value)
    if len(matrix) != dimension:
        raise UserError(f"diffusion must be [{dimension}, {dimension}] as the state is, not {list(matrix.shape)}")
    if not torch.allclose(matrix, matrix.T) or float(torch.linalg.eigvalsh(matrix)[0]) <= 0:
        raise UserError(
            "diffusion must be symmetric and positive definite; where a coordinate has no noise, take the divergence "
            "form (orientation_divergence) instead of the rate"
        )
    return matrix


def _same(name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or not one.ndim or not one.numel():
        raise UserError(f"{name} must agree in shape [..., d] and not be empty: {list(one.shape)}, {list(other.shape)}")
    if bool(one.isnan().any() or other.isnan().any()):
        raise UserError(f"{name} must not hold nan")


def linear_process(drift: Tensor, diffusion: Tensor) -> LinearProcess:
    """Closed form of the linear process with dz = -M z dt, M = `drift` [d, d]; refuses M that does not pull back."""
    m = _matrix("drift", drift)
    d = _diffusion(diffusion, len(m)).to(m.dtype)
    if float(torch.linalg.eigvals(m).real.min()) <= 0:
        raise UserError("drift must have eigenvalues of positive real part, else there is no stationary density")
    eye = torch.eye(len(m), dtype=m.dtype)
    lyapunov = torch.kron(m, eye) + torch.kron(eye, m)  # M S + S M^T, row by row
    covariance = torch.linalg.solve(lyapunov, (2 * d).reshape(-1)).reshape(m.shape)
    score = -torch.linalg.inv(covariance)
    velocity = -m - d @ score
    rate = float(torch.trace(velocity.T @ torch.linalg.inv(d) @ velocity @ covariance))
    return LinearProcess(m, d, covariance, score, velocity, rate)


def rate_by_trace(process: LinearProcess) -> float:
    """tr(M^T D^-1 M S) - tr M: the same rate without the score."""
    m = process.drift
    return float(torch.trace(m.T @ torch.linalg.inv(process.diffusion) @ m @ process.covariance) - torch.trace(m))


def rotating_trap(omega: float, pull: float = 1.0) -> tuple[Tensor, Tensor]:
    """M and D of a harmonic trap that is stirred at angular speed `omega`; the density is N(0, I / pull) for any."""
    if not pull > 0:
        raise UserError(f"pull must be positive, not {pull}")
    m = torch.tensor([[pull, -omega], [omega, pull]], dtype=torch.float64)
    return _matrix("omega", m), torch.eye(2, dtype=torch.float64)


def trapped_swimmer(speed: float, turning: float, pull: float, noise: float) -> tuple[Tensor, Tensor]:
    """M and D of one dimension (x, g) of a swimmer: v0 = speed, gamma = turning, A = pull, eps = noise > 0."""
    for name, value in (("turning", turning), ("pull", pull), ("noise", noise)):
        if not value > 0:
            raise UserError(f"{name} must be positive, not {value}")
    m = torch.tensor([[pull, -speed], [0.0, turning]], dtype=torch.float64)
    return _matrix("speed", m), torch.diag(torch.tensor([noise, turning], dtype=torch.float64))


def swimmer_rate(speed: float, turning: float, pull: float, noise: float) -> float:
    """v0^2 gamma / (eps (A + gamma)) nats per time and dimension: unbounded as the translational noise vanishes."""
    trapped_swimmer(speed, turning, pull, noise)  # the same refusals
    return speed**2 * turning / (noise * (pull + turning))


def probability_velocity(drift: Tensor, score: Tensor, diffusion: Tensor) -> Tensor:
    """v = b - D s at points: drift and score [..., d], diffusion [d, d]."""
    _same("drift and score", drift, score)
    matrix = _diffusion(diffusion, drift.shape[-1]).to(drift.dtype)
    return drift - score @ matrix


def entropy_production(velocity: Tensor, diffusion: Tensor, particles: int = 1) -> Tensor:
    """v_i^T D_i^-1 v_i [..., particles]: what each particle produces. Coordinates of a particle are neighbours.

    The mean over points, summed over particles, is the rate. Refuses a diffusion that couples particles.
    """
    _same("velocity", velocity, velocity)
    d = velocity.shape[-1]
    matrix = _diffusion(diffusion, d).to(velocity.dtype)
    if particles < 1 or d % particles:
        raise UserError(f"particles must divide the {d} coordinates, not {particles}")
    owner = torch.arange(d) // (d // particles)
    if bool(matrix[owner[:, None] != owner[None]].ne(0).any()):
        raise UserError("diffusion couples coordinates of different particles, so that none owns its part")
    each: Tensor = velocity * torch.linalg.solve(matrix, velocity.unsqueeze(-1)).squeeze(-1)
    return each.reshape(*velocity.shape[:-1], particles, d // particles).sum(-1)


def divergence(field: Field, points: Tensor) -> Tensor:
    """div f [...] at points [..., d], exact, one backward pass per coordinate; can be trained through."""
    z = points if points.requires_grad else points.detach().requires_grad_()
    value = field(z)
    _same("points and field(points)", points, value)
    if not value.requires_grad:
        return torch.zeros(value.shape[:-1], dtype=value.dtype)  # a constant field
    total = torch.zeros(value.shape[:-1], dtype=value.dtype)
    for i in range(z.shape[-1]):
        (slope,) = torch.autograd.grad(value[..., i].sum(), z, create_graph=True, allow_unused=True)
        total = total + (slope[..., i] if slope is not None else 0.0)
    return total


def balance(velocity: Field, score: Field, points: Tensor) -> tuple[Tensor, Tensor]:
    """(div v, v . s) at points, each [...]; their sum vanishes where the density is stationary."""
    return divergence(velocity, points), (velocity(points) * score(points)).sum(-1)


def stationarity_penalty(div_v: Tensor, v_dot_s: Tensor, kind: Penalty = "pointwise") -> Tensor:
    """(E div v)^2, (E v.s)^2 or E(div v + v.s)^2 of values [...]; only the last sees more than a mean."""
    _same("div_v and v_dot_s", div_v, v_dot_s)
    if kind not in get_args(Penalty):
        raise UserError(f"kind must be one of {', '.join(get_args(Penalty))}, not '{kind}'")
    if kind == "pointwise":
        return (div_v + v_dot_s).square().mean()
    return (div_v if kind == "mean_divergence" else v_dot_s).mean().square()


def implicit_loss(score: Field, points: Tensor) -> Tensor:
    """E[|s|^2 + 2 div s]: its minimum over s is -E|grad log rho|^2 at the score, with nothing but samples."""
    return (score(points).square().sum(-1) + 2 * divergence(score, points)).mean()


def antithetic_loss(
    score: Field, points: Tensor, sigma: float, generator: torch.Generator, step: Tensor | None = None
) -> Tensor:
    """E[1/2 sum over +- of |s(z')|^2 +- 2 s(z').xi / sigma] with z' = z + step +- sigma xi, points [..., d].

    `step` is drift times dt, as in the paper, where sigma^2 = 2 D dt; None denoises around the points themselves, which
    learns the score of a density that is wider by sigma^2. Without the pairs the term in xi / sigma has a variance of
    order 1 / sigma^2.
    """
    if not sigma > 0:
        raise UserError(f"sigma must be positive, not {sigma}")
    _same("points and step", points, points if step is None else step)
    centre = points if step is None else points + step
    xi = torch.randn(points.shape, generator=generator, dtype=points.dtype)
    up, down = score(centre + sigma * xi), score(centre - sigma * xi)
    return (0.5 * (up.square() + down.square()) + (up - down) * xi / sigma).sum(-1).mean()


def orientation_divergence(score_divergence: Tensor, turning: float, dimension: int) -> Tensor:
    """div_g v_g = -gamma d - gamma div_g s_g [...]: what the release maps as entropy of the orientations."""
    if not turning > 0 or dimension < 1:
        raise UserError(f"turning and dimension must be positive, not {turning} and {dimension}")
    return -turning * dimension - turning * score_divergence
