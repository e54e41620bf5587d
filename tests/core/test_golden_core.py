"""Core functions reproduce what the official code computes, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import golden_case
from torch import Tensor

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.entropy import softmax_entropy, token_statistics
from rlvr_lab.core.losses import clipped_surrogate
from rlvr_lab.core.reduce import Reduction, reduce

VERL_REDUCTION: dict[str, Reduction] = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_of_token_mean",
    "seq-mean-token-sum": "sequence_mean_of_token_sum",
    "seq-mean-token-sum-norm": "sequence_mean_of_token_sum_over_constant",
}


def close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def verl_reduce(values: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Our reduction under verl's name. verl's norm mode divides the sum by T alone, ours by B T as well."""
    b, t = mask.shape
    if mode == "seq-mean-token-sum-norm":
        return reduce(values, mask, VERL_REDUCTION[mode], constant=t) * b
    return reduce(values, mask, VERL_REDUCTION[mode])


@pytest.mark.parametrize("name", ["advantages_two_groups", "advantages_real_valued"])
@pytest.mark.parametrize(("output", "std"), [("grpo", "sample"), ("dr_grpo_no_std", "none")])
def test_group_advantage_is_verls(name: str, output: str, std: Any) -> None:
    case = golden_case(name)
    inputs = case["inputs"]
    reward, group = torch.tensor(inputs["sequence_reward"]).float(), torch.tensor(inputs["group_index"])
    advantage = group_advantage(reward, group, std, case["params"]["epsilon"])
    close(advantage[:, None] * torch.tensor(inputs["response_mask"]), case["outputs"][output])


@pytest.mark.parametrize(("output", "std"), [("scale_group", "sample"), ("scale_none", "none")])
def test_group_advantage_is_trls(output: str, std: Any) -> None:
    case = golden_case("trl_advantages")
    reward = torch.tensor(case["inputs"]["rewards"])
    group = torch.arange(len(reward)) // case["params"]["num_generations"]
    close(group_advantage(reward, group, std, eps=1e-4), case["outputs"][output])


def test_population_standard_deviation_differs_from_verls() -> None:
    case = golden_case("advantages_two_groups")
    reward = torch.tensor(case["inputs"]["sequence_reward"]).float()
    group = torch.tensor(case["inputs"]["group_index"])
    expected = torch.tensor(case["outputs"]["grpo"])[:, 0] * (4 / 3) ** 0.5
    close(group_advantage(reward, group, "population", case["params"]["epsilon"]), expected)


@pytest.mark.parametrize("mode", list(VERL_REDUCTION))
def test_reductions_are_verls(mode: str) -> None:
    case = golden_case("agg_modes_ragged")
    values = torch.tensor(case["inputs"]["loss_mat"])
    mask = torch.tensor(case["inputs"]["loss_mask"], dtype=torch.bool)
    close(verl_reduce(values, mask, mode), case["outputs"][mode])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("ppo_clip_symmetric", "token-mean"),
        ("ppo_clip_symmetric", "seq-mean-token-mean"),
        ("dapo_clip_higher", "token-mean"),
        ("dr_grpo_sum_norm", "seq-mean-token-sum-norm"),
    ],
)
def test_clipped_surrogate_and_its_gradient_are_verls(name: str, mode: str) -> None:
    case = golden_case(name)
    params, inputs, expected = case["params"], case["inputs"], case["outputs"][mode]
    mask = torch.tensor(inputs["response_mask"], dtype=torch.bool)
    logprob = torch.tensor(inputs["log_prob"], requires_grad=True)
    advantage = torch.tensor(inputs["advantages"])
    surrogate = clipped_surrogate(
        logprob,
        torch.tensor(inputs["old_log_prob"]),
        advantage,
        1 - params["clip_low"],
        1 + params["clip_high"],
        params["clip_ratio_c"],
    )
    loss = verl_reduce(surrogate.loss, mask, mode)
    loss.backward()  # type: ignore[no-untyped-call]
    close(loss.detach(), expected["loss"])
    assert logprob.grad is not None
    close(logprob.grad, case["grad"]["value"][mode])
    clipped = (surrogate.clipped_low | surrogate.clipped_high)[mask].float().mean()
    close(clipped, expected["pg_clipfrac"])


@pytest.mark.parametrize(("name", "reduction"), [("trl_dapo", "token_mean"), ("trl_dr_grpo", None)])
def test_clipped_surrogate_is_trls(name: str, reduction: Reduction | None) -> None:
    case = golden_case(name)
    params, inputs = case["params"], case["inputs"]
    mask = torch.tensor(inputs["completion_mask"], dtype=torch.bool)
    logprob = torch.tensor(inputs["log_prob"], requires_grad=True)
    advantage = torch.tensor(inputs["advantages_per_sequence"])[:, None].expand(mask.shape)
    surrogate = clipped_surrogate(
        logprob,
        torch.tensor(inputs["old_log_prob"]),
        advantage,
        1 - params["eps"],
        1 + params.get("eps_high", params["eps"]),
    )
    over_constant: Reduction = "sequence_mean_of_token_sum_over_constant"
    loss = reduce(surrogate.loss, mask, reduction or over_constant, constant=params["max_completion_length"])
    loss.backward()  # type: ignore[no-untyped-call]
    close(loss.detach(), case["outputs"]["loss"])
    assert logprob.grad is not None
    close(logprob.grad, case["grad"]["value"])


def test_entropy_and_the_gradient_of_its_bonus_are_verls() -> None:
    case = golden_case("entropy_bonus")
    mask = torch.tensor(case["inputs"]["response_mask"], dtype=torch.bool)
    logits = torch.tensor(case["inputs"]["logits"], requires_grad=True)
    _, entropy = token_statistics(logits, torch.zeros(mask.shape, dtype=torch.long))
    loss = -case["params"]["entropy_coeff"] * reduce(entropy, mask, "token_mean")
    loss.backward()  # type: ignore[no-untyped-call]
    close(entropy.detach(), case["outputs"]["entropy"])
    close(softmax_entropy(logits.detach()), case["outputs"]["entropy"])
    close(loss.detach(), case["outputs"]["loss_term"])
    assert logits.grad is not None
    close(logits.grad, case["grad"]["value"])
