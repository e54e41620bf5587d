"""A cart on a rail, pushed towards the middle: the smallest control task for Symphony, with and without swaddling.

State (x, v), action a in (-1, 1), x <- x + v / 10, v <- v + a / 10, both cut to [-2, 2], reward 1 - (x^2 + v^2 / 10)
of the new state, episodes of 60 steps from a uniform start. The controls are the same run without swaddling, that with
twice the noise, and that with a plain penalty on the squared signal, whose weight was chosen to give about the jerk
of swaddling on the seeds 0 to 2. All arms share draws. Repetitions and arms run at once: weights have a first axis M of
members, and the loss is a sum over members, so that each has the gradient it would have alone.

From the release: Adam without bias correction (beta .618, .995, decay .01), Polyak .005, three critics of h / 4 atoms,
a batch of as many transitions as there are atoms. Its network has layer normalisation and a gated sine; here it is two
SiLU layers, and 600 steps are taken before the first update instead of 10,240. An episode does not end in 50 steps
without action, and no transition is terminal. Three updates follow each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UserError
from ._networks import forward
from .symphony import (
    bounded_noise,
    fading_probabilities,
    heads,
    soft_value,
    swaddling_terms,
    temporal_advantage,
)

HORIZON = 60
LIMIT = 2.0  # of position and speed


@dataclass(frozen=True)
class Arm:
    """What one group of members does: weight of swaddling, factor of the exploration noise, and weight of a plain
    penalty on the squared signal (S A)^2, which is no part of the method."""

    swaddling: float = 1.0
    loudness: float = 1.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        for name in ("swaddling", "loudness", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")


ARMS = {
    "swaddled": Arm(),
    "not swaddled": Arm(0.0),
    "not swaddled, noise x 2": Arm(0.0, 2.0),
    "plain penalty 0.001": Arm(0.0, penalty=1e-3),
}


@dataclass(frozen=True)
class Task:
    """Settings of the control task. `width` is h; a quarter of it are the atoms of each critic."""

    seed: int = 0
    runs: int = 6
    steps: int = 2500
    warm_up: int = 600
    updates: int = 3
    width: int = 32
    rate: float = 1e-3
    discount: float = 0.99
    polyak: float = 0.005

    def __post_init__(self) -> None:
        if self.runs < 1 or self.updates < 1:
            raise UserError(f"runs and updates must be positive, not {self.runs}, {self.updates}")
        if self.warm_up < 2 or self.steps <= self.warm_up:
            raise UserError(f"warm_up must be at least 2 and steps exceed it, not {self.warm_up}, {self.steps}")
        if self.width < 4 or self.width % 4:
            raise UserError(f"width must be a multiple of 4, not {self.width}")
        if not (self.rate > 0 and 0 <= self.discount < 1 and 0 < self.polyak <= 1):
            raise UserError(f"rate must be positive, discount in [0, 1) and polyak in (0, 1], not {self}")


class Networks:
    """M networks with two hidden SiLU layers, [M, n, in] -> [M, n, out]."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters

    @classmethod
    def drawn(cls, runs: int, arms: int, sizes: Sequence[int], generator: torch.Generator) -> Networks:
        """The same first weights for every arm of a run."""
        parameters = []
        for rows, columns in pairwise(sizes):
            weight = torch.randn(runs, rows, columns, generator=generator) / rows**0.5
            parameters += [weight.repeat(arms, 1, 1).requires_grad_()]
            parameters += [torch.zeros(runs * arms, 1, columns).requires_grad_()]
        return cls(parameters)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of the last layer."""
        return forward(self.parameters, x, torch.nn.functional.silu)

    def frozen(self) -> Networks:
        """A copy without gradient."""
        return Networks([p.detach().clone() for p in self.parameters])


class ReleasedAdam:
    """The release's optimiser: no bias correction, decay applied with the same rate."""

    def __init__(self, parameters: Iterable[Tensor], rate: float) -> None:
        self.parameters, self.rate = list(parameters), rate
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss."""
        slopes = torch.autograd.grad(loss, self.parameters)
        phi = (math.sqrt(5) - 1) / 2
        for p, slope, m, v in zip(self.parameters, slopes, self.first, self.second, strict=True):
            m.lerp_(slope, 1 - phi)
            v.mul_(0.995).addcmul_(slope, slope, value=0.005)
            p.sub_(self.rate * (m / (v.sqrt() + 1e-8) + 0.01 * p))


def reward(state: Tensor) -> Tensor:
    """1 - (x^2 + v^2 / 10) of states [..., 2]."""
    return 1 - (state[..., 0].square() + 0.1 * state[..., 1].square())


def advance(state: Tensor, action: Tensor) -> Tensor:
    """The next state [..., 2] after an action [..., 1]."""
    x, v = state[..., :1], state[..., 1:]
    return torch.cat([x + 0.1 * v, v + 0.1 * action], -1).clamp(-LIMIT, LIMIT)


class Agent:
    """All members of all arms: one actor and three critics each, with target critics."""

    def __init__(self, task: Task, arms: Sequence[Arm], generator: torch.Generator) -> None:
        def drawn(*sizes: int) -> Networks:
            return Networks.drawn(task.runs, len(arms), sizes, generator)

        h = task.width
        self.task = task
        self.actor = drawn(2, h, h, 3)
        self.critics = [drawn(3, h, h, h // 4) for _ in range(3)]
        self.targets = [critic.frozen() for critic in self.critics]
        trained = [p for network in (self.actor, *self.critics) for p in network.parameters]
        self.optimizer = ReleasedAdam(trained, task.rate)
        each = [[arm.swaddling, arm.loudness, arm.penalty] for arm in arms]
        self.swaddling, self.loudness, self.penalty = torch.tensor(each).repeat_interleave(task.runs, 0).unbind(1)
        self.base = torch.zeros(len(arms) * task.runs, 1)

    def act(self, state: Tensor, normal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions, signals S A, scales and betas [M, n, 1] for states [M, n, 2]; draws of 0 leave the noise out."""
        direction, scale, beta = heads(self.actor(state))
        noise = self.loudness[:, None, None] * bounded_noise(normal)
        return torch.tanh(scale * direction + noise), scale * direction, scale, beta

    def learn(self, state: Tensor, action: Tensor, rewards: Tensor, after: Tensor, normal: Tensor) -> None:
        """One joint step of actor and critics on transitions [M, n, ...]."""
        planned, signal, scale, beta = self.act(after, normal)
        inputs = torch.cat([after, planned], -1)
        value = soft_value(torch.cat([target(inputs) for target in self.targets], -1))
        goal = (rewards + self.task.discount * value.detach())[..., None]
        inputs = torch.cat([state, action], -1)
        errors = torch.cat([critic(inputs) for critic in self.critics], -1) - goal
        gain, base = temporal_advantage(value, self.base)
        own = sum(swaddling_terms(scale, beta), torch.zeros_like(scale)).mean((1, 2))
        loss = -(gain.abs() * torch.tanh(gain / 2)).mean(1) + (errors * torch.tanh(errors / 2)).mean((1, 2))
        weak = self.swaddling * own + self.penalty * signal.square().mean((1, 2))
        self.optimizer.step((loss + weak).sum())
        self.base = base.mean(1, keepdim=True)
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for kept, new in zip(target.parameters, critic.parameters, strict=True):
                    kept.lerp_(new, self.task.polyak)


