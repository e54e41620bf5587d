"""Rows in one line without padding say what rows apart say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import make_rollout, sampled_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy import forward
from rlvr_lab.policy.forward import packing_error, passes, scored, token_view
from rlvr_lab.policy.load import Policy


@pytest.fixture(scope="module")
def wide() -> Any:
    """A vocabulary that goes through the tiled head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(vocab_size=5000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def ragged() -> Rollout:
    """Left-padded prompts, and responses of which one is empty."""
    rollout = make_rollout([3, 5, 0, 1])
    prompt_mask = rollout.prompt_mask.clone()
    prompt_mask[0, :3] = prompt_mask[3, :6] = False
    return rollout.with_(prompt_mask=prompt_mask)


def view_and_gradients(model: Any, rollout: Rollout, packed: bool, live: torch.Tensor | None) -> Any:
    view = token_view(model, rollout, True, True, live, packed)
    assert view.entropy is not None
    weight = torch.rand(rollout.mask.shape, generator=torch.Generator().manual_seed(1)) * rollout.mask
    model.zero_grad(set_to_none=True)
    ((view.logprob + 0.3 * view.entropy) * weight).sum().backward()
    return view, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("named", [False, True], ids=["all rows", "live rows named"])
@pytest.mark.parametrize("which", ["logits", "tiled head"])
def test_packed_rows_have_the_values_and_gradients_of_padded_ones(
    which: str, named: bool, wide: Any, tiny_s: Policy, ragged: Rollout
) -> None:
    model = wide if which == "tiled head" else copy.deepcopy(tiny_s.model)
    assert forward._has_plain_head(model) == (which == "tiled head")
    live = ragged.mask if named else None
    (apart, first), (packed, second) = (view_and_gradients(model, ragged, p, live) for p in (False, True))
    for name in ("logprob", "entropy"):
        a, b = getattr(packed, name), getattr(apart, name)
        torch.testing.assert_close(a[ragged.mask], b[ragged.mask], rtol=1e-5, atol=2e-5)
        assert bool((a[~ragged.mask] == 0).all())
    for name in ("collision", "cross"):
        a, b = getattr(packed.moments, name), getattr(apart.moments, name)
        torch.testing.assert_close(a[ragged.mask], b[ragged.mask], rtol=1e-4, atol=1e-6)
    largest = max(float(g.abs().max()) for g in first)
    assert largest > 1e-3
    for a, b in zip(second, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)


def test_a_model_that_mixes_packed_rows_is_noticed(tiny_s: Policy, ragged: Rollout, monkeypatch: Any) -> None:
    assert packing_error(tiny_s.model, ragged) < 1e-4
    real = forward._packed

    def without_positions(rollout: Rollout) -> Any:
        line = real(rollout)
        positions = torch.arange(line.inputs["input_ids"].shape[1])[None]
        line.inputs["position_ids"] = positions  # one long sequence: every row sees those before it
        return line

    monkeypatch.setattr(forward, "_packed", without_positions)
    assert packing_error(tiny_s.model, ragged) > 0.1


def test_passes_hold_as_many_tokens_as_they_may(ragged: Rollout) -> None:
    index = torch.tensor([1, 0, 3, 2])  # 13, 8, 3 and 8 tokens with their prompts
    sizes = {budget: [len(p) for p in passes(ragged, index, 99, budget)] for budget in (1, 13, 21, 24, 32)}
    assert sizes == {1: [1, 1, 1, 1], 13: [1, 2, 1], 21: [2, 2], 24: [3, 1], 32: [4]}
    assert torch.equal(torch.cat(passes(ragged, index, 99, 13)), index)
    assert [len(p) for p in passes(ragged, index, 3)] == [3, 1]
    assert passes(ragged, index[:0], 3) == passes(ragged, index[:0], 3, 10) == []


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_scores_do_not_depend_on_packing(tiny_s: Policy, tokens: int) -> None:
    rollout = sampled_rollout(tiny_s)
    for a, b in zip(scored(tiny_s.model, rollout, 4, tokens), scored(tiny_s.model, rollout, 4), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert float(b.abs().max()) > 0.1
