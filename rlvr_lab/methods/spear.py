r"""SPEAR: learn from own successes once more, after a curriculum of exploration (arXiv 2509.22601).

    L = L_new + gamma(s) L_replayed           gamma(s) = c/2 (1 - cos(pi s / T_warm)) up to T_warm, then c
    R = R_task + mu(s) min(cap, w n_calls)    mu(s) = (1 + cos(pi s / T_tool)) / 2 up to T_tool, then 0
    A = R - mean_group R                      no division by a standard deviation
    A~ = R - P50(D_R)                         of a replayed response; only those with A~ > 0

s counts steps from 0; R [B]; A, losses [B, T]. Both losses are clipped (1 - 0.2, 1 + 0.28) and reduced for themselves;
replayed ratios are against the log-probs stored when a response was sampled. D holds responses with A > 0, D_R the mean
rewards of all groups of recent steps, P50 is their median. In one step (`replay`): where more than `fill` x `buffer`
stored responses have R > P50, draw min(2^floor(log2 n), buffer) of the n with A~ > 0 and empty D; drop what is more
than min(tol, 10) steps older than the newest stored; store this step. Covariance clip, over the N tokens of a
minibatch's new rows and of its replayed rows separately (`entropy_mechanism`): max(floor(rho N), 1) of the tokens
that the clip leaves alone and whose cov = (A - mean A)(log pi - mean log pi) lies inside (low, high) lose their loss
and stay in the denominator; no dual clip then. rho = 0 switches it off, and the dual clip (10) on, for new rows.
"Dr.BoT" is the rest: no std, no KL, cut or unreadable responses out of the loss (not out of the group's mean), of N
groups the floor(0.75 N) of largest reward std.

Card: papers/spear.md. Code compared: TencentYoutuResearch/SPEAR @ 7e84315 (its `verl`; preset `agents`: its
`verl-agent`). The code takes separate optimizer steps for replayed rows, last; here both losses are one sum, as in the
paper, and `schedule: sequential` is refused. Its aggregation `seq-mean-token-sum-norm` divides by the padded length and
not by the number of sequences (`verl_compat`). It reads no covariance settings for replay: `paper` makes them
effective. `continuous`: draw every step, D a queue of `buffer` rows; `weight_decay` f: stored A times f in place of A~,
and the fill test counts all [code]. Not here: the mask for repetitive responses, whose rule the card does not give.
With 0/1 rewards the tool reward weighs twice what it does with the code's +-1.

Controls: `warmup: 0` (gamma = c at once), `ratio: 0, replay_ratio: 0`, `weight_decay: 1` (no recalibration),
`schedule: never` (Dr.BoT with the tool reward; `tool_reward: none` without).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import Singleton, group_advantage
from ..core.dynamics import token_covariance
from ..core.groups import varied_groups
from ..core.losses import Surrogate, clipped_surrogate
from ..core.rollout import Rollout
from ..core.rows import canonical_order, tool_calls
from ..errors import UserError
from ._draws import DrawingMethod, StepDraws
from ._self_imitation import Schedule, SelfImitation
from ._settings import bounds, check, check_choice
from .base import LossInputs
from .entropy_mechanism import clip_cov_candidates, clip_cov_number, place_mask, select_clip_cov

ToolReward = Literal["cosine", "constant", "none"]
Count = Literal["calls", "turns"]


def tool_weight(step: float, decay: float) -> float:
    """mu(s): from 1 down to 0 at `decay`; 0 afterwards."""
    return 0.5 * (1 + math.cos(math.pi * step / decay)) if decay and step <= decay else 0.0


def replay_weight(step: float, warmup: float, coefficient: float = 1.0) -> float:
    """gamma(s): from 0 up to `coefficient` at `warmup`; without a warm-up `coefficient` from the start."""
    return coefficient * (0.5 * (1 - math.cos(math.pi * step / warmup)) if step <= warmup and warmup else 1.0)


def tool_reward(calls_B: Tensor, per_call: float = 0.1, cap: float = 1.0) -> Tensor:
    """min(cap, per_call n) [B], for right and wrong answers alike."""
    return (per_call * calls_B).clamp_max(cap)


@dataclass(frozen=True)
class CovarianceClip:
    """What the covariance clip did with one set of tokens, all [B, T]."""

    covariance: Tensor
    eligible: Tensor
    clipped: Tensor
    """Where the ratio's clip has stopped the gradient."""
    places: Tensor
    """(row, column) of the dropped tokens [n, 2], in the order drawn: as many as rho asks for, or all eligible ones."""


