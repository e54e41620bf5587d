"""Log-probs and entropies through a lens: the small and the large head, rows packed or apart, adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import make_rollout, sampled_rollout

from rlvr_lab.core.lens import Lens
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods.bupo import internal_policy
from rlvr_lab.policy import forward
from rlvr_lab.policy.access import record
from rlvr_lab.policy.forward import score, score_layer, scored, token_view, untouched
from rlvr_lab.policy.load import Policy


def build(tied: bool = False, vocabulary: int = 5000, layers: int = 3) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = Qwen3Config(vocab_size=vocabulary, num_hidden_layers=layers, head_dim=16, max_position_embeddings=64,
                             initializer_range=0.3, tie_word_embeddings=tied, **shape)  # fmt: skip
        return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def wide() -> Any:
    return build()


@pytest.fixture(scope="module")
def ragged() -> Rollout:
    """Ragged responses, and a prompt with padding on its left."""
    rollout = make_rollout([3, 5, 1, 4])
    prompt_mask = rollout.prompt_mask.clone()
    prompt_mask[0, :3] = False
    return rollout.with_(prompt_mask=prompt_mask)


def by_hand(model: Any, rollout: Rollout, lens: Lens) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row without padding, from the stream that hooks saw in an ordinary forward pass."""
    logprob, entropy = torch.zeros(rollout.mask.shape), torch.zeros(rollout.mask.shape)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.mask[i]]
        with record(model) as seen:
            model(torch.cat([prompt, response])[None], use_cache=False)
        stream = seen.residual[lens.layer][0, len(prompt) - 1 : -1]
        if lens.kind == "normed":
            stream = model.get_decoder().norm(stream)
        n = len(response)
        logprob[i, :n], entropy[i, :n] = internal_policy(stream, model.get_output_embeddings().weight, response)
    return logprob, entropy


@pytest.mark.parametrize("lens", [Lens(0), Lens(1), Lens(2), Lens(2, "normed")])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_lens_reads_the_stream_of_its_layer(
    wide: Any, ragged: Rollout, lens: Lens, large: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not large:
        monkeypatch.setattr(forward, "LARGE", 10**9)
    with torch.no_grad():
        logprob, entropy = by_hand(wide, ragged, lens)
        view = token_view(wide, ragged, packed=packed, lens=lens)
    assert view.entropy is not None
    mask = ragged.mask
    torch.testing.assert_close(view.logprob[mask], logprob[mask], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(view.entropy[mask], entropy[mask], rtol=1e-5, atol=1e-4)


def gradient(model: Any, rollout: Rollout, lens: Lens | None) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    view = token_view(model, rollout, want_moments=True, lens=lens)
    assert view.entropy is not None
    assert view.moments is not None
    ((view.logprob + 0.3 * view.entropy) * rollout.mask).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("lens", [Lens(1), Lens(2, "normed")])
def test_both_heads_have_one_gradient(wide: Any, ragged: Rollout, lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = gradient(wide, ragged, lens)
    monkeypatch.setattr(forward, "LARGE", 10**9)
    whole = gradient(wide, ragged, lens)
    for name, value in whole.items():
        other = tiled[name]
        if value is None:
            assert other is None, name
        else:
            assert other is not None, name
            torch.testing.assert_close(other, value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_lens_does_not_use_has_no_gradient(ragged: Rollout, tied: bool) -> None:
    model = build(tied, vocabulary=100)
    for lens in (Lens(0), Lens(1), Lens(2), Lens(2, "normed"), Lens(3)):
        idle = {id(p) for p in untouched(model, lens)}
        none = {name for name, value in gradient(model, ragged, lens).items() if value is None}
        assert none == {name for name, p in model.named_parameters() if id(p) in idle}
        layers = {name.split(".")[2] for name in none if ".layers." in name}
        assert layers == {str(i) for i in range(lens.layer, 3)}
        assert ("model.norm.weight" in none) == (lens.layer < 3 and lens.kind == "raw")


def test_the_last_layer_is_the_real_policy_whatever_the_kind(wide: Any, ragged: Rollout) -> None:
    real = scored(wide, ragged, 2)
    for lens in (Lens(3), Lens(3, "normed")):
        for found, expected in zip(scored(wide, ragged, 2, lens=lens), real, strict=True):
            assert torch.equal(found, expected)
    assert float((scored(wide, ragged, 2, lens=Lens(2))[0] - real[0]).abs().max()) > 0.1


def test_scoring_a_layer_leaves_the_real_policy_in_place(tiny_s: Policy) -> None:
    rollout = score(tiny_s.model, sampled_rollout(tiny_s), 5)
    both = score_layer(tiny_s.model, rollout, Lens(2), 3)
    assert both.old_logprob is rollout.old_logprob
    assert both.statistics["token_entropy"] is rollout.statistics["token_entropy"]
    logprob, entropy = scored(tiny_s.model, rollout, 16, lens=Lens(2))
    torch.testing.assert_close(both.statistics[forward.LAYER_LOGPROB], logprob)
    torch.testing.assert_close(both.statistics[forward.LAYER_ENTROPY], entropy)
    packed = score_layer(tiny_s.model, rollout, Lens(2), 3, tokens=60)
    torch.testing.assert_close(packed.statistics[forward.LAYER_LOGPROB], logprob, rtol=1e-4, atol=1e-4)


def test_only_the_layers_up_to_the_lens_run(wide: Any, ragged: Rollout) -> None:
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(wide.model.layers, 1)]
    token_view(wide, ragged, lens=Lens(2))
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2]


def test_an_adapted_model_has_the_same_lens(tiny_s: Policy) -> None:
    pytest.importorskip("peft")
    from rlvr_lab.policy.lora import add_adapters

    rollout = sampled_rollout(tiny_s)
    plain = scored(tiny_s.model, rollout, 16, lens=Lens(1))[0]
    model = add_adapters(copy.deepcopy(tiny_s.model), 4, 8.0, (), seed=1)
    torch.testing.assert_close(scored(model, rollout, 16, lens=Lens(1))[0], plain, rtol=0, atol=0)
    found = gradient(model, rollout, Lens(1))
    moved = {name.split(".layers.")[1][0] for name, value in found.items() if value is not None}
    assert moved == {"0"}
    assert all("lora_" in name for name, value in found.items() if value is not None)


def test_a_layer_or_architecture_without_a_lens_is_refused(wide: Any, ragged: Rollout) -> None:
    with pytest.raises(UserError, match=r"layer 4 is out of range.*0 to 3"):
        token_view(wide, ragged, lens=Lens(4))
    with pytest.raises(ValueError, match="layer is -1"):
        Lens(-1)
    with pytest.raises(ValueError, match="kind is 'bare', of raw, normed"):
        Lens(1, "bare")  # type: ignore[arg-type]
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(UserError, match="'gpt2'; supported are llama, mistral, qwen2, qwen3"):
        token_view(other, ragged, lens=Lens(1))
