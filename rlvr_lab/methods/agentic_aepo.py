r"""AEPO for agents: entropy-balanced rollouts and updates (arXiv 2510.14545), with its base ARPO (arXiv 2507.19849).

**Rollout** (`sample`, in an environment of several turns): m of a prompt's trajectories begin at the prompt, the others
branch where entropy rose after a tool's answer; AEPO sets m by probes and makes consecutive branchings less likely
(formulas in `_branching`). **Clip**: r = pi / pi_old, sg stops the gradient,

    l = max(-A r, -A clip(r, 1 - clip_low, (1 + clip_high) r / sg(r)));    for A < 0 at most -A dual_clip

so that the upper bound has PPO's value and the gradient (1 + clip_high) A on log pi instead of 0. **Advantage**:

    A_t = A (1 + a z_t),    z_t = (H_t - mean H) / std H

with H_t [B, T] the policy's present token entropy in nats, without gradient, mean and unbiased std over the actions of
the *optimizer minibatch*: the card's micro-batch would make the result depend on memory settings. Where the std is 0 or
undefined, z = 0. The factor is negative for z < -1 / a, and advantages of a group no longer sum to 0. A is the base's
(`shared: soft`), or on a prefix that several branches share the mean of theirs (`hard`). Actions alone count: tool
output is outside loss and entropies. Reduction: token mean.

Card: papers/agentic_aepo.md. Code compared: RUC-NLPIR/ARPO @ ff66660. `lag: 0` decides by the segment *behind* the
answer, as the paper says: the trajectory's own next segment is the probe, so that no token is wasted, and a branch
starts at the answer. `lag: 1` decides by the segment before it, as released. H is a mean over tokens of full-softmax
entropy / ln V; the released sum over the first 20 is about 20 times that, so w and beta are 20 times the released ones
(w by the card, beta [inferred]). Engines record full-softmax entropies, so `segment: sum` is not cut to the ten
likeliest words. H_initial is the trajectory's own and a branch inherits it; the release keeps it by place in a list,
for ever. l is counted along a path, whose branches inherit it [inferred]; `counter: prompt` is the release: one count
for a prompt, which beginning anew raises too, and which returns to 0 in rounds in which only other prompts of the batch
branched. A call beyond `call_limit` ends the trajectory behind the tool's answer, without an end token of ours.

Presets: `paper`; `released` (no pre-monitoring, a = 0, since entropies are never computed there, lag 1, sum, count per
prompt); `arpo` (its branching, PPO's clip, a = 0, half of the group at first); `tiny` (paper without dual clip).
Controls: `weight: 0` branches at random, `preserve: false` is PPO's clip.
"""

from __future__ import annotations

import math
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..core.advantages import group_advantage
from ..core.losses import Surrogate, clipped_surrogate, importance_ratio
from ..core.paths import ROOT, Path, to_rollout
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..errors import UserError
from ._branching import Branching, Counter, How, Rounds, Rule
from ._settings import bounds, check, check_choice
from .base import LossInputs, Method

SCORE = "agentic_aepo.z"
PRESERVED = "agentic_aepo.preserved"


