r"""Physics-informed networks in a moving frame (Mojgani, Balajewicz and Hassanzadeh, arXiv 2205.02902).

A network that is trained on the residual of a transport equation gets stuck as the speed grows. The authors' reason: no
few basis functions span the solution at all times (Kolmogorov n-width). Along characteristics it hardly moves, so that
one network holds the state there and one the characteristic.

    Eulerian      u_t + c u_x = nu u_xx,                                   c = c(u, x, t)
    Lagrangian    R_X = X_t - c = 0,  R_u = u_t - nu u_XX = 0              label x: place at t = 0
                  X(x, 0) = x,  u(x, 0) = u0(x)
    u_XX          (u_x / X_x)_x / X_x = (u_xx X_x - u_x X_xx) / X_x^3      along the place, not the label
    loss          gamma_X |R_X| + gamma_u |R_u| + gamma_0 (|X(x, 0) - x| + |u(x, 0) - u0|)

All arrays are values at collocation points [...]. Norms are Frobenius norms, not squared, in paper and release;
`norm="mean_square"` is what the demonstration minimises.

How hard a frame is shows in its snapshots u(x_i, t_j) [space, time]: with singular values s and p = s^2 / sum s^2, the
spectral entropy is -sum p ln p (nats), the effective rank its exponential, and sqrt(sum_{j > k} p_j) the relative error
of the best k functions.

Code: github.com/rmojgani/LPINNs (431b40e, no licence file). It departs from the text: diffusion is the second
derivative in the *label* (`coordinate="label"`), which is right where X_x = 1 and wrong for Burgers; both networks
share layers, and all deeper layers reuse one matrix. The method ends where characteristics cross (X_x = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.entropy import entropy_of_log
from ..errors import UserError

Coordinate = Literal["place", "label"]
Norm = Literal["frobenius", "mean_square"]
Solution = Callable[[Tensor, Tensor], Tensor]
"""(x, t) of one shape to values of that shape, each point by itself."""


def _same(**arrays: Tensor) -> None:
    shapes = {name: tuple(value.shape) for name, value in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"all of these must have one shape: {shapes}")
    for name, value in arrays.items():
        if not value.numel() or bool(value.isnan().any()):
            raise UserError(f"{name} must not be empty or hold nan")


def _viscosity(nu: float) -> None:
    if not (nu >= 0 and math.isfinite(nu)):
        raise UserError(f"nu must be 0 or positive, not {nu}")


def eulerian_residual(u_t: Tensor, u_x: Tensor, u_xx: Tensor, speed: Tensor, nu: float = 0.0) -> Tensor:
    """u_t + c u_x - nu u_xx [...] at fixed places; `speed` is c(u, x, t) at the points (u itself for Burgers)."""
    _same(u_t=u_t, u_x=u_x, u_xx=u_xx, speed=speed)
    _viscosity(nu)
    return u_t + speed * u_x - nu * u_xx


def second_derivative(u_x: Tensor, u_xx: Tensor, place_x: Tensor, place_xx: Tensor) -> Tensor:
    """u_XX [...] from derivatives in the label: (u_xx X_x - u_x X_xx) / X_x^3.

    Refuses X_x <= 0: characteristics have crossed there, and the state has two values at one place.
    """
    _same(u_x=u_x, u_xx=u_xx, place_x=place_x, place_xx=place_xx)
    if float(place_x.detach().min()) <= 0:
        raise UserError("place_x must be positive: where X_x reaches 0 characteristics cross and the frame ends")
    return (u_xx * place_x - u_x * place_xx) / place_x**3


def lagrangian_residuals(
    u_t: Tensor,
    u_x: Tensor,
    u_xx: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    speed: Tensor,
    nu: float = 0.0,
    coordinate: Coordinate = "place",
) -> tuple[Tensor, Tensor]:
    """(R_X, R_u) [...] along characteristics, all derivatives in (label, t); `place` is (X_t, X_x, X_xx).

    `coordinate="label"` is the release's diffusion, nu u_xx. Without viscosity both are u_t, and X_x plays no part.
    """
    place_t, place_x, place_xx = place
    _same(u_t=u_t, u_x=u_x, u_xx=u_xx, place_t=place_t, place_x=place_x, place_xx=place_xx, speed=speed)
    _viscosity(nu)
    if coordinate not in get_args(Coordinate):
        raise UserError(f"coordinate must be 'place' or 'label', not '{coordinate}'")
    curvature = u_xx if coordinate == "label" or nu == 0 else second_derivative(u_x, u_xx, place_x, place_xx)
    return place_t - speed, u_t - nu * curvature


def size(residual: Tensor, norm: Norm = "frobenius") -> Tensor:
    """How large a residual [...] is: its Frobenius norm, or the mean of its square."""
    _same(residual=residual)
    if norm not in get_args(Norm):
        raise UserError(f"norm must be 'frobenius' or 'mean_square', not '{norm}'")
    # the norm itself, not the root of the sum of squares: its gradient at 0 is 0 instead of nan
    return torch.linalg.vector_norm(residual) if norm == "frobenius" else residual.square().mean()


def eulerian_loss(residual: Tensor, start: Tensor, weight: float = 100.0, norm: Norm = "mean_square") -> Tensor:
    """Size of the residual plus `weight` times that of `start` = u(x, 0) - u0(x)."""
    _weights(weight=weight)
    return size(residual, norm) + weight * size(start, norm)


def lagrangian_loss(
    residuals: tuple[Tensor, Tensor],
    starts: tuple[Tensor, Tensor],
    weights: tuple[float, float, float] = (10.0, 1.0, 1000.0),
    norm: Norm = "frobenius",
) -> Tensor:
    """gamma_X |R_X| + gamma_u |R_u| + gamma_0 (|X(x, 0) - x| + |u(x, 0) - u0(x)|); the weights are the paper's."""
    gamma_x, gamma_u, gamma_0 = weights
    _weights(gamma_x=gamma_x, gamma_u=gamma_u, gamma_0=gamma_0)
    (r_place, r_state), (start_place, start_state) = residuals, starts
    start = size(start_place, norm) + size(start_state, norm)
    return gamma_x * size(r_place, norm) + gamma_u * size(r_state, norm) + gamma_0 * start


