r"""EMPO: rewards from how often an answer is given, without labels (arXiv 2504.05812).

    p(c) = |c| / G        share of a prompt's G responses whose answer lies in cluster c
    r_i  = p(own cluster),            H = -sum_c p(c) ln p(c)       semantic entropy of the prompt, in nats
    only prompts with  low < H < high  are learnt from;    advantage and loss are the base's: GRPO, or GSPO beside it

Shapes: cluster ids, r and H [B]. Clusters (`Rollout.cluster_id`, made by `data.clusters`) hold answers of one meaning;
no label is read here or there. Unanimous groups, all-different ones and two clusters of one size have equal rewards and
so no advantage. E[r] = sum_c p(c)^2: what falls is Renyi-2 rather than Shannon entropy, and a frequent wrong answer is
reinforced like a right one [inferred].

Card: papers/empo.md. Code compared: QingyangZhang/EMPO @ c5eccd4. The paper's thresholds are in no equation; its
released runs have **no effective gate**: verl's is commented out, TRL's `H < ln G` zeroes groups that have no advantage
anyway. A gated prompt is dropped in the paper (`gate: drop`) and has reward 0 in TRL (`zero`). A response without an
answer earns `unreadable`, or 1/G as a cluster of its own (null, verl); in H it is left out, with G as the denominator,
or a class of its own (TRL and verl). `rule: voting` is verl's control: 1 for the largest cluster, all of them in a tie.

Presets: `paper` (gate at its widest, 0 < H < ln G [inferred]), `released` (verl), `trl`, `free_form` (unreadable -0.5;
0 for all where the largest of several clusters holds less than a fifth), `tiny` (no gate, unreadable 0). Control:
`control: shuffled` deals the rewards of each group to other responses of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_range, group_sums
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ._draws import DrawingMethod, StepDraws
from ._settings import check, check_choice

Rule = Literal["frequency", "voting"]
Missing = Literal["leave_out", "separate"]
Gate = Literal["drop", "zero"]
ROUNDING = 1e-9
"""A group whose entropy is a threshold up to rounding stands on it, and the gate is open only between them."""


def cluster_sizes(cluster_B: Tensor, group_id_B: Tensor) -> Tensor:
    """Responses of the group in each response's own cluster [B]; 0 where the cluster id is negative: no answer."""
    _, key = torch.unique(torch.stack([group_id_B, cluster_B]), dim=1, return_inverse=True)
    _, sizes, _ = group_sums(torch.ones(len(key), dtype=torch.float64, device=key.device), key)
    return sizes.masked_fill(cluster_B < 0, 0.0)


def group_sizes(group_id_B: Tensor) -> Tensor:
    """Responses of each response's group [B], in double precision."""
    return group_sums(torch.ones(len(group_id_B), dtype=torch.float64, device=group_id_B.device), group_id_B)[1]


def semantic_entropies(cluster_B: Tensor, group_id_B: Tensor, missing: Missing = "leave_out") -> Tensor:
    """Semantic entropy of each response's group [B], in nats: -(1/G) sum_i ln p(cluster of i), which is the sum over
    clusters. nan where no response of the group has an answer and such responses are left out."""
    sizes, group = cluster_sizes(cluster_B, group_id_B), group_sizes(group_id_B)
    counted = sizes if missing == "leave_out" else sizes.clamp_min(1)
    terms = torch.where(counted > 0, -(counted.clamp_min(1) / group).log() / group, 0.0)
    some = group_sums((counted > 0).to(terms), group_id_B)[0] > 0
    return group_sums(terms, group_id_B)[0].masked_fill(~some, math.nan)


def cluster_rewards(
    cluster_B: Tensor,
    group_id_B: Tensor,
    rule: Rule = "frequency",
    unreadable: float | None = 0.0,
    least_majority: float = 0.0,
) -> Tensor:
    """Reward of each response [B]: the share of its cluster, or 1 for the largest (`voting`).

    `unreadable`: reward without an answer (id -1); None makes each such response a cluster of its own. Id -2, an answer
    that copies the question, earns 0. Where a group has several clusters and the largest holds less than
    `least_majority`, all its answers earn 0.
    """
    sizes, group = cluster_sizes(cluster_B, group_id_B), group_sizes(group_id_B)
    if unreadable is None:
        sizes = torch.where(cluster_B == -1, 1.0, sizes)
    _, largest = group_range(sizes, group_id_B)
    value = sizes / group if rule == "frequency" else ((sizes == largest) & (sizes > 0)).to(sizes)
    clusters = group_sums(torch.where(sizes > 0, 1 / sizes.clamp_min(1), 0.0), group_id_B)[0]
    value = torch.where((largest / group < least_majority) & (clusters > 1.5), 0.0, value)
    return value if unreadable is None else torch.where(cluster_B == -1, unreadable, value)


