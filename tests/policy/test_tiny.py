"""The shipped bases are ordinary transformers directories, and their export is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_lab.policy import tiny
from rlvr_lab.tasks import countdown

BASES = pytest.mark.parametrize("base", list(tiny.BASES))


@BASES
def test_the_shipped_tokenizer_is_the_vocabulary_and_goes_round(base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.shipped(base))
    assert len(tokenizer) == len(countdown.VOCABULARY) == 128
    text = " ".join(countdown.VOCABULARY)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(128))
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for problem in countdown.problems(20, 1):
        assert tokenizer(problem.prompt)["input_ids"] == list(problem.prompt_ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        countdown.BOS, countdown.EOS, countdown.PAD,
    )  # fmt: skip
    assert tokenizer("zebra")["input_ids"] == [countdown.ID["<unk>"]]


@BASES
def test_the_shipped_model_opens_with_transformers_alone(base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.shipped(base))
    assert model.config.model_type == "llama"
    assert 380_000 < sum(p.numel() for p in model.parameters()) < 390_000
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    logits = model(input_ids=torch.tensor([countdown.problems(1, 0)[0].prompt_ids])).logits
    assert logits.shape == (1, countdown.PROMPT_TOKENS, 128)
    assert torch.isfinite(logits).all()


@BASES
def test_the_shipped_tokenizer_is_the_one_the_code_builds(base: str, tmp_path: Path) -> None:
    tiny.build_tokenizer().save_pretrained(tmp_path)
    shipped = (tiny.shipped(base) / "tokenizer.json").read_text()
    assert (tmp_path / "tokenizer.json").read_text() == shipped


def test_an_exported_policy_computes_the_same_function(tmp_path: Path) -> None:
    """Qwen2 in, Llama out; biases are made non-zero, because a fresh model's are and would hide a lost one."""
    model = tiny.build_model(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    state = torch.random.get_rng_state()
    tiny.export(model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 128, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        theirs = back(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(theirs[mask.bool()], ours[mask.bool()], rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 128


def test_a_fresh_model_depends_on_its_seed_only() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a, b, c = tiny.build_model(3), tiny.build_model(3), tiny.build_model(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
