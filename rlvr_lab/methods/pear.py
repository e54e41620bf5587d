r"""PEAR: a right answer is worth less where its thinking was more uncertain than its answer (arXiv 2510.08026).

    P = max(0, H_think - alpha H_ans)                       means of the token entropy in nats over the two phases
    R = min(1, s - P)  where the answer is right,   r_fmt  elsewhere

Shapes: entropies [B, T] of the policy that sampled, at the sampling temperature, without gradient; H_think, H_ans, P
and R [B]. R stands in place of the task's reward; advantage and loss stay the base method's. No lower bound: R < 0
where P > s. The first end-of-thinking marker parts the phases and belongs to neither; it may be any text, also one of
several tokens. Without a marker the whole response is thinking and H_ans = 0. An empty phase counts as 0, the first
marker counts of several [inferred]. In a group of right answers only, the advantage is the entropy term alone, which a
division by the standard deviation blows up to unit size: compose with `dr_grpo` for the form without it.

Card: papers/pear.md. Code compared: iNLP-Lab/PEAR could not be obtained; of its README, s = 1 and r_fmt = 0. So the
presets `paper` and `released` are the same. Controls (`penalty`): `shuffled`, the right responses of a group swap their
penalties at random; `none`, the plain reward of right and wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_range
from ..core.entropy import phase_entropy
from ..core.rollout import Rollout
from ..errors import UserError
from ._draws import DrawingMethod, StepDraws
from ._markers import marker_ids
from ._settings import check, check_choice
from .base import Encode

Penalty = Literal["own", "shuffled", "none"]


def find_marker(ids_BT: Tensor, mask_BT: Tensor, markers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Index of the first and of the last token of the marker [B] that comes first in each row; -1 where there is none.

    A marker counts where all of its tokens are marked by the mask. Of two that start together the longer one counts.
    """
    width = ids_BT.shape[1]
    start = torch.full(ids_BT.shape[:1], width, device=ids_BT.device)
    end = torch.full_like(start, -1)
    for marker in sorted(markers, key=len):
        if not 0 < len(marker) <= width:
            continue
        found = ids_BT.unfold(1, len(marker), 1).eq(ids_BT.new_tensor(list(marker))).all(-1)
        found &= mask_BT.unfold(1, len(marker), 1).all(-1)
        place = torch.where(found.any(1), found.long().argmax(1), width)
        end = torch.where((place <= start) & (place < width), place + len(marker) - 1, end)
        start = torch.minimum(start, place)
    return torch.where(start == width, -1, start), end


