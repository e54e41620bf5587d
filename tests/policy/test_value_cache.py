"""The value-cache hook: what it adds is what a full recomputation with changed values gives, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlvr_lab.core.entropy import softmax_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.policy.value_cache import ControlledCache, tail_of

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
NEXT = torch.tensor([[7, 3, 2], [9, 4, 6]])
PLACES = [[1, 2, 4], [0, 5]]


def make(kind: str, kv_heads: int = 2, **settings: Any) -> Any:
    config_class, model_class = KINDS[kind]
    sizes: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    if kind == "mistral":
        sizes["sliding_window"] = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config_class(**(sizes | settings))).double().eval()
    # the library's norms compute in float32, which drowns finite differences
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def changes(delta: Tensor) -> Tensor:
    return 0.5 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(2), dtype=delta.dtype)


def recomputed(model: Any, ids: Tensor, delta: Tensor) -> Tensor:
    """Logits [B, V] of the last token without any cache; the last layer's value projection is changed instead."""
    rows, heads, _, width = delta.shape
    added = torch.zeros(rows, ids.shape[1], heads * width, dtype=delta.dtype)
    for row, places in enumerate(PLACES):
        for i, place in enumerate(places):
            added[row, place] = delta[row, :, i].flatten()
    handle = model.model.layers[-1].self_attn.v_proj.register_forward_hook(lambda m, i, out: out + added)
    try:
        return model(input_ids=ids, use_cache=False).logits[:, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_cached_logits_equal_a_full_recomputation(kind: str, kv_heads: int) -> None:
    model, ids = make(kind, kv_heads), PROMPT
    cache = ControlledCache(model)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    delta = cache.control(PLACES)
    assert delta.shape == (2, kv_heads, 3, 4)
    delta.copy_(changes(delta))
    for step in range(3):  # dV persists, and later tokens read it too
        ids = torch.cat([ids, NEXT[:, step : step + 1]], 1)
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        expected = recomputed(model, ids, delta)
        plain = model(input_ids=ids, use_cache=False).logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-12)
        assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_controller_it_is_the_librarys_cache(kind: str) -> None:
    model = make(kind)
    plain, own = DynamicCache(config=model.config), ControlledCache(model)
    for ids in (PROMPT, NEXT[:, :1], NEXT[:, 1:]):
        a, b = (model(input_ids=ids, past_key_values=cache, use_cache=True).logits for cache in (plain, own))
        assert torch.equal(a, b)
    own.control([[], []])
    assert own.delta is not None
    assert own.delta.numel() == 0
    a, b = (model(input_ids=NEXT[:, :1], past_key_values=c, use_cache=True).logits for c in (plain, own))
    assert torch.equal(a, b)


def test_a_new_controller_changes_nothing_and_has_a_gradient() -> None:
    model, cache, entropy = entropies("qwen2")
    assert cache.delta is not None
    plain = model(input_ids=torch.cat([PROMPT, NEXT[:, :1]], 1), use_cache=False).logits[:, -1]
    assert torch.allclose(softmax_entropy(plain), entropy(), atol=1e-12)
    (grad,) = torch.autograd.grad(entropy().sum(), cache.delta)
    assert grad.abs().max() > 1e-4
    assert bool((grad[1, :, 2] == 0).all()), "row 1 controls two places only; its third block is padding"


def entropies(kind: str, kv_heads: int = 2) -> Any:
    model = make(kind, kv_heads)
    cache = ControlledCache(model)
    context = tail_of(model, cache)
    tail = context.__enter__()
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
        cache.control(PLACES)
        model(input_ids=NEXT[:, :1], past_key_values=cache, use_cache=True)
    context.__exit__(None, None, None)
    return model, cache, lambda: softmax_entropy(tail.logits())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_gradient_agrees_with_finite_differences(kind: str, kv_heads: int) -> None:
    _, cache, entropy = entropies(kind, kv_heads)
    delta = cache.delta
    with torch.no_grad():
        delta.copy_(changes(delta))
    weights = torch.tensor([1.0, -1.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * entropy()).sum(), delta)
    numeric, eps = torch.zeros_like(grad), 1e-6
    with torch.no_grad():
        for index in range(delta.numel()):
            old = float(delta.flatten()[index])
            found = []
            for shift in (eps, -eps):
                delta.view(-1)[index] = old + shift
                found.append(float((weights * entropy()).sum()))
            delta.view(-1)[index] = old
            numeric.view(-1)[index] = (found[0] - found[1]) / (2 * eps)
    assert torch.allclose(grad, numeric, atol=1e-8)
    assert grad.abs().max() > 1e-3


