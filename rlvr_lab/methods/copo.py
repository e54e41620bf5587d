r"""COPO: two clipped losses, blended by how far the answers of a group agree (arXiv 2508.04138).

For group j with rewards r, answers a and p(a) the share of an answer in the group:

    H_j   = -sum_a p(a) log p(a)                       consistency entropy; no answer is one answer of its own
    R_j   = mean r * c_j,    c_j = 1, or 1 - lambda H_j with lambda = (1 - 1/G) / log G
    A_glb = (R_j - mean) / (sample std + 1e-6)         over the groups of the rollout, each counted once
    w     = sigmoid(gamma (H_j - rho))
    l_t   = w l(A_loc) + (1 - w) l(A_glb)              l: the clipped loss with dual clip; not a mixed advantage's loss

so that a group whose answers differ trusts its own advantage, and one that agrees, right or wrong, learns how good its
prompt is among the others. A_loc [B, T] is the advantage of whoever owns that hook, GRPO's as a rule; A_glb and w are
channels over the whole rollout, constant per response. In units of `log_base`: rho in nats is not rho in bits.

Card: papers/copo.md. Code compared: hijih/copo-code @ f66883f, in bits. `gate` is its flag: `only-soft` the above,
`only-global` w = 0, `no-global` w = 1, `soft-with-forced` w = 0 where A_loc = 0, `only-forced` w = 1[A_loc != 0],
`only-zero` w = 1[r != 0], `only-soft-with-coef` the global loss times `global_coefficient`, and `soft-with-zero`, the
released default, w = 0 wherever r = 0. **That one takes wrong responses of good prompts, drops their negative advantage
and reinforces them with the prompt's positive one.** `soft-with-failed` forces groups without any reward only, as the
text motivates [inferred].

Equal answers are those of one `cluster_id` where the rollout has it (`equality: meaning`), else equal strings, as the
release compares them (`string`). A single group has nothing to be compared with: its A_glb is 0, which is said once.

Presets: `paper` (nats, only-soft), `bits` (the same in bits), `released` (bits, soft-with-zero, strings), `tiny` (rho
2 nats, amid what twelve Countdown answers have; token mean without dual clip, as the tiny lab's GRPO). Control:
`shuffled` gives each group the A_glb of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import dead_groups, group_range, group_sums
from ..core.losses import Surrogate, clipped_surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ._draws import DrawingMethod, StepDraws
from ._settings import check, check_choice
from .base import LossInputs

LogBase = Literal["nats", "bits"]
Gate = Literal[
    "only-soft", "only-soft-with-coef", "soft-with-failed", "soft-with-zero", "soft-with-forced", "only-forced",
    "only-zero", "only-global", "no-global",
]  # fmt: skip
UNIT: dict[str, float] = {"nats": 1.0, "bits": math.log(2.0)}


def answer_ids(answers: Sequence[str | None]) -> Tensor:
    """One number [B] per distinct answer; None is an answer of its own."""
    number = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    return torch.tensor([number[answer] for answer in answers], dtype=torch.long)


def consistency_entropy(
    answer_B: Tensor, group_id_B: Tensor, log_base: LogBase = "nats", eps: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """H of each response's own group [B]; `eps` stands inside the logarithm, 1e-8 in the release."""
    one = torch.ones(len(answer_B), dtype=dtype or torch.get_default_dtype(), device=answer_B.device)
    _, size, group = group_sums(one, group_id_B)
    pairs: Tensor = torch.unique(torch.stack([group, answer_B]), dim=1, return_inverse=True)[1]
    _, alike, _ = group_sums(one, pairs)
    # the mean over responses of log p(a_i) is the sum over answers of p log p
    logs, _, _ = group_sums((alike / size + eps).log(), group_id_B)
    return -(logs / size) / UNIT[log_base] + 0.0


def consistency_coefficient(entropy_B: Tensor, size_B: Tensor, log_base: LogBase = "nats") -> Tensor:
    """c = 1 - lambda H [B]: 1 for equal answers, 1/G for G different ones. A group of one has c = 1."""
    largest = size_B.clamp_min(2).log() / UNIT[log_base]
    return torch.where(size_B > 1, 1 - (1 - 1 / size_B) / largest * entropy_B, 1.0)