def covariance_clip(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    clip: tuple[float, float],
    interval: tuple[float, float],
    ratio: float,
    generator: torch.Generator,
) -> CovarianceClip:
    """Tokens that lose their loss. `clip` are the distances of the ratio's bounds from 1; `interval` is open."""
    covariance = token_covariance(logprob_BT, advantage_BT, mask_BT)
    old = old_logprob_BT.masked_fill(~mask_BT, 0.0)
    done = clipped_surrogate(logprob_BT.detach(), old, advantage_BT, 1 - clip[0], 1 + clip[1])
    clipped = (done.clipped_low | done.clipped_high) & mask_BT
    eligible = clip_cov_candidates(covariance, mask_BT, *interval, clipped)
    number = clip_cov_number(int(mask_BT.sum()), ratio) if ratio else 0
    places = select_clip_cov(eligible, number, generator)
    return CovarianceClip(covariance, eligible, clipped, places)


@dataclass(frozen=True)
class SpearConfig:
    """`coefficient` is c, `warmup` and `decay` are T_warm and T_tool in steps, `buffer` and `history` the sizes of D
    (responses) and D_R (groups), `tolerance` is tol; `ratio`, `low`, `high` are the covariance clip's on new rows and
    `replay_...` on replayed ones; `length` is the constant that the token sum is divided by, `rollout.max_tokens`."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    length: int = 16384
    verl_compat: bool = False
    singleton: Singleton = "zero"
    keep_groups: float = 0.75
    mask_incomplete: bool = True
    mask_unreadable: bool = True
    tool_reward: ToolReward = "cosine"
    count: Count = "calls"
    per_call: float = 0.1
    cap: float = 1.0
    decay: int = 200
    schedule: Schedule = "when_full"
    weight_decay: float | None = None
    std: bool = False
    """Divide both advantages by a standard deviation, A~ by the median one."""
    buffer: int = 2048
    fill: float = 1.5
    history: int = 10240
    tolerance: int = 10
    needs_call: bool = False
    """Store only responses that called a tool."""
    store_zero: bool = False
    """Store responses of advantage 0 too."""
    coefficient: float = 1.0
    warmup: int = 200
    ratio: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    replay_ratio: float = 0.02
    replay_low: float = 1.0
    replay_high: float = 40.0
    seed: int = 0

    def __post_init__(self) -> None:
        if str(self.schedule) == "sequential":
            raise UserError(
                "methods.spear.schedule 'sequential' (separate optimizer steps for replayed responses) is not carried: "
                "new and replayed losses are one sum; use when_full"
            )
        check_choice(self.schedule, get_args(Schedule), "spear.schedule")
        check_choice(self.tool_reward, get_args(ToolReward), "spear.tool_reward")
        check_choice(self.count, get_args(Count), "spear.count")
        check_choice(self.singleton, get_args(Singleton), "spear.singleton")
        check(0 <= self.clip_low <= 1, "spear.clip_low", "lie in [0, 1]", self.clip_low)
        check(self.dual_clip is None or self.dual_clip > 1, "spear.dual_clip", "be above 1 or null", self.dual_clip)
        check(0 < self.keep_groups <= 1, "spear.keep_groups", "lie in (0, 1]", self.keep_groups)
        decay = self.weight_decay
        check(decay is None or 0 < decay <= 1, "spear.weight_decay", "lie in (0, 1] or be null", decay)
        for name in ("length", "buffer", "history"):
            check(getattr(self, name) >= 1, f"spear.{name}", "be at least 1", getattr(self, name))
        for name in ("clip_high", "per_call", "cap", "decay", "fill", "tolerance", "coefficient", "warmup"):
            check(getattr(self, name) >= 0, f"spear.{name}", "not be negative", getattr(self, name))
        for kind in ("", "replay_"):
            ratio, low, high = (getattr(self, kind + name) for name in ("ratio", "low", "high"))
            check(0 <= ratio <= 1, f"spear.{kind}ratio", "be a fraction in [0, 1]", ratio)
            check(low <= high, f"spear.{kind}low", f"not exceed {kind}high ({high})", low)


class Spear(DrawingMethod):
    """Owns `advantage`, `replay`, `clip`, `surrogate` and the reduction; adds a `reward`, a `filter` and a `weight`."""

    slug: ClassVar[str] = "spear"
    requires: tuple[str, ...] = ("reward", "old_logprob")
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[SpearConfig]] = SpearConfig
    presets: ClassVar[Mapping[str, SpearConfig]] = {
        "paper": SpearConfig(),
        "released": SpearConfig(
            needs_call=True, replay_ratio=2e-4, replay_high=5.0, verl_compat=True, singleton="raw", tolerance=5,
            warmup=300,
        ),
        "agents": SpearConfig(
            count="turns", cap=math.inf, store_zero=True, replay_ratio=2e-4, replay_high=5.0, verl_compat=True,
            singleton="raw", tolerance=5, length=512,
        ),
        "tiny": SpearConfig(
            length=96, buffer=64, history=256, tolerance=5, decay=12, warmup=12, ratio=0.02, low=0.0, high=40.0,
            replay_low=0.0,
        ),
    }  # fmt: skip

    def __init__(self, config: SpearConfig | None = None) -> None:
        c = self.config = config or SpearConfig()
        self.reduction = "token_sum_over_constant" if c.verl_compat else "sequence_mean_of_token_sum_over_constant"
        self.reduction_constant = float(c.length)
        if c.mask_unreadable:
            self.requires = (*self.requires, "answer")
        self.replay_rows = 0 if c.schedule == "never" else c.buffer
        self.draws = StepDraws(c.seed)
        self.memory = SelfImitation(
            c.buffer, c.history, c.tolerance, c.schedule, c.fill, c.weight_decay, c.std, c.needs_call, c.store_zero
        )
        self._figures: dict[str, float] = {}
        self._clipped = [0.0, 0.0]
        self._pending: list[str] = []
        self._said = False

    # -- curricula ----------------------------------------------------------------------------------------------

    @property
    def gamma(self) -> float:
        """Weight of the replayed loss in this step."""
        return replay_weight(self.draws.step, self.config.warmup, self.config.coefficient)

    @property
    def mu(self) -> float:
        """Weight of the tool reward in this step."""
        fixed = {"constant": 1.0, "none": 0.0}
        return fixed.get(self.config.tool_reward, tool_weight(self.draws.step, self.config.decay))

    def check_run(self, vocabulary: int, steps: int) -> None:
        """A curriculum that the run is too short for is said, not refused."""
        replays, pays = self.config.schedule != "never", self.config.tool_reward == "cosine"
        for name, used in (("warmup", replays), ("decay", pays)):
            if used and (length := getattr(self.config, name)) > steps:
                self._pending.append(
                    f"methods.spear.{name} is {length}, but the run has {steps} steps: the curriculum does not end"
                )

    def notices(self) -> list[str]:
        """What came up: a curriculum longer than the run, and successes without a tool call."""
        found, self._pending = self._pending, []
        return found

    def _counted(self, rollout: Rollout) -> Tensor:
        if self.config.count == "calls":
            return tool_calls(rollout)
        turns = rollout.require("turn_id", by=self.slug)
        return turns.masked_fill(~rollout.mask, -1).amax(1) + 1

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """mu(s) R_tool as component `tool_calls`."""
        if self.config.tool_reward == "none":
            return {}
        calls = self._counted(rollout).to(torch.get_default_dtype())
        return {"tool_calls": self.mu * tool_reward(calls, self.config.per_call, self.config.cap)}

    # -- Dr.BoT -------------------------------------------------------------------------------------------------

    def filter(self, rollout: Rollout) -> Rollout:
        """Notes all groups for D_R; keeps those that vary most, without the tokens of cut and unreadable responses."""
        reward, c = rollout.require("reward", by=self.slug), self.config
        self.memory.note(reward, rollout.group_id)
        if c.mask_incomplete:
            rollout = rollout.with_(action_mask=rollout.action_mask & rollout.finished[:, None])
        if c.mask_unreadable and rollout.answer is not None:
            read = torch.tensor([a is not None for a in rollout.answer], device=reward.device)
            rollout = rollout.with_(action_mask=rollout.action_mask & read[:, None])
        if c.keep_groups == 1:
            return rollout
        return rollout.rows(varied_groups(reward, rollout.group_id, c.keep_groups).nonzero().squeeze(1))

    def advantage(self, rollout: Rollout) -> Tensor:
        """Reward minus group mean [B, T]."""
        reward, kind = rollout.require("reward", by=self.slug), self.config.singleton
        value_B = group_advantage(reward, rollout.group_id, "sample" if self.config.std else "none", singleton=kind)
        return value_B[:, None].expand(rollout.response_ids.shape)

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Constant bounds 1 - clip_low and 1 + clip_high."""
        return bounds(1 - self.config.clip_low, 1 + self.config.clip_high, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The clipped surrogate; a dual clip where no covariance clip acts on new rows (replayed ones have A > 0)."""
        dual = None if self.config.ratio else self.config.dual_clip
        given = inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.lower, inputs.upper
        return clipped_surrogate(*given, dual_clip=dual)

    # -- covariance clip ----------------------------------------------------------------------------------------

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """`spear.kept` [B, T], False on tokens that lose their loss: for new and for replayed rows by themselves, and
        the same tokens whatever the order of rows."""
        c, kept = self.config, torch.ones_like(batch.mask)
        order = canonical_order(batch)
        for kind, ratio, interval in (
            (False, c.ratio, (c.low, c.high)),
            (True, c.replay_ratio, (c.replay_low, c.replay_high)),
        ):
            rows = order[_replayed(batch)[order] == kind]
            if not len(rows):
                continue
            logprob, old = (batch.require(name, by=self.slug)[rows] for name in ("current_logprob", "old_logprob"))
            given = logprob, old, advantage_BT[rows], batch.mask[rows]
            found = covariance_clip(*given, (c.clip_low, c.clip_high), interval, ratio, generator)
            kept[rows] = ~place_mask(found.places, batch.mask[rows])
            if kind:
                self._clipped[0] += float(found.clipped.sum())
                self._clipped[1] += float(batch.mask[rows].sum())
        return {"spear.kept": kept}

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """0 on dropped tokens; gamma(s) on replayed rows, 1 on new ones [B, T]."""
        kept = batch.require("spear.kept", by=self.slug).to(advantage_BT.dtype)
        return torch.where(_replayed(batch)[:, None], self.gamma * kept, kept)

    # -- replay -------------------------------------------------------------------------------------------------

    def replay(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Rollout, Tensor] | None:
        """Draw, then evict, then store this step; None where nothing is replayed."""
        order, step = canonical_order(rollout), self.draws.step
        self._figures["baseline"] = self.memory.means.median()
        drawn = self.memory.draw(self.draws.generator())
        arranged = rollout.rows(order)
        self.memory.store(arranged, advantage_BT[order, : arranged.response_ids.shape[1]], step)
        self._figures["buffer"] = float(len(self.memory.buffer))
        if self.memory.uncalled and not self._said:
            self._said = True
            self._pending.append("method 'spear' stores no success without a tool call (methods.spear.needs_call)")
        if drawn is None:
            return None
        rows, advantage, steps = drawn
        ages = (step - steps).double()
        self._figures |= {"replay_age": float(ages.mean()), "replay_age_max": float(ages.max())}
        return rows, advantage

    # -- state and figures --------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Both weights, P50 before this step, stored responses; of replayed ones their ages and the share of tokens
        that the clip has stopped, nan in a step without."""
        clipped, tokens = self._clipped
        nothing = dict.fromkeys(("replay_age", "replay_age_max", "buffer", "baseline"), math.nan)
        share = clipped / tokens if tokens else math.nan
        found = nothing | self._figures | {"gamma": self.gamma, "mu": self.mu, "replay_clip_fraction": share}
        self._figures, self._clipped = {}, [0.0, 0.0]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Steps made, both histories and the buffer."""
        return super().state_dict() | self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's state."""
        super().load_state_dict(state)
        self.memory.load_state_dict(state)


def _replayed(batch: Rollout) -> Tensor:
    """True [B] on responses of earlier steps."""
    return torch.zeros_like(batch.finished) if batch.replayed is None else batch.replayed
