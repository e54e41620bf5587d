"""What RlvrGRPOTrainer counts on in TRL, `trl>=1.16,<2`: a release that changes it fails here, by name."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig, GRPOTrainer

from rlvr_lab.integrations.trl import OWNED, RlvrGRPOTrainer

SIGNATURES = {
    "_prepare_inputs": "(self, generation_batch)",
    "_generate_and_score_completions": "(self, inputs)",
    "_tokenize_prompts": "(self, prompts)",
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
    "_get_grad_norm": "(self, model, grad_norm)",
    "create_scheduler": "(self, num_training_steps, optimizer)",
    "_save_checkpoint": "(self, model, trial)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
}
FIRST_ARGUMENTS = {
    "__init__": ["self", "model", "reward_funcs", "args", "train_dataset"],
    "_get_per_token_logps_and_entropies": [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ],
}  # fmt: skip
SETTINGS = (
    "vllm_importance_sampling_correction", "steps_per_generation", "generation_batch_size", "num_generations",
    "gradient_accumulation_steps", "num_iterations", "router_aux_loss_coef",
)  # fmt: skip
READ = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps",
    "ref_per_token_logps",
)  # fmt: skip
ATTRIBUTES = (
    "self.num_generations =", "self.num_iterations =", "self.temperature =", "self.eos_token_ids =",
    "self._tokenizer =", "self.reward_func_names =", "self.reward_weights =", "self._metrics =",
    "self.aux_loss_enabled =",
)  # fmt: skip


def names(method: str) -> list[str]:
    return list(inspect.signature(getattr(GRPOTrainer, method)).parameters)


def test_version_is_one_we_support() -> None:
    assert version("trl") in SpecifierSet(">=1.16,<2")


@pytest.mark.parametrize("method", SIGNATURES)
def test_overridden_methods_have_the_signatures_we_override(method: str) -> None:
    assert f"({', '.join(names(method))})" == SIGNATURES[method]


@pytest.mark.parametrize("method", FIRST_ARGUMENTS)
def test_methods_with_many_arguments_begin_alike(method: str) -> None:
    expected = FIRST_ARGUMENTS[method]
    assert names(method)[: len(expected)] == expected


def test_every_override_is_under_contract() -> None:
    inherited = set(dir(GRPOTrainer))
    own = {n for n, value in vars(RlvrGRPOTrainer).items() if inspect.isfunction(value) and n in inherited}
    assert own == set(SIGNATURES) | set(FIRST_ARGUMENTS)


def test_settings_exist() -> None:
    assert {*SETTINGS, *OWNED} <= set(GRPOConfig.__dataclass_fields__)


def test_fields_of_the_generation_batch_are_written() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert [name for name in READ if f'"{name}"' not in source] == []


def test_attributes_are_set() -> None:
    source = inspect.getsource(GRPOTrainer.__init__)
    assert [name for name in ATTRIBUTES if name not in source] == []


def test_loss_is_not_divided_again_for_accumulation() -> None:
    """We return a share of a sum; a trainer that divides it once more would shrink gradients."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert "no_sync" in inspect.getsource(inspect.getmodule(GRPOTrainer.__mro__[2]).Trainer._run_epoch)


def test_rank_share_of_rewards_is_gathered() -> None:
    """`_calculate_rewards` returns the rewards of all ranks; we take them as such."""
    assert "rewards_per_func = gather(rewards_per_func)" in inspect.getsource(GRPOTrainer._calculate_rewards)
