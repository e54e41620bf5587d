"""TRL 1.16 itself: the same tensors into GRPOTrainer._compute_loss and into our methods.

The trainer is a stand-in with the attributes that the method reads; its forward pass is replaced by the tensors, so
that everything behind it is TRL's own code.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_samples import FULL, WITH_EMPTY, Sample, assert_same_loss, our_loss, sample
from torch import Tensor
from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rlvr_lab.methods import build
from rlvr_lab.testing.golden import Case, replay

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def test_version() -> None:
    assert version("trl") == "1.16.0"


def trainer(**settings: Any) -> SimpleNamespace:
    """A stand-in for a GRPOTrainer with these settings of GRPOConfig and TRL's defaults for the others."""
    config = GRPOConfig(use_cpu=True, bf16=False, report_to=[], steps_per_generation=1, **settings)
    adaptive = config.use_adaptive_entropy
    return SimpleNamespace(
        args=config,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=config.top_entropy_quantile,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        importance_sampling_level=config.importance_sampling_level,
        beta=config.beta,
        loss_type=config.loss_type,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        max_completion_length=config.max_completion_length,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=adaptive,
        _entropy_bonus_enabled=adaptive or config.entropy_coef != 0,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        _metrics={"train": defaultdict(list)},
    )


def trl_loss(this: SimpleNamespace, data: Sample) -> Tensor:
    this._get_per_token_logps_and_entropies = lambda *args, **kwargs: (data.logprob, data.entropy, None)
    rollout, mask = data.rollout, data.mask.double()
    inputs = {
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask.long(),
        "completion_ids": rollout.response_ids,
        "completion_mask": mask,
        "advantages": data.advantage_B,
        "old_per_token_logps": data.old_logprob,
        "ref_per_token_logps": data.statistic("ref_logprob"),
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = GRPOTrainer._compute_loss(this, None, inputs)
    return loss


def with_reduction(reduction: str) -> dict[str, Any]:
    return {"grpo": {"preset": "trl", "reduction": reduction}}


SEQUENCES = "sequence_mean_of_token_mean"
LOSSES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "grpo": ({"loss_type": "grpo"}, with_reduction(SEQUENCES)),
    "bnpo": ({"loss_type": "bnpo"}, with_reduction("token_mean")),
    "dapo, clip higher": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        with_reduction("token_mean") | {"clip_higher": {"preset": "paper"}},
    ),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": 12},
        {"grpo": {"preset": "trl"}, "dr_grpo": {"preset": "trl", "max_length": 12}},
    ),
    "two-sided": ({"loss_type": "dapo", "delta": 1.5}, {"grpo": {"preset": "trl", "delta": 1.5}}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"grpo": {"preset": "trl"}, "cispo": {"preset": "trl", "clip_high": 2.0}},
    ),
    "sapo": ({"loss_type": "sapo"}, {"grpo": {"preset": "trl"}, "sapo": {"preset": "paper"}}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"grpo": {"preset": "trl"}, "gspo": {"preset": "paper"}},
    ),
    "gspo with a wide bound": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"grpo": {"preset": "trl"}, "gspo": {"preset": "paper", "clip_low": 0.2, "clip_high": 0.2}},
    ),
    "kl": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        with_reduction(SEQUENCES) | {"kl_reference": {"preset": "trl", "beta": 0.04}},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_method_has_trls_loss_and_gradient(name: str) -> None:
    settings, methods = LOSSES[name]
    data = sample(spread=1.0)
    assert_same_loss(our_loss(data, methods), trl_loss(trainer(**settings), data), data.logprob)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_entropy_bonus(loss_type: str) -> None:
    """TRL's bonus is the mean over tokens whatever the loss type divides by."""
    data = sample()
    theirs = trl_loss(trainer(loss_type=loss_type, entropy_coef=0.3, max_completion_length=9), data)
    reduction = {"grpo": SEQUENCES, "dapo": "token_mean", "dr_grpo": "sequence_mean_of_token_sum_over_constant"}
    base = {"preset": "trl", "reduction": reduction[loss_type], "reduction_constant": 9.0}
    bonus = {"preset": "trl", "coefficient": 0.3}
    ours = our_loss(data, {"grpo": base, "entropy_bonus": bonus})
    assert_same_loss(ours, theirs, data.logprob, data.entropy)


