"""What competes in an arena: named settings on top of one recipe.

A catalogue holds the interventions of the book with their controls. Any other composition is written in place:
`steer`, `steer:full` (a preset), `kl_cov:beta=3` or `siren:tiny,coefficient=0.1`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import yaml

from ..errors import UserError, nearest
from ..methods import build, load_class, trainable

Role = Literal["reference", "method", "control"]
REFERENCE = "grpo"
"""The first control of every method: stopped early, it has gone less far along the same path."""


@dataclass(frozen=True)
class Arm:
    """One contestant. `settings` are dotted overrides of the contest's recipe; `method` is the slug that it is about.

    A control has everything of `control_of` but the idea: a method is only credited for what its control does not do.
    """

    name: str
    settings: tuple[str, ...] = ()
    role: Role = "method"
    method: str = REFERENCE
    control_of: str = ""
    note: str = ""

    def uses(self, slug: str) -> bool:
        """Whether the code of a registered work takes part; the recipe's own method does in every arm."""
        named = (f"methods.{slug}=", f"methods.{slug}.")
        return slug in (REFERENCE, self.method) or any(text.startswith(named) for text in self.settings)

    def as_dict(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self) | {"settings": list(self.settings)}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Arm:
        """The other way round."""
        return Arm(**dict(found) | {"settings": tuple(found["settings"])})


def _method(name: str, slug: str, settings: str, note: str = "") -> Arm:
    return Arm(name, _settings(slug, settings), "method", slug, "", note)


def _control(name: str, of: str, slug: str, settings: str, note: str) -> Arm:
    return Arm(name, _settings(slug, settings), "control", slug, of, note)


def _sized(name: str, slug: str, settings: str, group_size: int, note: str, of: str = "") -> Arm:
    """A method whose tree fixes the size of a group; a control where `of` names an arm. Contests are at equal steps,
    whose generated tokens differ: `benchmarks/tree_methods.py` compares at equal tokens."""
    own = (*_settings(slug, settings), f"rollout.group_size={group_size}")
    return Arm(name, own, "control" if of else "method", slug, of, note)


def _settings(slug: str, settings: str) -> tuple[str, ...]:
    """The method's own settings, and what it needs of the loop."""
    method = build(slug, yaml.safe_load(f"{{{settings}}}"))
    rescored = method.rescored or method.has("read_old_logits")
    return (f"methods.{slug}={{{settings}}}", *(("update.recompute_old_logprob=true",) if rescored else ()))


