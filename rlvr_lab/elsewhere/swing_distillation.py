r"""Swing distillation: a temperature for each token of the teacher, high where a secret may sit.

Li, Wu, Dong, Wu, Bian, Xiong, arXiv 2212.08349; no code is named. The structure is the abstract's, every constant and
formula below is [inferred]. A student that copies soft targets copies the teacher's secrets. With logits z_t [T, V] of
the teacher, s_t of the student, and a privacy score p_t in [0, 1] for each token,

    tau_t = low + (high - low) p_t
    q_t   = softmax(z_t / tau_t),   then where noise is asked for   q_t <- normalised max(q_t + p_t sigma xi_t, floor)
    L     = mix CE(labels) + (1 - mix) sum_t tau_t^2 KL(q_t || softmax(s_t / tau_t))

Entropies and losses in nats. dH(q_t)/d tau = Var_q(z_t) / tau^3 >= 0: heating raises the entropy of one target, and
never changes the order within it. A sequence is a path through several contexts, and only there can ranks move.

Exposure (Carlini et al.) of a secret among all candidates R:  log2 |R| - log2 rank,  rank 1 = most likely; in bits.

With `student` "heated" (the formula above) the loss is smallest at s_t = z_t up to a constant, whatever tau_t is: a
student that can reach its optimum then hides nothing. With "plain" the student's own temperature is 1 and its optimum
is q_t. Which of the two the paper means is not known to us. The demonstration is in `swing_distillation_demo`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

Student = Literal["heated", "plain"]
Ties = Literal["best", "middle", "worst"]


def _check_student(student: str) -> None:
    if student not in ("heated", "plain"):
        raise UserError(f"student must be 'heated' or 'plain', not {student!r}")


def _check_temperature(temperature: Tensor) -> None:
    if not bool(((temperature > 0) & (temperature < math.inf)).all()):
        raise UserError("temperature must be positive and finite everywhere")


def token_temperature(score: Tensor, low: float = 1.0, high: float = 6.0) -> Tensor:
    """tau = low + (high - low) score, of the shape of `score`, which lies in [0, 1]."""
    if not bool(((score >= 0) & (score <= 1)).all()):
        raise UserError("score must lie in [0, 1] everywhere")
    if not (0 < low <= high < math.inf):
        raise UserError(f"temperatures must satisfy 0 < low <= high, not {low} and {high}")
    return low + (high - low) * score


def soft_targets(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """softmax(logits / temperature) over the last axis; one temperature, or one for each position."""
    tau = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    _check_temperature(tau)
    if tau.ndim and tau.shape != logits.shape[:-1]:
        raise UserError(f"temperature must have shape {tuple(logits.shape[:-1])}, not {tuple(tau.shape)}")
    return (logits / tau[..., None]).softmax(-1)


def noisy_targets(
    target: Tensor, score: Tensor, generator: torch.Generator, sigma: float = 0.05, floor: float = 1e-4
) -> Tensor:
    """Normal noise of scale score * sigma on each target, clipped at `floor` and normalised again.

    Targets of score 0 are left as they are, the floor included.
    """
    if score.shape != target.shape[:-1]:
        raise UserError(f"score must have shape {tuple(target.shape[:-1])}, not {tuple(score.shape)}")
    if not (0 <= sigma < math.inf) or not (0 < floor < 1):
        raise UserError(f"sigma must not be negative and floor lie between 0 and 1, not {sigma} and {floor}")
    xi = torch.randn(target.shape, generator=generator, dtype=target.dtype)
    raised = (target + sigma * score[..., None] * xi).clamp_min(floor)
    return torch.where(score[..., None] > 0, raised / raised.sum(-1, keepdim=True), target)


def distillation_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    temperature_T: Tensor,
    mix: float = 0.5,
    student: Student = "heated",
    squared: bool = True,
) -> Tensor:
    """mix CE + (1 - mix) tau^2 KL(q || student) of each token [T]; the published loss is its sum. [inferred]

    No gradient reaches the teacher. tau^2 keeps the gradients of heated students in scale; `squared` False drops it.
    """
    if student_TV.shape != teacher_TV.shape or labels_T.shape != student_TV.shape[:-1]:
        raise UserError(
            f"student {tuple(student_TV.shape)}, teacher {tuple(teacher_TV.shape)} and labels {tuple(labels_T.shape)} "
            "must agree"
        )
    if not 0 <= mix <= 1:
        raise UserError(f"mix must lie in [0, 1], not {mix}")
    _check_student(student)
    target = soft_targets(teacher_TV.detach(), temperature_T)
    log_q = (teacher_TV.detach() / temperature_T[..., None]).log_softmax(-1)
    own = temperature_T if student == "heated" else torch.ones_like(temperature_T)
    log_s = (student_TV / own[..., None]).log_softmax(-1)
    divergence = (target * (log_q - log_s)).sum(-1)
    hard = -student_TV.log_softmax(-1).gather(-1, labels_T[..., None]).squeeze(-1)
    return mix * hard + (1 - mix) * (temperature_T**2 if squared else 1.0) * divergence


def optimal_student(target: Tensor, temperature: Tensor, student: Student = "heated") -> Tensor:
    """Log-probabilities, at temperature 1, of the student that minimises the KL term in each context.

    "plain": log q. "heated": log softmax(tau log q), which is the teacher itself where no noise was added.
    """
    _check_student(student)
    _check_temperature(temperature)
    if temperature.shape != target.shape[:-1]:
        raise UserError(f"temperature must have shape {tuple(target.shape[:-1])}, not {tuple(temperature.shape)}")
    if not bool((target > 0).all()):
        raise UserError("target must be positive everywhere: use a floor, or smooth the teacher")
    return target.log() if student == "plain" else (temperature[..., None] * target.log()).log_softmax(-1)


def exposure(loglik_R: Tensor, secret: int, ties: Ties = "middle") -> float:
    """log2 |R| - log2 rank in bits, over log-likelihoods of the whole candidate space; |R| = len(loglik_R).

    Candidates within 1e-9 of the secret are ties: they count as behind it ("best": the attacker's best case), half
    ("middle") or before it ("worst"). With "middle" a flat law over R gives about 1 bit, not 0.
    """
    if loglik_R.ndim != 1 or not len(loglik_R) or bool(loglik_R.isnan().any()):
        raise UserError(f"loglik must be one axis of numbers, not {tuple(loglik_R.shape)}, and free of nan")
    if not 0 <= secret < len(loglik_R):
        raise UserError(f"secret must be an index below {len(loglik_R)}, not {secret}")
    own = loglik_R[secret]
    before = int((loglik_R > own + 1e-9).sum())
    level = int(((loglik_R - own).abs() <= 1e-9).sum()) - 1
    shares = {"best": 0.0, "middle": 0.5, "worst": 1.0}
    if ties not in shares:
        raise UserError(f"ties must be one of {', '.join(shares)}, not {ties!r}")
    return math.log2(len(loglik_R)) - math.log2(1 + before + shares[ties] * level)
