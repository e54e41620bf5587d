r"""Dichotomy of control: condition on a latent of the future that knows nothing the environment decides.

Yang, Schuurmans, Abbeel, Nachum, arXiv 2210.13435; code: google-research/google-research `dichotomy_of_control`
(Apache-2.0, TensorFlow). A policy asked for a high return imitates whoever had one, by skill or by luck. Here the
encoder q(z | trajectory) may carry what the agent chose, and no information about reward and next state beyond it:

    min_{pi, q}  E[-sum_t log pi(a_t | h, s_t, z)]   s.t.   I(r_t, s_{t+1}; z | h_t, s_t, a_t) = 0

This module holds the tabular one-step form: joint P(a, r), encoder q(z | a, r), policy pi(a | z), value V(r | z), in
nats. With w(a, r, z) = P(a, r) q(z | a, r) the penalised loss is (weights of both cross entropies are 1)

    L = E_w[-log pi(a | z)] + E_w[-log V(r | z)] + beta I(R; Z | A)
    I(R; Z | A) = sum_{a,r,z} w log( w(a, r, z) P(a) / (w(a, z) P(a, r)) )

In place of the exact information the paper takes a critic omega and a reference law rho of the outcome,

    E_w[omega(a, r, z)] - E_w[log sum_r' rho(r') exp omega(a, r', z)]   <=   E_w log( P(r | a, z) / rho(r) ),

to be made LARGE by omega and SMALL by q. With rho = P(r) the right side is I(R; Z | A) + I(R; A). At inference: many z
from the prior, the one with the largest promised value, then act with pi(. | z).

Shapes: A actions, R outcomes, Z latents; every function takes further axes in front (a batch of runs).
Released code departs: it adds beta (-pos + neg) and minimises over *all* variables, encoder included, so that the
encoder raises what it should remove; its rho is the marginal outcome, not conditional on the action; its neural value
head ranks candidates by the future-encoder's sample, the same for all of them.
The demonstration is in `dichotomy_of_control_demo`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

NEGLIGIBLE = 1e-3
"""Latents of a smaller probability are never chosen: their value was hardly trained."""


@dataclass(frozen=True)
class Objective:
    """The parts of the penalised loss, each of the batch's shape; nats."""

    action_ce: Tensor
    value_ce: Tensor
    information: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Conditioned:
    """What conditioning on the best latent promises and what it yields, of the batch's shape; outcomes' units."""

    latent: Tensor
    promised: Tensor
    achieved: Tensor

    @property
    def gap(self) -> Tensor:
        """Consistency gap: promised minus achieved."""
        return self.promised - self.achieved


def _check(name: str, table: Tensor, ndim: int, axes: int = 1) -> None:
    """`axes` counts the last axes over which `table` must sum to one."""
    if table.ndim < ndim or not table.numel():
        raise UserError(f"{name} needs at least {ndim} axes and one entry, not shape {tuple(table.shape)}")
    total = table.sum(tuple(range(-axes, 0)))
    if not bool((table >= 0).all()) or not bool(((total - 1).abs() < 1e-4).all()):
        raise UserError(f"{name} must hold probabilities that are not negative and sum to 1 over its last {axes} axes")


def weights(joint_AR: Tensor, encoder_ARZ: Tensor) -> Tensor:
    """w(a, r, z) = P(a, r) q(z | a, r), [..., A, R, Z]. Refuses tables that are no probabilities or do not fit."""
    _check("joint", joint_AR, 2, axes=2)
    _check("encoder", encoder_ARZ, 3)
    if joint_AR.shape[-2:] != encoder_ARZ.shape[-3:-1]:
        raise UserError(
            f"joint {tuple(joint_AR.shape)} and encoder {tuple(encoder_ARZ.shape)} need the same actions and outcomes"
        )
    return joint_AR.unsqueeze(-1) * encoder_ARZ


def _xlogx(p: Tensor) -> Tensor:
    return torch.xlogy(p, p)  # 0 log 0 = 0, and no gradient there


def conditional_information(w_ARZ: Tensor) -> Tensor:
    """I(R; Z | A) of a joint law w(a, r, z) in nats: H(A, R) + H(A, Z) - H(A) - H(A, R, Z); 0 to H(R | A)."""
    _check("w", w_ARZ, 3, axes=3)
    terms = _xlogx(w_ARZ).sum((-3, -2, -1)) + _xlogx(w_ARZ.sum((-2, -1))).sum(-1)
    return terms - _xlogx(w_ARZ.sum(-1)).sum((-2, -1)) - _xlogx(w_ARZ.sum(-2)).sum((-2, -1))


def outcome_entropy(joint_AR: Tensor) -> Tensor:
    """H(R | A) in nats: the luck, all that an encoder could memorise beyond the action."""
    _check("joint", joint_AR, 2, axes=2)
    return _xlogx(joint_AR.sum(-1)).sum(-1) - _xlogx(joint_AR).sum((-2, -1))


def objective(
    joint_AR: Tensor, encoder_ARZ: Tensor, policy_ZA: Tensor, value_ZR: Tensor, beta: float | Tensor
) -> Objective:
    """The penalised loss with exact information, to be minimised over encoder, policy and value.

    `beta` is a number or one for each run of the batch, not negative.
    """
    w = weights(joint_AR, encoder_ARZ)
    _check("policy", policy_ZA, 2)
    _check("value", value_ZR, 2)
    for name, table, size in (("policy", policy_ZA, w.shape[-3]), ("value", value_ZR, w.shape[-2])):
        if table.shape[-2:] != (w.shape[-1], size):
            raise UserError(f"{name} must end in {(w.shape[-1], size)} (latents first), not {tuple(table.shape)}")
    scale = torch.as_tensor(beta, dtype=w.dtype)
    if not bool((scale >= 0).all()):
        raise UserError(f"beta must not be negative or nan: {beta}")
    action_ce = -torch.xlogy(w.sum(-2).transpose(-1, -2), policy_ZA).sum((-2, -1))
    value_ce = -torch.xlogy(w.sum(-3).transpose(-1, -2), value_ZR).sum((-2, -1))
    information = conditional_information(w)
    return Objective(action_ce, value_ce, information, action_ce + value_ce + scale * information)


