r"""AEPO: imitate one's own successes drawn at another temperature, and so steer entropy to a target (arXiv 2510.08141).

    grad J = grad J_GRPO + alpha E_{o ~ pi^T}[ R(o) grad log pi(o) ],      pi^T proportional to pi^(1/T), R in {0, 1}
    T = T_high where the entropy is at or below the target, else T_low

Not importance-corrected for T: to first order the extra term moves the entropy by (T - 1) sum_a [pi_a (log pi_a +
H)]^2 (`entropy_drift` has the exact form). Entropies in nats; advantages [B, T]. Two other methods are called AEPO too.

A share of the step's prompts, evenly spread over it, is sampled again at T (`sample`, which owns the hook). `mode: add`
gives every token of a success the advantage alpha, such that both expectations are token means of their own; `mode:
replace` is the release: the first successes (GRPO advantage above 0.05 among the extra responses, at most `most`, half
of that above the target) take the places of as many rows of the batch, with advantage 1. Log-probs of all rows are
those of the policy's own temperature, so `update.recompute_old_logprob: true` is needed. Where nothing succeeds the
step is plain GRPO.

Card: papers/arbitrary_entropy.md. Code compared: 597358816/AEPO @ b353a05. It compares -mean log pi of the last mixed
batch (`entropy: sample`); the default here is the exact token entropy of the rows at the policy's temperature. Its
top-p 0.99 is not reproduced. `dcpo_advantage` is the follow-up in the same repository, which samples nothing more.

Presets: `paper` (add, alpha 0.05 [inferred], target 0.75), `released` (replace, 60 rows), `tiny` (add, T 2 or 0.8 on
half of the prompts, alpha 4: in the tiny lab successes drawn at T 1.2 are the policy's likely answers and lower the
entropy).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.advantages import group_advantage
from ..core.dynamics import first_order_change
from ..core.reduce import Reduction, masked_mean
from ..core.rollout import Rollout
from ..core.rows import concatenate
from ._settings import check, check_choice, check_reachable
from .base import Method

THRESHOLD = 0.05  # of the advantage above which the release calls a response a success
EXTRA, CHOSEN = "arbitrary_entropy.extra", "arbitrary_entropy.advantage"


def control_temperature(entropy: float, target: float, high: float, low: float) -> float:
    """T_high at or below the target, T_low above it."""
    return high if entropy <= target else low


def replacement_number(successes: int, most: int, entropy: float, target: float) -> int:
    """Rows that the release replaces: at most `most`, half of them above the target."""
    number = min(most, successes)
    return number // 2 if entropy > target else number


def again_count(share: float, prompts: int) -> int:
    """How many of a step's first prompts are sampled again: the ceiling of their share."""
    return math.ceil(round(share * prompts, 9))


def again_places(share: float, first: int, count: int) -> list[int]:
    """Which of `count` prompts, the first of them at place `first` of the step, are sampled again. They are spread
    evenly over the step, so that the same ones are chosen however the step is divided over processes."""
    return [i for i in range(count) if again_count(share, first + i) < again_count(share, first + i + 1)]


def successes(advantage_B: Tensor) -> Tensor:
    """Rows whose advantage is above 0.05; none of a group in which all are right."""
    return (advantage_B > THRESHOLD).nonzero().squeeze(1)


def reinforce_direction(logits: Tensor, temperature: float) -> Tensor:
    """Expected gradient of log pi with respect to the logits when actions come from pi^T: pi^T - pi."""
    return torch.softmax(logits / temperature, -1) - torch.softmax(logits, -1)


