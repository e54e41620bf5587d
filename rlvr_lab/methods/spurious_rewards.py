r"""Spurious rewards: training on signals that say nothing about correctness, and what clipping does to them.

Rules (arXiv 2506.10947), in place of the task's reward; the group advantage is GRPO's, equal groups give 0:

    ground_truth  1[correct]               random    Bernoulli(gamma), independent of everything, redrawn at every visit
    majority      1[answer = group's most frequent answer]      format  1[an answer could be read]
    incorrect     1[wrong, but readable]   or, with `incorrect: complement`, 1 - correct (the toy form)

**Clipping bias** (2506.10947, App. B.1; full text). For a reward independent of the rollout, with
mu = E[max(A, 0)], the expected gradient of the clipped objective is mu times

    +grad r  where r < 1 - eps_low,     0  inside,     -grad r  where r > 1 + eps_high,        grad r = r grad log pi

and exactly 0 without clipping: a restoring force toward the clip range. A token with pi_old > 1 / (1 + eps_high) can
never exceed the range, a rare one is pushed back after a small absolute rise. (The paper's case list has a typo: its
second A < 0 case must read r > 1 - eps.)

**Entropy without clipping** (2512.16912 uses pi_new ~ pi_old exp(eta A)). For independent zero-mean unit-variance A

    E[dH] = eta^2 / 2 (2 sum_a p_a^2 (log p_a + H) - 1 + sum_a p_a^2) + O(eta^3)                            [inferred]

negative for flat policies, positive for skewed ones. "Clipping lowers entropy" reverses at large steps or a very tight
clip: report the clip fraction with every such run.

**Misalignment** [inferred; exact by enumeration]: n_c of G rollouts are correct, n_i are not, labels are Bernoulli
(gamma). The centred advantage mass on the correct ones falls by D with E[D] = n_c n_i / G and
Var[D] = gamma (1 - gamma) n_c n_i / G, so a model that is mostly right loses less.

No official code for 2512.16912 (card: papers/spurious_rewards.md); its own theorems could not be read verbatim.
Presets: `paper` (random reward, 1[wrong but readable]), `released` (the same with the complement form).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import Std, group_advantage
from ..core.entropy import softmax_entropy
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError, nearest
from .base import Method

Rule = Literal["ground_truth", "random", "incorrect", "majority", "format"]
Incorrect = Literal["readable", "complement"]
MOST_ACTIONS = 18  # 2^18 sign patterns


# ------------------------------------------------------------------------------------------------------- the rules


def random_reward(uniform_B: Tensor, gamma: float) -> Tensor:
    """1 where a uniform number lies below gamma, else 0 [B]."""
    return (uniform_B < gamma).to(uniform_B.dtype)


def incorrect_reward(correct_B: Tensor, readable_B: Tensor | None = None) -> Tensor:
    """1 for a wrong answer [B]; where `readable_B` is given, only for one that could be read."""
    wrong = ~correct_B if readable_B is None else ~correct_B & readable_B
    return wrong.to(torch.get_default_dtype())


def readable(answers: Sequence[str | None]) -> Tensor:
    """True [B] where an answer could be read."""
    return torch.tensor([answer is not None for answer in answers], dtype=torch.bool)


def majority_reward(answers: Sequence[str | None], majority: Sequence[str | None]) -> Tensor:
    """1 where an answer equals its group's majority answer [B]; 0 for a missing one."""
    pairs = zip(answers, majority, strict=True)
    return torch.tensor([float(answer is not None and answer == most) for answer, most in pairs])


def group_majority(answers: Sequence[str | None], group_id_B: Tensor) -> list[str | None]:
    """Each response's most frequent answer in its group; ties go to the alphabetically first, so that the order of rows
    does not matter. None where no response of the group has an answer."""
    groups = group_id_B.tolist()
    counts: dict[int, Counter[str]] = {}
    for group, answer in zip(groups, answers, strict=True):
        if answer is not None:
            counts.setdefault(group, Counter())[answer] += 1
    most = {g: min(c, key=lambda answer: (-c[answer], answer)) for g, c in counts.items()}
    return [most.get(group) for group in groups]


