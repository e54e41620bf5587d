r"""The policy cliff: values depend continuously on rewards, optimal policies do not (arXiv 2507.20150, no code).

A deterministic tabular MDP with states S, actions A, rewards R [S, A], discount gamma; terminal states have value 0:

    hard   Q = R + gamma max_a Q(s', a)                               pi = any rule on argmax Q; jumps at a tie
    soft   Q = R + gamma alpha log sum_a exp(Q(s', a) / alpha)        pi = softmax(Q / alpha)
    KL     Q = R + gamma beta log sum_a base exp(Q(s', a) / beta)     pi ~ base exp(Q / beta)

Hard Q is 1/(1-gamma)-Lipschitz in R (Prop. 2.1), yet a reward change of any size eps moves a policy at a tie of m
actions by up to (m-1)/m in total variation (Prop. 2.5). The soft policy is Lipschitz at every state (Prop. 4.5):

    TV(pi_1, pi_2) <= max|R_1 - R_2| / (2 alpha (1 - gamma)),       at a cost of at most alpha log|A| / (1 - gamma)

The KL form has the same bound with beta in place of alpha, and tends to `base` renormalised on the argmax as beta -> 0
[inferred]. The theorems are about exact optima, not about iterates of PPO or GRPO; at alpha = 1e-3 and rewards of order
1 the bound exceeds 1 and says nothing. Card: papers/policy_cliff.md. An analysis, no training method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["uniform", "first"]


@dataclass(frozen=True)
class TabularMDP:
    """`next_state` [S, A] (long), `reward` [S, A], `terminal` [S] (bool), discount `gamma` in [0, 1).

    A language model is such a table: states are token sequences, actions tokens, transitions append. Raises ValueError
    where shapes, the discount or a state index are impossible.
    """

    next_state: Tensor
    reward: Tensor
    terminal: Tensor
    gamma: float

    def __post_init__(self) -> None:
        states = len(self.next_state)
        if self.next_state.shape != self.reward.shape or self.next_state.ndim != 2:
            raise ValueError(f"next_state and reward must be [S, A], not {self.next_state.shape}, {self.reward.shape}")
        if self.terminal.shape != (states,):
            raise ValueError(f"terminal must be [{states}], not {tuple(self.terminal.shape)}")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), not {self.gamma}")
        if int(self.next_state.min()) < 0 or int(self.next_state.max()) >= states:
            raise ValueError(f"next_state must hold indices of {states} states")

    def with_reward(self, reward: Tensor) -> TabularMDP:
        """The same table with other rewards."""
        return replace(self, reward=reward)

    def perturbed(self, state: int, action: int, change: float) -> TabularMDP:
        """The same table with one reward changed."""
        reward = self.reward.clone()
        reward[state, action] += change
        return self.with_reward(reward)


def state_values(q: Tensor, alpha: float = 0.0, base: Tensor | None = None) -> Tensor:
    """V [S] from Q [S, A]: max for alpha = 0, else alpha log sum exp(Q / alpha), weighted by `base` where given.

    `base` ([A] or [S, A], a distribution) makes alpha the KL coefficient beta. torch shifts by the maximum, so that
    alpha = 1e-3 does not overflow.
    """
    if alpha == 0:
        return q.max(-1).values
    return alpha * torch.logsumexp(q / alpha + (0.0 if base is None else base.log()), dim=-1)


def value_iteration(
    mdp: TabularMDP, alpha: float = 0.0, base: Tensor | None = None, tolerance: float = 1e-13
) -> Tensor:
    """Q [S, A] of the hard (alpha = 0), soft (alpha > 0) or KL-regularised (`base` given) Bellman operator.

    Iterates until no entry moves by more than `tolerance` times the scale of the rewards; the contraction bounds the
    number of sweeps. Raises ValueError for a negative alpha, or for a base without alpha.
    """
    if alpha < 0 or (base is not None and alpha == 0):
        raise ValueError(f"alpha must be positive, or 0 without a base policy, not {alpha}")
    scale = max(1.0, float(mdp.reward.abs().max()))
    sweeps = 2 if mdp.gamma == 0 else math.ceil(math.log(tolerance * (1 - mdp.gamma)) / math.log(mdp.gamma)) + 100
    q = mdp.reward.clone()
    for _ in range(sweeps):
        value = state_values(q, alpha, base).masked_fill(mdp.terminal, 0.0)
        new = mdp.reward + mdp.gamma * value[mdp.next_state]
        if float((new - q).abs().max()) <= tolerance * scale:
            return new
        q = new
    return q


def invert_bellman(mdp: TabularMDP, q: Tensor) -> Tensor:
    """The reward under which Q is the hard optimum: R = Q - gamma max_a Q(s', a) (construction of Prop. 2.4)."""
    return q - mdp.gamma * state_values(q).masked_fill(mdp.terminal, 0.0)[mdp.next_state]


def optimal_actions(q: Tensor, tolerance: float = 1e-10) -> Tensor:
    """True [S, A] where an action ties for the maximum, within `tolerance` times max(1, |maximum|)."""
    best = q.max(-1, keepdim=True).values
    return q >= best - tolerance * best.abs().clamp_min(1.0)


def hard_policy(q: Tensor, ties: Ties = "uniform", base: Tensor | None = None, tolerance: float = 1e-10) -> Tensor:
    """An optimal policy [S, A] by an explicit rule on ties: `uniform` over them, the `first`, or, with `base`, the base
    policy renormalised on them (the limit of the KL-regularised policy as beta -> 0)."""
    optimal = optimal_actions(q, tolerance)
    if base is not None:
        weights = optimal * base
    elif ties == "first":
        weights = torch.nn.functional.one_hot(optimal.long().argmax(-1), q.shape[-1]).to(q.dtype)
    else:
        weights = optimal.to(q.dtype)
    return weights / weights.sum(-1, keepdim=True)


def soft_policy(q: Tensor, alpha: float, base: Tensor | None = None) -> Tensor:
    """softmax(Q / alpha), or proportional to base exp(Q / alpha), over the last axis."""
    return torch.softmax(q / alpha + (0.0 if base is None else base.log()), dim=-1)


def expected_return(mdp: TabularMDP, policy: Tensor, start: int = 0) -> float:
    """Discounted return of a policy [S, A] from a state, without entropy bonus: solves (I - gamma P) V = r."""
    states = len(mdp.reward)
    live = (~mdp.terminal).to(policy.dtype)
    transition = torch.zeros(states, states, dtype=policy.dtype)
    transition.scatter_add_(1, mdp.next_state, policy)
    reward = (policy * mdp.reward).sum(-1) * live
    system = torch.eye(states, dtype=policy.dtype) - mdp.gamma * live[:, None] * transition
    return float(torch.linalg.solve(system, reward)[start])


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the L1 distance over the last axis."""
    return (p - q).abs().sum(-1) / 2


def lipschitz_bound(reward_change: float, alpha: float, gamma: float) -> float:
    """Largest total variation between two soft policies whose rewards differ by at most this (Prop. 4.5)."""
    return abs(reward_change) / (2 * alpha * (1 - gamma))


def regularisation_cost(actions: int, alpha: float, gamma: float) -> float:
    """Largest loss of value by following the soft policy: alpha log|A| / (1 - gamma) (standard, not in the paper)."""
    return alpha * math.log(actions) / (1 - gamma)


def two_armed(first: float, second: float) -> TabularMDP:
    """A bandit: one decision between two rewards, then the end (gamma = 0)."""
    reward = torch.tensor([[first, second], [0.0, 0.0]], dtype=torch.float64)
    return TabularMDP(torch.ones(2, 2, dtype=torch.long), reward, torch.tensor([False, True]), gamma=0.0)


def honest_or_shortcut(gamma: float = 0.9) -> tuple[TabularMDP, Tensor]:
    """The card's example and the reward that its verifier misses, [4, 3].

    State 0 is the question: action 0 leads to an honest path (1), action 1 to a shortcut (2), action 2 gives up (3,
    terminal). The verifier pays both paths 1 for their action 0, a tie at state 0; the truth values the honest path
    0.5 more and the shortcut 0.5 less. `mdp.perturbed(2, 0, eps)` breaks the tie.
    """
    next_state = torch.tensor([[1, 2, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]])
    reward, missing = torch.zeros(2, 4, 3, dtype=torch.float64)
    reward[1, 0] = reward[2, 0] = 1.0
    missing[1, 0], missing[2, 0] = 0.5, -0.5
    return TabularMDP(next_state, reward, torch.tensor([False, False, False, True]), gamma), missing