def entropy_drift(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """d entropy / d step of that gradient: exact, and to first order in T - 1, (T - 1) sum [pi (log pi + H)]^2.

    The exact one has the sign of T - 1 for every policy and every T; imitating successes alone need not.
    """
    log_p = torch.log_softmax(logits, -1)
    weighted = log_p.exp() * (log_p - (log_p.exp() * log_p).sum(-1, keepdim=True))
    exact = first_order_change(logits, reinforce_direction(logits, temperature))
    return exact, (temperature - 1) * weighted.square().sum(-1)


def dcpo_advantage(
    advantage_BT: Tensor, correct_B: Tensor, old_BT: Tensor, tempered_BT: Tensor, entropy: float, target: float
) -> tuple[float, Tensor]:
    """DCPO: (1 - a) A + a R pi^T_old / pi_old [B, T], a = g / (1 + g) with g = min(|target - H|, 0.1) / success rate.

    Where nothing is correct a is 0 (the release divides by zero).
    """
    rate = float(correct_B.to(advantage_BT.dtype).mean())
    gap = min(abs(target - entropy), 0.1) / rate if rate else 0.0
    a = gap / (1 + gap)
    ratio = (tempered_BT - old_BT).exp()
    return a, (1 - a) * advantage_BT + a * correct_B[:, None] * ratio


@dataclass(frozen=True)
class ArbitraryEntropyConfig:
    """Settings. `alpha` belongs to mode add, `most` to mode replace; `share` of the prompts is sampled again."""

    target: float = 0.75
    mode: Literal["add", "replace"] = "add"
    alpha: float = 0.05
    most: int = 60
    high: float = 1.2
    low: float = 0.8
    share: float = 0.25
    entropy: Literal["token", "sample"] = "token"

    def __post_init__(self) -> None:
        check(
            0 <= self.target < math.inf, "arbitrary_entropy.target", "be an entropy in nats, not negative", self.target
        )
        check_choice(self.mode, ("add", "replace"), "arbitrary_entropy.mode")
        check_choice(self.entropy, ("token", "sample"), "arbitrary_entropy.entropy")
        check(self.alpha >= 0, "arbitrary_entropy.alpha", "not be negative", self.alpha)
        check(self.most >= 0, "arbitrary_entropy.most", "not be negative", self.most)
        check(0 < self.low <= 1 <= self.high, "arbitrary_entropy.low", "satisfy 0 < low <= 1 <= high", self.low)
        check(0 < self.share <= 1, "arbitrary_entropy.share", "lie in (0, 1]", self.share)


class ArbitraryEntropy(Method):
    """Owns `sample` and `advantage`; `filter` measures the entropy and, in mode replace, exchanges rows."""

    slug: ClassVar[str] = "arbitrary_entropy"
    requires: tuple[str, ...] = ("reward", "correct", "old_logprob", "token_entropy")
    rescored: ClassVar[bool] = True
    config_class: ClassVar[type[ArbitraryEntropyConfig]] = ArbitraryEntropyConfig
    presets: ClassVar[Mapping[str, ArbitraryEntropyConfig]] = {
        "paper": ArbitraryEntropyConfig(),
        "released": ArbitraryEntropyConfig(mode="replace", entropy="sample"),
        "tiny": ArbitraryEntropyConfig(target=0.1, alpha=4.0, high=2.0, share=0.5),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: ArbitraryEntropyConfig | None = None) -> None:
        self.config = config or ArbitraryEntropyConfig()
        self.measured = 0.0
        self._drawn_at = math.nan

    @property
    def temperature(self) -> float:
        """Of the extra responses, relative to the policy's."""
        c = self.config
        return control_temperature(self.measured, c.target, c.high, c.low)

    def sample(
        self,
        engine: Any,
        prompts: Sequence[Any],
        group_size: int,
        sampling: Any,
        generator: torch.Generator,
        **rest: Any,
    ) -> Rollout:
        """All prompts at the policy's temperature, then a share of them again at T."""
        parts = [(engine.sample(prompts, group_size, sampling, generator, **rest), 0.0)]
        self._drawn_at = self.temperature
        again = again_places(self.config.share, sampling.first, len(prompts))
        if again:
            if rest.get("problem_ids") is not None:
                rest = rest | {"problem_ids": [rest["problem_ids"][i] for i in again]}
            # numbers of their own, which do not depend on who samples the prompts before
            first = again_count(self.config.share, sampling.first)
            tempered = replace(sampling.at(sampling.temperature * self._drawn_at), first=first)
            extra = engine.sample([prompts[i] for i in again], group_size, tempered, generator, **rest)
            parts.append((extra, 1.0))
        return concatenate(
            [
                part.with_(old_logprob=None, policy_temperature=sampling.temperature).with_statistics(
                    **{EXTRA: torch.full_like(part.behaviour_logprob, flag)}
                )
                for part, flag in parts
            ]
        )

    def check_run(self, vocabulary: int, steps: int) -> None:
        """Raises UserError for a target above log V."""
        check_reachable(self.config.target, vocabulary, "arbitrary_entropy.target")

    def metrics(self) -> dict[str, float]:
        """`entropy` that the controller compares with the target, and the extra responses' `temperature`, relative to
        the policy's."""
        return {"entropy": self.measured, "temperature": self._drawn_at}

    def filter(self, rollout: Rollout) -> Rollout:
        """Measure; in mode replace, exchange rows and record the advantages they keep. Extra rows go last, wherever
        the processes that sampled them left them."""
        rollout = rollout.rows(self._extra(rollout).long().argsort(stable=True))
        extra = self._extra(rollout)
        if self.config.entropy == "token":
            own = rollout.mask & ~extra[:, None]
            self.measured = float(masked_mean(rollout.require("token_entropy", by=self.slug), own))
        else:
            self.measured = -float(masked_mean(rollout.require("old_logprob", by=self.slug), rollout.mask))
        if self.config.mode == "add":
            return rollout
        reward = rollout.require("reward", by=self.slug)
        value = group_advantage(reward, rollout.group_id, "sample", 1e-6, "raw")
        main, others = (~extra).nonzero().squeeze(1), extra.nonzero().squeeze(1)
        chosen = others[successes(value[others])]
        number = replacement_number(len(chosen), self.config.most, self.measured, self.config.target)
        number = min(number, len(main))
        rows = torch.cat([chosen[:number], main[number:]])
        kept = torch.cat([torch.ones_like(value[:number]), value[main[number:]]])
        replaced = rollout.rows(rows)
        return replaced.with_statistics(**{CHOSEN: kept[:, None].expand(replaced.response_ids.shape)})

    def _extra(self, rollout: Rollout) -> Tensor:
        flags = rollout.require(EXTRA, by=self.slug)
        return flags[:, 0] > 0 if flags.shape[1] else torch.zeros(len(rollout), dtype=torch.bool)

    def advantage(self, rollout: Rollout) -> Tensor:
        """GRPO's advantage on the rows of the policy's temperature; alpha R, or 1, on the others."""
        if self.config.mode == "replace":
            return rollout.require(CHOSEN, by=self.slug)
        extra, mask = self._extra(rollout), rollout.mask
        reward = rollout.require("reward", by=self.slug)
        value = group_advantage(reward, rollout.group_id, "sample", 1e-6, "raw")
        right = rollout.require("correct", by=self.slug).to(value.dtype)
        # each of the two expectations is a mean over its own tokens
        total, other = float(mask.sum()), float(mask[extra].sum())
        own = total / max(total - other, 1.0)
        value = torch.where(extra, self.config.alpha * right * (total / max(other, 1.0)), value * own)
        return value[:, None].expand(mask.shape)

    def state_dict(self) -> dict[str, Any]:
        """The entropy that decides on the next temperature."""
        return {"measured": self.measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's measurement."""
        self.measured = float(state["measured"])