_SPEAR = "preset: tiny, length: 32, warmup: 24, decay: 24"
"""Both curricula over 30 % of a contest of 80 steps."""
_CATALOGUE = (
    Arm(REFERENCE, (), "reference", REFERENCE, "", "the reference; stopped early, it is the first control of all"),
    _method("clip_higher", "clip_higher", "preset: paper", "upper clip 0.28"),
    _method("entropy_bonus_small", "entropy_bonus", "preset: paper, coefficient: 0.003"),
    _method("entropy_bonus_large", "entropy_bonus", "preset: paper, coefficient: 0.03"),
    _method("adaptive_entropy", "adaptive_entropy", "preset: released, target: 0.1, step: 0.002, maximum: 0.1"),
    _method("clip_cov", "clip_cov", "preset: tiny"),
    _method("kl_cov", "kl_cov", "preset: tiny"),
    _control("kl_cov_random", "kl_cov", "kl_cov", "preset: tiny, selection: random", "as many tokens, at random"),
    _method("steer", "steer", "preset: tiny"),
    _control("steer_shuffled", "steer", "steer", "preset: tiny, control: shuffled", "the same weights on other tokens"),
    _control("steer_constant", "steer", "steer", "preset: tiny, control: constant", "their mean on every token"),
    _method("high_entropy_tokens", "high_entropy_tokens", "preset: released", "the 20 % of highest entropy"),
    _control("high_entropy_tokens_random", "high_entropy_tokens", "high_entropy_tokens",
             "preset: released, selection: random", "20 % at random"),
    _control("high_entropy_tokens_lowest", "high_entropy_tokens", "high_entropy_tokens",
             "preset: released, selection: lowest, ratio: 0.8", "the other 80 %"),
    _method("negative_reinforcement", "negative_reinforcement", "preset: paper", "W-REINFORCE, right answers at 0.1"),
    _method("nsr", "negative_reinforcement", "preset: nsr", "wrong answers alone"),
    _control("psr", "negative_reinforcement", "negative_reinforcement", "preset: psr", "right answers alone"),
    _method("bapo", "bapo", "preset: paper"),
    _control("bapo_fixed", "bapo", "bapo", "preset: paper, lower_end: 0.6, upper_end: 1.2",
             "the bounds it starts from, not searched"),
    _method("hapo", "hapo", "preset: paper", "all four parts"),
    _control("hapo_released_sign", "hapo", "hapo", "preset: paper, sign: released",
             "the most certain token counts like the most uncertain one"),
    _control("hapo_off", "hapo", "hapo", "preset: paper, tau: 0.0, alpha: 0.0, beta: 0.0, token_advantage: false",
             "all parts off, which leaves clip-higher"),
    _method("siren", "siren", "preset: tiny"),
    _control("siren_unmasked", "siren", "siren", "preset: tiny, top_p: null, top_k: null, quantile: null",
             "the anchor on the plain entropy of all tokens"),
    _method("epo", "epo", "preset: tiny"),
    _control("epo_bonus_only", "epo", "epo", "preset: tiny, alpha: 0.0", "its entropy bonus without the corridor"),
    _method("arbitrary_entropy", "arbitrary_entropy", "preset: tiny", "holds an entropy of 0.1 nats"),
    _control("aepo_untempered", "arbitrary_entropy", "arbitrary_entropy", "preset: tiny, high: 1.0, low: 1.0",
             "extra successes drawn at the policy's own temperature"),
    _method("aepo_target_low", "arbitrary_entropy", "preset: tiny, target: 0.05", "below where GRPO ends"),
    _method("aepo_target_high", "arbitrary_entropy", "preset: tiny, target: 0.12", "above where GRPO ends"),
    _method("lp_reg", "lp_reg", "preset: tiny"),
    _control("lp_reg_unfiltered", "lp_reg", "lp_reg", "preset: tiny, filter: none",
             "pulls to the old policy itself, junk included"),
    Arm("grpo_wide_clip", ("methods.grpo.clip_low=1.0", "methods.grpo.clip_high=9.0"), "control", REFERENCE, "lp_reg",
        "lp_reg's clip range without its regulariser"),
    _method("pear", "pear", "preset: paper", "right answers docked by how much more uncertain their thinking was"),
    _control("pear_shuffled", "pear", "pear", "preset: paper, penalty: shuffled",
             "the same penalties on other right answers of the group"),
    _method("ucas", "ucas", "preset: paper", "both stages, confidence a mean"),
    _control("ucas_masked", "ucas", "ucas", "preset: paper, degenerate: mask", "none in groups of equal rewards"),
    _control("ucas_stage1", "ucas", "ucas", "preset: paper, token_penalty: 0.0", "the weight by confidence alone"),
    _control("ucas_stage2", "ucas", "ucas", "preset: paper, positive: 0.0, negative: 0.0", "the logit penalty alone"),
    _method("ucas_sum", "ucas", "preset: released", "confidence a sum, almost the length"),
    _method("canon", "canon", "preset: tiny", "against the other half, split by entropy (mu = 1)"),
    _method("canon_intra", "canon", "preset: tiny, mu: 0.0", "against the own half (mu = 0)"),
    _control("canon_half", "canon", "canon", "preset: tiny, mu: 0.5", "Dr. GRPO"),
    _control("canon_random", "canon", "canon", "preset: tiny, metric: random", "halves at random, mu = 1"),
    _control("canon_random_intra", "canon_intra", "canon", "preset: tiny, metric: random, mu: 0.0",
             "halves at random, mu = 0"),
    _control("canon_doubled", "canon", "canon", "preset: tiny, mu: 0.5, scale: 2.0", "Dr. GRPO twice as large"),
    _method("canon_dynamic", "canon", "preset: tiny, schedule: accuracy_inter_first", "mu = 1 - accuracy"),
    _method("riskpo", "riskpo", "preset: tiny", "risk-averse, bundles of four, tracked quantiles"),
    _control("riskpo_negative_only", "riskpo", "riskpo", "preset: tiny, functional: negative_only",
             "GRPO's min(A, 0): the sign of every advantage and nothing of risk"),
    _control("riskpo_seeking", "riskpo", "riskpo", "preset: tiny, functional: seeking", "weight on the upper tail"),
    _control("riskpo_single", "riskpo", "riskpo", "preset: tiny, bundle_size: 1", "every question judged alone"),
    _method("riskpo_sequence", "riskpo", "preset: tiny, surrogate: sequence", "under the paper's sequence ratio"),
    _method("empo", "empo", "preset: tiny", "no labels: how many of the group give an answer of this value"),
    _method("empo_gated", "empo", "preset: tiny, low: 0.2, high: 0.8", "semantic entropy between 0.2 and 0.8 ln G"),
    _control("empo_shuffled", "empo", "empo", "preset: tiny, control: shuffled", "its rewards, dealt anew in a group"),
    _control("majority_vote", "empo", "empo", "preset: tiny, rule: voting", "1 for the largest cluster, else 0"),
    _control("random_reward", "empo", "spurious_rewards", "preset: paper", "a fair coin for every response"),
    Arm("empo_by_form", ("methods.empo={preset: tiny}", "data.clusters.by=exact"), "method", "empo", "",
        "different expressions of one value are different answers"),
    _method("copo", "copo", "preset: tiny", "two losses, blended by the entropy of a group's answers"),
    _control("copo_shuffled", "copo", "copo", "preset: tiny, shuffled: true", "every group with another's advantage"),
    _control("copo_global_only", "copo", "copo", "preset: tiny, gate: only-global",
             "REINFORCE on each prompt's mean reward, normalised over the rollout"),
    _method("copo_soft_with_zero", "copo", "preset: tiny, gate: soft-with-zero", "the released gate"),
    _method("copo_soft_with_failed", "copo", "preset: tiny, gate: soft-with-failed", "groups that fail forced global"),
    _method("empg", "empg", "preset: tiny", "steps end at = and at the end of thinking"),
    _control("empg_shuffled", "empg", "empg", "preset: tiny, shuffled: true", "every step with another's entropy"),
    _control("empg_centred", "empg", "empg", "preset: tiny, k: 0.0, zeta: 0.0", "GRPO's advantage, centred over steps"),
    _method("empg_scale_only", "empg", "preset: tiny, zeta: 0.0", "no bonus for a certain next step"),
    _method("empg_bonus_only", "empg", "preset: tiny, k: 0.0", "every step at its own size"),
    _sized("cure", "cure", "preset: tiny", 16, "4 responses from the question, 3 from inside each"),
    _sized("cure_random", "cure", "preset: tiny, critical_token_type: random", 16, "cut anywhere", "cure"),
    _sized("cure_stage2", "cure", "preset: stage2", 16, "16 from the question: what stage 1 branches beside", "cure"),
    _sized("cure_by_start", "cure", "preset: tiny, group_by_start_state: true", 16, "a baseline for each start"),
    _sized("ettrl", "ettrl", "preset: tiny", 15, "no labels: majority of 15 leaves of 3 trees"),
    _sized("ettrl_random_forks", "ettrl", "preset: tiny, order: random", 15, "forks anywhere", "ettrl"),
    _sized("ettrl_random_label", "ettrl", "preset: tiny, label: random", 15, "a fair coin for every leaf", "ettrl"),
    _sized("ttrl", "ettrl", "preset: tiny, forks: 0", 16, "majority of 16 independent responses", "ettrl"),
    _sized("ettrl_adv_res", "ettrl", "preset: tiny, forks: 0, shape: res", 16, "16 votes, advantage by confidence"),
    _sized("ettrl_adv_res_shuffled", "ettrl", "preset: tiny, forks: 0, shape: res, shuffled: true", 16,
           "its weights on other responses of the prompt", "ettrl_adv_res"),
    _sized("ettrl_adv_clip", "ettrl", "preset: tiny, forks: 0, shape: clip", 16, "16 votes, advantage within 2"),
    _method("spear", "spear", _SPEAR, "own successes replayed, a covariance clip; no tool to call in Countdown"),
    _control("dr_bot", "spear", "spear", f"{_SPEAR}, schedule: never, tool_reward: none, ratio: 0.0",
             "its baseline: no std, groups that vary most, no cut responses"),
    _control("spear_gamma_one", "spear", "spear", _SPEAR.replace("warmup: 24", "warmup: 0"),
             "replay at full weight from the start"),
    _control("spear_no_clip", "spear", "spear", f"{_SPEAR}, ratio: 0.0, replay_ratio: 0.0", "no covariance clip"),
    _control("spear_sil", "spear", "spear", _SPEAR.replace("warmup: 24", "warmup: 0")
             + ", tool_reward: none, ratio: 0.0, replay_ratio: 0.0, weight_decay: 1.0",
             "plain self-imitation on dr_bot: advantages as stored, at full weight from the start"),
    _method("ares", "ares", "preset: tiny", "wrong answers docked by their events of high entropy, by difficulty"),
    _control("ares_permuted", "ares", "ares", "preset: tiny, control: permuted", "with another prompt's difficulty"),
    _method("ares_kl", "ares", "preset: tiny, kl: windows", "and a KL that gives way in the events"),
    _control("ares_kl_only", "ares", "ares", "preset: tiny, kl: windows, reward: none", "that KL without the reward"),
    _control("ares_batch_target", "ares", "ares", "preset: tiny, target: batch", "the text's target, which is GRPO"),
    _method("bupo", "bupo", "preset: tiny", "8 steps on the policy of layer 1 of 3"),
    _control("bupo_long", "bupo", "bupo", "preset: tiny, s_inter: 40", "40 steps on it"),
    _control("bupo_last", "bupo", "bupo", "preset: tiny, layer: last", "on the last layer, which is GRPO"),
)  # fmt: skip
CATALOGUE: dict[str, Arm] = {arm.name: arm for arm in _CATALOGUE}