def global_advantage(value_B: Tensor, group_id_B: Tensor, eps: float = 1e-6) -> Tensor:
    """z-score [B] of each group's value, equal within a group, over the groups. nan for one group, whose standard
    deviation is undefined; 0 where all are equal."""
    _, size, index = group_sums(value_B, group_id_B)
    groups = int(index.max()) + 1
    if groups < 2:
        return torch.full_like(value_B, math.nan)
    mean = (value_B / size).sum() / groups  # every group counts once
    spread = (((value_B - mean).square() / size).sum() / (groups - 1)).sqrt()
    # exactly 0 where all are equal, whatever rounding left of the mean
    return torch.where(value_B.min() == value_B.max(), 0.0, (value_B - mean) / (spread + eps))


def local_weight(
    entropy_B: Tensor,
    reward_B: Tensor,
    local_B: Tensor,
    group_id_B: Tensor,
    gate: Gate = "only-soft",
    gamma: float = 5.0,
    rho: float = 1.0,
) -> Tensor:
    """w [B], the share of the local loss. `local_B` is nonzero where the response has a local advantage."""
    soft = torch.sigmoid(gamma * (entropy_B - rho))
    one = torch.ones_like(soft)
    if gate in ("only-global", "no-global"):
        return one * float(gate == "no-global")
    if gate.startswith("only-soft"):
        return soft
    kept = {
        "soft-with-failed": lambda: _any_reward(reward_B, group_id_B),
        "soft-with-zero": lambda: reward_B != 0,
        "soft-with-forced": lambda: local_B != 0,
        "only-forced": lambda: local_B != 0,
        "only-zero": lambda: reward_B != 0,
    }[gate]()
    return (one if gate.startswith("only") else soft) * kept


def _any_reward(reward_B: Tensor, group_id_B: Tensor) -> Tensor:
    low, high = group_range(reward_B, group_id_B)
    return (low != 0) | (high != 0)


def blended_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    local_BT: Tensor,
    global_BT: Tensor,
    weight_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual_clip: float | None = 3.0,
    global_coefficient: float = 1.0,
) -> Surrogate:
    """w l(A_loc) + (1 - w) k l(A_glb). A token counts as clipped where one of the losses that it has is."""
    own, among = (
        clipped_surrogate(logprob_BT, old_logprob_BT, advantage, lower, upper, dual_clip)
        for advantage in (local_BT, global_BT)
    )
    loss = weight_BT * own.loss + (1 - weight_BT) * global_coefficient * among.loss
    has_own, has_among = weight_BT > 0, weight_BT < 1
    clipped_low = own.clipped_low & has_own | among.clipped_low & has_among
    clipped_high = own.clipped_high & has_own | among.clipped_high & has_among
    return Surrogate(loss, own.ratio, clipped_low, clipped_high)


@dataclass(frozen=True)
class COPOConfig:
    """Settings: `gamma` and `rho` are slope and middle of the gate, `rho` in units of `log_base`."""

    gate: Gate = "only-soft"
    gamma: float = 5.0
    rho: float = 1.0
    log_base: LogBase = "nats"
    coefficient: bool = False
    """Whether the global reward is multiplied by the consistency coefficient."""
    global_coefficient: float = 1.0
    equality: Literal["meaning", "string"] = "meaning"
    shuffled: bool = False
    seed: int = 0
    dual_clip: float | None = 3.0
    reduction: Reduction = "sequence_mean_of_token_mean"

    def __post_init__(self) -> None:
        check_choice(self.gate, get_args(Gate), "copo.gate")
        check(self.gamma >= 0, "copo.gamma", "not be negative", self.gamma)
        check(self.rho >= 0, "copo.rho", "not be negative", self.rho)
        check_choice(self.log_base, get_args(LogBase), "copo.log_base")
        used = self.gate == "only-soft-with-coef"
        ok = self.global_coefficient >= 0 and (used or self.global_coefficient == 1)
        check(ok, "copo.global_coefficient", "be 1, or not negative with gate only-soft-with-coef",
              self.global_coefficient)  # fmt: skip
        check_choice(self.equality, ("meaning", "string"), "copo.equality")
        check(self.dual_clip is None or self.dual_clip > 1, "copo.dual_clip", "be above 1 or null", self.dual_clip)
        check_choice(self.reduction, ("token_mean", "sequence_mean_of_token_mean"), "copo.reduction")