def contrastive_estimate(
    joint_AR: Tensor, encoder_ARZ: Tensor, energy_ARZ: Tensor, rho_R: Tensor | None = None
) -> Tensor:
    """The critic's lower bound of E log P(r | a, z) / rho(r), in nats.

    `rho_R` is the reference law of the outcome; without it the marginal P(r), as in the released tabular code.
    """
    w = weights(joint_AR, encoder_ARZ)
    if energy_ARZ.shape[-3:] != w.shape[-3:]:
        raise UserError(f"energy must end in {tuple(w.shape[-3:])}, not {tuple(energy_ARZ.shape)}")
    rho = joint_AR.sum(-2) if rho_R is None else rho_R
    _check("rho", rho, 1)
    if rho.shape[-1] != w.shape[-2]:
        raise UserError(f"rho must have {w.shape[-2]} outcomes, not {rho.shape[-1]}")
    free = torch.logsumexp(energy_ARZ + rho.log()[..., None, :, None], dim=-2)
    return (w * energy_ARZ).sum((-3, -2, -1)) - (w.sum(-2) * free).sum((-2, -1))


def best_energy(joint_AR: Tensor, encoder_ARZ: Tensor) -> Tensor:
    """The critic at which the bound is tight, log P(r | a, z) / P(r), [..., A, R, Z].

    Refuses tables with an impossible triple (a, r, z): there the critic is minus infinity.
    """
    w = weights(joint_AR, encoder_ARZ)
    if not bool((w > 0).all()):
        raise UserError("joint and encoder must be positive everywhere for a finite critic")
    return (w / w.sum(-2, keepdim=True)).log() - joint_AR.sum(-2).log()[..., None, :, None]


def posteriors(joint_AR: Tensor, encoder_ARZ: Tensor) -> tuple[Tensor, Tensor]:
    """The policy P(a | z) [..., Z, A] and value P(r | z) [..., Z, R] that minimise both cross entropies.

    Uniform for a latent of probability 0, where any law is as good.
    """
    w = weights(joint_AR, encoder_ARZ).movedim(-1, -3)

    def normalised(table: Tensor) -> Tensor:
        total = table.sum(-1, keepdim=True)
        return torch.where(total > 0, table / total.clamp_min(torch.finfo(w.dtype).tiny), 1 / table.shape[-1])

    return normalised(w.sum(-1)), normalised(w.sum(-2))


def condition_on_best(
    joint_AR: Tensor, encoder_ARZ: Tensor, policy_ZA: Tensor, value_ZR: Tensor, outcomes_R: Tensor
) -> Conditioned:
    """Take the latent with the largest promised value among those not negligible, and act on it in the true world.

    Promised: sum_r V(r | z) r. Achieved: sum_{a,r} pi(a | z) P(r | a) r. Refuses an action that was never taken: its
    outcomes are unknown.
    """
    if outcomes_R.shape != joint_AR.shape[-1:]:
        raise UserError(f"outcomes must have shape {tuple(joint_AR.shape[-1:])}, not {tuple(outcomes_R.shape)}")
    mass_Z = weights(joint_AR, encoder_ARZ).sum((-3, -2))
    taken = joint_AR.sum(-1)
    if not bool((taken > 0).all()):
        raise UserError("joint gives an action probability 0: what it yields is unknown")
    promised_Z = (value_ZR * outcomes_R).sum(-1)
    worth_A = (joint_AR * outcomes_R).sum(-1) / taken
    achieved_Z = (policy_ZA * worth_A.unsqueeze(-2)).sum(-1)
    best = promised_Z.masked_fill(mass_Z < NEGLIGIBLE, float("-inf")).argmax(-1, keepdim=True)
    return Conditioned(
        best.squeeze(-1), promised_Z.gather(-1, best).squeeze(-1), achieved_Z.gather(-1, best).squeeze(-1)
    )


def mean_gap(joint_AR: Tensor, encoder_ARZ: Tensor, outcomes_R: Tensor) -> tuple[Tensor, Tensor]:
    """E_z |promised - achieved| under the posteriors of q, and its bound (max - min of r) sqrt(I(R; Z | A) / 2).

    The bound is Pinsker's inequality and Jensen's; it is 0, and the policy consistent, where the information is 0.
    """
    w = weights(joint_AR, encoder_ARZ)
    if not bool((joint_AR.sum(-1) > 0).all()):
        raise UserError("joint gives an action probability 0: what it yields is unknown")
    policy, value = posteriors(joint_AR, encoder_ARZ)
    worth_A = (joint_AR * outcomes_R).sum(-1) / joint_AR.sum(-1)
    gap_Z = (value * outcomes_R).sum(-1) - (policy * worth_A.unsqueeze(-2)).sum(-1)
    bound = (outcomes_R.max() - outcomes_R.min()) * (conditional_information(w).clamp_min(0) / 2).sqrt()
    return (w.sum((-3, -2)) * gap_Z.abs()).sum(-1), bound
