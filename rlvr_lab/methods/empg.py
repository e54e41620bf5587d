r"""EMPG: steps scaled by their own confidence, and a bonus for a certain next step (arXiv 2509.09265).

A step is a turn of an agent, or a piece of a response. With H_s the mean token entropy of step s in nats (a constant of
the policy that sampled) and, over all S steps of the rollout, Hn = (H - min H) / (max H - min H + 1e-8):

    g_s = e^(-k Hn_s) / (mean e^(-k Hn) + 1e-8)      mean 1: confident steps gain what uncertain ones lose
    f_s = e^(-k' Hn_s)
    A_s = A_i g_s + zeta f_(s+1)  (no bonus for a trajectory's last step),     A_s <- A_s - mean over steps of A

on the tokens of the step [B, T], 0 on tokens of no step; A_i is GRPO's advantage of the trajectory. Each step counts
once, whatever its length. Where every reward is equal, A_i = 0 and what is left is the centred bonus: it lowers entropy
with no verified reward. `bonus_only_if_signal` leaves such groups out first, as DAPO does [inferred option].

Why: E |grad_z log pi|^2 = 1 - sum pi^2 = 1 - e^(-H_2) for a softmax, so that confident tokens have small gradients.

Card: papers/empg.md. There is no official code; the formulas are those of the paper's appendix. `steps: turn` tells
steps apart by `turn_id`, else `segment_id` (a negative id belongs to no step; with neither, a response is one step);
`steps: marker` by `markers`, texts that end a step. A text whose tokens merge with their neighbours is not found: give
all its forms. `quantile` measures Hn between the q- and (1 - q)-quantile, so that one degenerate step does not set the
scale [inferred option].

Presets: `paper`; `released` is the same, since nothing was released; `tiny` (steps end at `=` and at `</think>`).
Controls: `shuffled` deals the entropies to other steps; k = 0 and zeta = 0 leave the base's advantage up to centring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import dead_groups, group_advantage
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError
from ._draws import DrawingMethod, StepDraws
from ._markers import marker_ids
from ._settings import check, check_choice
from .base import Encode

StepKind = Literal["turn", "marker"]


def expected_squared_score(logits: Tensor) -> Tensor:
    """E_a |grad_z log pi(a)|^2 over the last axis, from its definition: the sum over actions of pi_a |e_a - pi|^2."""
    p = torch.softmax(logits, -1)
    score = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p[..., None, :]
    return (p * score.square().sum(-1)).sum(-1)


def renyi2_entropy(logits: Tensor) -> Tensor:
    """H_2 = -ln sum pi^2 over the last axis, in nats."""
    return -torch.softmax(logits, -1).square().sum(-1).log()


@dataclass(frozen=True)
class Steps:
    """`row` [S] is the response of each step, in order; `index` [B, T] the step of each token, -1 for none."""

    row: Tensor
    index: Tensor

    def mean(self, values_BT: Tensor) -> Tensor:
        """Mean over the tokens of each step [S]."""
        inside = self.index >= 0
        where = self.index[inside]
        total = torch.zeros(len(self.row), dtype=values_BT.dtype, device=values_BT.device)
        return total.index_add(0, where, values_BT[inside]) / torch.bincount(where, minlength=len(self.row))

    def spread(self, values_S: Tensor) -> Tensor:
        """Each step's value on its tokens [B, T], 0 elsewhere."""
        if not len(values_S):
            return torch.zeros(self.index.shape, dtype=values_S.dtype, device=values_S.device)
        return values_S[self.index.clamp_min(0)].masked_fill(self.index < 0, 0.0)


