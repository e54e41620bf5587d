"""The listing of the works outside RLVR, whose modules live in `rlvr_lab.elsewhere`. None of them trains a policy."""

from __future__ import annotations

from ._entry import Entry

_STATUS = "tested, a demonstration"


def _work(slug: str, title: str, arxiv: str, field: str, chapter: str, recipe: str | None = None) -> Entry:
    where = f"8_elsewhere/{chapter}"
    return Entry(slug, title, arxiv, slug, field, f"elsewhere.{slug}", None, where, recipe, _STATUS, group="elsewhere")


_ENTRIES = (
    _work("maxent_statmech", "Information theory and statistical mechanics revisited", "1105.5662",
          "statistical mechanics", "maximum_entropy"),
    _work("cpl", "Contrastive preference learning (CPL)", "2310.13639", "preference learning", "maximum_entropy"),
    _work("ctrl_diffusion", "Conditional control of diffusion models by RL (CTRL)", "2406.12120",
          "diffusion models", "maximum_entropy"),
    _work("dichotomy_of_control", "Dichotomy of control", "2210.13435", "offline RL", "luck_grades_secrets"),
    _work("spo", "Self-supervised preference optimisation (SPO)", "2409.17791", "preference learning",
          "luck_grades_secrets"),
    _work("swing_distillation", "Swing distillation", "2212.08349", "privacy", "luck_grades_secrets"),
    _work("mtard", "Multi-teacher adversarial robustness distillation (MTARD)", "2306.16170", "distillation",
          "entropy_thermostat"),
    _work("symphony", "Symphony: normalised, calibrated advantage actor and critic", "2512.10477",
          "continuous control", "entropy_thermostat"),
    _work("open_set_tta", "Open-set test-time adaptation by wisdom of crowds", "2308.06879", "test-time adaptation",
          "entropy_stop_signal"),
    _work("jei_dnn", "Jointly learned exit and inference (JEI-DNN)", "2310.09163", "early exit",
          "entropy_stop_signal"),
    _work("crysbfn", "Periodic Bayesian flow for crystals (CrysBFN)", "2502.02016", "generative models",
          "beliefs_and_bottlenecks"),
    _work("dale_langevin", "Dale meets Langevin: multiplicative denoising", "2510.02730", "generative models",
          "beliefs_and_bottlenecks"),
    _work("style_extracting_diffusion", "Style-extracting diffusion (STEDM)", "2403.14429", "generative models",
          "style_and_self_conditioning"),
    _work("ddae_pp", "Self-conditioned diffusion representations (DDAE++)", "2505.10999", "generative models",
          "style_and_self_conditioning"),
    _work("classp", "Adjustment suppression and sparsity promotion (CLASSP)", "2405.09637", "continual learning",
          "plasticity", "classp/tiny"),
    _work("granet", "Gradual pruning with zero-cost regeneration (GraNet)", "2106.10404", "sparse training",
          "plasticity"),
    _work("homeostatic_nets", "Homeostatic neural networks", "2205.08645", "concept shift",
          "phases_and_homeostasis"),
    _work("three_regime_pruning", "A three-regime model of pruning", "2305.18383", "pruning",
          "phases_and_homeostasis"),
    _work("active_matter_entropy", "Entropy production of active matter from a learned score", "2309.12991",
          "stochastic thermodynamics", "physics_and_frames"),
    _work("lagrangian_pinns", "Lagrangian physics-informed networks", "2205.02902", "differential equations",
          "physics_and_frames"),
    _work("pi_hc_moe", "Hard constraints by mixture of experts (PI-HC-MoE)", "2402.13412", "differential equations",
          "physics_and_frames"),
)  # fmt: skip
ELSEWHERE: dict[str, Entry] = {entry.slug: entry for entry in _ENTRIES}
