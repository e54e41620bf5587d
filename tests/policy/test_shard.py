"""What sharding prepares; sharding itself needs processes and is tested in tests/train/test_parallel.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import sampled_rollout
from torch import nn

from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import token_view
from rlvr_lab.policy.load import Policy
from rlvr_lab.policy.shard import checkpoint_activations, decoder_layers, is_sharded, whole_weights


def gradients(model: Any, rollout: Any) -> tuple[list[torch.Tensor], int]:
    """Gradients, and how often the first layer ran."""
    runs = []
    handle = decoder_layers(model)[0].self_attn.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[operator]
    model.zero_grad(set_to_none=True)
    (token_view(model, rollout).logprob * rollout.mask).sum().backward()
    handle.remove()
    return [p.grad.clone() for p in model.parameters()], len(runs)


def test_activation_checkpointing_recomputes_and_changes_no_gradient(tiny_s: Policy) -> None:
    """In evaluation mode, where transformers' own switch does nothing."""
    rollout = sampled_rollout(tiny_s)
    plain = copy.deepcopy(tiny_s.model)
    model = copy.deepcopy(tiny_s.model)
    checkpoint_activations(model)
    assert not model.training
    (expected, once), (found, twice) = gradients(plain, rollout), gradients(model, rollout)
    assert (once, twice) == (1, 2)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    again = sampled_rollout(Policy(model, tiny_s.tokenizer, tiny_s.eos_ids, tiny_s.pad_id, ""))
    assert torch.equal(again.response_ids, rollout.response_ids)  # sampling with a cache is as before


def test_whole_weights_of_a_plain_model_are_its_parameters(tiny_s: Policy) -> None:
    assert not is_sharded(tiny_s.model)
    own = dict(tiny_s.model.named_parameters())
    for name, value in whole_weights(tiny_s.model):
        assert value.data_ptr() == own.pop(name).data_ptr()
    assert not own


def test_a_model_without_layers_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def get_decoder(self) -> nn.Module:
            return nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"Odd has no list of decoder layers; set parallel\.shard"):
        decoder_layers(Odd())