def resolve(names: Iterable[str], *, controls: bool = False) -> list[Arm]:
    """Arms by name, GRPO first even where it was not asked for; `controls` adds those of every arm.

    A name is an entry of `CATALOGUE`, or `SLUG[:PRESET][,SETTING=VALUE...]`. Raises UserError with the nearest name.
    """
    found = {REFERENCE: CATALOGUE[REFERENCE]}
    for name in names:
        arm = CATALOGUE.get(name) or _written(name)
        found[arm.name] = arm
        if controls:
            found |= {a.name: a for a in _CATALOGUE if a.control_of == arm.name}
    return list(found.values())


def _written(text: str) -> Arm:
    slug, _, rest = text.partition(":")
    if slug not in trainable():
        raise UserError(f"no arm '{slug}'; {nearest(slug, [*CATALOGUE, *trainable()])}")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    presets = [word for word in words if "=" not in word]
    if len(presets) > 1:
        raise UserError(f"arm '{text}' names two presets: {presets[0]} and {presets[1]}")
    settings = [tuple(word.split("=", 1)) for word in words if "=" in word]
    preset = presets[0] if presets else _tiniest(slug)
    parts = [f"preset: {preset}", *(f"{key.strip()}: {value.strip()}" for key, value in settings)]
    return _method(text, slug, ", ".join(parts))


def _tiniest(slug: str) -> str:
    presets = load_class(slug).presets
    return next((name for name in ("tiny", "paper") if name in presets), next(iter(presets)))
