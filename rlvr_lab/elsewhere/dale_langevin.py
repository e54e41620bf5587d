r"""Dale meets Langevin: a multiplicative denoising diffusion (arXiv 2510.02730, 2025). No released code.

The idea: exponentiated gradient is mirror descent whose mirror map is the negative entropy :math:`\sum w\ln w - w`. Its
steps multiply, so no weight changes sign (Dale's law for synapses). Geometric Brownian motion is the noisy twin: the
logarithm of a positive number makes a random walk, and running the walk backwards samples positive data by products.

    EG            w <- w exp(-eta g)    = argmin_v <g, v> + KL(v || w) / eta,   KL(v||w) = sum v ln(v/w) - v + w
    on a simplex  p <- p exp(-eta g) / Z
    forward       dX = (sigma^2/2) X dt + sigma X dW (Ito):   X_t = X_0 exp(sigma sqrt(t) eps),   ln X has no drift
    score         h_t(x) = x d ln p_t(x) / dx  ("Hyvarinen score");    d ln q_t / d ln x = h + 1   (q: density of ln x)
    M-DSM         E (h_theta(X_t, t) + eps / (sigma sqrt(t)) + 1)^2,   least at h_theta = h_t
    explicit      E [h^2 + 2 (h + x dh/dx)]: the same loss up to a constant
    sign kept     x <- x exp(sigma^2 (h + 1) dt + sigma sqrt(dt) z)
    ambient       x <- x (1 + sigma^2 (3/2 + h) dt + sigma sqrt(dt) z): Euler's step in x itself, can turn negative
    no Ito term   x <- x (1 + sigma^2 h dt + sigma sqrt(dt) z): another process, which misses the data at any step size

Symbols: w, x positive, any shape; g the gradient of a loss; sigma > 0 in 1/sqrt(time), t time, eps and z standard
normal; h without unit. The +1 between h and the score of ln x is the Jacobian of the logarithm. The first version of
the paper has one multiplicative rule, the second one (2026) sets the two samplers apart [derived: both were checked
numerically for the card; the paper's own objects are named after its abstract].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from ._checks import positive

Rule = Literal["sign_kept", "ambient", "no_ito"]
RULES: tuple[str, ...] = get_args(Rule)


def _positive_tensor(name: str, x: Tensor) -> None:
    if x.numel() == 0 or not bool((x > 0).all()) or not bool(x.isfinite().all()):
        raise UserError(f"{name} must hold positive finite numbers (shift data that touch zero, as the paper does)")


def _finite(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape or not bool(x.isfinite().all()):
        raise UserError(f"{name} must be finite and of shape {tuple(like.shape)}, not of shape {tuple(x.shape)}")


# Exponentiated gradient


def exponentiated_gradient(w: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """One unnormalised step w exp(-eta g), any shape. No entry changes sign; a zero stays zero."""
    positive(eta=eta)
    _finite("gradient", gradient, w)
    return w * torch.exp(-eta * gradient)


def exponentiated_gradient_simplex(p: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """One step on the simplex (last axis): p exp(-eta g) / Z. With g = -A it adds eta A to the logits of a policy."""
    positive(eta=eta)
    _finite("gradient", gradient, p)
    if bool((p < 0).any()) or not torch.allclose(p.sum(-1), torch.ones_like(p.sum(-1)), atol=1e-6):
        raise UserError("p must hold probabilities that sum to 1 along its last axis")
    return torch.softmax(p.log() - eta * gradient, -1)


def bregman_kl(v: Tensor, w: Tensor) -> Tensor:
    """Divergence of the mirror map, sum of v ln(v/w) - v + w over the last axis, in nats; zero exactly at v = w."""
    _positive_tensor("w", w)
    _positive_tensor("v", v)
    return (v * (v / w).log() - v + w).sum(-1)


# Diffusion of positive data


def forward_sample(x0: Tensor, eps: Tensor, sigma: float, t: float) -> Tensor:
    """X_t = X_0 exp(sigma sqrt(t) eps), any shape: the logarithm walks without drift."""
    positive(sigma=sigma, t=t)
    _positive_tensor("x0", x0)
    _finite("eps", eps, x0)
    return x0 * torch.exp(sigma * math.sqrt(t) * eps)


def mdsm_target(eps: Tensor, sigma: float, t: float) -> Tensor:
    """What h_theta(X_t, t) regresses on: -eps / (sigma sqrt(t)) - 1."""
    positive(sigma=sigma, t=t)
    return -eps / (sigma * math.sqrt(t)) - 1.0


def mdsm_loss(h: Tensor, eps: Tensor, sigma: float, t: float) -> Tensor:
    """Multiplicative denoising score matching, averaged over all entries. Weigh by sigma^2 t across times."""
    _finite("h", h, eps)
    return (h - mdsm_target(eps, sigma, t)).square().mean()


def explicit_loss(h: Tensor, x_dh_dx: Tensor) -> Tensor:
    """Mean of h^2 + 2 (h + x dh/dx): Hyvarinen's loss for non-negative data, equal to M-DSM up to a constant."""
    _finite("x_dh_dx", x_dh_dx, h)
    return (h.square() + 2 * (h + x_dh_dx)).mean()


