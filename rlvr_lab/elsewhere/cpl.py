r"""Contrastive preference learning in a small world (CPL, arXiv 2310.13639, ICLR 2024; code jhejna/cpl).

The idea: an entropy bonus makes the optimal policy a re-weighting, pi*(a|s) = exp(A*(s,a) / alpha), so that a
log-probability is an advantage and preferences between behaviours train the policy by a supervised loss. The loss, its
settings and where the release departs from the paper are in `rlvr_lab.core.cpl`; here is what shows it at work.

    soft optimum   Q(s,a) = r(s,a) + gamma E V(s'),   V(s) = alpha ln sum_a exp(Q(s,a)/alpha),   A* = Q - V
    labels         P(2 preferred to 1) = sigmoid(slope (G_2 - G_1)),   G = sum of A* ("regret") or sum of r ("return")
    CPL            segment score u = sum_t ln pi(a_t|s_t): exact for regret labels where slope * alpha = 1

Shapes: S states, A actions; tables of log-probabilities [S, A] in nats; segments of T steps as indices [n, T]. Rewards
have no unit; alpha is reward per nat. Control: the same segments labelled by their return instead of their regret, and
a learner that is right for those, which fits rewards by logistic regression and plans with the known world.

The world is not the paper's, whose six manipulation tasks with 64-step segments are out of reach here [independent
re-run of the card].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.cpl import cpl_loss, segment_score
from ..errors import UserError

Labels = Literal["regret", "return"]
LABELS: tuple[str, ...] = get_args(Labels)


@dataclass(frozen=True)
class Settings:
    """The world, the preferences and the training of one demonstration."""

    states: int = 12
    actions: int = 4
    gamma: float = 0.9
    alpha: float = 0.5
    length: int = 6
    slope: float = 2.0
    updates: int = 400
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("states", "actions", "length", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("alpha", "slope", "rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a positive number, not {value}")
        if not 0 <= self.gamma < 1:
            raise UserError(f"gamma must be at least 0 and below 1, not {self.gamma}")


@dataclass(frozen=True)
class World:
    """Known dynamics [S, A, S] and rewards [S, A]."""

    move: Tensor
    reward: Tensor


@dataclass(frozen=True)
class SoftOptimum:
    """The entropy-regularised optimum: ln pi* [S, A], A* [S, A], V [S]."""

    log_policy: Tensor
    advantage: Tensor
    value: Tensor


@dataclass(frozen=True)
class Pairs:
    """Two segments each, as indices [n, T], and labels [n]: 1 where the second one is preferred."""

    states: tuple[Tensor, Tensor]
    actions: tuple[Tensor, Tensor]
    label: Tensor


@dataclass(frozen=True)
class Score:
    """How good a policy is: its soft return, 0 for uniform and 1 for pi*, and KL(pi* || pi) in nats, a state's mean."""

    soft_return: float
    kl: float


def random_world(settings: Settings) -> World:
    """Normal rewards, and next states from a peaked random distribution."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.states, settings.actions)
    logits = 2 * torch.randn(*shape, settings.states, generator=generator, dtype=torch.float64)
    return World(logits.softmax(-1), torch.randn(*shape, generator=generator, dtype=torch.float64))


def soft_optimum(world: World, gamma: float, alpha: float, tolerance: float = 1e-12) -> SoftOptimum:
    """Soft value iteration until the value moves by less than `tolerance`."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha must be a positive number, not {alpha}")
    if not 0 <= gamma < 1:
        raise UserError(f"gamma must be at least 0 and below 1, not {gamma}")
    if not bool(world.reward.isfinite().all()):
        raise UserError("reward must hold finite numbers")
    value = torch.zeros(len(world.reward), dtype=world.reward.dtype)
    while True:
        q = world.reward + gamma * world.move @ value
        new = alpha * torch.logsumexp(q / alpha, -1)
        if float((new - value).abs().max()) < tolerance:
            advantage = q - alpha * torch.logsumexp(q / alpha, -1, keepdim=True)
            return SoftOptimum(advantage / alpha, advantage, new)
        value = new


def soft_value(world: World, log_policy: Tensor, gamma: float, alpha: float) -> Tensor:
    """Value [S] of a policy where every step also pays -alpha ln pi: one linear system."""
    if log_policy.shape != world.reward.shape or not bool(log_policy.isfinite().all()):
        raise UserError(f"log_policy must be finite and of shape {tuple(world.reward.shape)}")
    policy = log_policy.exp()
    step = (policy * (world.reward - alpha * log_policy)).sum(-1)
    move = torch.einsum("sa,sat->st", policy, world.move)
    value: Tensor = torch.linalg.solve(torch.eye(len(step), dtype=step.dtype) - gamma * move, step)
    return value


