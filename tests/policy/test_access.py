"""The inside of a decoder: what is read adds up, what is patched arrives, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
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

from rlvr_lab.errors import UserError
from rlvr_lab.policy.access import (
    SUPPORTED,
    Lens,
    attention_matrices,
    lens_logits,
    parts,
    patched,
    record,
    unembed,
)

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
EVERYTHING = ("residual", "attention_write", "ffn_write", "attention_input", "ffn_input")


def make(kind: str, tied: bool = False) -> Any:
    config_class, model_class = KINDS[kind]
    config = config_class(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model_class(config).double().eval()


@pytest.fixture(params=[(kind, tied) for kind in SUPPORTED for tied in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request: pytest.FixtureRequest) -> Any:
    return make(*request.param)


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_supported_kind_is_tried_here() -> None:
    assert set(KINDS) == set(SUPPORTED)


def test_the_stream_is_the_sum_of_what_was_written(model: Any) -> None:
    with record(model, EVERYTHING) as seen:
        logits = model(input_ids=IDS).logits
    depth = parts(model).depth
    assert list(seen.residual) == list(range(depth + 1))
    stream = seen.residual[0]
    assert torch.equal(stream, model.get_input_embeddings()(IDS))
    for layer in range(1, depth + 1):
        block = parts(model).layer(layer)
        assert torch.allclose(seen.attention_input[layer], block.input_layernorm(stream), atol=1e-12)
        middle = stream + seen.attention_write[layer]
        assert torch.allclose(seen.ffn_input[layer], block.post_attention_layernorm(middle), atol=1e-12)
        stream = middle + seen.ffn_write[layer]
        assert torch.allclose(stream, seen.residual[layer], atol=1e-12)
    assert torch.allclose(unembed(model, stream, "normed"), logits, atol=1e-12)
    assert not torch.allclose(unembed(model, stream, "raw"), logits, atol=1e-3)


def test_only_what_was_asked_for_is_kept_and_no_hook_stays(model: Any) -> None:
    before = hooks_of(model)
    with record(model, ("ffn_write",), layers=[0, 2]) as seen:
        model(input_ids=IDS)
    assert list(seen.ffn_write) == [2]
    assert not seen.residual
    with pytest.raises(RuntimeError, match="mine"), record(model):
        raise RuntimeError("mine")
    lens_logits(model, Lens(2), input_ids=IDS)
    assert hooks_of(model) == before


@pytest.mark.parametrize("kind", ["raw", "normed"])
def test_a_layers_policy_and_its_gradient(model: Any, kind: Any) -> None:
    with record(model) as seen:
        whole = model(input_ids=IDS).logits
    for layer in range(parts(model).depth):
        read = lens_logits(model, Lens(layer, kind), input_ids=IDS)
        assert torch.allclose(read, unembed(model, seen.residual[layer], kind), atol=1e-12)
    assert torch.allclose(lens_logits(model, Lens(4, kind), input_ids=IDS), whole, atol=1e-12)

    lens_logits(model, Lens(2, kind), input_ids=IDS).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    above = {name for name, _ in model.named_parameters() if ".layers.2." in name or ".layers.3." in name}
    norm = {"model.norm.weight"} if kind == "raw" else set()
    assert reached == {name for name, _ in model.named_parameters()} - above - norm


def test_gradient_reaches_what_was_recorded(model: Any) -> None:
    with record(model, ("attention_write",)) as seen:
        loss = model(input_ids=IDS).logits.square().sum()
    (slope,) = torch.autograd.grad(loss, [seen.attention_write[1]])
    assert float(slope.abs().min(-1).values.max()) > 0


def test_patching_a_state_by_its_own_changes_nothing(model: Any) -> None:
    with record(model) as seen:
        whole = model(input_ids=IDS).logits
    for layer in (1, 3):
        with patched(model, layer, 2, seen.residual[layer - 1][:, 2]):
            assert torch.allclose(model(input_ids=IDS).logits, whole, atol=1e-12)


def test_a_patched_state_is_what_the_layer_reads(model: Any) -> None:
    value = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with patched(model, 3, torch.tensor([1, -1]), value), record(model) as patch:
        logits = model(input_ids=IDS).logits
    with record(model) as clean:
        model(input_ids=IDS)
    assert torch.equal(patch.residual[1], clean.residual[1])  # earlier layers are as they were
    changed = (patch.residual[3] != clean.residual[3]).any(-1)
    assert changed.tolist() == [[False] + [True] * 6, [False] * 6 + [True]]  # causal: nothing before the position
    (slope,) = torch.autograd.grad(logits.square().sum(), [value])
    assert float(slope.abs().max()) > 0


def test_attention_matrices_are_causal_distributions_and_the_model_has_its_own_again(model: Any) -> None:
    before = model.config._attn_implementation
    found = attention_matrices(model, input_ids=IDS)
    assert [matrix.shape for matrix in found] == [(2, 4, 7, 7)] * 4
    for matrix in found:
        assert torch.allclose(matrix.sum(-1), torch.ones(2, 4, 7, dtype=matrix.dtype), atol=1e-6)
        assert float(matrix.detach().triu(1).abs().max()) == 0
    assert model.config._attn_implementation == before
    (slope,) = torch.autograd.grad(found[1].square().sum(), [model.get_input_embeddings().weight])
    assert float(slope.abs().max()) > 0


def test_left_padded_rows_read_the_same(model: Any) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = lens_logits(model, Lens(2), input_ids=IDS[:1], attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[:, 2:], lens_logits(model, Lens(2), input_ids=IDS[:1, 2:]), atol=1e-6)


def test_what_cannot_be_looked_into_is_refused() -> None:
    foreign = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="'gpt2'; supported are llama, mistral, qwen2, qwen3"):
        parts(foreign)
    model = make("llama")
    with (
        pytest.raises(UserError, match="layer 5 is out of range: this model has layers 0 to 4"),
        record(model, layers=[5]),
    ):
        pass
    with pytest.raises(UserError, match="layer 0 is out of range: this model has layers 1 to 4"):
        parts(model).layer(0)
    with pytest.raises(UserError, match="layer 7 is out of range"):
        lens_logits(model, Lens(7), input_ids=IDS)
    with pytest.raises(UserError, match="cannot record 'logits'"):
        record(model, ["logits"]).__enter__()  # type: ignore[list-item]
    with pytest.raises(UserError, match="outside a sequence of 7"), patched(model, 1, 7, torch.zeros(2, 16)):
        model(input_ids=IDS)
    with (
        pytest.raises(UserError, match=r"\(1, 16\), the stream wants \(2, 16\)"),
        patched(model, 1, 0, torch.zeros(1, 16)),
    ):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="counted from 1"):
        Lens(-1)