def reverse_step(x: Tensor, h: Tensor, z: Tensor, sigma: float, dt: float, rule: Rule = "sign_kept") -> Tensor:
    """One step towards the data, x [...] with h = h_t(x) and standard normal z. See the module for the three rules."""
    positive(sigma=sigma, dt=dt)
    _finite("h", h, x)
    _finite("z", z, x)
    noise = sigma * math.sqrt(dt) * z
    if rule == "sign_kept":
        return x * torch.exp(sigma**2 * (h + 1) * dt + noise)
    if rule == "ambient":
        return x * (1 + sigma**2 * (1.5 + h) * dt + noise)
    if rule == "no_ito":
        return x * (1 + sigma**2 * h * dt + noise)
    raise UserError(f"rule must be one of {', '.join(RULES)}, not '{rule}'")


# The demonstration: four log-normal bumps with a known score


@dataclass(frozen=True)
class Mixture:
    """An even mixture of log-normals: `centres` are the means of ln x, one tuple for each bump (here x = 1/2 or 2)."""

    centres: tuple[tuple[float, ...], ...] = tuple((a * math.log(2), b * math.log(2)) for a in (-1, 1) for b in (-1, 1))
    log_sd: float = 0.18

    def means(self) -> Tensor:
        """Means of ln x [K, D]."""
        return torch.tensor(self.centres, dtype=torch.float64)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n positive points [n, D]."""
        positive(n=n, log_sd=self.log_sd)
        mu = self.means()
        which = torch.randint(len(mu), (n,), generator=generator)
        noise = torch.randn(n, mu.shape[1], generator=generator, dtype=torch.float64)
        return torch.exp(mu[which] + self.log_sd * noise)

    def score(self, x: Tensor, sigma: float, t: float) -> Tensor:
        """The exact h_t(x) [n, D] after time t >= 0, from the normal mixture that ln x follows."""
        positive(sigma=sigma)
        if not t >= 0:
            raise UserError(f"t must not be negative, and is {t}")
        _positive_tensor("x", x)
        variance = self.log_sd**2 + sigma**2 * t
        away = self.means() - x.log().unsqueeze(-2)  # [n, K, D]
        share = torch.softmax(-away.square().sum(-1) / (2 * variance), -1)
        return (share.unsqueeze(-1) * away).sum(-2) / variance - 1.0

    def broad(self, n: int, sigma: float, t: float, generator: torch.Generator) -> Tensor:
        """n points [n, D] of one log-normal with the mean and the variance of ln X_t: where a sampler starts."""
        mu = self.means()
        sd = (mu.var(0, correction=0) + self.log_sd**2 + sigma**2 * t).sqrt()
        return torch.exp(mu.mean(0) + sd * torch.randn(n, mu.shape[1], generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class Settings:
    """The demonstration of the card: sigma 1, horizon 3, samples in two dimensions."""

    mixture: Mixture = Mixture()
    sigma: float = 1.0
    horizon: float = 3.0
    samples: int = 4000
    directions: int = 32
    seed: int = 0


SMALLEST = 1e-6


@dataclass(frozen=True)
class Drawn:
    """End points [n, D], and the share of trajectories with a coordinate that was ever at or below zero."""

    x: Tensor
    crossed: float


def draw(settings: Settings, rule: Rule, steps: int) -> Drawn:
    """Run the reverse process in `steps` equal steps from the broad start to time zero.

    A coordinate that turned negative keeps its sign for the step and lends its size to the score, which is undefined
    there.
    """
    positive(steps=steps)
    generator = torch.Generator().manual_seed(settings.seed)
    x = settings.mixture.broad(settings.samples, settings.sigma, settings.horizon, generator)
    dt, crossed = settings.horizon / steps, torch.zeros(len(x), dtype=torch.bool)
    for k in range(steps):
        h = settings.mixture.score(x.abs().clamp_min(SMALLEST), settings.sigma, settings.horizon - k * dt)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = reverse_step(x, h, z, settings.sigma, dt, rule)
        crossed |= (x <= 0).any(-1)
    return Drawn(x, float(crossed.double().mean()))


def sliced_w1(a: Tensor, b: Tensor, directions: int, generator: torch.Generator) -> float:
    """Mean over random directions of the Wasserstein-1 distance between two point sets [n, D] of equal size."""
    if a.shape != b.shape or a.dim() != 2 or not len(a):
        raise UserError(f"a and b must be point sets of one shape [n, D], not {tuple(a.shape)} and {tuple(b.shape)}")
    positive(directions=directions)
    u = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype)
    u = u / u.norm(dim=0)
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).abs().mean())


def distance(settings: Settings, drawn: Drawn) -> float:
    """Sliced W1 between the logarithms of drawn and of fresh data; a value at or below zero counts as 1e-6."""
    generator = torch.Generator().manual_seed(settings.seed + 10_000)
    data = settings.mixture.sample(settings.samples, generator)
    return sliced_w1(drawn.x.clamp_min(SMALLEST).log(), data.log(), settings.directions, generator)


def data_floor(settings: Settings) -> float:
    """The distance of two samples of the data itself: no sampler can be expected below it."""
    fresh = settings.mixture.sample(settings.samples, torch.Generator().manual_seed(settings.seed + 20_000))
    return distance(settings, Drawn(fresh, 0.0))


def random_steps(n: int, steps: int, eta: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights [n] after `steps` standard normal gradients from w = 1: by EG, and by gradient descent."""
    positive(n=n, steps=steps, eta=eta)
    eg = gd = torch.ones(n, dtype=torch.float64)
    for _ in range(steps):
        g = torch.randn(n, generator=generator, dtype=torch.float64)
        eg, gd = exponentiated_gradient(eg, g, eta), gd - eta * g
    return eg, gd


def skewness(x: Tensor) -> float:
    """Third standardised moment of a sample [n]; nan where all values are equal, which leaves it undefined."""
    away = x - x.mean()
    return float(away.pow(3).mean() / away.square().mean().pow(1.5))