def thinking_and_answer(entropy_BT: Tensor, mask_BT: Tensor, start_B: Tensor, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean token entropy before the marker's first token and behind its last one [B]; 0 for an empty phase."""
    thinking, _ = phase_entropy(entropy_BT, mask_BT, start_B)
    _, answer = phase_entropy(entropy_BT, mask_BT, end_B)
    return thinking.nan_to_num(0.0), answer.nan_to_num(0.0)


def penalty(thinking_B: Tensor, answer_B: Tensor, alpha: float = 1.0) -> Tensor:
    """max(0, H_think - alpha H_ans) [B], in nats."""
    return (thinking_B - alpha * answer_B).clamp_min(0.0)


def shaped_reward(penalty_B: Tensor, correct_B: Tensor, score: float = 1.0, format_score: float = 0.0) -> Tensor:
    """min(1, score - penalty) where the answer is right, `format_score` elsewhere [B]."""
    return torch.where(correct_B, (score - penalty_B).clamp_max(1.0), format_score)


def swap_within_groups(values_B: Tensor, chosen_B: Tensor, group_id_B: Tensor, draws_B: Tensor) -> Tensor:
    """The chosen rows of every group swap their values in the order of `draws_B`; the other rows keep theirs."""
    swapped = values_B.clone()
    for group in torch.unique(group_id_B):
        rows = ((group_id_B == group) & chosen_B).nonzero().squeeze(1)
        by_value = rows[values_B[rows].argsort(stable=True)]
        swapped[rows[draws_B[rows].argsort(stable=True)]] = values_B[by_value]
    return swapped


@dataclass(frozen=True)
class PEARConfig:
    """`alpha` weighs the answer's entropy, `score` is s and `format_score` r_fmt. `marker`: the end-of-thinking text,
    or several of them, such as the forms that it takes behind a blank."""

    alpha: float = 1.0
    score: float = 1.0
    format_score: float = 0.0
    marker: str | Sequence[str] = "</think>"
    penalty: Penalty = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "score", "format_score"):
            value = getattr(self, name)
            check(math.isfinite(value), f"pear.{name}", "be finite", value)
        listed = isinstance(self.marker, (str, list, tuple))
        named = listed and bool(self.markers) and all(isinstance(text, str) and text for text in self.markers)
        check(named, "pear.marker", "be a text, or a list of some", self.marker)
        check_choice(self.penalty, get_args(Penalty), "pear.penalty")

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts of `marker`."""
        return (self.marker,) if isinstance(self.marker, str) else tuple(self.marker)


class PEAR(DrawingMethod):
    """Replaces the task's reward; `channels` only measures, and adds none."""

    slug: ClassVar[str] = "pear"
    requires: tuple[str, ...] = ("correct", "token_entropy")
    replaces_reward: ClassVar[bool] = True
    config_class: ClassVar[type[PEARConfig]] = PEARConfig
    presets: ClassVar[Mapping[str, PEARConfig]] = {"paper": PEARConfig(), "released": PEARConfig()}

    def __init__(self, config: PEARConfig | None = None) -> None:
        self.config = config or PEARConfig()
        self.draws = StepDraws(self.config.seed)
        self.markers: tuple[tuple[int, ...], ...] = ()
        self._figures: dict[str, float] = {}

    def bind(self, encode: Encode) -> None:
        """The marker's token ids. Raises UserError for a text that has none, or an unknown one."""
        self.markers = marker_ids(self.config.markers, encode, "pear.marker")

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """One component, `pear` [B]."""
        if not self.markers:
            raise UserError("methods.pear.marker is not yet token ids: call bind(encode) before the first reward")
        c, mask = self.config, rollout.mask
        entropy, correct = (rollout.require(name, by=self.slug) for name in ("token_entropy", "correct"))
        start, end = find_marker(rollout.response_ids, mask, self.markers)
        thinking, answer = thinking_and_answer(entropy, mask, start, end)
        docked = penalty(thinking, answer, c.alpha)
        if c.penalty == "none":
            docked = torch.zeros_like(docked)
        elif c.penalty == "shuffled":
            docked = swap_within_groups(docked, correct, rollout.group_id, self.draws.per_response(rollout))
        length = torch.where(start < 0, mask.sum(1), start)
        self._figures = {
            "thinking_entropy": float(thinking.mean()),
            "answer_phase_entropy": float(answer.mean()),
            "thinking_tokens": float(length.float().mean()),
            "no_marker": float((start < 0).float().mean()),
            "penalty": float(docked[correct].mean()),
        }
        return {self.slug: shaped_reward(docked, correct, c.score, c.format_score)}

    def channels(self, rollout: Rollout, advantage_BT: Tensor) -> dict[str, Tensor]:
        """No channel; notes which part of all |A| lies in groups of right answers only."""
        correct = rollout.require("correct", by=self.slug)
        every, _ = group_range(correct.to(advantage_BT.dtype), rollout.group_id)
        size = advantage_BT.masked_fill(~rollout.mask, 0.0).abs().sum(1)
        self._figures["all_correct_share"] = float(size[every > 0].sum() / size.sum())
        return {}

    def metrics(self) -> dict[str, float]:
        """Phase entropies in nats, tokens before the marker, the mean penalty of right answers, the share of responses
        without a marker, and `all_correct_share`, the part of all |A| in groups that have nothing wrong."""
        return dict(self._figures)