@dataclass(frozen=True)
class Outcome:
    """One arm. Means over evaluation episodes without noise, [R]: reward per step, scale S, |a|, change of the action
    from step to step, and share of actions beyond 0.9. `path` [HORIZON, R]: the action of one episode from (0.5, 0)."""

    reward: Tensor
    scale: Tensor
    size: Tensor
    jerk: Tensor
    saturated: Tensor
    path: Tensor


def run(task: Task | None = None, arms: dict[str, Arm] | None = None) -> dict[str, Outcome]:
    """Train every arm from equal weights on equal draws, then evaluate without noise."""
    task, arms = task or Task(), arms or ARMS
    generator = torch.Generator().manual_seed(task.seed)
    agent = Agent(task, list(arms.values()), generator)
    members = task.runs * len(arms)
    memory = torch.zeros(members, task.steps, 6)
    batch = 3 * (task.width // 4)
    for step in range(task.steps):
        if step % HORIZON == 0:
            state = _starts(task.runs, generator).repeat(len(arms), 1, 1)
        with torch.no_grad():
            action = agent.act(state, _shared(task, len(arms), 1, generator))[0]
            after = advance(state, action)
        memory[:, step] = torch.cat([state, action, reward(after)[..., None], after], -1)[:, 0]
        state = after
        if step >= task.warm_up:
            chances = fading_probabilities(step + 1)
            for _ in range(task.updates):
                rows = memory[:, torch.multinomial(chances, batch, replacement=True, generator=generator)]
                normal = _shared(task, len(arms), batch, generator)
                agent.learn(rows[..., :2], rows[..., 2:3], rows[..., 3], rows[..., 4:], normal)
    found = _evaluate(agent, members, generator)
    return {
        arm: Outcome(*(values[..., i * task.runs : (i + 1) * task.runs] for values in found))
        for i, arm in enumerate(arms)
    }


def _starts(count: int, generator: torch.Generator) -> Tensor:
    """Uniform starts [count, 1, 2]: x in (-0.5, 0.5), v in (-0.5, 0.5)."""
    return torch.rand(count, 1, 2, generator=generator) - 0.5


def _shared(task: Task, arms: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(task.runs, count, 1, generator=generator).repeat(arms, 1, 1)


@torch.no_grad()
def _evaluate(agent: Agent, members: int, generator: torch.Generator) -> list[Tensor]:
    """The fields of `Outcome` for all members, over 32 shared episodes and one from (0.5, 0)."""
    state = torch.cat([torch.tensor([[[0.5, 0.0]]]), _starts(32, generator)]).transpose(0, 1).repeat(members, 1, 1)
    actions, scales, rewards = [], [], []
    for _ in range(HORIZON):
        action, _, scale, _ = agent.act(state, torch.zeros(members, 33, 1))
        state = advance(state, action)
        actions.append(action[..., 0])
        scales.append(scale[..., 0])
        rewards.append(reward(state))
    a, s, r = (torch.stack(values) for values in (actions, scales, rewards))  # [HORIZON, M, 33]

    def mean(values: Tensor) -> Tensor:
        return values[..., 1:].float().mean((0, 2))

    return [mean(r), mean(s), mean(a.abs()), mean(a.diff(dim=0).abs()), mean(a.abs() > 0.9), a[..., 0]]
