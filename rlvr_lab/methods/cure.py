r"""CURE: half the exploration starts inside earlier responses, just before an uncertain word (arXiv 2508.11016).

    stage 1   n1 responses o to the question q;   H_t = -sum_v pi ln pi of every token, in nats
              candidates: walk positions by descending H, accept p > 0 whose token is no special one and whose text,
              stripped, has at least `min_chars` characters, until `top_k` are accepted
              p* uniform among them, 0 where there is none;    n2 responses from  q + o_{<p*}
    stage 2   plain DAPO from the question (`n2: 0`)

The group is the n1 (1 + n2) responses [B rows], originals first, with one baseline for all. The critical token is
sampled again. What a branch was given belongs to its prompt: no loss on it. Its verdict is that of the whole text,
because an answer may begin in the prefix. A branch may have `rollout.max_tokens` new tokens, so that its context can
exceed a root's; compare at equal generated tokens. Loss, advantage and filter are those of the composition: `grpo`,
`clip_higher`, `dynamic_sampling`, `overlong`.

Card: papers/cure.md. Code compared: bytedance/CURE @ c904b38, which cuts a start that is longer than its prompt window
P on the **right**, so that a long prefix loses the critical position (`window`; null cuts nothing). The paper's top-K
has no text filter, keeps the critical token and says nothing of a window. `group_by_start_state` gives branches of one
root a baseline of their own, and the roots theirs: A = (R - mean) / (std + 1e-6) with the sample std [card's option].

Presets: `paper`, `released`, `stage2`, `tiny` (K 5, one-character words count too). Control:
`critical_token_type: random` visits positions in random order, under the same filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.advantages import group_advantage
from ..core.paths import ROOT, Path, to_rollout
from ..core.rollout import Rollout
from ..core.trees import Fork, Order, TreeDraws, candidates, grow, pick, plant, ranking
from ..errors import UserError
from ._settings import check, check_choice
from .base import Method

RESTARTS = 0.5
"""Share of responses without a candidate above which the user is told."""


def window_cut(prompt: Sequence[int], prefix: Sequence[int], window: int | None) -> tuple[list[int], int]:
    """The prompt and how many tokens of the prefix remain, where prompt and prefix together are cut on the right to
    `window` tokens. A prompt that fills the window is cut itself, and nothing of the prefix remains."""
    if window is None:
        return list(prompt), len(prefix)
    return list(prompt)[:window], min(len(prefix), max(window - len(prompt), 0))


def start_states(rollout: Rollout) -> Tensor:
    """Dense number [B] of the state that each response was sampled from: the question of its group, or a root's prefix.
    A branch that kept nothing started from the question."""
    parent = rollout.require("parent_id", by="cure").clone()
    parent[rollout.require("prefix_length", by="cure") == 0] = ROOT
    index: Tensor = torch.unique(torch.stack([rollout.group_id, parent]), dim=1, return_inverse=True)[1]
    return index


@dataclass(frozen=True)
class CUREConfig:
    """Settings. `n1` responses from the question, `n2` from inside each of them; 0 is stage 2, without branches.

    `filter_first` is the code's reading of "top-K", walking on until K words are accepted; else only the K positions of
    highest entropy are considered. `window`: most tokens of a branch's start, its question included.
    """

    n1: int = 4
    n2: int = 3
    top_k: int = 20
    filter_first: bool = True
    min_chars: int = 2
    keep_critical: bool = False
    window: int | None = None
    critical_token_type: Order = "entropy"
    group_by_start_state: bool = False

    def __post_init__(self) -> None:
        check(self.n1 >= 1, "cure.n1", "be at least 1", self.n1)
        check(self.n2 >= 0, "cure.n2", "not be negative", self.n2)
        check(self.top_k >= 1, "cure.top_k", "be at least 1", self.top_k)
        check(self.min_chars >= 0, "cure.min_chars", "not be negative", self.min_chars)
        check(self.window is None or self.window >= 1, "cure.window", "be at least 1 or null", self.window)
        check_choice(self.critical_token_type, ("entropy", "random"), "cure.critical_token_type")


class CURE(Method):
    """Owner of `sample`; with `group_by_start_state` also of `advantage`. `channels` only measures."""

    slug: ClassVar[str] = "cure"
    requires: tuple[str, ...] = ("parent_id", "prefix_length", "branch_position")
    config_class: ClassVar[type[CUREConfig]] = CUREConfig
    presets: ClassVar[Mapping[str, CUREConfig]] = {
        "paper": CUREConfig(filter_first=False, min_chars=0, keep_critical=True),
        "released": CUREConfig(window=1500),
        "stage2": CUREConfig(n1=16, n2=0),
        "tiny": CUREConfig(top_k=5, min_chars=1),
    }

    def __init__(self, config: CUREConfig | None = None) -> None:
        self.config = config or CUREConfig()
        self.requires = type(self).requires if self.config.n2 else ()
        self._figures: dict[str, float] = {}
        self._said = False
        self._pending: list[str] = []

    def has(self, hook: str) -> bool:
        """Stage 2 samples as any other method; the advantage stays the base's unless it is by start state."""
        off = {
            "sample": not self.config.n2,
            "channels": not self.config.n2,
            "advantage": not (self.config.n2 and self.config.group_by_start_state),
        }
        return super().has(hook) and not off.get(hook, False)

    def sample(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Any,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
    ) -> Rollout:
        """`group_size` = n1 (1 + n2) rows per prompt: the originals, then the branches of each.

        Raises UserError for another `rollout.group_size`, and in a multi-turn environment.
        """
        c = self.config
        if group_size != c.n1 * (1 + c.n2):
            raise UserError(
                f"rollout.group_size is {group_size}, but methods.cure.n1 = {c.n1} and n2 = {c.n2} make n1 (1 + n2) = "
                f"{c.n1 * (1 + c.n2)} responses to a prompt; set rollout.group_size={c.n1 * (1 + c.n2)}"
            )
        if getattr(engine, "turns", None) is not None:
            raise UserError("method 'cure' cannot branch inside an episode of several turns; choose a plain data.task")
        roots = plant(engine, prompts, c.n1, sampling, generator, problem_ids)
        if c.critical_token_type == "entropy":
            engine.with_entropy(roots)
        forks = self.forks(roots, word_filter(engine.policy, c.min_chars), sampling.max_tokens, TreeDraws(generator))
        paths = grow(engine, roots, lambda _, turn: forks if turn == 0 else [], sampling, generator)
        temperature = None if sampling.temper is None else sampling.temperature
        device = engine.policy.device
        return to_rollout(
            paths, pad_id=engine.policy.pad_id, version=version, device=device, policy_temperature=temperature
        )

    def forks(
        self, roots: Sequence[Path], accept: Callable[[int], bool], max_tokens: int, draws: TreeDraws
    ) -> list[Fork]:
        """n2 forks of every root at one position of its own. `accept` judges token ids."""
        c, forks, empty = self.config, list[Fork](), 0
        for root in roots:
            generator = draws.of(root)
            found = self.candidates(root.ids, root.entropy or [], accept, generator)
            empty += not found
            position = pick(found, generator)
            kept = position + int(c.keep_critical and bool(found))
            prompt, length = window_cut(root.prompt, root.ids[:kept], c.window)
            forks += [Fork(root, length, max_tokens, position, learn=False, prompt=prompt)] * c.n2
        self._warn(empty, len(roots))
        return forks

    def candidates(
        self, ids: Sequence[int], entropy: Sequence[float], accept: Callable[[int], bool], generator: torch.Generator
    ) -> list[int]:
        """Positions of one response at which it may be cut, the most uncertain first (or in random order)."""
        c = self.config
        ranked = ranking(entropy or [0.0] * len(ids), c.critical_token_type, generator)
        return candidates(ranked, lambda p: p > 0 and accept(ids[p]), c.top_k, c.filter_first)

    def _warn(self, empty: int, responses: int) -> None:
        if self._said or empty <= RESTARTS * responses:
            return
        self._said = True
        self._pending.append(
            f"method 'cure' found no word to branch at in {empty} of {responses} responses, whose branches are fresh "
            f"samples of the question: methods.cure.min_chars is {self.config.min_chars}; a vocabulary of shorter "
            "words wants 1 or 0. The share is logged as cure.restarts"
        )

    def notices(self) -> list[str]:
        """Says once that most responses had no candidate, so that the method did not act."""
        found, self._pending = self._pending, []
        return found

    def advantage(self, rollout: Rollout) -> Tensor:
        """With `group_by_start_state`: a response against those that began where it began [B, T]."""
        reward = rollout.require("reward", by=self.slug)
        return group_advantage(reward, start_states(rollout))[:, None].expand(rollout.response_ids.shape)

    def channels(self, rollout: Rollout, advantage_BT: Tensor) -> dict[str, Tensor]:
        """Adds none; takes the step's figures of roots and branches."""
        branch = rollout.require("parent_id", by=self.slug) != ROOT
        kept = rollout.require("prefix_length", by=self.slug)
        mask, entropy = rollout.mask, rollout.statistics.get("token_entropy")
        size = mask.sum(1)
        mean_B = advantage_BT.masked_fill(~mask, 0.0).sum(1) / size.clamp_min(1)
        self._figures = {
            "restarts": _mean((rollout.require("branch_position", by=self.slug) == 0).float()[branch]),
            "prefix_tokens": _mean(kept[branch].float()),
        }
        for name, rows in (("root", ~branch), ("branch", branch)):
            self._figures[f"{name}_advantage"] = _mean(mean_B[rows & (size > 0)])
            values = None if entropy is None else entropy[rows][mask[rows]]
            self._figures[f"{name}_entropy"] = math.nan if values is None else _mean(values)
        return {}

    def metrics(self) -> dict[str, float]:
        """Of the rows that are trained on: `restarts`, the share of branches with p* = 0; mean `prefix_tokens` of a
        branch; `root_advantage` and `branch_advantage`, which differ because branches of a good root often succeed;
        `root_entropy` and `branch_entropy`, nats per new token: only the first is of fresh samples of the question."""
        return dict(self._figures)


def word_filter(policy: Any, min_chars: int) -> Callable[[int], bool]:
    """Whether a token id is no special one and its text, stripped, has at least `min_chars` characters."""
    special = {policy.pad_id, *policy.eos_ids, *getattr(policy.tokenizer, "all_special_ids", ())}
    known: dict[int, bool] = {}

    def accept(token: int) -> bool:
        if token not in known:
            long_enough = min_chars == 0 or len(policy.decode([token]).strip()) >= min_chars
            known[token] = token not in special and long_enough
        return known[token]

    return accept


def _mean(values: Tensor) -> float:
    """nan for no value."""
    return float(values.mean()) if values.numel() else math.nan
