"""Method classes, composed as in training, on golden cases: presets and settings mean what the recorded code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import GOLDEN

from rlvr_lab.methods import build, compose
from rlvr_lab.testing.compare import compare
from rlvr_lab.testing.golden import TOLERANCE, Case, gradient, read_cases
from rlvr_lab.testing.minibatch import minibatch_loss, record

CASES = {case.name: case for case in read_cases(GOLDEN / "baselines.json")}
SEQUENCES = "sequence_mean_of_token_mean"
GRPO_TRL = {"preset": "trl"}

# case, recorded mode, composition; the settings are the case's parameters where they are no preset
COMPOSITIONS: dict[str, tuple[str, str | None, dict[str, dict[str, Any]]]] = {
    "grpo": ("ppo_clip_symmetric", "token-mean", {"grpo": {"preset": "released"}}),
    "grpo by sequence": (
        "ppo_clip_symmetric",
        "seq-mean-token-mean",
        {"grpo": {"preset": "released", "reduction": SEQUENCES}},
    ),
    "clip_higher": (
        "dapo_clip_higher",
        "token-mean",
        {"grpo": {"preset": "released", "dual_clip": 10.0}, "clip_higher": {"preset": "released"}},
    ),
    "dr_grpo": (
        "dr_grpo_sum_norm",
        "seq-mean-token-sum-norm",
        {"grpo": {"preset": "released"}, "dr_grpo": {"preset": "released", "max_length": 5}},
    ),
    "gspo": ("gspo_paper_clip", "seq-mean-token-mean", {"gspo": {"preset": "released"}}),
    "gspo in a loose range": (
        "gspo_loose_clip",
        "seq-mean-token-mean",
        {"gspo": {"preset": "released", "clip_low": 0.2, "clip_high": 0.2}},
    ),
    "cispo": ("cispo", "token-mean", {"cispo": {"preset": "verl", "clip_low": 1.0, "clip_high": 0.28}}),
    "sapo": ("sapo", "seq-mean-token-mean", {"sapo": {"preset": "released"}}),
    "trl dapo": ("trl_dapo", None, {"grpo": GRPO_TRL, "clip_higher": {"preset": "paper"}}),
    "trl dr_grpo": ("trl_dr_grpo", None, {"grpo": GRPO_TRL, "dr_grpo": {"preset": "trl", "max_length": 5}}),
    "trl gspo": (
        "trl_gspo_sequence_level",
        None,
        {"grpo": GRPO_TRL, "gspo": {"preset": "paper", "clip_low": 0.2, "clip_high": 0.2}},
    ),
    "trl cispo": ("trl_cispo_eps5", None, {"grpo": GRPO_TRL, "cispo": {"preset": "trl"}}),
    "trl kl and bonus": (
        "trl_grpo_kl_entropy_bonus",
        None,
        {
            "grpo": GRPO_TRL | {"reduction": SEQUENCES},
            "kl_reference": {"preset": "trl"},
            "entropy_bonus": {"preset": "trl", "coefficient": 0.01},
        },
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_has_the_recorded_loss_and_gradient(name: str) -> None:
    case_name, mode, methods = COMPOSITIONS[name]
    case = CASES[case_name]
    logprob = case.leaf("log_prob")
    mask = case.mask("response_mask" if mode else "completion_mask")
    advantage = case.tensor("advantages") if mode else case.tensor("advantages_per_sequence")[:, None] * mask
    statistics = {"ref_logprob": case.tensor("ref_log_prob")} if "ref_log_prob" in case.inputs else {}
    entropy = case.tensor("entropy") if "entropy" in case.inputs else torch.zeros_like(mask, dtype=case.dtype)
    batch = record(mask, case.tensor("old_log_prob"), statistics=statistics)
    pipeline = compose([build(slug, settings) for slug, settings in ({"grpo": {}} | methods).items()])
    loss = minibatch_loss(pipeline, batch, logprob, advantage, entropy)
    recorded = (case.outputs[mode], case.grad[mode]) if mode else (case.outputs, case.grad)
    assert not wrong(
        case, {"loss": loss, "grad": gradient(loss, logprob)}, {"loss": recorded[0]["loss"], "grad": recorded[1]}
    )


def wrong(case: Case, actual: Any, expected: Any) -> list[str]:
    return [f"{d.path} {d.problem}" for d in compare(actual, expected, TOLERANCE[case.dtype]) if d.problem]


ADVANTAGES = {
    "grpo": {"grpo": {"preset": "released"}},
    "dr_grpo_no_std": {"grpo": {}, "dr_grpo": {"preset": "released"}},
    "rloo": {"grpo": {}, "rloo": {"preset": "released"}},
    "opo": {"grpo": {}, "opo": {"preset": "released"}},
    "reinforce_plus_plus_gamma1": {"grpo": {}, "reinforce_plus_plus": {"preset": "released"}},
    "reinforce_plus_plus_gamma0.9": {"grpo": {}, "reinforce_plus_plus": {"preset": "released", "gamma": 0.9}},
    "reinforce_plus_plus_baseline": {"grpo": {}, "reinforce_plus_plus": {"preset": "baseline"}},
}


@pytest.mark.parametrize("case_name", ["advantages_two_groups", "advantages_real_valued"])
@pytest.mark.parametrize("key", ADVANTAGES)
def test_method_has_the_recorded_advantage(key: str, case_name: str) -> None:
    case = CASES[case_name]
    mask = case.mask("response_mask")
    batch = record(
        mask,
        torch.zeros(mask.shape, dtype=case.dtype),
        group_id=case.ids("group_index"),
        reward=case.tensor("sequence_reward"),
    )
    pipeline = compose([build(slug, settings) for slug, settings in ADVANTAGES[key].items()])
    assert not wrong(case, pipeline.advantage(batch), case.outputs[key])
    assert case.outputs.keys() == ADVANTAGES.keys()