def test_rows_are_separate() -> None:
    _, cache, entropy = entropies("qwen3")
    (grad,) = torch.autograd.grad(entropy()[0], cache.delta)
    assert grad[0].abs().max() > 0
    assert bool((grad[1] == 0).all())


def test_the_tail_equals_the_forward_pass_and_stores_nothing() -> None:
    model, cache = make("llama"), None
    cache = ControlledCache(model)
    with tail_of(model, cache) as tail, torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
        cache.control(PLACES).copy_(changes(cache.delta))
        logits = model(input_ids=NEXT[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]
        before = [layer.values.clone() for layer in cache.layers]
        assert torch.allclose(tail.logits(), logits, atol=1e-12)
        assert torch.allclose(tail.logits(), logits, atol=1e-12)
        assert all(torch.equal(a, layer.values) for a, layer in zip(before, cache.layers, strict=True))
        assert cache.get_seq_length() == 7
    assert not model.model.layers[-1]._forward_pre_hooks, "the hook stays behind"


def test_backward_touches_the_last_layer_only() -> None:
    """Nothing below the last block is in the graph, and no parameter gets a gradient."""
    model = make("qwen2")
    seen: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, n=number: seen.append(n))
    cache = ControlledCache(model)
    with tail_of(model, cache) as tail:
        model(input_ids=PROMPT, past_key_values=cache, use_cache=True)  # with a graph, which the tail has to leave out
        delta = cache.control(PLACES)
        model(input_ids=NEXT[:, :1], past_key_values=cache, use_cache=True)
        seen.clear()
        softmax_entropy(tail.logits()).sum().backward(inputs=[delta])
    assert seen == [2]
    assert delta.grad is not None
    assert not cache.last.values.requires_grad
    assert not cache.last.keys.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_forward_passes_inside_no_grad_and_inference_mode(mode: Any) -> None:
    """A cache that was filled inside inference mode still has a gradient outside of it."""
    model = make("qwen2")
    cache = ControlledCache(model)
    with tail_of(model, cache) as tail:
        with mode():
            model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
            cache.control(PLACES)
            model(input_ids=NEXT[:, :1], past_key_values=cache, use_cache=True)
        (grad,) = torch.autograd.grad(softmax_entropy(tail.logits()).sum(), cache.delta)
    assert grad.abs().max() > 1e-4


def test_reset_forgets_the_controller() -> None:
    model = make("llama")
    cache = ControlledCache(model)
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
        cache.control(PLACES).add_(1.0)
    cache.reset()
    assert cache.delta is None
    assert cache.last.places is None


def test_bfloat16_values_take_a_float32_change() -> None:
    model = make("qwen2").bfloat16()
    cache = ControlledCache(model)
    with tail_of(model, cache) as tail:
        with torch.no_grad():
            model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
            assert cache.control(PLACES).dtype == torch.float32
            model(input_ids=NEXT[:, :1], past_key_values=cache, use_cache=True)
        (grad,) = torch.autograd.grad(softmax_entropy(tail.logits()).sum(), cache.delta)
    assert grad.dtype == torch.float32
    assert grad.abs().max() > 0


# -- bad input --------------------------------------------------------------------------------------------------------


def test_an_unsupported_architecture_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        ControlledCache(model)


def test_sliding_window_attention_in_the_last_layer_is_refused() -> None:
    with pytest.raises(UserError, match="sliding_window to null"):
        ControlledCache(make("mistral", sliding_window=4))
    with pytest.raises(UserError, match="sliding_window to null"):
        ControlledCache(make("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[6], []], "position 6 of row 0 is out of range: the cache holds 0 to 5"),
        ([[], [-1]], "position -1 of row 1 is out of range"),
        ([[1]], r"has 1 rows, the cache 2"),
        ([[2, 2], []], "row 0 name a place twice"),
    ],
)
@torch.no_grad()
def test_wrong_positions(positions: list[list[int]], message: str) -> None:
    model = make("qwen2")
    cache = ControlledCache(model)
    model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match=message):
        cache.control(positions)


def test_a_controller_needs_a_prompt_and_a_tail_a_forward_pass() -> None:
    model = make("qwen2")
    cache = ControlledCache(model)
    with pytest.raises(UserError, match="run the prompt"):
        cache.control(PLACES)
    with tail_of(model, cache) as tail, pytest.raises(UserError, match="nothing to recompute"):
        tail.logits()


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = make("qwen2")
    with (
        pytest.raises(UserError, match=r"torch.inference_mode: load it outside"),
        tail_of(model, ControlledCache(model)),
    ):
        pass
