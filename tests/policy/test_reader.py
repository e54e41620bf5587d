"""A text read once and cut back gives the logits of reading it anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.policy.reader import Reader

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def foreign(kind: str) -> Any:
    import transformers

    own = {
        "Qwen3": {"head_dim": 8},
        "Mistral": {"sliding_window": 4},
        "GPT2": {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "Mamba": {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    }.get(kind, {})
    settings = own if kind in ("GPT2", "Mamba") else SMALL | own
    config = getattr(transformers, f"{kind}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


KINDS = ("Llama", "Qwen3", "Mistral", "GPT2", "Mamba")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return foreign(request.param)


@torch.no_grad()
def anew(model: Any, ids: list[int], last: int) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -last:]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 30), max_size=5)),
        st.tuples(st.just("rewind"), st.integers(0, 12)),
        st.tuples(st.just("peek"), st.lists(st.integers(0, 30), max_size=6)),
        st.tuples(st.just("logits"), st.integers(1, 5)),
    ),
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(start=st.lists(st.integers(0, 30), min_size=1, max_size=6), actions=ACTIONS)
def test_any_history_gives_the_logits_of_the_text(model: Any, start: list[int], actions: list[Any]) -> None:
    reader, text = Reader(model, start), list(start)
    with torch.no_grad():
        for action, value in actions:
            if action == "append":
                reader.append(value)
                text += value
            elif action == "rewind":
                length = max(1, min(value, len(text)))
                reader.rewind(length)
                del text[length:]
            elif action == "peek":
                last = max(1, len(value))
                torch.testing.assert_close(reader.peek(value, last), anew(model, text + value, last), atol=1e-5, rtol=0)
            else:
                last = min(value, len(text))
                torch.testing.assert_close(reader.logits(last), anew(model, text, last), atol=1e-5, rtol=0)
            assert reader.ids == text
        torch.testing.assert_close(reader.logits(), anew(model, text, 1), atol=1e-5, rtol=0)


def test_only_new_tokens_are_read() -> None:
    model, seen = foreign("Llama"), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        for cached in (True, False):
            reader = Reader(model, range(10), cached=cached)
            reader.peek([1, 2, 3])
            reader.append([4, 5])
            reader.peek([1, 2, 3])
    hook.remove()
    assert seen == [13, 5, 13, 15]


def test_a_model_without_keys_and_values_reads_everything_anew() -> None:
    assert [kind for kind in KINDS if not Reader(foreign(kind)).cached] == ["Mamba"]


def test_float64_stays_float64() -> None:
    with torch.no_grad():
        assert Reader(foreign("Llama").double(), [1, 2]).logits().dtype == torch.float64


def test_logits_of_more_tokens_than_there_are() -> None:
    with pytest.raises(ValueError, match="last 3 of 2 tokens"):
        Reader(foreign("Llama"), [1, 2]).logits(3)
    with pytest.raises(ValueError, match="last 1 of 0 tokens"):
        Reader(foreign("Llama")).logits()