def test_adaptive_coefficient_over_several_steps() -> None:
    settings = {"entropy_target": 0.8, "entropy_coef_delta": 0.05, "entropy_coef_max": 0.12}
    this = trainer(loss_type="dapo", use_adaptive_entropy=True, **settings)
    ours: Any = build("adaptive_entropy", {"preset": "trl", "target": 0.8, "step": 0.05, "maximum": 0.12})
    applied = []
    for step, scale in enumerate((2.0, 0.5, 0.4, 0.3, 0.2, 3.0, 0.5)):
        data = sample(seed=step)
        with torch.no_grad():
            data.entropy.mul_(scale)
        before = this.entropy_coef
        theirs = trl_loss(this, data)
        (gradient,) = torch.autograd.grad(theirs, data.entropy)
        tokens = int(data.mask.sum())
        expected = -ours.controller.coefficient / tokens * data.mask
        torch.testing.assert_close(gradient, expected.double(), rtol=0, atol=1e-6)
        ours.observe({"token_entropy": data.entropy[data.mask].mean().item()})
        assert ours.controller.value == pytest.approx(this.entropy_coef)
        applied.append((before, ours.controller.value))
    assert len(set(applied)) > 3  # it did move


def test_trl_counts_empty_rows_as_sequences() -> None:
    for lengths, share in ((FULL, 1.0), (WITH_EMPTY, 7 / 8)):
        data = sample(lengths)
        ours = our_loss(data, with_reduction(SEQUENCES))
        assert_same_loss(ours * share, trl_loss(trainer(loss_type="grpo"), data), data.logprob)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "higher": ({"epsilon_high": 0.5}, {"eps_high": 0.5}),
    "two-sided": ({"delta": 1.4}, {"delta": 1.4}),
    "kl and bonus": (
        {"beta": 0.1, "entropy_coef": 0.05, "use_bias_correction_kl": False},
        {"beta": 0.1, "ent_coef": 0.05},
    ),
    "adaptive": (
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 5.0},
        {"ent_coef": 0.05, "entropy_target": 5.0},
    ),
}


@pytest.mark.parametrize("lengths", [FULL, WITH_EMPTY], ids=["full", "empty row"])
@pytest.mark.parametrize(("loss_type", "level"), list(product(LOSS_TYPES, ("token", "sequence"))))
def test_golden_adapter_replays_every_setting(loss_type: str, level: str, lengths: tuple[int, ...]) -> None:
    """Golden cases recorded on the spot; hidden cases of this format must replay."""
    for settings, params in VARIANTS.values():
        case = recorded_case(sample(lengths, seed=2), loss_type, level, settings, params)
        assert replay(case).problem is None, params


def test_golden_adapter_replays_the_weighted_kl() -> None:
    settings, params = {"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": True}
    assert replay(recorded_case(sample(), "dapo", "token", settings, params)).problem is None
    assert replay(recorded_case(sample(), "dapo", "token", settings, {"beta": 0.1})).problem is not None


def recorded_case(data: Sample, loss_type: str, level: str, settings: dict[str, Any], params: dict[str, Any]) -> Case:
    about = {"loss_type": loss_type, "max_completion_length": 9}
    this = trainer(**about, importance_sampling_level=level, **settings)
    loss = trl_loss(this, data)
    (grad,) = torch.autograd.grad(loss, data.logprob)
    inputs = {
        "log_prob": data.logprob.tolist(),
        "old_log_prob": data.old_logprob.tolist(),
        "entropy": data.entropy.tolist(),
        "advantages_per_sequence": data.advantage_B.tolist(),
        "completion_mask": data.mask.int().tolist(),
        "ref_log_prob": data.statistic("ref_logprob").tolist(),
    }
    outputs = {"loss": loss.item(), "entropy_coef_after": this.entropy_coef}
    recorded = {**about, "eps": 0.2, "is_level": level, **params}
    return Case("baselines", 0, "", None, "GRPOTrainer._compute_loss", recorded, inputs, outputs, grad.tolist())
