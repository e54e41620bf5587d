"""What verl 0.9.1 lets a method see, and so which compositions each way of joining it can carry. Needs no verl.

Two ways exist. **Tier A** registers a policy loss and an advantage estimator by name; verl then calls them with the few
tensors it thinks a loss needs. **Tier B** is a trainer of verl's with our hooks and a loss function of our own, which
sees everything our loop sees.

| | our loop | tier A | tier B |
|---|---|---|---|
| `trainable` | yes | no: verl makes its optimizer first | no |
| `select`, `sample` | yes | verl's dataset and agent loop | verl's dataset and agent loop |
| `replay` | yes | no: verl's batch holds new responses only | no |
| `temper` | yes | no: verl samples at one temperature | no |
| `lens` | yes | no: verl's engines give log-probs of the last layer | no |
| `reward`, `filter` | yes | verl's reward function, `algorithm.filter_groups` | yes; no refill |
| `advantage` | whole rollout | rewards, mask, group; whole rollout | whole rollout |
| `channels` | whole rollout | no | whole rollout |
| `prepare` | optimizer minibatch | no: a micro-batch of one rank | optimizer minibatch |
| `weight` | optimizer minibatch | no | optimizer minibatch |
| `clip`, `surrogate` | yes | from log-probs and advantage | yes |
| `regularise` | yes | no: neither entropy nor reference | yes |
| `observe` | yes | no | yes |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..core.reduce import Reduction
from ..errors import UserError
from ..methods import build, compose, trainable
from ..methods.base import Method, Pipeline

VERSION = "0.9.1"
Tier = Literal["a", "b"]

MODES: dict[Reduction, str] = {
    "token_mean": "token-mean",
    "sequence_mean_of_token_mean": "seq-mean-token-mean",
    "sequence_mean_of_token_sum": "seq-mean-token-sum",
    "sequence_mean_of_token_sum_over_constant": "seq-mean-token-sum-norm",
    "token_sum_over_constant": "token-sum",
}
"""verl's `loss_agg_mode` for each reduction. Of `token-sum` the constant is divided out by us; the constant of
`seq-mean-token-sum-norm` is `actor.loss_scale_factor`."""

TIER_A_FIELDS = frozenset({"reward", "old_logprob"})
"""Rollout fields and statistics that the registered functions are given."""

MINIBATCH_CLIP = frozenset({"bapo", "hapo"})
"""Methods whose `clip` bounds span the minibatch, so that tier A, which sees a micro-batch, cannot have them right."""

_WHY_NOT_A = {
    "trainable": "chooses which parameters train, before verl makes its optimizer",
    "select": "chooses problems; in verl that is the dataset or data.sampler",
    "sample": "samples in its own way; in verl that is an agent loop",
    "replay": "learns from responses of earlier steps, and verl's batch holds the new ones only",
    "temper": "sets the temperature of every token while sampling, and verl's rollout has one (tau: 0 switches it off)",
    "lens": "trains the policy of one layer, and verl's engines give the log-probs of the last one only",
    "channels": "needs a second advantage channel over the whole rollout; a registered loss is given one",
    "prepare": "takes a statistic or a selection over the optimizer minibatch; a registered loss sees one micro-batch",
    "weight": "weights tokens by fields of the rollout that a registered loss is not given",
    "regularise": "adds a term from entropies or reference log-probs that a registered loss is not given",
    "reward": "acts on rewards, which in verl come from reward.custom_reward_function",
    "filter": "acts on the rollout before the advantage; verl has algorithm.filter_groups",
    "observe": "adapts itself to the metrics of the step, which a registered loss does not see",
}
_READS = "reads the whole distribution of every token, which verl's engines do not keep"
_WHY_NOT_A |= {"read_logits": _READS, "read_old_logits": _READS}
_NOT_RECORDED = {
    "token_certainty": "needs a statistic of the raw logits, which verl's engines do not keep",
    "sampled_logit": "needs a statistic of the raw logits, which verl's engines do not keep",
    "answer": "needs the responses' answers, which verl's reward function does not hand over",
    "cluster_id": "needs answers clustered without labels, which verl's reward function does not do",
    "thought_label": "needs a judge of thoughts, which verl's rollout has not",
}
_NOT_IN_B = ("trainable", "select", "sample", "replay", "temper", "lens", "read_logits", "read_old_logits")
_WHY_NOT_B = {hook: _WHY_NOT_A[hook] for hook in _NOT_IN_B}


def pipeline_of(methods: Mapping[str, Mapping[str, Any]]) -> Pipeline:
    """The composition of `{slug: {preset: NAME, setting: value}}`; raises UserError as `compose` does."""
    return compose([build(slug, dict(settings or {})) for slug, settings in methods.items()])


def obstacles(methods: Sequence[Method], tier: Tier) -> list[str]:
    """Why a tier cannot carry these methods: one sentence per method, empty where it can."""
    hooks = _WHY_NOT_A if tier == "a" else _WHY_NOT_B
    found = []
    for method in methods:
        reasons = [why for hook, why in hooks.items() if method.has(hook)]
        reasons += [why for name, why in _NOT_RECORDED.items() if name in method.requires]
        if tier == "a" and not reasons:
            reasons += [f"needs '{name}'" for name in method.requires if name not in TIER_A_FIELDS]
            if type(method).bind is not Method.bind:
                reasons.append("looks for texts in responses, whose tokens a registered function is not given")
            if method.slug in MINIBATCH_CLIP:
                reasons.append("takes its clip bounds over the optimizer minibatch")
        if getattr(method, "needs_moments", False):
            reasons.append("needs the sum of p^2 log p over the vocabulary, which verl's engines do not compute")
        if reasons:
            found.append(f"'{method.slug}' {reasons[0]}")
    return found


def unsupported(tier: Tier) -> dict[str, str]:
    """Registered methods, as they stand in their `released` preset, that a tier cannot carry, with the reason."""
    found = {}
    for slug in trainable():
        if why := obstacles([build(slug, {"preset": "released"})], tier):
            found[slug] = why[0].removeprefix(f"'{slug}' ")
    return found


def supported(tier: Tier) -> list[str]:
    """Registered methods that a tier carries."""
    return [slug for slug in trainable() if slug not in unsupported(tier)]


def require_tier(pipeline: Pipeline, tier: Tier) -> None:
    """Raise UserError naming the first method that the tier cannot carry, and what to use instead."""
    if why := obstacles(pipeline.methods, tier):
        instead = "use tier B (trainer.v1.trainer_mode=rlvr)" if tier == "a" else "train it with rlvr-lab train"
        raise UserError(f"verl's tier {tier.upper()} cannot carry {why[0]}; {instead}")


def reduction_mode(pipeline: Pipeline) -> tuple[str, float | None]:
    """verl's `loss_agg_mode` for the composition's reduction, and the reduction's constant."""
    reduction, constant = pipeline.reduction
    return MODES[reduction], constant
