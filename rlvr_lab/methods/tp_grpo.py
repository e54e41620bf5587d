r"""TP-GRPO: process rewards on whole thoughts, scaled by how able the policy is (arXiv 2507.23317).

    r^_i = (o_i - mean) / (std + eps),   o = +1 right, -1 wrong;       r_c = alpha x (share of the group that is right)
    A_it = r^_i          right response, correct thought              r^_i    wrong response, matching thought
           r^_i - r_c    right response, incorrect thought            0       wrong response, mismatched thought

A thought is a maximal run of steps with one label; the block with the answer counts as correct, or matching. Labels:
the statistic `thought_label` [B, T], 1 (correct, mismatched) or 0 (incorrect, matching), from `data.judge`. Where none
judged, a response has its answer's label throughout, which is GRPO. Shapes: r^, r_c [B], A [B, T].

The paper's form is a return: r^ plus the process rewards of all thoughts that end at or after t, which are +-r_c in
right responses and +-r^ in wrong ones. It equals the above where the last thought has no process reward [inferred];
`returns_to_go` is that form, and `level: step` rewards every step instead of every thought, as the ablation that
drowns the outcome in long traces. `adaptive: false` sets r_c = alpha.

A group that is all wrong has A = 0; one that is all right has 0 on correct and -alpha on incorrect thoughts: it still
teaches, though `dynamic_sampling` would drop it. Rewards of other methods are not seen: the outcome is right or wrong.

Card: papers/tp_grpo.md. The official code could not be obtained: formulas are secondary, alpha = 1 is our default (no
published value was found), and `released` equals `paper`. Preset `tiny`: alpha 1 with eps 1e-4 as `grpo` there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import Std, group_advantage, group_sums
from ..core.reduce import masked_mean
from ..core.rollout import Rollout
from ._settings import check, check_choice
from .base import Method

LABEL, STEP = "thought_label", "thought_step"
Level = Literal["thought", "step"]


def outcome_advantage(correct_B: Tensor, group_id_B: Tensor, eps: float = 1e-6, std: Std = "sample",
                      dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """r^ [B]: outcomes +1 and -1, normalised in their group; 0 in a group of one or of equal outcomes."""
    return group_advantage(2 * correct_B.to(dtype) - 1, group_id_B, std, eps)


def ability_scale(correct_B: Tensor, group_id_B: Tensor, alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """r_c [B] = alpha x the share of right responses in the group."""
    right, sizes, _ = group_sums(correct_B.to(dtype), group_id_B)
    return alpha * right / sizes


def thought_advantage(label_BT: Tensor, correct_B: Tensor, outcome_B: Tensor, scale_B: Tensor) -> Tensor:
    """The closed form A [B, T]; see the module's head."""
    good, outcome = label_BT > 0.5, outcome_B[:, None]
    right = torch.where(good, outcome, outcome - scale_B[:, None])
    wrong = torch.where(good, torch.zeros_like(outcome), outcome)
    return torch.where(correct_B[:, None], right, wrong)


