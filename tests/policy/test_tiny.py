"""The shipped bases are ordinary transformers directories, and their export is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import Policy
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import task

BASES = pytest.mark.parametrize("base", list(tiny.BASES))


def prompts(base: str) -> list[tuple[Any, list[int]]]:
    """Problems of the base's tasks with their own token ids."""
    if base != "A":
        return [(problem, list(problem.prompt_ids)) for problem in countdown.problems(20, 1)]
    made = [task(name) for name in ("triples", "maze", "feedback")]
    return [(problem, each.prompt_ids(problem, None)) for each in made for problem in each.problems(20, 1)]  # type: ignore[attr-defined]


@BASES
def test_the_shipped_tokenizer_is_the_vocabulary_and_goes_round(base: str) -> None:
    tokenizer, words = AutoTokenizer.from_pretrained(tiny.shipped(base)), tiny.lexicon(base).words
    assert len(tokenizer) == len(words) == (192 if base == "A" else 128)
    text = " ".join(words)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(len(words)))
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for problem, own in prompts(base):
        assert tokenizer(problem.prompt)["input_ids"] == own
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        countdown.BOS, countdown.EOS, countdown.PAD,
    )  # fmt: skip
    assert tokenizer("zebra")["input_ids"] == [countdown.ID["<unk>"]]


@BASES
def test_the_shipped_model_opens_with_transformers_alone(base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.shipped(base))
    assert model.config.model_type == "llama"
    words = len(tiny.lexicon(base).words)
    assert sum(p.numel() for p in model.parameters()) == 422_976 + 2 * tiny.SHAPES["tiny"].hidden * (words - 128)
    assert model.config.max_position_embeddings == tiny.lexicon(base).positions
    assert model.config.head_dim == tiny.EXPORTED_HEAD_WIDTH
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    ids = prompts(base)[0][1]
    logits = model(input_ids=torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), words)
    assert torch.isfinite(logits).all()


@BASES
def test_the_shipped_tokenizer_is_the_one_the_code_builds(base: str, tmp_path: Path) -> None:
    tiny.build_tokenizer(tiny.lexicon(base)).save_pretrained(tmp_path)
    shipped = (tiny.shipped(base) / "tokenizer.json").read_text()
    assert (tmp_path / "tokenizer.json").read_text() == shipped


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Biases are made non-zero, because a fresh model's are zero and would hide a lost one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "theta", "width"),
    [
        (tiny.SHAPES["tiny"].hidden, 4, 4, 10_000.0, 32),  # the tiny lab's own: 24 padded to 32
        (64, 4, 2, 500.0, 32),  # 16 padded to 32, two query heads share a key
        (64, 2, 2, 10_000.0, 32),  # nothing to pad
        (96, 2, 1, 10_000.0, 48),  # wider: left alone
    ],
)
def test_an_exported_policy_computes_the_same_function(
    tmp_path: Path, hidden: int, heads: int, kv_heads: int, theta: float, width: int
) -> None:
    """Qwen2 in, Llama out, on left-padded rows as long as the context; and a Llama goes through unchanged."""
    config = tiny.build_config()
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = hidden, heads, kv_heads
    config.rope_parameters["rope_theta"] = theta
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturbed(Qwen2ForCausalLM(config))
    state = torch.random.get_rng_state()
    tiny.export(model, tmp_path / "once")
    assert torch.equal(torch.random.get_rng_state(), state)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "once").eval()
    assert back.config.head_dim == width
    ids = torch.randint(0, 128, (3, tiny.POSITIONS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        theirs = back(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(theirs[mask.bool()], ours[mask.bool()], rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "once")) == 128
    tiny.export(back, tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def padding(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Where a policy exported from heads of width 24 has its zeros: True at padded places of each parameter."""
    row = torch.ones(tiny.SHAPES["tiny"].heads, 32, dtype=torch.bool)
    row[:, :12] = row[:, 16:28] = False
    found = {}
    for name, p in model.named_parameters():
        if "self_attn" in name and not name.endswith("o_proj.bias"):
            shape = (1, -1) if "o_proj" in name else (-1, *[1] * (p.ndim - 1))
            found[name] = row.flatten().reshape(shape).expand(p.shape)
    return found


def test_training_leaves_the_padding_of_the_heads_at_zero(fresh_s: Callable[[], Policy]) -> None:
    """Exactly zero gradients, so that AdamW, whose steps do not shrink with the gradient, does not move them."""
    model = fresh_s().model
    places = padding(model)
    assert sum(int(where.sum()) for where in places.values()) == 422_976 - 385_824
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, 128, (4, 20), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, where in places.items():
            assert not model.get_parameter(name).grad[where].any(), name
            assert model.get_parameter(name).grad[~where].all(), name
        optimizer.step()
    for name, where in places.items():
        p = model.get_parameter(name).detach()
        assert not p[where].any(), name
        assert (p[~where] != before[name][~where]).all(), name


def test_a_fresh_model_depends_on_its_seed_only() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a, b, c = tiny.build_model(3), tiny.build_model(3), tiny.build_model(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