class COPO(DrawingMethod):
    """Two `channels`, and the `surrogate` that blends with them; advantage and clip range stay their owner's."""

    slug: ClassVar[str] = "copo"
    requires: tuple[str, ...] = ("reward", "answer", "old_logprob")
    learns_without_advantage: ClassVar[bool] = True
    config_class: ClassVar[type[COPOConfig]] = COPOConfig
    presets: ClassVar[Mapping[str, COPOConfig]] = {
        "paper": COPOConfig(),
        "bits": COPOConfig(log_base="bits"),
        "released": COPOConfig("soft-with-zero", log_base="bits", equality="string"),
        "tiny": COPOConfig(rho=2.0, dual_clip=None, reduction="token_mean"),
    }

    def __init__(self, config: COPOConfig | None = None) -> None:
        self.config = config or COPOConfig()
        self.reduction = self.config.reduction
        self.draws = StepDraws(self.config.seed)
        self._last: dict[str, float] = {}
        self._alone = False
        self._pending: list[str] = []

    def channels(self, rollout: Rollout, advantage_BT: Tensor) -> dict[str, Tensor]:
        """`copo.global` and `copo.local_weight`, the same on every token of a response [B, T]."""
        c, reward, group = self.config, rollout.require("reward", by=self.slug), rollout.group_id
        entropy = consistency_entropy(self._answers(rollout), group, c.log_base, dtype=reward.dtype)
        sums, size, _ = group_sums(reward, group)
        value = sums / size
        if c.coefficient:
            value = value * consistency_coefficient(entropy, size, c.log_base)
        among = self._among(value, group)
        local = advantage_BT.masked_fill(~rollout.mask, 0.0).abs().sum(1)
        weight = local_weight(entropy, reward, local, group, c.gate, c.gamma, c.rho)
        self._last = {
            "consistency_entropy": float((entropy / size).sum() / (1 / size).sum()),
            "local_weight": float(weight.mean()),
            "equal_groups": float((dead_groups(reward, group) / size).sum() / (1 / size).sum()),
        }
        shape = advantage_BT.shape
        return {"copo.global": among[:, None].expand(shape), "copo.local_weight": weight[:, None].expand(shape)}

    def _answers(self, rollout: Rollout) -> Tensor:
        if self.config.equality == "meaning" and rollout.cluster_id is not None:
            return rollout.cluster_id
        rollout.require("answer", by=self.slug)
        return answer_ids(rollout.answer or ()).to(rollout.group_id.device)

    def _among(self, value: Tensor, group: Tensor) -> Tensor:
        ids, index = torch.unique(group, return_inverse=True)
        if len(ids) < 2:
            self._warn_alone()
            return torch.zeros_like(value)
        among = global_advantage(value, group)
        if not self.config.shuffled:
            return among
        of_group = torch.zeros(len(ids), dtype=among.dtype, device=among.device).scatter(0, index, among)
        return of_group[self.draws.permutation(len(ids)).to(index.device)][index]

    def _warn_alone(self) -> None:
        if not self._alone:
            self._alone = True
            self._pending.append(
                "method 'copo' compares prompts, and a rollout has only one group: its global advantage is 0; set "
                "rollout.prompts to at least 2"
            )

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The blended loss."""
        among, weight = (inputs.rollout.require(f"copo.{name}", by=self.slug) for name in ("global", "local_weight"))
        c = self.config
        return blended_surrogate(
            inputs.logprob, inputs.old_logprob, inputs.advantage, among, weight, inputs.lower, inputs.upper,
            c.dual_clip, c.global_coefficient,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Mean consistency entropy over groups in units of `log_base`, mean w, share of groups with equal rewards."""
        names = ("consistency_entropy", "local_weight", "equal_groups")
        return {name: self._last.get(name, math.nan) for name in names}

    def notices(self) -> list[str]:
        """Says once that there was nothing to compare with."""
        found, self._pending = self._pending, []
        return found