def segments(world: World, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States and actions [n, T] of a uniform policy from uniform first states."""
    states_count, actions_count = world.reward.shape
    now = torch.randint(states_count, (n,), generator=generator)
    states, actions = [], []
    for _ in range(length):
        act = torch.randint(actions_count, (n,), generator=generator)
        states.append(now)
        actions.append(act)
        now = torch.multinomial(world.move[now, act], 1, generator=generator).squeeze(1)
    return torch.stack(states, 1), torch.stack(actions, 1)


def preferences(world: World, settings: Settings, n: int, labels: Labels, generator: torch.Generator) -> Pairs:
    """n labelled pairs of segments; "regret" compares sums of A*, "return" sums of rewards."""
    if labels not in LABELS:
        raise UserError(f"labels must be one of {', '.join(LABELS)}, not '{labels}'")
    if n < 1:
        raise UserError(f"n must be at least 1, not {n}")
    best = soft_optimum(world, settings.gamma, settings.alpha)
    worth = best.advantage if labels == "regret" else world.reward
    (s1, a1), (s2, a2) = (segments(world, n, settings.length, generator) for _ in range(2))
    chance = torch.sigmoid(settings.slope * (worth[s2, a2].sum(1) - worth[s1, a1].sum(1)))
    return Pairs((s1, s2), (a1, a2), torch.bernoulli(chance, generator=generator))


def fit_cpl(pairs: Pairs, settings: Settings, bias: float = 1.0) -> Tensor:
    """Train a table of logits by the CPL loss with alpha = 1; ln pi [S, A]. Deterministic."""
    logits = torch.zeros(settings.states, settings.actions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=settings.rate)
    for _ in range(settings.updates):
        table = logits.log_softmax(-1)
        u1, u2 = (segment_score(table[s, a], 1.0) for s, a in zip(pairs.states, pairs.actions, strict=True))
        optimizer.zero_grad()
        cpl_loss(u1, u2, pairs.label, bias).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return logits.detach().log_softmax(-1)


def fit_rewards(pairs: Pairs, world: World, settings: Settings) -> Tensor:
    """The learner that is right for return labels: logistic regression on rewards, then planning; ln pi [S, A]."""
    reward = torch.zeros(settings.states, settings.actions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([reward], lr=settings.rate)
    for _ in range(settings.updates):
        g1, g2 = (reward[s, a].sum(1) for s, a in zip(pairs.states, pairs.actions, strict=True))
        optimizer.zero_grad()
        cpl_loss(settings.slope * g1, settings.slope * g2, pairs.label).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return soft_optimum(World(world.move, reward.detach()), settings.gamma, settings.alpha).log_policy


def clone_preferred(pairs: Pairs, settings: Settings, pseudo: float = 0.5) -> Tensor:
    """Supervised fine-tuning on the preferred segments: counts of actions by state, plus `pseudo`; ln pi [S, A]."""
    counts = torch.full((settings.states, settings.actions), pseudo, dtype=torch.float64)
    for side, (s, a) in enumerate(zip(pairs.states, pairs.actions, strict=True)):
        kept = pairs.label == side
        where = s[kept] * settings.actions + a[kept]
        counts.view(-1).index_add_(0, where.flatten(), torch.ones(where.numel(), dtype=torch.float64))
    return (counts / counts.sum(-1, keepdim=True)).log()


def evaluate(world: World, log_policy: Tensor, settings: Settings) -> Score:
    """Normalised soft return from uniform first states, and the distance to pi*."""
    best = soft_optimum(world, settings.gamma, settings.alpha)
    even = torch.full_like(log_policy, -math.log(settings.actions))
    low, own = (float(soft_value(world, p, settings.gamma, settings.alpha).mean()) for p in (even, log_policy))
    kl = (best.log_policy.exp() * (best.log_policy - log_policy)).sum(-1).mean()
    return Score((own - low) / (float(best.value.mean()) - low), float(kl))


LEARNERS = ("cpl", "cpl_biased", "clone", "rewards")


def compare(
    settings: Settings, n: int, labels: Labels = "regret", learners: tuple[str, ...] = LEARNERS
) -> dict[str, Score]:
    """Train each learner on the same n pairs: CPL with lambda 1 and 1/2, cloning, and rewards with planning."""
    world = random_world(settings)
    pairs = preferences(world, settings, n, labels, torch.Generator().manual_seed(settings.seed + 1000))
    fits = {
        "cpl": lambda: fit_cpl(pairs, settings),
        "cpl_biased": lambda: fit_cpl(pairs, settings, 0.5),
        "clone": lambda: clone_preferred(pairs, settings),
        "rewards": lambda: fit_rewards(pairs, world, settings),
    }
    if unknown := set(learners) - set(fits):
        raise UserError(f"learners must be among {', '.join(fits)}, not {', '.join(sorted(unknown))}")
    return {name: evaluate(world, fits[name](), settings) for name in learners}
