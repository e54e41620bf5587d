r"""Light-IF: token-weighted entropy, entropy-preserving SFT and sorted prompts for instructions (arXiv 2508.03178).

    cov_t = (A_t - mean A)(log pi_t - sg[mean log pi])       means over the marked tokens of the optimizer minibatch
    w_t   = clip(alpha softmax_t(cov), 0, cap)               softmax over the tokens of one response: sum w <= alpha
    term  = -coefficient token_mean(w H)                     H: entropy of the current policy in nats, with gradient

(TEA-RL; all [B, T]). The gradient flows through H and, unless `detach_weights`, through w into log pi: that path also
raises the covariance of high-entropy tokens. Uniform advantages give w = alpha / length; the mean weight of a response
is at most alpha / length, so alpha 10 is negligible for thousands of tokens and large for ten. `mean_weight` sets
alpha = mean_weight x length per response instead.

Dense rewards are the task's (`tasks.instructions`, `tasks.ifeval`): points of single rules beside strict success.

Card: papers/light_if.md. Code compared: Qihoo360/Light-IF @ 01e9003. **TEA is dead code there**: its branch is never
reached and every script sets the entropy coefficient to 0, so the release trains GRPO with clip range 1/1, dual clip 10
and KL 0.001 (preset `released`: no term at all; the clip values are in the recipe). The default adds the term to the
policy loss. The release takes the means over a micro-batch; a response without marked tokens is nan there and has
weight 0 here. The length reward is computed and logged there, never used; here `length_limit` switches it on.

Presets: `paper` (alpha 10, cap 5), `released` (coefficient 0), `tiny` (`mean_weight` 0.05 for ten-token responses).
Controls: `weighting: permuted` deals the weights anew inside each response, `uniform` gives its mean weight to every
token; both without gradient through the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.reduce import Reduction, masked_mean
from ..core.rollout import Rollout
from ..core.rows import canonical_order
from ..errors import UserError
from ._settings import check, check_choice, check_reduction
from .base import LossInputs, Method

Weighting = Literal["covariance", "permuted", "uniform"]
Difficulty = Literal["hard", "pass", "easy"]
CENTRES = ("light_if.advantage_mean", "light_if.logprob_mean")
PLACES = "light_if.places"


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


def entropy_sft_tokens(nll_N: Tensor, entropy_N: Tensor, weight: float = 0.8, ratio: float = 0.8) -> Tensor:
    """Indices, ascending, of the k = max(floor(ratio N), 1) supervised tokens with the largest nll - weight H.

    Dropped are tokens that are certain and right relative to their entropy, so that they are not sharpened further.
    Equal values: which of them are kept is arbitrary. Raises ValueError without a token and for a ratio outside (0, 1].
    """
    if not len(nll_N):
        raise ValueError("there is no supervised token to choose from")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], not {ratio}")
    delta = (nll_N - weight * entropy_N).detach()
    return delta.topk(max(int(ratio * len(delta)), 1)).indices.sort().values


def entropy_sft_loss(
    nll_N: Tensor, entropy_N: Tensor, weight: float = 0.8, ratio: float = 0.8, total: int | None = None
) -> Tensor:
    """Mean nll of the kept tokens (`entropy_sft_tokens`); no gradient through the choice, no entropy in the loss.

    `total`: supervised tokens of all devices and accumulated batches; the sum is then divided by floor(ratio total).
    """
    kept = nll_N[entropy_sft_tokens(nll_N, entropy_N, weight, ratio)]
    return kept.mean() if total is None else kept.sum() / int(total * ratio)


# -- difficulty and length --------------------------------------------------------------------------------------------


def difficulty(rate: float) -> Difficulty:
    """hard: never right; easy: always right; pass: sometimes. Raises ValueError for what is no rate."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of success lies in [0, 1], not {rate}")
    return "hard" if rate == 0 else "easy" if rate == 1 else "pass"


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Names a pool of prompts, so that rates are not taken for those of another."""
    return hashlib.sha256(json.dumps([list(map(int, p)) for p in prompts]).encode()).hexdigest()


def length_reward(
    length_B: Tensor,
    score_B: Tensor,
    limit: int = 8192,
    threshold: float = 0.2,
    right: float = 0.0,
    wrong: tuple[float, float] = (0.0, -1.0),
    exceeded: float = -2.0,
) -> Tensor:
    """Cosine reward [B] for long answers that are right and short ones that are wrong.

    f = (1 - cos(pi length / limit)) / 2;   score >= threshold: right + f (2 score - right), else from wrong[0] to
    wrong[1] by f;   `exceeded` where length >= limit
    """
    f = 0.5 * (1 - torch.cos(math.pi * length_B.to(score_B.dtype) / limit))
    good = right + f * (2 * score_B - right)
    bad = wrong[0] + f * (wrong[1] - wrong[0])
    return torch.where(length_B >= limit, exceeded, torch.where(score_B >= threshold, good, bad))


# -- reinforcement learning -------------------------------------------------------------------------------------------


def tea_weights(
    logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    alpha: Tensor | float = 10.0,
    cap: float = 5.0,
    centres: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """w [B, T], 0 outside the mask, with gradient in `logprob_BT`. `alpha` may be given per response [B, 1].

    `centres`: means of advantage and log-prob, broadcastable; by default over the marked tokens given here.
    """
    if centres is None:
        centres = masked_mean(advantage_BT, mask_BT), masked_mean(logprob_BT, mask_BT)
    covariance = (advantage_BT - centres[0]) * (logprob_BT - centres[1].detach())
    some = mask_BT.any(1, keepdim=True)
    # a row of -inf alone has no softmax; 0 keeps its gradient finite
    scores = covariance.masked_fill(~mask_BT, -math.inf).masked_fill(~some, 0.0)
    return (alpha * torch.softmax(scores, 1)).clamp(0.0, cap).masked_fill(~mask_BT, 0.0)


def places(mask_BT: Tensor, generator: torch.Generator, order_B: Tensor | None = None) -> Tensor:
    """For every token the place [B, T] whose weight it takes: a random permutation of the marked ones of its row.

    Random numbers are dealt to the rows in `order_B`, by default as they come.
    """
    keys = torch.rand(mask_BT.shape, generator=generator, device=generator.device).to(mask_BT.device)
    if order_B is not None:
        keys = torch.empty_like(keys).index_copy(0, order_B, keys)
    shuffled = keys.masked_fill(~mask_BT, math.inf).argsort(dim=1, stable=True)
    marked_first = (~mask_BT).to(torch.int8).argsort(dim=1, stable=True)
    return torch.empty_like(shuffled).scatter(1, marked_first, shuffled)


@dataclass(frozen=True)
class LightIFConfig:
    """Settings. `split`: the `difficulty.json` that `rlvr-lab cold-start` writes; prompts then come in two stages, of
    which the first has `stage_steps` steps of `prompts` prompts each."""

    coefficient: float = 1.0
    alpha: float = 10.0
    cap: float = 5.0
    mean_weight: float | None = None
    detach_weights: bool = False
    weighting: Weighting = "covariance"
    reduction: Reduction = "token_mean"
    length_limit: int | None = None
    split: str | None = None
    stage_steps: int = 40
    prompts: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.coefficient >= 0, "light_if.coefficient", "not be negative", self.coefficient)
        check(self.alpha > 0, "light_if.alpha", "be positive", self.alpha)
        check(self.cap > 0, "light_if.cap", "be positive", self.cap)
        check(self.mean_weight is None or self.mean_weight > 0, "light_if.mean_weight", "be positive or null",
              self.mean_weight)  # fmt: skip
        check_choice(self.weighting, get_args(Weighting), "light_if.weighting")
        check_reduction(self.reduction, "light_if.reduction")
        check(self.length_limit is None or self.length_limit >= 1, "light_if.length_limit", "be at least 1 or null",
              self.length_limit)  # fmt: skip
        check(self.stage_steps >= 0, "light_if.stage_steps", "not be negative", self.stage_steps)
        check(self.prompts >= 1, "light_if.prompts", "be at least 1", self.prompts)


class LightIF(Method):
    """The TEA term, and where asked for the length reward and prompts by difficulty."""

    slug: ClassVar[str] = "light_if"
    needs_entropy: ClassVar[bool] = True
    needs_current: ClassVar[bool] = True
    config_class: ClassVar[type[LightIFConfig]] = LightIFConfig
    presets: ClassVar[Mapping[str, LightIFConfig]] = {
        "paper": LightIFConfig(),
        "released": LightIFConfig(coefficient=0.0),
        "tiny": LightIFConfig(mean_weight=0.05, cap=0.25),
    }

    def __init__(self, config: LightIFConfig | None = None) -> None:
        self.config = config or LightIFConfig()
        self.regularise_reduction = self.config.reduction
        self.steps = 0
        self.mean_weight = math.nan
        self._stages: list[list[int]] | None = None

    def has(self, hook: str) -> bool:
        """A coefficient of 0 leaves the term out, as the release does; `length_limit` and `split` switch on theirs."""
        c = self.config
        off = {"regularise": not c.coefficient, "prepare": not c.coefficient, "reward": c.length_limit is None,
               "select": c.split is None, "observe": c.split is None}  # fmt: skip
        return super().has(hook) and not off.get(hook, False)

    def select(self, problems: Any, step: int) -> list[int]:
        """Problems of a step: first those that are solved at least half the time, later the rest that can be learned
        from, hard ones included; the order is drawn anew for each epoch [inferred: the paper names two stages only].

        Raises UserError where the split is missing, or was made for other prompts.
        """
        c = self.config
        if self._stages is None:
            self._stages = read_stages(Path(str(c.split)), digest(problems.prompts))
        pool = self._stages[0 if self.steps < c.stage_steps else 1] or self._stages[0] or self._stages[1]
        chosen: list[int] = []
        while len(chosen) < c.prompts:
            epoch, offset = divmod(step * c.prompts + len(chosen), len(pool))
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(c.seed * 1_000_003 + epoch))
            chosen += [pool[i] for i in order[offset : offset + c.prompts - len(chosen)].tolist()]
        return chosen

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        """The length reward [B], from the sum of the components so far (dense and strict)."""
        assert self.config.length_limit is not None
        parts = list(rollout.reward_components.values())
        score = torch.stack(parts).sum(0) if parts else rollout.require("reward", by=self.slug)
        return {"light_if.length": length_reward(rollout.lengths, score, self.config.length_limit)}

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The two means, which span the minibatch, and for the permuted control every token's place."""
        logprob = batch.require("current_logprob", by=self.slug)
        means = [masked_mean(x, batch.mask).expand_as(logprob) for x in (advantage_BT, logprob)]
        found = dict(zip(CENTRES, means, strict=True))
        if self.config.weighting == "permuted":
            found[PLACES] = places(batch.mask, generator, canonical_order(batch))
        weight = self._weights(batch.with_statistics(**found), logprob, advantage_BT)
        self.mean_weight = float(masked_mean(weight, batch.mask))
        return found

    def _weights(self, rollout: Rollout, logprob_BT: Tensor, advantage_BT: Tensor) -> Tensor:
        c, mask, statistics = self.config, rollout.mask, rollout.statistics
        lengths = mask.sum(1, keepdim=True).to(logprob_BT.dtype)
        alpha = c.alpha if c.mean_weight is None else c.mean_weight * lengths
        if c.detach_weights or c.weighting != "covariance":
            logprob_BT = logprob_BT.detach()
        centres = statistics[CENTRES[0]], statistics[CENTRES[1]]
        weight = tea_weights(logprob_BT, advantage_BT, mask, alpha, c.cap, centres)
        if c.weighting == "permuted":
            weight = weight.gather(1, statistics[PLACES].long())
        elif c.weighting == "uniform":
            weight = (weight.sum(1, keepdim=True) / lengths.clamp_min(1)).expand_as(weight)
        return weight.masked_fill(~mask, 0.0)

    def regularise(self, inputs: LossInputs) -> Tensor:
        """-coefficient w H per token [b, T]."""
        assert inputs.entropy is not None
        weight = self._weights(inputs.rollout, inputs.logprob, inputs.advantage)
        return -self.config.coefficient * weight * inputs.entropy

    def metrics(self) -> dict[str, float]:
        """`mean_weight`: over the tokens of the last minibatch; nan before one, and where there is no term."""
        return {"mean_weight": self.mean_weight}

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Count the steps that the stages are made of."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps made."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's count."""
        self.steps = int(state["steps"])


def read_stages(path: Path, pool: str) -> list[list[int]]:
    """Indices of the easier and of the harder prompts of a `difficulty.json`; always solved ones are left out.

    Raises UserError where it cannot be read, was made for another pool of prompts, or leaves no prompt.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found, rates = data["pool"], [float(rate) for rate in data["rates"]]
        kinds = [difficulty(rate) for rate in rates]
    except OSError as error:
        raise UserError(f"methods.light_if.split: {path}: {error.strerror}; make it with rlvr-lab cold-start") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"methods.light_if.split: {path} was not made by rlvr-lab cold-start: {error}") from None
    if found != pool:
        raise UserError(f"methods.light_if.split: {path} was made for other prompts; use the same data and seed")
    easier = [i for i, rate in enumerate(rates) if rate >= 0.5 and kinds[i] == "pass"]
    harder = [i for i, rate in enumerate(rates) if rate < 0.5]
    if not easier and not harder:
        raise UserError(f"methods.light_if.split: every prompt of {path} is always solved; use harder data")
    return [easier, harder]
