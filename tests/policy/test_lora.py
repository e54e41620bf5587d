"""Adapters: only they train, without them the model is the starting policy, merged they are a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import sampled_rollout

from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy
from rlvr_lab.policy.lora import add_adapters, is_lora, linear_names, without_adapters
from rlvr_lab.policy.shard import whole_weights

pytest.importorskip("peft")


@pytest.fixture
def adapted(fresh_s: Callable[[], Policy]) -> Any:
    model = add_adapters(fresh_s().model, 4, 8.0, ("q_proj", "down_proj"), seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_only_adapters_of_the_named_layers_are_trained(adapted: Any) -> None:
    assert is_lora(adapted)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * adapted.config.num_hidden_layers
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in names)
    assert not adapted.training


def test_an_adapter_starts_as_the_policy_and_the_same_on_every_process(fresh_s: Callable[[], Policy]) -> None:
    policy = fresh_s()
    rollout = sampled_rollout(policy)
    before = scored(policy.model, rollout, 16)[0]
    first, second = (add_adapters(fresh_s().model, 4, 8.0, (), seed=1) for _ in range(2))
    torch.testing.assert_close(scored(first, rollout, 16)[0], before, rtol=0, atol=0)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert "lm_head" not in " ".join(name for name, p in first.named_parameters() if p.requires_grad)


def test_without_adapters_the_model_is_the_starting_policy(adapted: Any, tiny_s: Policy) -> None:
    rollout = sampled_rollout(tiny_s)
    start = scored(tiny_s.model, rollout, 16)[0]
    with without_adapters(adapted):
        torch.testing.assert_close(scored(adapted, rollout, 16)[0], start, rtol=0, atol=0)
    assert float((scored(adapted, rollout, 16)[0] - start).abs().max()) > 0.01


def test_whole_weights_are_a_plain_model_that_says_the_same(adapted: Any, tiny_s: Policy) -> None:
    rollout = sampled_rollout(tiny_s)
    plain = copy.deepcopy(tiny_s.model)
    weights = dict(whole_weights(adapted))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(scored(plain, rollout, 16)[0], scored(adapted, rollout, 16)[0], rtol=0, atol=1e-4)


def test_a_target_that_matches_no_layer_is_named_with_the_nearest(fresh_s: Callable[[], Policy]) -> None:
    model = fresh_s().model
    assert "q_proj" in linear_names(model)
    assert "lm_head" not in linear_names(model)
    with pytest.raises(
        UserError, match=r"model\.lora\.targets: no linear layer is named 'q_prj'; did you mean 'q_proj'"
    ):
        add_adapters(model, 4, 8.0, ("q_prj",), seed=0)