# ---------------------------------------------------------------------------------------------------- the analysis


@dataclass(frozen=True)
class AdvantageMoments:
    """Of one rollout's group advantage under i.i.d. Bernoulli rewards, exact."""

    mu: float
    """E[max(A, 0)] = P(A > 0) E[A | A > 0], the positive advantage mass."""
    mean: float
    second_moment: float
    all_equal: float
    """Probability that the whole group has one reward, and so no advantage."""


def bernoulli_moments(group_size: int, gamma: float = 0.5, std: Std = "sample", eps: float = 0.0) -> AdvantageMoments:
    """Moments of the group advantage, summed over the number of ones in the group (the same as over all 2^G patterns).

    Raises ValueError unless group_size >= 1 and 0 <= gamma <= 1.
    """
    if group_size < 1 or not 0 <= gamma <= 1:
        raise ValueError(f"needs group_size >= 1 and gamma in [0, 1], not {group_size} and {gamma}")
    mu = mean = second = equal = 0.0
    for ones in range(group_size + 1):
        chance = _binomial(group_size, ones, gamma)
        if ones in (0, group_size):
            equal += chance
            continue
        reward = torch.zeros(group_size, dtype=torch.float64)
        reward[:ones] = 1.0
        advantage = group_advantage(reward, torch.zeros(group_size, dtype=torch.long), std, eps)
        mu += chance * float(advantage.clamp_min(0).mean())
        mean += chance * float(advantage.mean())
        second += chance * float(advantage.square().mean())
    return AdvantageMoments(mu, mean, second, equal)


def _binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def clipping_bias(ratio: Tensor, mu: float, lower: float, upper: float) -> Tensor:
    """Coefficient of grad r in the expected gradient (ascent): +mu below `lower`, -mu above `upper`, else 0.

    `lower` and `upper` bound the ratio itself. Times r it is the coefficient of grad log pi.
    """
    return mu * ((ratio < lower).to(ratio.dtype) - (ratio > upper).to(ratio.dtype))


def largest_ratio(old_logprob: Tensor) -> Tensor:
    """1 / pi_old: how far the importance ratio of a token can rise at most."""
    return (-old_logprob).exp()


def second_order_coefficient(probs: Tensor) -> Tensor:
    """2 sum p^2 (log p + H) - 1 + sum p^2 over the last axis; E[dH] is eta^2 / 2 times this. [inferred]"""
    inside = torch.where(probs > 0, probs, 1.0)
    entropy = -(probs * inside.log()).sum(-1, keepdim=True)
    squares = probs.square()
    return 2 * (squares * (inside.log() + entropy)).sum(-1) - 1 + squares.sum(-1)


def expected_entropy_change(probs: Tensor, eta: float) -> float:
    """E[H(new) - H(old)] for pi_new ~ pi_old exp(eta A), A = +-1 independently per action, over all 2^V patterns.

    Raises ValueError for more than 18 actions.
    """
    if probs.ndim != 1 or len(probs) > MOST_ACTIONS:
        raise ValueError(f"needs one distribution of at most {MOST_ACTIONS} actions, not {tuple(probs.shape)}")
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=len(probs))), dtype=probs.dtype)
    change = softmax_entropy(probs.log() + eta * signs) - softmax_entropy(probs.log())
    return float(change.mean())


@dataclass(frozen=True)
class Misalignment:
    """Advantage mass (reward - group mean, no std division) that the correct rollouts of one group lose."""

    oracle_mass: float
    """With true labels: n_c n_i / G."""
    expected_loss: float
    variance_loss: float
    closed_form_variance: float
    """gamma (1 - gamma) n_c n_i / G; the closed form of the mean is `oracle_mass`."""
    chance_of_positive_mass: float
    """Probability that the correct rollouts gain on balance."""
    false_positives: float
    false_negatives: float


