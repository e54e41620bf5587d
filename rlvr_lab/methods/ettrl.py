r"""ETTRL: test-time RL on majority votes, with a tree of responses and an advantage by confidence (arXiv 2508.11356).

    TTRL      label = most frequent answer of the prompt's R responses;   r_i = 1[answer_i = label];   GRPO on r
    ETMR      M root responses; at each one's N positions of highest token entropy, B new ends:  R = M (1 + B N)
    Adv-Res   Y_i = 2 - H_i / mean_j H_j,   A_i <- Y_i A_i           H_i: mean token entropy of response i, a constant
    Adv-Clip  A_i <- clip(A_i, -beta, beta)
    A_i = (r_i - mean) / (std + 1e-6)   within the prompt, sample std, 0 for a prompt of one response

Shapes: r, H, Y, A [B], then the same on every token [B, T]; entropies in nats. No label of the task is read, save for
measuring how often the vote is right. Votes are counted over `Rollout.cluster_id` (`data.clusters`); the first-seen
answer wins a tie, a response without an answer has no vote and reward 0, but counts in the majority's share.

**Sign hazard** [inferred]: Y_i < 0 where H_i > 2 mean H, and then a response that agrees with the vote is pushed down.
`y_min` bounds Y from below (null is the paper's; 0 is safe); `negative_y` is logged. Mean H = 0 gives Y = 1.

Card: papers/ettrl.md. No official code; base code compared: PRIME-RL/TTRL @ 3e2cc93, which votes with 64 and trains on
the first 32. Decided here [inferred], each an option: of all leaves a seeded random subset is trained on (`trained`,
`subset`), so that no tree is favoured, and baseline and mean H are those of the subset; a copied prefix has gradient in
every leaf (`learn_prefix`); the fork token is sampled again (`keep_fork_token`); H_i is of the whole leaf
(`entropy_over`); ETMR and the two advantages are used apart (`shape`). A leaf has `rollout.max_tokens` tokens in all,
and a response shorter than N forks everywhere, which makes fewer leaves. `forks: 0` is TTRL: `rollout.group_size`
independent votes.

Presets: `paper` (ETMR, M 12, N 2, B 2, 32 of 60), `released` (TTRL's code), `adv_res`, `adv_clip` (beta 2), `tiny`
(M 3, N 2, B 2). Controls: `order: random` forks anywhere, `shuffled` deals each prompt's Y to other responses of it,
`label: random` is a fair coin for each response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_advantage, group_range, group_sums
from ..core.paths import Path, to_rollout
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..core.trees import Fork, Order, TreeDraws, candidates, grow, plant, ranking, token_counts
from ..errors import UserError
from ._draws import DrawingMethod, StepDraws
from ._settings import check, check_choice
from .empo import cluster_sizes, group_sizes, semantic_entropies

Shape = Literal["none", "res", "clip"]
Subset = Literal["random", "first"]
Span = Literal["leaf", "new"]
Label = Literal["majority", "random"]


def majority(cluster_B: Tensor, group_id_B: Tensor) -> Tensor:
    """True [B] for the responses whose answer won their prompt's vote; of answers with equal votes the one that stands
    first wins. Nobody wins where no response has an answer (ids below 0)."""
    sizes = cluster_sizes(cluster_B, group_id_B)
    row = torch.arange(len(cluster_B), dtype=torch.float64, device=cluster_B.device)
    tied = (sizes == group_range(sizes, group_id_B)[1]) & (sizes > 0)
    first = group_range(torch.where(tied, row, math.inf), group_id_B)[0]
    winner = torch.where(row == first, cluster_B.double(), -math.inf)
    return tied & (cluster_B == group_range(winner, group_id_B)[1])


def majority_ratio(cluster_B: Tensor, group_id_B: Tensor) -> Tensor:
    """Votes of the winner over all responses of the prompt [B], those without an answer included; 0 for no winner."""
    return group_range(cluster_sizes(cluster_B, group_id_B), group_id_B)[1] / group_sizes(group_id_B)


def confidence_weight(entropy_B: Tensor, group_id_B: Tensor, y_min: float | None = None) -> Tensor:
    """Y [B] = 2 - H / mean H of the prompt's responses, at least `y_min`; 1 where mean H is 0. No gradient."""
    h = entropy_B.detach()
    total, size, _ = group_sums(h, group_id_B)
    mean = total / size
    y = torch.where(mean == 0, 1.0, 2 - h / mean.masked_fill(mean == 0, 1.0))
    return y if y_min is None else y.clamp_min(y_min)


