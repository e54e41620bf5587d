r"""ARES: how many stretches of high entropy a response may have, by how difficult its prompt is (arXiv 2510.08457).

    Hw_t   = mean token entropy of t .. t + w - 1, only where all w tokens are in the response
    theta  = mean over responses of the 0.95 quantile of H_t;    event: Hw_t > theta;    N_i = events of response i
    bucket = easy, medium or hard: at least 2/3, at least 1/3, less than 1/3 of the group right
    lambda = max(0, (mean N - N*) / (var N + eps)), at most `largest`;          D = N_i - N*
    R_i    = 1[right] - 1[wrong] lambda g(D),   g = [D]+ (easy), |D| (medium), [-D]+ (hard)
    term   = coefficient beta_d rho^event k3(ref)      per token

Means and population variances over the responses of a bucket; H in nats [B, T], detached; N, R [B]. Order: difficulty,
then target, then reward, then `filter`. **With the batch's own mean as target N*, as the text has it, lambda is exactly
0** (`target: batch`). Here N* is the bucket's mean in the previous step, or an average of earlier ones [inferred]; a
bucket without one is not shaped. For hard prompts lambda needs a mean above the target while g punishes what lies
below: as in the text. Where var N = 0 lambda would be D / eps, hence `largest`. rho and the beta_d are not stated; 0.5
and 1 [inferred]. Windows seldom exceed the quantile of single tokens, so events are rare; `theta_of: window` takes
the quantile of the windows.

Card: papers/ares.md. Code compared: shawn0728/ARES @ 146620e, for which `_ares_code` has another reward, another count
and a KL weight for each bucket. **Its reward is not adaptive**: online filtering scores before difficulty exists, so
all prompts are easy with target 0 and alpha 0.5 (`order: released`). The release moves its KL weights once per
micro-batch and process; here it is once per step, from the log-probs before the update. Branching is described, and in
no code. Appendix: `theta_over: group` with `inclusive`, `appendix_advantage`, `moved_kappa`; S_d, phi, b and Z have no
stated form (`reward: appendix` says so). `count: semantic` counts trigger words of high entropy; the list is not in the
paper, so `trigger_words` must be given, as for `count: trigger`, the release's.

Presets: `paper`, `released`, `tiny` (quantile of windows, no filter, no KL). Control: `control: permuted` deals the
labels of difficulty to other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.advantages import group_advantage, group_sums
from ..core.losses import kl_estimate
from ..core.rollout import Rollout
from ..core.windows import BUCKETS, EASY, MEDIUM, bucket_moments, slope
from ..errors import UserError
from ._ares_code import BucketKLController, grid_reward, head_entropies, moved_strengths, rounded_targets
from ._ares_settings import BARE, HEAD, TRIGGER, ARESConfig, Seen, look
from ._draws import DrawingMethod, StepDraws
from ._markers import marker_ids
from ._settings import check
from .base import Encode, LossInputs

EVENT, BETA = "ares.event", "ares.beta"
TOP = 10  # log-probs that the release has of every token
SOLVED = (0.01, 0.99)
START = 0.5  # the release's alpha


def multiplier(mean: float, target: float, variance: float, eps: float = 1e-6, largest: float | None = None) -> float:
    """lambda of a bucket; 0 where the bucket is empty or has no target yet (nan)."""
    value = (mean - target) / (variance + eps)
    return min(max(0.0, value), math.inf if largest is None else largest) if math.isfinite(value) else 0.0


def deviation(delta_B: Tensor, bucket_B: Tensor) -> Tensor:
    """g_d(N - N*) [B]: what lies above the target (easy), both sides (medium), what lies below it (hard)."""
    above, below = delta_B.clamp_min(0.0), (-delta_B).clamp_min(0.0)
    return torch.where(bucket_B == EASY, above, torch.where(bucket_B == MEDIUM, above + below, below))


def shaping(count_B: Tensor, target_B: Tensor, multiplier_B: Tensor, correct_B: Tensor, bucket_B: Tensor) -> Tensor:
    """-1[wrong] lambda g(N - N*) [B], to be added to the accuracy."""
    punished = multiplier_B * deviation(count_B - target_B, bucket_B)
    return torch.where(correct_B | (multiplier_B == 0), 0.0, -punished)


def averaged(before: float | None, value: float, decay: float) -> float | None:
    """decay before + (1 - decay) value; the value itself where nothing was before, and what was where it is nan."""
    if not math.isfinite(value):
        return before
    return value if before is None else decay * before + (1 - decay) * value


def relaxed_weights(beta_B: Tensor, event_BT: Tensor, rho: float) -> Tensor:
    """beta_d, times rho where a window of high entropy begins [B, T]."""
    return beta_B[:, None] * torch.where(event_BT, rho, 1.0).to(beta_B.dtype)


def appendix_advantage(reward_B: Tensor, group_id_B: Tensor, length_B: Tensor) -> Tensor:
    """(R - mean of the group) / length [B]: the appendix's group advantage, without the token term psi, whose phi and b
    are not stated. An empty response has 0."""
    return group_advantage(reward_B, group_id_B, "none") / length_B.clamp_min(1)


def moved_kappa(kappa: float, kl: float, target: float, rate: float, low: float, high: float) -> float:
    """clip(kappa (1 + rate (KL / target - 1)), low, high): the appendix's controller, KL over tokens outside windows.
    No value of target, rate or bounds is stated."""
    return min(max(kappa * (1 + rate * (kl / target - 1)), low), high)


class ARES(DrawingMethod):
    """Adds a reward component; `filter` records difficulty and events, and drops prompts; `regularise` is the KL."""

    slug: ClassVar[str] = "ares"
    config_class: ClassVar[type[ARESConfig]] = ARESConfig
    presets: ClassVar[Mapping[str, ARESConfig]] = {
        "paper": ARESConfig(),
        "released": ARESConfig(
            count="trigger", theta_of="filled", theta_over="median", theta_decay=0.99, inclusive=True, reward="code",
            order="released", kl="buckets", limit=True, filter="reward",
        ),
        "tiny": ARESConfig(theta_of="window", target_decay=0.8, kl="none", filter="none"),
    }  # fmt: skip

    def __init__(self, config: ARESConfig | None = None) -> None:
        self.config = c = config or ARESConfig()
        self.requires = ("correct", "token_entropy")
        self.requires += (TRIGGER, HEAD, BARE) if c.count == "trigger" else ()
        self.requires += ("ref_logprob",) if c.kl != "none" else ()
        self.refill = 0 if c.filter == "none" else c.max_batches
        self.draws = StepDraws(c.seed)
        self.controller = BucketKLController(c.kl_target, c.kl_interval)
        self.targets: list[float | None] = [None] * len(BUCKETS)
        self.alpha = [START] * len(BUCKETS)
        self.theta: float | None = None
        self.words: tuple[int, ...] = ()
        self._batches: list[Seen] = []
        self._kl: tuple[Tensor, Tensor] | None = None
        self._figures: dict[str, float] = {}

    def has(self, hook: str) -> bool:
        """Reads distributions only to find likeliest tokens; regularises only with a KL."""
        if hook == "read_old_logits" and self.config.count != "trigger":
            return False
        return super().has(hook) and (self.config.kl != "none" or hook not in ("regularise", "channels"))

    def bind(self, encode: Encode) -> None:
        """Ids of the trigger words. Raises UserError where words are needed and missing, or are several tokens."""
        c = self.config
        if c.count == "window":
            return
        if not c.trigger_words:
            raise UserError(
                f"methods.ares.count '{c.count}' needs methods.ares.trigger_words: the paper does not print its list"
            )
        found = marker_ids(c.trigger_words, encode, "ares.trigger_words")
        for text, ids in zip(c.trigger_words, found, strict=True):
            check(len(ids) == 1, "ares.trigger_words", "hold words of one token each", text)
        self.words = tuple(ids[0] for ids in found)

    def read_old_logits(self, log_p_bTV: Tensor, ids_bT: Tensor) -> dict[str, Tensor]:
        """Whether the likeliest token is a trigger word, and two entropies of the ten likeliest [b, T]."""
        top = log_p_bTV.topk(min(TOP, log_p_bTV.shape[-1]), dim=-1)
        head, bare = head_entropies(top.values)
        trigger = torch.isin(top.indices[..., 0], top.indices.new_tensor(self.words))
        return {TRIGGER: trigger.to(head.dtype), HEAD: head, BARE: bare}

    # -- over the whole rollout -------------------------------------------------------------------------------------

    def _look(self, rollout: Rollout) -> Seen:
        return look(rollout, self.config, self.words, self.theta, self.draws)

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """One component, `ares` [B], beside the accuracy."""
        seen = self._look(rollout)
        self._batches.append(seen)
        correct = rollout.require("correct", by=self.slug)
        strengths, targets = self._strengths(seen)
        bucket = seen.bucket
        if self.config.reward == "code" and self.config.order == "released":
            strengths, targets, bucket = [START] * 3, [0.0] * 3, torch.full_like(bucket, EASY)
        strength, target = (seen.count.new_tensor(some)[bucket] for some in (strengths, targets))
        if self.config.reward == "code":
            value = grid_reward(seen.count, target, strength, correct, bucket)
        else:
            value = shaping(seen.count, target, strength, correct, bucket)
        self._note(rollout, seen, strengths, value)
        return {self.slug: value.float()}

    def _strengths(self, seen: Seen) -> tuple[list[float], list[float]]:
        """lambda (or the release's alpha) and target of every bucket, as this batch is rewarded."""
        c = self.config
        if c.reward == "none":
            return [0.0] * 3, [0.0] * 3
        if c.reward == "code":
            targets = rounded_targets(seen.mean)
            return moved_strengths(self.alpha, seen.mean, targets), targets
        lagged = [math.nan if target is None else target for target in self.targets]
        targets = seen.mean if c.target == "batch" else lagged
        triples = zip(seen.mean, targets, seen.variance, strict=True)
        return [multiplier(m, t, v, c.eps, c.largest) for m, t, v in triples], targets

    def _note(self, rollout: Rollout, seen: Seen, strengths: Sequence[float], value: Tensor) -> None:
        length = rollout.lengths.double()
        lengths = bucket_moments(length, seen.bucket)[0].tolist()
        share = torch.bincount(seen.bucket, minlength=len(BUCKETS)).double() / max(len(rollout), 1)
        self._figures = {
            "theta": float(seen.theta.nanmean()),
            "events": float(seen.count.mean()),
            "shaping": float(value.abs().mean()),
            "event_slope": slope(seen.bucket, seen.count),
            "length_slope": slope(seen.bucket, length),
        }
        columns = {"events": seen.mean, "length": lengths, "share": share.tolist(), "strength": strengths}
        for name, values in columns.items():
            self._figures |= {f"{name}_{kind}": float(v) for kind, v in zip(BUCKETS, values, strict=True)}

    def filter(self, rollout: Rollout) -> Rollout:
        """Records `difficulty` (0 easy, 1 medium, 2 hard) and the events, and drops prompts whose mean accuracy (or
        reward) lies outside [0.01, 0.99]; possibly all."""
        last = self._batches[-1] if self._batches else None
        # rows that an earlier filter dropped are no longer those that were rewarded
        seen = last if last is not None and last.ids is rollout.response_ids else self._look(rollout)
        rollout = rollout.with_(difficulty=seen.bucket).with_statistics(**{EVENT: seen.event.float()})
        if self.config.filter == "none":
            return rollout
        metric = rollout.require("correct" if self.config.filter == "accuracy" else "reward", by=self.slug).double()
        sums, sizes, _ = group_sums(metric, rollout.group_id)
        inside = (sums / sizes >= SOLVED[0]) & (sums / sizes <= SOLVED[1])
        return rollout.rows(inside.nonzero().squeeze(1))

    # -- the KL -----------------------------------------------------------------------------------------------------

    def channels(self, rollout: Rollout, advantage_BT: Tensor) -> dict[str, Tensor]:
        """No advantage: the KL's weight of every token. Notes the KL of the step for the controller."""
        c, event = self.config, rollout.statistics.get(EVENT)
        bucket = rollout.difficulty
        if bucket is None or event is None:
            seen = self._look(rollout)
            bucket, event = seen.bucket, seen.event
        betas = (c.beta_easy, c.beta_medium, c.beta_hard) if c.kl == "windows" else self.controller.beta
        beta = advantage_BT.new_tensor(betas)[bucket]
        if c.kl == "windows":
            return {BETA: relaxed_weights(beta, event.bool(), c.rho)}
        old, reference = (rollout.require(name, by=self.slug) for name in ("old_logprob", "ref_logprob"))
        kl = kl_estimate(old, reference, "k3", c.limit).masked_fill(~rollout.mask, 0.0)
        tokens = rollout.mask.sum(1)
        some = tokens > 0
        self._kl = (kl.sum(1)[some] / tokens[some], bucket[some])
        return {BETA: beta[:, None].expand(advantage_BT.shape)}

    def regularise(self, inputs: LossInputs) -> Tensor:
        """coefficient beta k3 per token [b, T]; 0 on responses of an earlier step, which have no beta."""
        rollout = inputs.rollout
        weight, reference = (rollout.require(name, by=self.slug) for name in (BETA, "ref_logprob"))
        # a nan outside would survive the mask, because the gradient of exp multiplies it by zero
        outside = ~rollout.mask | weight.isnan()
        kl = kl_estimate(inputs.logprob, reference.masked_fill(outside, 0.0), "k3", self.config.limit)
        return self.config.coefficient * weight.masked_fill(outside, 0.0) * kl

    # -- after the step ---------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Of the last generation batch: threshold (nats), mean events, mean |shaping|, slopes of events and length on
        the bucket, and by bucket events, length, share of the responses and strength (lambda or alpha); the KL weights
        where they move. nan for an empty bucket."""
        moving = dict(zip((f"beta_{kind}" for kind in BUCKETS), self.controller.beta, strict=True))
        return self._figures | (moving if self.config.kl == "buckets" else {})

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Targets, strengths, threshold and KL weights move: after their use."""
        c = self.config
        if self._batches:
            names = ("count", "bucket", "weight", "theta")
            count, bucket, weight, theta = (torch.cat([getattr(s, name) for s in self._batches]) for name in names)
            means = bucket_moments(count, bucket, weight)[0].tolist()
            self.targets = [averaged(t, m, c.target_decay) for t, m in zip(self.targets, means, strict=True)]
            self.alpha = moved_strengths(self.alpha, means, rounded_targets(means))
            self.theta = averaged(self.theta, float(theta.nanmean()), 0.0)
        if self._kl is not None:
            self.controller.update(*self._kl)
        self._batches, self._kl = [], None
        super().observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Targets, strengths, threshold, KL weights, and the number of steps."""
        own = {"targets": list(self.targets), "alpha": list(self.alpha), "theta": self.theta}
        return own | {"controller": self.controller.state_dict()} | super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.targets = [None if value is None else float(value) for value in state["targets"]]
        self.alpha = [float(value) for value in state["alpha"]]
        self.theta = None if state["theta"] is None else float(state["theta"])
        self.controller.load_state_dict(state["controller"])
        super().load_state_dict(state)