def run_ends(key_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """True [B, T] on the last marked token of every run of equal keys."""
    follows = torch.zeros_like(mask_BT)
    follows[:, :-1] = mask_BT[:, 1:] & (key_BT[:, 1:] == key_BT[:, :-1])
    return mask_BT & ~follows


def process_rewards(label_BT: Tensor, ends_BT: Tensor, correct_B: Tensor, outcome_B: Tensor, scale_B: Tensor) -> Tensor:
    """Process reward of each run on its last token [B, T], 0 elsewhere and for the run with the answer, the last."""
    good, outcome, scale = label_BT > 0.5, outcome_B[:, None], scale_B[:, None]
    right, wrong = torch.where(good, scale, -scale), torch.where(good, -outcome, outcome)
    value = torch.where(correct_B[:, None], right, wrong)
    later = ends_BT.long().flip(1).cumsum(1).flip(1)
    return torch.where(ends_BT & (later > 1), value, torch.zeros_like(value))


def returns_to_go(
    label_BT: Tensor, key_BT: Tensor, mask_BT: Tensor, correct_B: Tensor, outcome_B: Tensor, scale_B: Tensor
) -> Tensor:
    """r^ plus the process rewards of all runs of equal keys that end at or after t [B, T].

    Keys are the labels for thoughts, or numbers of steps.
    """
    rewards = process_rewards(label_BT, run_ends(key_BT, mask_BT), correct_B, outcome_B, scale_B)
    return (outcome_B[:, None] + rewards.flip(1).cumsum(1).flip(1)).masked_fill(~mask_BT, 0.0)


@dataclass(frozen=True)
class TPGRPOConfig:
    """Settings of TP-GRPO. `alpha` is the scale of r_c, or with `adaptive: false` r_c itself."""

    alpha: float = 1.0
    adaptive: bool = True
    level: Level = "thought"
    std: Std = "sample"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self.alpha >= 0, "tp_grpo.alpha", "not be negative", self.alpha)
        check_choice(self.level, get_args(Level), "tp_grpo.level")
        check_choice(self.std, get_args(Std), "tp_grpo.std")
        check(self.eps > 0, "tp_grpo.eps", "be positive", self.eps)


class TPGRPO(Method):
    """Owner of `advantage`; clip, surrogate and reduction stay the base's."""

    slug: ClassVar[str] = "tp_grpo"
    requires: tuple[str, ...] = ("correct", LABEL)
    config_class: ClassVar[type[TPGRPOConfig]] = TPGRPOConfig
    presets: ClassVar[Mapping[str, TPGRPOConfig]] = {
        "paper": TPGRPOConfig(),
        "released": TPGRPOConfig(),
        "tiny": TPGRPOConfig(eps=1e-4),
    }

    def __init__(self, config: TPGRPOConfig | None = None) -> None:
        self.config = config or TPGRPOConfig()
        self.requires = ("correct", LABEL, *((STEP,) if self.config.level == "step" else ()))
        self._figures: dict[str, float] = {}
        self._pending: list[str] = []
        self._said = False

    def advantage(self, rollout: Rollout) -> Tensor:
        """A [B, T] from outcomes and labels."""
        c, label, dtype = self.config, rollout.require(LABEL, by=self.slug), rollout.behaviour_logprob.dtype
        correct, group = rollout.require("correct", by=self.slug), rollout.group_id
        outcome = outcome_advantage(correct, group, c.eps, c.std, dtype)
        scale = ability_scale(correct, group, c.alpha, dtype) if c.adaptive else torch.full_like(outcome, c.alpha)
        self._note(rollout, label, correct)
        if c.level == "step":
            return returns_to_go(label, rollout.require(STEP, by=self.slug), rollout.mask, correct, outcome, scale)
        return thought_advantage(label, correct, outcome, scale)

    def _note(self, rollout: Rollout, label_BT: Tensor, correct_B: Tensor) -> None:
        mask, good = rollout.mask, (label_BT > 0.5).to(label_BT)
        right, wrong = mask & correct_B[:, None], mask & ~correct_B[:, None]
        self._figures = {
            "incorrect_tokens": 1 - float(masked_mean(good, right)),
            "mismatched_tokens": float(masked_mean(good, wrong)),
            "thoughts": float(run_ends(label_BT, mask).sum() / max(len(rollout), 1)),
        }
        others = sorted(set(rollout.reward_components) - {"correct"})
        if others and not self._said:
            self._said = True
            self._pending.append(
                f"method 'tp_grpo' sees right or wrong alone: the reward components {', '.join(others)} are logged and "
                "do not train; leave out the methods that make them"
            )

    def metrics(self) -> dict[str, float]:
        """`incorrect_tokens`: share of the tokens of right responses in incorrect thoughts; `mismatched_tokens`: of
        wrong responses in mismatched ones (nan where there is no such response); `thoughts` per response."""
        return dict(self._figures)

    def notices(self) -> list[str]:
        """Says once that further reward components do not train."""
        found, self._pending = self._pending, []
        return found