def number_steps(label_BT: Tensor, mask_BT: Tensor) -> Steps:
    """Steps from labels that rise along a response; a negative label belongs to no step. Steps without a marked token
    do not exist."""
    inside = mask_BT & (label_BT >= 0)
    width = int(label_BT.max()) + 1 if label_BT.numel() else 1
    row = torch.arange(len(label_BT), device=label_BT.device)[:, None]
    found, where = torch.unique((row * width + label_BT)[inside], return_inverse=True)
    index = torch.full_like(label_BT, -1)
    index[inside] = where
    return Steps(found // max(width, 1), index)


def labels_by_marker(ids_BT: Tensor, mask_BT: Tensor, markers: Sequence[Sequence[int]]) -> Tensor:
    """Number of markers that ended before each token [B, T]; a marker belongs to the step that it ends."""
    ended = torch.zeros_like(ids_BT)
    steps = ids_BT.shape[1]
    for marker in markers:
        if not 0 < len(marker) <= steps:
            continue
        found = mask_BT.clone()
        for back, token in enumerate(reversed(marker)):
            here = (ids_BT == token) & mask_BT
            found &= torch.nn.functional.pad(here, (back, 0))[:, :steps]
        ended |= found.long()
    before: Tensor = ended.cumsum(1) - ended
    return before


def normalised(entropy_S: Tensor, quantile: float = 0.0, eps: float = 1e-8) -> Tensor:
    """Hn in [0, 1] over all steps: between the extremes, or between the `quantile` and its opposite."""
    if not quantile:
        low, high = entropy_S.min(), entropy_S.max()
        return (entropy_S - low) / (high - low + eps)
    low, high = entropy_S.quantile(entropy_S.new_tensor([quantile, 1 - quantile])).unbind()
    return ((entropy_S - low) / (high - low + eps)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Modulation:
    """Everything per step [S]: Hn, g, f, the bonus, and the advantage before and after centring."""

    entropy: Tensor
    scale: Tensor
    clarity: Tensor
    bonus: Tensor
    modulated: Tensor
    final: Tensor


def modulate(
    entropy_S: Tensor,
    advantage_S: Tensor,
    row_S: Tensor,
    k: float = 1.0,
    k_bonus: float = 1.0,
    zeta: float = 0.1,
    quantile: float = 0.0,
    eps: float = 1e-8,
) -> Modulation:
    """The module's equation. `advantage_S` is A_i of each step's trajectory, `row_S` which trajectory that is."""
    hn = normalised(entropy_S, quantile, eps)
    u = (-k * hn).exp()
    scale, clarity = u / (u.mean() + eps), (-k_bonus * hn).exp()
    # the next step's clarity, where there is one in the same trajectory
    same = torch.nn.functional.pad(row_S[1:] == row_S[:-1], (0, 1))
    bonus = zeta * torch.nn.functional.pad(clarity[1:], (0, 1)) * same
    modulated = advantage_S * scale + bonus
    return Modulation(hn, scale, clarity, bonus, modulated, modulated - modulated.mean())


@dataclass(frozen=True)
class EMPGConfig:
    """Settings: `k` and `k_bonus` sharpen g and f, `zeta` weighs the bonus. `steps`: what a step is; `markers` are the
    texts that end one where `steps` is `marker`."""

    k: float = 1.0
    k_bonus: float = 1.0
    zeta: float = 0.1
    quantile: float = 0.0
    bonus_only_if_signal: bool = False
    shuffled: bool = False
    seed: int = 0
    steps: StepKind = "turn"
    markers: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self.k >= 0, "empg.k", "not be negative", self.k)
        check(self.k_bonus >= 0, "empg.k_bonus", "not be negative", self.k_bonus)
        check(self.zeta >= 0, "empg.zeta", "not be negative", self.zeta)
        check(0 <= self.quantile < 0.5, "empg.quantile", "lie in [0, 0.5)", self.quantile)
        texts = not isinstance(self.markers, str) and all(isinstance(m, str) and m for m in self.markers)
        check(texts, "empg.markers", "be a list of texts, none of them empty", self.markers)
        check_choice(self.steps, get_args(StepKind), "empg.steps")
        by_marker = self.steps == "marker"
        want = "name at least one text where steps is 'marker'" if by_marker else "be empty where steps is 'turn'"
        check(bool(self.markers) == by_marker, "empg.markers", want, list(self.markers))


class EMPG(DrawingMethod):
    """Owner of `advantage`; everything else stays the base's."""

    slug: ClassVar[str] = "empg"
    requires: tuple[str, ...] = ("reward", "old_logprob", "token_entropy")
    config_class: ClassVar[type[EMPGConfig]] = EMPGConfig
    presets: ClassVar[Mapping[str, EMPGConfig]] = {
        "paper": EMPGConfig(),
        "released": EMPGConfig(),
        "tiny": EMPGConfig(steps="marker", markers=("=", "</think>")),
    }

    def __init__(self, config: EMPGConfig | None = None) -> None:
        self.config = config or EMPGConfig()
        self.markers: tuple[tuple[int, ...], ...] | None = None
        self.draws = StepDraws(self.config.seed)
        self._last: dict[str, float] = {}
        self._said = False
        self._pending: list[str] = []

    def bind(self, encode: Encode) -> None:
        """The markers' token ids. Raises UserError for a text that has none, or an unknown word."""
        self.markers = marker_ids(self.config.markers, encode, "empg.markers")

    def steps(self, rollout: Rollout) -> Steps:
        """The steps of a rollout, by turns or by markers. Raises UserError where there is none."""
        label: Tensor | None
        if self.config.steps == "marker":
            if self.markers is None:
                raise UserError("methods.empg.markers are not token ids yet: call bind(encode) before the first update")
            label = labels_by_marker(rollout.response_ids, rollout.mask, self.markers)
        else:
            label = rollout.turn_id if rollout.turn_id is not None else rollout.segment_id
        if label is None:
            label = torch.zeros_like(rollout.response_ids)
        self._warn_whole(label, rollout)
        steps = number_steps(label.long(), rollout.mask)
        if not len(steps.row):
            raise UserError(
                "method 'empg' finds no step: no token of this rollout belongs to a turn; check the turns of the "
                "environment (data.task), or set methods.empg.steps: marker with methods.empg.markers"
            )
        return steps

    def _warn_whole(self, label: Tensor, rollout: Rollout) -> None:
        if self._said or bool((label[rollout.mask] > 0).any()) or not bool(rollout.mask.any()):
            return
        self._said = True
        missed = f"none of methods.empg.markers {list(self.config.markers)} occurs"
        if self.config.steps == "turn":
            missed = "no response has a second turn, and methods.empg.steps is 'turn'"
        self._pending.append(
            f"method 'empg' finds one step in each response of a rollout, so that none has a bonus: {missed}"
        )

    def advantage(self, rollout: Rollout) -> Tensor:
        """The modulated advantage [B, T] with statistics over all steps of the rollout."""
        c = self.config
        reward, entropy = (rollout.require(name, by=self.slug) for name in ("reward", "token_entropy"))
        steps = self.steps(rollout)
        value = group_advantage(reward, rollout.group_id)
        kept = torch.ones_like(steps.row, dtype=torch.bool)
        if c.bonus_only_if_signal:
            kept = ~dead_groups(reward, rollout.group_id)[steps.row]
        final = torch.zeros(len(steps.row), dtype=value.dtype, device=value.device)
        if bool(kept.any()):
            mean = steps.mean(entropy.to(value.dtype))
            if c.shuffled:
                mean = self._deal(mean, kept, steps, rollout)
            row = steps.row[kept]
            done = modulate(mean[kept], value[row], row, c.k, c.k_bonus, c.zeta, c.quantile)
            final[kept] = done.final
            self._note(done, mean[kept], rollout)
        return steps.spread(final)

    def _deal(self, mean_S: Tensor, kept_S: Tensor, steps: Steps, rollout: Rollout) -> Tensor:
        """The same entropies on other steps, whatever the order of the rows."""
        place = canonical_order(rollout).argsort()[steps.row]
        order = place.argsort(stable=True)
        order = order[kept_S[order]]
        dealt = mean_S.clone()
        dealt[order] = mean_S[order][self.draws.permutation(len(order)).to(order.device)]
        return dealt

    def _note(self, done: Modulation, mean_S: Tensor, rollout: Rollout) -> None:
        self._last = {
            "steps": len(mean_S) / max(1, int(rollout.mask.any(1).sum())),
            "step_entropy": float(mean_S.mean()),
            "scale_min": float(done.scale.min()),
            "scale_max": float(done.scale.max()),
            "bonus": float(done.bonus.mean()),
        }

    def metrics(self) -> dict[str, float]:
        """Steps per response, their mean entropy in nats, the range of g, the mean bonus."""
        names = ("steps", "step_entropy", "scale_min", "scale_max", "bonus")
        return {name: self._last.get(name, math.nan) for name in names}

    def notices(self) -> list[str]:
        """Says once that no step ends within a response."""
        found, self._pending = self._pending, []
        return found
