"""A large vocabulary goes through the tiled head: same numbers and gradients as from all logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import make_rollout

from rlvr_lab.core.head import NotFinite
from rlvr_lab.policy import forward


@pytest.fixture(scope="module")
def wide() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(vocab_size=5000, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
        )  # fmt: skip


def gradients(
    model: Any, live: torch.Tensor | None, weight: torch.Tensor
) -> tuple[forward.TokenView, list[torch.Tensor]]:
    rollout = make_rollout([3, 5, 1])
    prompt_mask = rollout.prompt_mask.clone()
    prompt_mask[0, :3] = False  # left padding
    view = forward.token_view(model, rollout.with_(prompt_mask=prompt_mask), True, True, live)
    assert view.entropy is not None
    model.zero_grad(set_to_none=True)
    ((view.logprob + 0.3 * view.entropy) * weight).sum().backward()
    return view, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("named", [False, True])
def test_head_and_logits_agree(wide: Any, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) * (make_rollout([3, 5, 1]).mask)
    tiled, first = gradients(wide, weight > 0 if named else None, weight)
    monkeypatch.setattr(forward, "LARGE", 10**9)
    whole, second = gradients(wide, None, weight)
    assert tiled.entropy is not None
    assert whole.entropy is not None
    assert tiled.moments is not None
    assert whole.moments is not None
    torch.testing.assert_close(tiled.logprob, whole.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled.entropy, whole.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled.moments.collision, whole.moments.collision, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(tiled.moments.cross, whole.moments.cross, rtol=1e-4, atol=1e-6)
    assert bool(torch.isnan(tiled.moments.slope_square).all())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_logits_that_are_not_finite_are_named(wide: Any) -> None:
    broken = copy.deepcopy(wide)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(NotFinite, match="weight"):
        forward.token_view(broken, make_rollout([3, 5]))
