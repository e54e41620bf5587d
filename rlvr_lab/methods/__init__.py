"""One module per published method. `REGISTRY` lists them, `build` makes one, `compose` joins several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module, resources
from typing import Any

from ..errors import UserError, nearest
from ._elsewhere import ELSEWHERE
from ._entry import Entry
from .base import EXCLUSIVE, HOOKS, NEEDED, Method, Pipeline

__all__ = [
    "ELSEWHERE",
    "REGISTRY",
    "Entry",
    "Method",
    "Pipeline",
    "build",
    "compose",
    "hooks_of",
    "load_class",
    "trainable",
]


_TESTED = "tested, not run at scale"
_FIRST = "1_foundations/rlvr_from_scratch"
_BASELINES = "2_measuring/baselines"


def _baseline(slug: str, title: str, arxiv: str, stage: str, cls: str, recipe: str | None = None) -> Entry:
    recipe = recipe or f"{slug}/math"
    return Entry(slug, title, arxiv, "baselines", stage, f"methods.{slug}", cls, _BASELINES, recipe, _TESTED)


def _token_level(slug: str, title: str, arxiv: str, stage: str, cls: str) -> Entry:
    chapter, recipe = f"4_token_level/{slug}", f"{slug}/math"
    return Entry(slug, title, arxiv, slug, stage, f"methods.{slug}", cls, chapter, recipe, _TESTED)


def _signal(slug: str, title: str, arxiv: str, stage: str, cls: str, chapter: bool = False) -> Entry:
    """What acts before the loss: on rewards, on advantages, on which prompts are seen."""
    status = _TESTED if chapter else f"{_TESTED}; chapter to come"
    where = f"5_signal/{slug}" if chapter else None
    return Entry(slug, title, arxiv, slug, stage, f"methods.{slug}", cls, where, f"{slug}/math", status)


def _rollout(
    slug: str, title: str, arxiv: str, stage: str, cls: str, chapter: bool = False, recipe: str | None = None
) -> Entry:
    """What changes how responses are sampled, or trains over many turns."""
    status = _TESTED if chapter else f"{_TESTED}; chapter to come"
    where = f"6_rollouts/{slug}" if chapter else None
    return Entry(slug, title, arxiv, slug, stage, f"methods.{slug}", cls, where, recipe or f"{slug}/math", status)


def _inside(
    slug: str, title: str, arxiv: str, stage: str, module: str, cls: str | None = None, recipe: str | None = None
) -> Entry:
    """What looks into the model, or acts at inference; without `cls` it does not train."""
    status = _TESTED if cls else f"tested, {stage}"
    return Entry(slug, title, arxiv, slug, stage, module, cls, f"7_inside/{slug}", recipe, status)


def _analysis(slug: str, title: str, arxiv: str, module: str) -> Entry:
    status = "tested, an analysis"
    return Entry(slug, title, arxiv, slug, "analysis", module, None, f"2_measuring/{slug}", None, status)


_ENTRIES = (
    Entry(
        "grpo",
        "Group Relative Policy Optimization",
        "2402.03300",
        "baselines",
        "base: advantage, clip, surrogate",
        "methods.grpo",
        "GRPO",
        _FIRST,
        "grpo/deepseekmath",
        _TESTED,
    ),
    _baseline("dr_grpo", "GRPO done right (no std, constant length)", "2503.20783", "advantage, reduction", "DrGRPO"),
    _baseline("rloo", "REINFORCE leave-one-out", "2402.14740", "advantage", "RLOO"),
    _baseline("reinforce_plus_plus", "REINFORCE++", "2501.03262", "advantage", "ReinforcePlusPlus"),
    _baseline("opo", "On-policy RL with optimal reward baseline", "2505.23585", "advantage", "OPO"),
    _baseline("gspo", "Group Sequence Policy Optimization", "2507.18071", "clip, surrogate, reduction", "GSPO"),
    _baseline("cispo", "Clipped importance weights (MiniMax-M1)", "2506.13585", "clip, surrogate, reduction", "CISPO"),
    _baseline("gpg", "Group Policy Gradient", "2504.02546", "surrogate, reduction", "GPG"),
    _baseline("sapo", "Soft Adaptive Policy Optimization", "2511.20347", "surrogate, reduction", "SAPO"),
    _baseline("gmpo", "Geometric-Mean Policy Optimization", "2507.20673", "clip, surrogate, reduction", "GMPO"),
    _baseline("clip_higher", "Asymmetric clip range (DAPO)", "2503.14476", "clip", "ClipHigher", "dapo/math"),
    _baseline("dynamic_sampling", "Dynamic sampling (DAPO)", "2503.14476", "filter", "DynamicSampling", "dapo/math"),
    _baseline("overlong", "Overlong shaping and filtering (DAPO)", "2503.14476", "reward, filter", "Overlong",
              "dapo/math"),
    _baseline("kl_reference", "KL penalty to a reference policy", "2402.03300", "regulariser", "KLReference",
              "grpo/deepseekmath"),
    _baseline("entropy_bonus", "Entropy bonus", "1602.01783", "regulariser", "EntropyBonus"),
    _baseline("adaptive_entropy", "Adaptive entropy coefficient (Skywork-OR1)", "2505.22312", "regulariser",
              "AdaptiveEntropy", "adaptive_entropy/skywork_or1"),
    _baseline("truncated_importance_sampling", "Truncated importance sampling", "2510.13786", "weight",
              "TruncatedImportanceSampling"),
    Entry("clip_cov", "Clip-Cov (the entropy mechanism)", "2505.22617", "entropy_mechanism", "weight, clip, surrogate",
          "methods.entropy_mechanism", "ClipCov", "2_measuring/entropy_law", "entropy_mechanism/clip_cov", _TESTED),
    Entry("kl_cov", "KL-Cov (the entropy mechanism)", "2505.22617", "entropy_mechanism", "surrogate",
          "methods.entropy_mechanism", "KLCov", "2_measuring/entropy_law", "entropy_mechanism/kl_cov", _TESTED),
    Entry("spurious_rewards", "Spurious rewards and clipping bias", "2512.16912", "spurious_rewards", "reward",
          "methods.spurious_rewards", "SpuriousRewards", "2_measuring/spurious_rewards", "spurious_rewards/math",
          _TESTED),
    _token_level("steer", "STEER: weights by estimated entropy change", "2510.10150", "weight", "Steer"),
    _token_level("high_entropy_tokens", "High-entropy (forking) tokens", "2506.01939", "weight, reduction",
                 "HighEntropyTokens"),
    _token_level("negative_reinforcement", "Negative reinforcement: PSR, NSR, Weighted-REINFORCE", "2506.01347",
                 "filter, advantage, clip, surrogate", "NegativeReinforcement"),
    _token_level("bapo", "Balanced policy optimisation with adaptive clipping (BAPO)", "2510.18927",
                 "clip, surrogate", "BAPO"),
    _token_level("hapo", "Heterogeneous adaptive policy optimisation (HAPO)", "2509.16591",
                 "rollout, advantage, weight, clip, surrogate", "HAPO"),
    _token_level("siren", "SIREN: selective, self-anchored entropy regularisation", "2509.25133", "regulariser",
                 "Siren"),
    _token_level("epo", "Entropy-regularised policy optimisation (EPO)", "2509.22576", "regulariser", "EPO"),
    _token_level("arbitrary_entropy", "Arbitrary entropy policy optimisation (AEPO)", "2510.08141",
                 "rollout, advantage", "ArbitraryEntropy"),
    _token_level("lp_reg", "Low-probability regularisation (Lp-Reg)", "2510.03222",
                 "regulariser, clip, surrogate", "LpReg"),
    # one `_signal(...)` for each work on rewards, advantages and data
    _signal("pear", "Phase entropy aware reward (PEAR)", "2510.08026", "reward", "PEAR", chapter=True),
    _signal("canon", "Conditional advantage estimation (CANON)", "2509.23962", "advantage, reduction", "CANON",
            chapter=True),
    _signal("ucas", "Uncertainty-aware advantage shaping (UCAS)", "2510.10649", "advantage", "UCAS", chapter=True),
    _signal("riskpo", "Risk-based policy optimisation (RiskPO)", "2510.00911", "advantage, clip, surrogate", "RiskPO",
            True),
    _signal("light_if", "Light-IF: token-weighted entropy for instructions (TEA-RL)", "2508.03178",
            "data, reward, regulariser", "LightIF", chapter=True),
    _signal("empo", "Entropy-minimised policy optimisation without labels (EMPO)", "2504.05812", "reward, filter",
            "EMPO", True),
    _signal("tp_grpo", "Thought-level process rewards (TP-GRPO)", "2507.23317", "advantage", "TPGRPO", True),
    _signal("copo", "Consistency-aware policy optimisation (COPO)", "2508.04138", "channels, surrogate, reduction",
            "COPO", True),
    _signal("one_shot", "Training on one example (1-shot RLVR)", "2504.20571", "data, weight, regulariser", "OneShot",
            True),
    _rollout("cure", "Critical-token re-concatenation (CURE)", "2508.11016", "rollout", "CURE", chapter=True),
    _rollout("ettrl", "Entropy-fork trees and majority votes (ETTRL)", "2508.11356",
             "rollout, reward, filter, advantage", "ETTRL", chapter=True),
    _rollout("ares", "Entropy shaped by difficulty (ARES)", "2510.08457", "data, reward, filter, regulariser", "ARES",
             chapter=True),
    _rollout("agentic_aepo", "Agentic entropy-balanced policy optimisation (AEPO), with ARPO", "2510.14545",
             "rollout, clip, surrogate, advantage", "AgenticAEPO", True, "agentic_aepo/search"),
    _rollout("spear", "Self-imitation with progressive exploration (SPEAR)", "2509.22601",
             "reward, filter, advantage, replay, weight", "Spear", True, "spear/search"),
    _rollout("empg", "Entropy-modulated policy gradients (EMPG)", "2509.09265", "advantage", "EMPG", chapter=True),
    _analysis("policy_cliff", "The policy cliff", "2507.20150", "methods.policy_cliff"),
    _analysis("invisible_leash", "The invisible leash", "2507.14843", "evaluate.support"),
    _inside("bupo", "Bottom-up policy optimisation (BuPO)", "2512.19673", "lens, surrogate, reduction",
            "methods.bupo", "BuPO", "bupo/math"),
    _inside("representation_geometry", "Representation geometry: RankMe, alpha-ReQ and phases", "2509.23024",
            "analysis", "evaluate.representation_geometry"),
    _inside("entropy_guided_attention", "Learnable targets for attention entropy", "2501.03489", "analysis",
            "methods.entropy_guided_attention"),
    _inside("explicit_cot", "Explicit CoT training on two-hop facts", "2502.04667", "analysis",
            "evaluate.explicit_cot"),
    _inside("kappatune", "Training the tensors of lowest condition number (KappaTune)", "2506.16289", "parameters",
            "methods.kappatune", "KappaTune", "kappatune/math"),
    _inside("reasoning_utility", "Reasoning utility by conditional answer entropy, and early stopping", "2508.20395",
            "analysis, inference", "evaluate.reasoning_utility"),
    _inside("diffadapt", "Decoding adapted to difficulty by a probe (DiffAdapt)", "2510.19669", "inference",
            "inference.diffadapt"),
    _inside("v_reason", "Entropy steered through the value cache (V-Reason, text only)", "2510.17045", "inference",
            "inference.v_reason"),
    _inside("feedback_friction", "Feedback friction over rounds of feedback", "2506.11930", "analysis",
            "evaluate.feedback_friction"),
)  # fmt: skip
REGISTRY: dict[str, Entry] = {entry.slug: entry for entry in _ENTRIES}


def step_costs() -> dict[str, float]:
    """What each method adds to the time of a GRPO step, as `benchmarks/step_cost.py` measured it on the tiny lab."""
    costs = resources.files(__package__) / "step_cost.json"
    return dict(json.loads(costs.read_text(encoding="utf-8"))) if costs.is_file() else {}


def trainable() -> dict[str, Entry]:
    """Entries that can stand in a composition."""
    return {slug: entry for slug, entry in REGISTRY.items() if entry.cls}


def compose(methods: Sequence[Method]) -> Pipeline:
    """Join methods into one pipeline; see `Pipeline`. Where no base is among them and one is needed, GRPO's
    `released` preset is put first."""
    incomplete = any(not any(m.has(hook) for m in methods) for hook in NEEDED)
    if incomplete and not any(m.is_base for m in methods):
        methods = [build("grpo", {"preset": "released"}), *methods]
    return Pipeline(methods)


def load_class(slug: str) -> Any:
    """The class of a registered method. Raises UserError that suggests the nearest slug."""
    if slug not in REGISTRY:
        raise UserError(f"no method '{slug}' in methods; {nearest(slug, trainable())}")
    entry = REGISTRY[slug]
    if entry.cls is None:
        raise UserError(f"'{slug}' measures and does not train; import rlvr_lab.{entry.module} instead")
    return getattr(import_module(f"rlvr_lab.{entry.module}"), entry.cls)


def hooks_of(cls: Any) -> list[str]:
    """Hooks that a method implements, exclusive ones marked with *."""
    return [f"{hook}*" if hook in EXCLUSIVE else hook for hook in HOOKS if callable(getattr(cls, hook, None))]


def build(slug: str, settings: Mapping[str, Any]) -> Method:
    """A method from `{preset: NAME, setting: value, ...}`; settings override the preset.

    Raises UserError for an unknown slug, preset or setting, with the nearest valid name.
    """
    cls = load_class(slug)
    own = dict(settings)
    preset = own.pop("preset", "paper")
    if preset not in cls.presets:
        raise UserError(f"methods.{slug}.preset '{preset}' does not exist; {nearest(str(preset), cls.presets)}")
    valid = [f.name for f in fields(cls.config_class)]
    for key, value in own.items():
        if key not in valid:
            raise UserError(f"unknown setting methods.{slug}.{key}; {nearest(key, [*valid, 'preset'])}")
        own[key] = _number(value, getattr(cls.presets[preset], key), f"methods.{slug}.{key}")
    try:
        method: Method = cls(replace(cls.presets[preset], **own))
    except TypeError as error:
        raise UserError(f"methods.{slug}: {error}") from error
    return method


def _number(value: Any, default: Any, name: str) -> Any:
    """Numbers may be written as integers or, in YAML 1.1, as strings such as 1e-4; words are not numbers."""
    if isinstance(default, float) and value is not None and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name} must be a number, not '{value}'") from None
    return value