def _weights(**named: float) -> None:
    for name, value in named.items():
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{name} must be 0 or positive, not {value}")


def derivatives(field: Solution, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(f, f_t, f_x, f_xx) at points of one shape, by two backward passes; can be trained through."""
    _same(x=x, t=t)
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    f = field(x, t)
    _same(x=x, field=f)
    f_x, f_t = _gradient(f, x), _gradient(f, t)
    return f, f_t, f_x, _gradient(f_x, x)


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if slope is None else slope


def snapshots(profile: Callable[[Tensor], Tensor], speed: float, places: int = 128, times: int = 50) -> Tensor:
    """u(x_i, t_j) = profile(x_i - c t_j) [places, times] over one period and t in [0, 1], float64."""
    if places < 2 or times < 2 or not math.isfinite(speed):
        raise UserError(f"places and times must be at least 2 and speed finite, not {places}, {times} and {speed}")
    x = torch.arange(places, dtype=torch.float64) * (2 * math.pi / places)
    t = torch.linspace(0, 1, times, dtype=torch.float64)
    return profile(torch.remainder(x[:, None] - speed * t, 2 * math.pi))


def bump(x: Tensor, width: float = 0.21) -> Tensor:
    """A periodic bump exp((cos(x - pi) - 1) / width^2) [...]: near its top a Gaussian of that width."""
    if not width > 0:
        raise UserError(f"width must be positive, not {width}")
    return torch.exp((torch.cos(x - math.pi) - 1) / width**2)


def energy_shares(snapshots_XT: Tensor) -> Tensor:
    """p = s^2 / sum s^2 [min(X, T)], largest first; refuses a matrix that is zero, empty or not finite."""
    if snapshots_XT.ndim != 2 or not snapshots_XT.numel() or not bool(snapshots_XT.isfinite().all()):
        raise UserError("snapshots_XT must be a matrix [space, time] of finite numbers, and not empty")
    energy: Tensor = torch.linalg.svdvals(snapshots_XT.double()).square()
    if not float(energy.sum()) > 0:
        raise UserError("snapshots_XT must not be zero everywhere: it has no spectrum")
    return energy / energy.sum()


def spectral_entropy(snapshots_XT: Tensor) -> float:
    """-sum p ln p of the energy shares, nats; between 0 (one function) and ln min(X, T)."""
    return float(entropy_of_log(energy_shares(snapshots_XT).log())) + 0.0


def effective_rank(snapshots_XT: Tensor) -> float:
    """exp(spectral entropy): so many equally important functions would have the same entropy."""
    return math.exp(spectral_entropy(snapshots_XT))


def rank_error(snapshots_XT: Tensor, rank: int) -> float:
    """Relative error of the best `rank` functions in space: sqrt of the energy that they leave out."""
    shares = energy_shares(snapshots_XT)
    if not 0 <= rank <= len(shares):
        raise UserError(f"rank must lie between 0 and {len(shares)}, not {rank}")
    return math.sqrt(float(shares[rank:].sum()))
