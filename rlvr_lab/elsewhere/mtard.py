r"""MTARD: two temperatures that move until two teachers are equally uncertain (arXiv 2306.16170).

A student learns from a robust teacher on attacked inputs and from a clean one on clean inputs. Two controllers keep one
lesson from drowning the other. Every pair here has the order (robust, clean) on its last axis, logits are [B, C],
entropies are means over the batch in nats.

    p      = softmax(z / tau)                                     a teacher; the student keeps temperature 1
    L_i    = KL(p_i || student_i)
    tau_i <- clip(tau_i - r_tau sign(H_i / H_j - 1), 1, 10)        j: the other teacher; equal entropies move nothing
    w_i   <- w_i - r_w (w_i - l_i / (l_i + l_j)),  l = L / L at step 0;  floor 0, then divided by their sum
    loss   = w_a L_a + w_n L_n                                     no gradient through temperatures and weights

Losses and entropies of a step use the temperatures before it; its loss uses the weights after it. The loop settles
because the entropy is monotone in the temperature: dH / dtau = Var_p(z) / tau^3.

Card: papers/mtard.md. Code compared: zhaoshiji123/MTARD-extension @ 93506d6 (entropy balance), whose KL and entropy are
means over B x C elements with 1e-5 added inside the logarithm of the teacher (`released=True`). For the loss this is
a factor 1 / C; the entropy of a teacher that is nearly one-hot becomes negative, and with it the ratio. No factor
tau^2, unlike Hinton's distillation. The conference code (zhaoshiji123/MTARD @ 6480a1b) has no temperature controller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.entropy import entropy_of_log
from ..errors import UserError

ADDED = 1e-5  # inside the logarithm of the released code


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Refuse what is not a finite, non-empty [B, C]."""
    if logits.ndim < 2 or not logits.numel() or logits.shape[-1] < 2:
        raise UserError(f"{name} must have shape [B, C] with at least two classes, not {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise UserError(f"{name} must be finite")


def _tempered(logits: Tensor, temperature: Tensor | float, name: str = "logits") -> Tensor:
    check_logits(logits, name)
    tau = torch.as_tensor(temperature, dtype=logits.dtype)
    if not bool((torch.isfinite(tau) & (tau > 0)).all()):
        raise UserError(f"temperature must be positive and finite, not {temperature}")
    return torch.log_softmax(logits / tau[..., None, None], -1)


def tempered_entropy(logits: Tensor, temperature: Tensor | float = 1.0, released: bool = False) -> Tensor:
    """Mean entropy of softmax(z / tau) over the batch, logits [..., B, C], temperature [...].

    `released`: mean of -p log(p + 1e-5) over batch and classes, as the code measures it.
    """
    log_p = _tempered(logits, temperature)
    if released:
        p = log_p.exp()
        return -(p * (p + ADDED).log()).mean((-2, -1))
    return entropy_of_log(log_p).mean(-1)


def entropy_slope(logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """d H / d tau = Var_p(z) / tau^3 in nats per unit of temperature, mean over the batch; never negative."""
    p = _tempered(logits, temperature).exp()
    centred = logits - (p * logits).sum(-1, keepdim=True)
    variance = (p * centred.square()).sum(-1).mean(-1)
    return variance / torch.as_tensor(temperature, dtype=logits.dtype) ** 3


def teacher_kl(teacher: Tensor, student: Tensor, temperature: Tensor | float = 1.0, released: bool = False) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student)) in nats, mean over the batch; the student is not tempered.

    `released`: divided by the number of classes, and with 1e-5 inside the logarithm of the teacher.
    """
    if teacher.shape != student.shape:
        raise UserError(f"student must have the teacher's shape {tuple(teacher.shape)}, not {tuple(student.shape)}")
    check_logits(student, "student")
    log_p, log_q = _tempered(teacher, temperature, "teacher"), torch.log_softmax(student, -1)
    p = log_p.exp()
    if released:
        return (p * ((p + ADDED).log() - log_q)).mean((-2, -1))
    return (p * (log_p - log_q)).sum(-1).mean(-1)


@dataclass(frozen=True)
class Balance:
    """Steps and bounds of the two controllers; defaults of the paper."""

    temperature_step: float = 1e-3
    weight_rate: float = 0.025
    low: float = 1.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if not self.temperature_step >= 0:
            raise UserError(f"temperature_step must not be negative, not {self.temperature_step}")
        if not 0 <= self.weight_rate <= 1:
            raise UserError(f"weight_rate must lie in [0, 1], not {self.weight_rate}")
        if not 0 < self.low <= self.high:
            raise UserError(f"low must satisfy 0 < low <= high, not {self.low} with high {self.high}")


def _pair(values: Tensor, name: str) -> Tensor:
    if values.shape[-1:] != (2,):
        raise UserError(f"{name} must end in an axis of two (robust, clean), not {tuple(values.shape)}")
    if not torch.isfinite(values).all():
        raise UserError(f"{name} must be finite")
    return values


def more_uncertain(entropies: Tensor) -> Tensor:
    """sign(H_i / H_j - 1) of both teachers [..., 2]: 1 where a teacher is the more uncertain one, -1 for the other.

    Entropies that are not negative are compared directly, which has the same sign and needs no division by 0. A
    negative one can only come from the released estimate; then the ratio decides, as it does in the code.
    """
    own, other = _pair(entropies, "entropies"), entropies.flip(-1)
    safe = torch.where(other == 0, torch.ones_like(other), other)
    by_ratio = torch.where(other == 0, torch.sign(own), torch.sign(own / safe - 1))
    return torch.where((entropies < 0).any(-1, keepdim=True), by_ratio, torch.sign(own - other))


def temperature_step(entropies: Tensor, temperatures: Tensor, balance: Balance = Balance()) -> Tensor:
    """New temperatures [..., 2]: the more uncertain teacher is cooled by one step, the sharper one heated."""
    if not bool((_pair(temperatures, "temperatures") > 0).all()):
        raise UserError(f"temperatures must be positive, not {temperatures.tolist()}")
    moved = temperatures - balance.temperature_step * more_uncertain(entropies)
    return moved.clamp(balance.low, balance.high)


def weight_step(losses: Tensor, first: Tensor, weights: Tensor, balance: Balance = Balance()) -> Tensor:
    """New loss weights [..., 2]: drawn towards each lesson's share of the losses relative to those of step 0.

    The lesson that has improved less gets more weight. Raises UserError for a first loss that is not positive,
    negative losses or weights, and where both losses are 0.
    """
    for values, name in ((losses, "losses"), (weights, "weights")):
        if bool((_pair(values, name) < 0).any()) or not bool((values.sum(-1) > 0).all()):
            raise UserError(f"{name} must not be negative, nor all zero, not {values.tolist()}")
    if not bool((_pair(first, "first") > 0).all()):
        raise UserError(f"first must hold the positive losses of step 0, not {first.tolist()}")
    normalised = losses / first
    target = normalised / normalised.sum(-1, keepdim=True)
    moved = (weights - balance.weight_rate * (weights - target)).clamp_min(0.0)
    return moved / moved.sum(-1, keepdim=True)
