r"""Losses on pairs of responses and on graded ones, all minimised; per pair or response [B], in nats, differentiable.

They read sequence log-probabilities (the sum over response tokens of log pi) and hidden states, so that they stand
beside any loss of RLVR: a pair is one right and one wrong response of a group, a grade any number of response copies
whose order is known. With implicit reward  s(y) = beta (log pi(y) - log pi_ref(y)),

    DPO (arXiv 2305.18290)      l = -log sigmoid(s(y_w) - s(y_l))
    degree loss (arXiv 2409.17791, no code; this reading is [inferred])
                                l = (1/D) sum_d -log softmax(W h_d + b)_d

for copies d = 0 .. D-1 of one response with more and more of its content removed, h_d their mean hidden states [H].
Everywhere the reference is a constant.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError


def sequence_logprob(logprob_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the marked tokens of each response [B]; masked entries are inert even where they are infinite or nan."""
    if logprob_BT.shape != mask_BT.shape or mask_BT.dtype != torch.bool:
        raise UserError(
            f"mask must be boolean and have the shape of logprob {tuple(logprob_BT.shape)}, not {tuple(mask_BT.shape)}"
        )
    return logprob_BT.masked_fill(~mask_BT, 0.0).sum(1)


def implicit_reward(logprob_B: Tensor, ref_logprob_B: Tensor, beta: float = 0.1) -> Tensor:
    """s(y) = beta (log pi(y) - log pi_ref(y)) of any shape; defined up to a constant of the prompt, which pairs cancel.

    No gradient reaches the reference. beta must be positive.
    """
    if not (0 < beta < math.inf):
        raise UserError(f"beta must be a positive number, not {beta}")
    if logprob_B.shape != ref_logprob_B.shape:
        raise UserError(f"reference {tuple(ref_logprob_B.shape)} must have the shape of {tuple(logprob_B.shape)}")
    return beta * (logprob_B - ref_logprob_B.detach())


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float = 0.1
) -> Tensor:
    """DPO's loss of each pair from four sequence log-probabilities; ln 2 where policy and reference are equal.

    The gradient of a pair is beta sigmoid(-(s_w - s_l)) (grad log pi(y_l) - grad log pi(y_w)).
    """
    if chosen_B.shape != rejected_B.shape:
        raise UserError(f"chosen {tuple(chosen_B.shape)} and rejected {tuple(rejected_B.shape)} must have one shape")
    margin = implicit_reward(chosen_B, ref_chosen_B, beta) - implicit_reward(rejected_B, ref_rejected_B, beta)
    return -F.logsigmoid(margin)


def pool_hidden(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean hidden state over the marked tokens [..., H]: a mean, because copies with tokens removed differ in length.

    Masked positions are inert. Refuses a row without a marked token: it has no mean.
    """
    if hidden_BTH.shape[:-1] != mask_BT.shape or mask_BT.dtype != torch.bool:
        raise UserError(f"mask must be boolean of shape {tuple(hidden_BTH.shape[:-1])}, not {tuple(mask_BT.shape)}")
    if not bool(mask_BT.any(-1).all()):
        raise UserError("mask leaves a response without a token: it has no mean hidden state")
    total = hidden_BTH.masked_fill(~mask_BT.unsqueeze(-1), 0.0).sum(-2)
    return total / mask_BT.sum(-1, keepdim=True)


def degree_loss(pooled_BDH: Tensor, weight_DH: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """Mean cross entropy of telling D degrees apart, for each response [B]; [inferred].

    ln D for a head of zeros, and never below ln D where the copies of a response have one hidden state. With uniform
    degrees, ln D minus its mean is a lower bound of the information between hidden state and degree.
    """
    degrees = weight_DH.shape[0]
    if degrees < 2 or pooled_BDH.shape[-2:] != weight_DH.shape:
        raise UserError(
            f"pooled must end in the head's shape {tuple(weight_DH.shape)} with 2 degrees or more, "
            f"not {tuple(pooled_BDH.shape)}"
        )
    log_p = F.linear(pooled_BDH, weight_DH, bias_D).log_softmax(-1)
    return -log_p.diagonal(dim1=-2, dim2=-1).mean(-1)


def spo_loss(pair_B: Tensor, degree_B: Tensor, graded_B: Tensor, gamma: float) -> Tensor:
    """mean(pair loss) + gamma mean(degree loss over responses with content), a scalar; [inferred] but for the sum.

    `graded_B` marks responses from which something could be removed. The others have no degree loss, and nan there is
    inert; where there is none at all the pair loss is left alone.
    """
    if not (0 <= gamma < math.inf):
        raise UserError(f"gamma must be a number that is not negative, not {gamma}")
    if degree_B.shape != graded_B.shape or graded_B.dtype != torch.bool:
        raise UserError(f"graded must be boolean of shape {tuple(degree_B.shape)}, not {tuple(graded_B.shape)}")
    if not pair_B.numel():
        raise UserError("pair loss is empty: there is nothing to average over")
    degree = degree_B.masked_fill(~graded_B, 0.0).sum() / graded_B.sum().clamp_min(1)
    return pair_B.mean() + gamma * degree