def open_gate(entropy_B: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> Tensor:
    """True [B] strictly between the thresholds; an undefined entropy never is, unless there is no threshold."""
    inside = torch.ones_like(entropy_B, dtype=torch.bool)
    if low is not None:
        inside &= entropy_B > low + ROUNDING
    if high is not None:
        inside &= entropy_B < high - ROUNDING
    return inside


@dataclass(frozen=True)
class EMPOConfig:
    """Settings. `low` and `high` are shares of ln G, or nats where `relative` is false; null is no threshold."""

    rule: Rule = "frequency"
    unreadable: float | None = 0.0
    missing: Missing = "leave_out"
    low: float | None = None
    high: float | None = None
    relative: bool = True
    gate: Gate = "drop"
    least_majority: float = 0.0
    control: Literal["none", "shuffled"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.rule, get_args(Rule), "empo.rule")
        check_choice(self.missing, get_args(Missing), "empo.missing")
        check_choice(self.gate, get_args(Gate), "empo.gate")
        check_choice(self.control, ("none", "shuffled"), "empo.control")
        check(0 <= self.least_majority <= 1, "empo.least_majority", "lie in [0, 1]", self.least_majority)
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        check(low < high, "empo.low", f"lie below empo.high ({high})", self.low)


class EMPO(DrawingMethod):
    """Replaces the task's reward; `filter` drops the prompts outside the gate."""

    slug: ClassVar[str] = "empo"
    requires: tuple[str, ...] = ("cluster_id",)
    replaces_reward: ClassVar[bool] = True
    config_class: ClassVar[type[EMPOConfig]] = EMPOConfig
    presets: ClassVar[Mapping[str, EMPOConfig]] = {
        "paper": EMPOConfig(low=0.0, high=1.0),
        "released": EMPOConfig(unreadable=None, missing="separate"),
        "trl": EMPOConfig(missing="separate", high=1.0, gate="zero"),
        "free_form": EMPOConfig(unreadable=-0.5, missing="separate", least_majority=0.2),
        "tiny": EMPOConfig(),
    }

    def __init__(self, config: EMPOConfig | None = None) -> None:
        self.config = config or EMPOConfig()
        self.draws = StepDraws(self.config.seed)
        self._figures: dict[str, float] = {}

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """One component, `empo` [B]."""
        c, cluster = self.config, rollout.require("cluster_id", by=self.slug)
        value = cluster_rewards(cluster, rollout.group_id, c.rule, c.unreadable, c.least_majority)
        inside = self._inside(rollout)
        if c.gate == "zero":
            value = torch.where(inside, value, 0.0)
        if c.control == "shuffled":
            value = self._shuffled(value, rollout)
        self._note(rollout, inside)
        return {self.slug: value.float()}

    def filter(self, rollout: Rollout) -> Rollout:
        """Only the prompts inside the gate. Where there is none, all stay with reward 0: nothing is learnt."""
        if self.config.gate == "zero":
            return rollout
        inside = self._inside(rollout)
        if not bool(inside.any()):
            return rollout.with_(reward=torch.zeros(len(rollout), device=inside.device))
        return rollout if bool(inside.all()) else rollout.rows(inside.nonzero().squeeze(1))

    def _inside(self, rollout: Rollout) -> Tensor:
        c, cluster = self.config, rollout.require("cluster_id", by=self.slug)
        entropy = semantic_entropies(cluster, rollout.group_id, c.missing)
        unit = group_sizes(rollout.group_id).log() if c.relative else 1.0
        return open_gate(entropy, None if c.low is None else c.low * unit, None if c.high is None else c.high * unit)

    def _shuffled(self, value_B: Tensor, rollout: Rollout) -> Tensor:
        drawn, group = self.draws.per_response(rollout).argsort(), rollout.group_id
        content = canonical_order(rollout)
        to, source = (order[group[order].argsort(stable=True)] for order in (drawn, content))
        dealt = value_B.clone()
        dealt[to] = value_B[source]
        return dealt

    def _note(self, rollout: Rollout, inside_B: Tensor) -> None:
        cluster, group = rollout.require("cluster_id", by=self.slug), rollout.group_id
        weight = 1 / group_sizes(group)
        entropy = semantic_entropies(cluster, group, self.config.missing)
        known = weight.masked_fill(entropy.isnan(), 0.0)
        largest = group_range(cluster_sizes(cluster, group), group)[1] * weight
        self._figures = {
            "semantic_entropy": float((known * entropy.nan_to_num()).sum() / known.sum()),
            "largest_cluster": float((weight * largest).sum() / weight.sum()),
            "gated": float((weight * ~inside_B).sum() / weight.sum()),
            "distinct_majorities": distinct_majorities(rollout),
        }

    def metrics(self) -> dict[str, float]:
        """Means over prompts: `semantic_entropy` (nats, nan where no prompt has an answer), `largest_cluster` as a
        share, `gated`, the share of prompts outside the gate; and `distinct_majorities`."""
        return dict(self._figures)


def distinct_majorities(rollout: Rollout) -> float:
    """Different majority answers per prompt that has one: near 0 where one constant answer has won everywhere. nan
    without answers. The texts are compared for this figure only; a verifier's form may depend on the label."""
    if rollout.answer is None or rollout.cluster_id is None:
        return math.nan
    sizes = cluster_sizes(rollout.cluster_id, rollout.group_id).tolist()
    best: dict[int, tuple[float, str]] = {}
    for group, size, answer in zip(rollout.group_id.tolist(), sizes, rollout.answer, strict=True):
        if size and answer is not None:
            best[group] = min(best.get(group, (0.0, "")), (-size, answer))
    return len({answer for _, answer in best.values()}) / len(best) if best else math.nan