def entropy_score(entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """z [B, T] over the marked tokens, without gradient: (H - mean) / unbiased std; 0 outside the mask, and everywhere
    where the std is 0 or fewer than two tokens are marked (the release has nan for one)."""
    entropy = entropy_BT.detach().masked_fill(~mask_BT, 0.0)
    values = entropy[mask_BT].double()
    if len(values) < 2 or not bool(values.std() > 0):
        return torch.zeros_like(entropy)
    return ((entropy - values.mean()) / values.std()).to(entropy.dtype).masked_fill(~mask_BT, 0.0)


def preserved_tokens(entropy_BT: Tensor, mask_BT: Tensor, quantile: float | None) -> Tensor:
    """Tokens [B, T] whose gradient survives the upper bound: all, or those at or above a quantile of the entropies."""
    if quantile is None or not bool(mask_BT.any()):
        return mask_BT
    return mask_BT & (entropy_BT >= torch.quantile(entropy_BT[mask_BT], quantile))


def balanced_surrogate(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    dual_clip: float | None = 3.0,
    preserved: Tensor | bool = True,
) -> Surrogate:
    """The clipped surrogate whose upper bound has a gradient on `preserved` tokens [B, T]; values are PPO's.

    d l / d log pi = -F A with F = upper where r > upper and A > 0, 0 where r < lower and A < 0 or beyond the dual clip,
    else r. `clipped_high` marks the tokens beyond the upper bound, whether or not a gradient is left.
    Raises ValueError for a dual clip that is not above 1.
    """
    ratio = importance_ratio(logprob_BT, old_logprob_BT)
    keep = torch.as_tensor(preserved, device=ratio.device)
    top = torch.where(keep, upper * (ratio / ratio.detach()), torch.as_tensor(upper, dtype=ratio.dtype))
    return clipped_surrogate(logprob_BT, old_logprob_BT, advantage_BT, lower, top, dual_clip)


def shared_advantage(
    value_B: Tensor, group_id_B: Tensor, path_id_B: Tensor, parent_id_B: Tensor, prefix_length_B: Tensor, tokens: int
) -> Tensor:
    """ARPO's hard advantage [B, T]: on a token that several trajectories share, the mean over all who share it.

    Shared are tokens that were copied, the same words sampled twice are not. A parent that is no longer there leaves
    its children to share among themselves, as far as its last token; what it had copied is not known then.
    """
    row = {key: i for i, key in enumerate(zip(group_id_B.tolist(), path_id_B.tolist(), strict=True))}
    owner_BT = path_id_B[:, None].repeat(1, tokens)
    parents, lengths = parent_id_B.tolist(), prefix_length_B.tolist()
    for i, group in enumerate(group_id_B.tolist()):
        at: int | None = i
        while at is not None and parents[at] != ROOT:
            owner_BT[i, : lengths[at]] = parents[at]
            at = row.get((group, parents[at]))
    place_BT = torch.arange(tokens, device=owner_BT.device).expand(owner_BT.shape)
    key = torch.stack([group_id_B[:, None].expand(owner_BT.shape), owner_BT, place_BT], -1).flatten(0, 1)
    _, index = torch.unique(key, dim=0, return_inverse=True)
    value = value_B[:, None].expand(owner_BT.shape).flatten()
    sums, counts = (torch.zeros(len(key), dtype=value.dtype, device=value.device) for _ in range(2))
    sums.index_add_(0, index, value)
    counts.index_add_(0, index, torch.ones_like(value))
    return (sums / counts.clamp_min(1))[index].view(owner_BT.shape)


def trees(group_id_B: Tensor, path_id_B: Tensor, parent_id_B: Tensor) -> list[tuple[int, int]]:
    """Group and `path_id` of the trajectory from the prompt that each response descends from, as far as it is there."""
    keys = list(zip(group_id_B.tolist(), path_id_B.tolist(), strict=True))
    parent = {key: (key[0], above) for key, above in zip(keys, parent_id_B.tolist(), strict=True) if above != ROOT}

    def origin(key: tuple[int, int]) -> tuple[int, int]:
        while key in parent:
            key = parent[key]
        return key

    return [origin(key) for key in keys]


def most_branched_share(group_id_B: Tensor, path_id_B: Tensor, parent_id_B: Tensor) -> float:
    """Share of a prompt's branches that descend from one of its trajectories, the most-branched one; mean over prompts
    with branches, nan without any."""
    counts: dict[int, Counts[int]] = {}
    origins = trees(group_id_B, path_id_B, parent_id_B)
    for (group, root), parent in zip(origins, parent_id_B.tolist(), strict=True):
        if parent != ROOT:
            counts.setdefault(group, Counts())[root] += 1
    shares = [max(count.values()) / count.total() for count in counts.values()]
    return sum(shares) / len(shares) if shares else math.nan


@dataclass(frozen=True)
class AgenticAEPOConfig:
    """Settings. `monitor` sets m by probes of `root_tokens` tokens with slope `beta`; without it m is the share
    `initial` of the group. `weight` is w, `probability` p, `penalty` per consecutive branching; `beam` - 1 attempts per
    trajectory and round. H: `segment` over the `first` tokens. `coefficient` is a."""

    monitor: bool = True
    beta: float = 10.0
    root_tokens: int = 50
    initial: float = 0.5
    rule: Rule = "aepo"
    weight: float = 4.0
    probability: float = 0.5
    penalty: float = 0.05
    counter: Counter = "path"
    lag: int = 0
    beam: int = 2
    segment: How = "mean"
    first: int = 20
    call_limit: int | None = None
    shared: Literal["soft", "hard"] = "soft"
    coefficient: float = 0.2
    preserve: bool = True
    entropy_quantile: float | None = None
    """Keep the gradient of tokens at or above this quantile of the minibatch's entropies only; None keeps all."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self) -> None:
        name = "agentic_aepo"
        for key, choices in (("rule", Rule), ("counter", Counter), ("segment", How)):
            check_choice(getattr(self, key), get_args(choices), f"{name}.{key}")
        check_choice(self.shared, ("soft", "hard"), f"{name}.shared")
        for key in ("initial", "probability"):
            value = getattr(self, key)
            check(0 < value <= 1, f"{name}.{key}", "lie in (0, 1]", value)
        for key in ("beta", "weight", "penalty", "coefficient", "clip_high"):
            value = getattr(self, key)
            check(0 <= value < math.inf, f"{name}.{key}", "be finite and not negative", value)
        for key, least in (("root_tokens", 1), ("beam", 1), ("first", 1), ("lag", 0)):
            value = getattr(self, key)
            check(isinstance(value, int) and value >= least, f"{name}.{key}", f"be an integer from {least} on", value)
        check(self.lag <= 1, f"{name}.lag", "be 0 (the paper) or 1 (the release)", self.lag)
        limit = self.call_limit
        check(limit is None or limit >= 0, f"{name}.call_limit", "not be negative, or null", limit)
        q = self.entropy_quantile
        check(q is None or 0 <= q <= 1, f"{name}.entropy_quantile", "lie in [0, 1], or be null", q)
        check(0 <= self.clip_low <= 1, f"{name}.clip_low", "lie in [0, 1]", self.clip_low)
        check(self.dual_clip is None or self.dual_clip > 1, f"{name}.dual_clip", "be above 1 or null", self.dual_clip)


RELEASED = {"monitor": False, "beta": 0.5, "weight": 0.2, "lag": 1, "segment": "sum", "coefficient": 0.0}


class AgenticAEPO(Method):
    """Owns `sample`, `clip`, `surrogate` and the reduction, with `shared: hard` also `advantage`; `prepare`
    standardises entropies over the minibatch, `filter` only looks at the branches of a rollout."""

    slug: ClassVar[str] = "agentic_aepo"
    requires: tuple[str, ...] = ("reward", "old_logprob")
    config_class: ClassVar[type[AgenticAEPOConfig]] = AgenticAEPOConfig
    presets: ClassVar[Mapping[str, AgenticAEPOConfig]] = {
        "paper": AgenticAEPOConfig(),
        "released": AgenticAEPOConfig(**RELEASED, counter="prompt"),  # type: ignore[arg-type]
        "arpo": AgenticAEPOConfig(**RELEASED, rule="arpo", preserve=False),  # type: ignore[arg-type]
        "tiny": AgenticAEPOConfig(dual_clip=None),
    }
    reduction: Reduction | None = "token_mean"

    def __init__(self, config: AgenticAEPOConfig | None = None) -> None:
        self.config = config or AgenticAEPOConfig()
        self.vocabulary: int | None = None
        self._last: dict[str, float] = {}

    @property
    def needs_current(self) -> bool:  # type: ignore[override]
        """Entropies of the policy being updated, where z or a quantile of them is used."""
        return self.config.coefficient > 0 or (self.config.preserve and self.config.entropy_quantile is not None)

    def has(self, hook: str) -> bool:
        """Soft advantages are the base's."""
        return super().has(hook) and not (hook == "advantage" and self.config.shared == "soft")

    def check_run(self, vocabulary: int, steps: int) -> None:
        """Takes the vocabulary's size, which segment entropies are relative to."""
        self.vocabulary = vocabulary

    # -- rollout ------------------------------------------------------------------------------------------------

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
        """`group_size` trajectories of every prompt, in the order in which they came to be. Probes are sampled with the
        same engine and are part of no group.

        Raises UserError for a task of one turn, which has no answer to branch behind.
        """
        if engine.turns is None:
            raise UserError(
                "method 'agentic_aepo' branches behind a tool's answer, and this task has one turn: set data.task to "
                "an environment such as 'triples', or take a method for single responses"
            )
        c, vocabulary = self.config, self.vocabulary or int(engine.policy.model.config.vocab_size)
        branching = Branching(
            c.rule, c.weight, c.probability, c.penalty, c.counter, c.lag, c.beam, c.segment, c.first, c.call_limit
        )
        rounds = Rounds(engine, branching, sampling, generator, vocabulary)
        ids = list(problem_ids) if problem_ids is not None else list(range(len(prompts)))
        roots = [
            Path(problem, i, sampling.first + i, 0, list(prompt))
            for i, (problem, prompt) in enumerate(zip(ids, prompts, strict=True))
        ]
        if c.monitor:
            initial = rounds.monitor(roots, group_size, c.beta, c.root_tokens)
        else:
            initial = [min(max(round(c.initial * group_size), 1), group_size)] * len(roots)
        paths = [path for group in rounds.grow(roots, initial, group_size) for path in group]
        tempered = None if sampling.temper is None else sampling.temperature
        return to_rollout(
            paths, pad_id=engine.policy.pad_id, version=version, device=engine.policy.device,
            policy_temperature=tempered,
        )  # fmt: skip

    def filter(self, rollout: Rollout) -> Rollout:
        """Changes nothing; notes where the whole rollout branched."""
        if rollout.parent_id is not None and rollout.path_id is not None and len(rollout):
            branches, groups = rollout.parent_id != ROOT, len(set(rollout.group_id.tolist()))
            share = most_branched_share(rollout.group_id, rollout.path_id, rollout.parent_id)
            self._last = {"branches": float(branches.sum()) / groups, "most_branched": share}
        return rollout

    def metrics(self) -> dict[str, float]:
        """Branches per prompt, and the share of them that descend from the most-branched trajectory."""
        return {name: self._last.get(name, math.nan) for name in ("branches", "most_branched")}

    # -- update -------------------------------------------------------------------------------------------------

    def advantage(self, rollout: Rollout) -> Tensor:
        """GRPO's advantage, averaged over those who share a token [B, T] (`shared: hard`)."""
        reward, group = rollout.require("reward", by=self.slug), rollout.group_id
        lineage = [rollout.require(name, by=self.slug) for name in ("path_id", "parent_id", "prefix_length")]
        value_B = group_advantage(reward, group)
        return shared_advantage(value_B, group, lineage[0], lineage[1], lineage[2], rollout.response_ids.shape[1])

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """z and the tokens whose gradient survives, from present entropies. Raises UserError where they are missing."""
        if not self.needs_current:
            return {}
        entropy = batch.statistics.get("current_entropy")
        if entropy is None:
            raise UserError(
                "method 'agentic_aepo' needs 'current_entropy', the token entropies of the policy being updated, which "
                "this minibatch lacks; set methods.agentic_aepo.coefficient=0 to do without them, as the release does"
            )
        kept = preserved_tokens(entropy, batch.mask, self.config.entropy_quantile)
        return {SCORE: entropy_score(entropy, batch.mask), PRESERVED: kept.to(entropy.dtype)}

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the bounds; the gradient of the upper one is made in `surrogate`, which has the ratio."""
        return bounds(1 - self.config.clip_low, 1 + self.config.clip_high, advantage_BT)

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The balanced surrogate of the entropy-aware advantage."""
        c, advantage = self.config, inputs.advantage
        if c.coefficient:
            advantage = advantage * (1 + c.coefficient * inputs.rollout.require(SCORE, by=self.slug))
        preserved: Tensor | bool = c.preserve
        if c.preserve and c.entropy_quantile is not None:
            preserved = inputs.rollout.require(PRESERVED, by=self.slug) > 0
        return balanced_surrogate(
            inputs.logprob, inputs.old_logprob, advantage, inputs.lower, inputs.upper, c.dual_clip, preserved
        )