def response_entropy(entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean token entropy [B] over the marked tokens of each response; 0 for one without any, which no loss can feel."""
    return entropy_BT.masked_fill(~mask_BT, 0.0).sum(1) / mask_BT.sum(1).clamp_min(1)


@dataclass(frozen=True)
class ETTRLConfig:
    """Settings: `trees` M, `forks` N, `branches` B; `trained` leaves of a prompt are learned from, all where null."""

    trees: int = 12
    forks: int = 2
    branches: int = 2
    order: Order = "entropy"
    keep_fork_token: bool = False
    learn_prefix: bool = True
    trained: int | None = None
    subset: Subset = "random"
    shape: Shape = "none"
    beta: float = 2.0
    y_min: float | None = None
    entropy_over: Span = "leaf"
    shuffled: bool = False
    label: Label = "majority"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.trees >= 1, "ettrl.trees", "be at least 1", self.trees)
        check(self.forks >= 0, "ettrl.forks", "not be negative", self.forks)
        check(self.branches >= 1, "ettrl.branches", "be at least 1; forks: 0 grows no branch", self.branches)
        check(self.trained is None or self.trained >= 1, "ettrl.trained", "be at least 1 or null", self.trained)
        fits = self.trained is None or not self.forks or self.trained <= self.leaves
        check(fits, "ettrl.trained", f"not exceed M (1 + BN) = {self.leaves} leaves", self.trained)
        check(self.beta > 0, "ettrl.beta", "be positive", self.beta)
        check(self.y_min is None or self.y_min <= 1, "ettrl.y_min", "be at most 1, the mean of Y, or null", self.y_min)
        for name, kind in (("order", Order), ("subset", Subset), ("shape", Shape), ("entropy_over", Span),
                           ("label", Label)):  # fmt: skip
            check_choice(getattr(self, name), get_args(kind), f"ettrl.{name}")
        scored = self.learn_prefix or self.entropy_over == "new" or self.shape != "res"
        check(scored, "ettrl.entropy_over", "be 'new' where learn_prefix is off: no one scores such a prefix",
              self.entropy_over)  # fmt: skip

    @property
    def leaves(self) -> int:
        """M (1 + BN): whole responses of one prompt, where no root is shorter than N."""
        return self.trees * (1 + self.branches * self.forks)


class ETTRL(DrawingMethod):
    """Replaces the task's reward; owns `sample` unless `forks` is 0, and `advantage` unless `shape` is none."""

    slug: ClassVar[str] = "ettrl"
    replaces_reward: ClassVar[bool] = True
    config_class: ClassVar[type[ETTRLConfig]] = ETTRLConfig
    presets: ClassVar[Mapping[str, ETTRLConfig]] = {
        "paper": ETTRLConfig(trained=32),
        "released": ETTRLConfig(forks=0, trained=32, subset="first"),
        "adv_res": ETTRLConfig(forks=0, trained=32, shape="res"),
        "adv_clip": ETTRLConfig(forks=0, trained=32, shape="clip"),
        "tiny": ETTRLConfig(trees=3),
    }

    def __init__(self, config: ETTRLConfig | None = None) -> None:
        self.config = config or ETTRLConfig()
        self.requires = ("cluster_id", "token_entropy") if self.config.shape == "res" else ("cluster_id",)
        self.draws = StepDraws(self.config.seed)
        self._figures: dict[str, float] = {}

    def has(self, hook: str) -> bool:
        """Without forks, shape or subset the engine, the base's advantage and all rows stay as they are."""
        c = self.config
        off = {"sample": not c.forks, "advantage": c.shape == "none", "filter": c.trained is None}
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
        """`group_size` = M (1 + BN) rows per prompt, roots first; fewer where a root is shorter than N.

        Raises UserError for another `rollout.group_size`, and in a multi-turn environment.
        """
        c = self.config
        if group_size != c.leaves:
            raise UserError(
                f"rollout.group_size is {group_size}, but methods.ettrl.trees = {c.trees}, forks = {c.forks} and "
                f"branches = {c.branches} make M (1 + BN) = {c.leaves} leaves; set rollout.group_size={c.leaves}"
            )
        if getattr(engine, "turns", None) is not None:
            raise UserError("method 'ettrl' cannot fork inside an episode of several turns; choose a plain data.task")
        roots = plant(engine, prompts, c.trees, sampling, generator, problem_ids)
        if c.order == "entropy":
            engine.with_entropy(roots)
        forks = self.forks(roots, sampling.max_tokens, TreeDraws(generator))
        paths = grow(engine, roots, lambda _, turn: forks if turn == 0 else [], sampling, generator)
        temperature = None if sampling.temper is None else sampling.temperature
        device = engine.policy.device
        return to_rollout(
            paths, pad_id=engine.policy.pad_id, version=version, device=device, policy_temperature=temperature
        )

    def forks(self, roots: Sequence[Path], max_tokens: int, draws: TreeDraws) -> list[Fork]:
        """B forks at each of N positions of every root. Where the kept token ends the response or fills it, it is
        sampled again all the same: nothing could follow it."""
        c, forks = self.config, list[Fork]()
        for root in roots:
            for position in self.positions(root.entropy or [0.0] * len(root), draws.of(root)):
                kept = position + int(c.keep_fork_token and position + 1 < len(root))
                fork = Fork(root, kept, max_tokens - kept, position, learn=c.learn_prefix)
                forks += [fork] * c.branches
        return forks

    def positions(self, entropy: Sequence[float], generator: torch.Generator | None = None) -> list[int]:
        """The fork positions of one response: up to N, the most uncertain first, or at random."""
        ranked = ranking(entropy, self.config.order, generator)
        return candidates(ranked, lambda position: True, self.config.forks)

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """One component, `ettrl` [B]: 1 for the majority's answer, else 0."""
        won = majority(rollout.require("cluster_id", by=self.slug), rollout.group_id)
        self._note_vote(rollout, won)
        if self.config.label == "random":
            won = self._numbers(rollout, "label") < 0.5
        return {self.slug: won.float()}

    def filter(self, rollout: Rollout) -> Rollout:
        """Of each prompt only `trained` leaves; all have voted by now."""
        most, group = self.config.trained, rollout.group_id
        assert most is not None
        row = torch.arange(len(rollout), device=group.device).double()
        drawn = self._numbers(rollout, "subset").double() if self.config.subset == "random" else row
        order = drawn.argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        _, size = torch.unique_consecutive(group[order], return_counts=True)
        place = torch.cat([torch.arange(n, device=group.device) for n in size.tolist()])
        return rollout.rows(order[place < most].sort().values)

    def advantage(self, rollout: Rollout) -> Tensor:
        """Adv-Res or Adv-Clip [B, T]."""
        c, value = self.config, group_advantage(rollout.require("reward", by=self.slug), rollout.group_id)
        value = value.clamp(-c.beta, c.beta) if c.shape == "clip" else value * self.weights(rollout)
        return value[:, None].expand(rollout.response_ids.shape)

    def weights(self, rollout: Rollout) -> Tensor:
        """Y of each response [B]; notes how many are negative before `y_min`."""
        c, group = self.config, rollout.group_id
        span = rollout.mask if c.entropy_over == "leaf" else rollout.sampled
        h = response_entropy(rollout.require("token_entropy", by=self.slug), span)
        y = confidence_weight(h, group)
        self._figures |= {"negative_y": float((y < 0).float().mean()), "y_least": float(y.min())}
        if c.shuffled:
            drawn, content = self._numbers(rollout, "shuffle").argsort(), canonical_order(rollout)
            to, source = (order[group[order].argsort(stable=True)] for order in (drawn, content))
            y = y.index_copy(0, to, y[source])
        return y if c.y_min is None else y.clamp_min(c.y_min)

    def _numbers(self, rollout: Rollout, purpose: Literal["label", "subset", "shuffle"]) -> Tensor:
        """A uniform number for each response [B]; choices of different purpose are independent of one another."""
        draws = StepDraws(3 * self.config.seed + ("label", "subset", "shuffle").index(purpose))
        draws.step = self.draws.step
        return draws.per_response(rollout)

    def _note_vote(self, rollout: Rollout, won_B: Tensor) -> None:
        cluster, group = rollout.require("cluster_id", by=self.slug), rollout.group_id
        share = 1 / group_sizes(group)  # sums to 1 over a prompt
        prompts = float(share.sum())
        labelled = group_sums(won_B.double(), group)[0] > 0
        entropy = semantic_entropies(cluster, group)
        sizes = cluster_sizes(cluster, group)
        distinct = float(torch.where(sizes > 0, 1 / sizes.clamp_min(1), 0.0).sum())
        tokens = token_counts(rollout)
        right = math.nan
        if rollout.correct is not None and bool(labelled.any()):
            # one verdict for a label: that of the winner's first response
            row = torch.arange(len(group), device=group.device).double()
            first = won_B & (row == group_range(torch.where(won_B, row, math.inf), group)[0])
            right = float(rollout.correct[first].double().mean())
        self._figures = {
            "label_accuracy": right,
            "majority_ratio": float((share * majority_ratio(cluster, group)).sum()) / prompts,
            "vote_entropy": _weighted(entropy, share * ~entropy.isnan()),
            "unlabelled": float((share * ~labelled).sum()) / prompts,
            "distinct_answers": distinct / prompts,
            "distinct_answers_per_kilotoken": 1000 * distinct / tokens.generated if tokens.generated else math.nan,
            "token_ratio": tokens.ratio,
        }

    def metrics(self) -> dict[str, float]:
        """Means over prompts: `label_accuracy`, the share of votes that are right (the only figure that reads the
        task's labels; nan without a vote), `majority_ratio`, `vote_entropy` (nats), `unlabelled`, the share of prompts
        without any answer, `distinct_answers`, also per thousand generated tokens; `token_ratio`, generated tokens over
        those of as many independent responses; for Adv-Res `negative_y` and `y_least`."""
        return dict(self._figures)


def _weighted(values: Tensor, weight: Tensor) -> float:
    """Weighted mean; nan where no weight is left."""
    total = float(weight.sum())
    return float((values.nan_to_num() * weight).sum()) / total if total else math.nan