def misalignment(group_size: int, correct: int, gamma: float = 0.5) -> Misalignment:
    """Random labels on a group with `correct` right rollouts, exact over all patterns. [inferred]

    Raises ValueError unless 0 <= correct <= group_size and 0 <= gamma <= 1.
    """
    if group_size < 1 or not 0 <= correct <= group_size or not 0 <= gamma <= 1:
        raise ValueError(f"impossible group: {correct} correct of {group_size}, gamma {gamma}")
    wrong = group_size - correct
    oracle = correct * wrong / group_size
    mean = square = positive = 0.0
    for right_ones, wrong_ones in product(range(correct + 1), range(wrong + 1)):
        chance = _binomial(correct, right_ones, gamma) * _binomial(wrong, wrong_ones, gamma)
        # G times the mass is a whole number, so that its sign is exact
        mass = group_size * right_ones - correct * (right_ones + wrong_ones)
        loss = oracle - mass / group_size
        mean, square, positive = mean + chance * loss, square + chance * loss * loss, positive + chance * (mass > 0)
    closed = gamma * (1 - gamma) * oracle
    return Misalignment(oracle, mean, square - mean**2, closed, positive, gamma * wrong, (1 - gamma) * correct)


# ------------------------------------------------------------------------------------------------------ the method


@dataclass(frozen=True)
class SpuriousRewardsConfig:
    """`gamma` is the chance of a 1 and `seed` the generator's of rule `random`."""

    rule: Rule = "random"
    gamma: float = 0.5
    incorrect: Incorrect = "readable"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("rule", get_args(Rule)), ("incorrect", get_args(Incorrect))):
            value = getattr(self, name)
            if value not in allowed:
                hint = nearest(str(value), allowed)
                raise UserError(f"methods.spurious_rewards.{name} '{value}' does not exist; {hint}")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"methods.spurious_rewards.gamma must lie in [0, 1], not {self.gamma}")


class SpuriousRewards(Method):
    """Replaces the task's reward by a rule; the advantage and the loss stay the base method's."""

    slug: ClassVar[str] = "spurious_rewards"
    requires: tuple[str, ...] = ()
    replaces_reward: ClassVar[bool] = True
    config_class: ClassVar[type[SpuriousRewardsConfig]] = SpuriousRewardsConfig
    presets: ClassVar[Mapping[str, SpuriousRewardsConfig]] = {
        "paper": SpuriousRewardsConfig(),
        "released": SpuriousRewardsConfig(incorrect="complement"),
    }

    def __init__(self, config: SpuriousRewardsConfig | None = None) -> None:
        self.config = config or SpuriousRewardsConfig()
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """One component, `spurious_rewards`, of zeros and ones [B]."""
        value = self._rule(rollout).to(rollout.response_ids.device, torch.float32)
        return {self.slug: value}

    def _rule(self, rollout: Rollout) -> Tensor:
        rule = self.config.rule
        if rule == "random":
            # drawn in canonical order, so that shuffled rows keep their rewards
            reward = torch.empty(len(rollout))
            uniform = torch.rand(len(rollout), generator=self.generator)
            reward[canonical_order(rollout).cpu()] = random_reward(uniform, self.config.gamma)
            return reward
        if rule == "ground_truth":
            return rollout.require("correct", by=self.slug)
        if rule == "incorrect":
            correct = rollout.require("correct", by=self.slug)
            whole = self.config.incorrect == "complement"
            return incorrect_reward(correct, None if whole else readable(self._answers(rollout)).to(correct.device))
        answers = self._answers(rollout)
        if rule == "format":
            return readable(answers)
        return majority_reward(answers, group_majority(answers, rollout.group_id))

    def _answers(self, rollout: Rollout) -> tuple[str | None, ...]:
        if rollout.answer is None:
            rollout.require("answer", by=self.slug)  # raises, and names what provides it
            raise AssertionError
        return rollout.answer

    def state_dict(self) -> dict[str, Any]:
        """State of the random generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the saved random numbers."""
        self.generator.set_state(state["generator"].cpu())
