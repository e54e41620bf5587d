"""Sizes from a config: equal to what transformers builds, and to the published numbers of parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.plan.shapes import NoPlan, published, shape_from, shape_of

# as the models' own pages give them (tied matrices counted once)
COUNTS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "deepseek-ai/deepseek-math-7b-instruct": 6_910_365_696,
}


def built(config: dict[str, Any]) -> Any:
    """The model that transformers makes of a config, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    other = {key: value for key, value in config.items() if key not in ("names", "model_type")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **other))


@pytest.mark.parametrize("name", COUNTS)
def test_published_numbers_of_parameters(name: str) -> None:
    assert shape_of(name).parameters == COUNTS[name]


def test_half_a_billion_by_hand() -> None:
    shape = shape_of("Qwen/Qwen2.5-0.5B")
    layer = 896 * 896 + 896 + 2 * (896 * 128 + 128) + 896 * 896 + 3 * 896 * 4864 + 2 * 896
    assert shape.layer_parameters == layer
    assert shape.parameters == 151_936 * 896 + 24 * layer + 896 == 494_032_768
    # rank 8 on queries and values: r (in + out) each, in 24 layers
    assert shape.lora_parameters(8, ("q_proj", "v_proj")) == 24 * 8 * (896 + 896 + 896 + 128)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B"])
def test_the_table_is_what_transformers_builds(name: str) -> None:
    assert built(published()[name]).num_parameters() == shape_of(name).parameters


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([2, 4, 6]))
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    config = {
        "model_type": family,
        "vocab_size": draw(st.integers(50, 300)),
        "hidden_size": heads * draw(st.sampled_from([8, 16])),
        "intermediate_size": draw(st.integers(10, 90)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family != "qwen2":
        config["head_dim"] = draw(st.sampled_from([8, 16, 32]))
    if family in ("llama", "qwen3"):
        config["attention_bias"] = draw(st.booleans())
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    return config


@given(configs())
@settings(max_examples=25, deadline=None)
def test_counts_equal_the_model_that_is_built(config: dict[str, Any]) -> None:
    shape = shape_from(config, "random", "a test")
    model = built(config)
    assert shape.parameters == model.num_parameters()
    layer = model.get_decoder().layers[0]
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())
    weights = {n.split(".")[-2]: p.shape for n, p in layer.named_parameters() if n.endswith("proj.weight")}
    assert {n: (b, a) for n, (a, b) in shape.matrices.items()} == {n: tuple(s) for n, s in weights.items()}


def test_the_shipped_base_is_counted_from_its_directory() -> None:
    shape = shape_of("tiny/S")
    assert shape.parameters == 422_976
    assert shape.source == "its config.json"


def test_a_family_that_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(NoPlan, match=r"no plan for model type 'gpt2'.*llama, mistral, qwen2, qwen3"):
        shape_of(str(tmp_path))


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NoPlan, match=r"its config\.json cannot be read"):
        shape_of(str(tmp_path))


def test_a_shipped_base_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="no shipped policy 'tiny/X'"):
        shape_of("tiny/X")


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(NoPlan, match=r"'/no/such/model': there is no config\.json"):
        shape_of("/no/such/model")


def test_a_model_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NoPlan, match=r"no config found .*did you mean 'Qwen/Qwen2\.5-7B'"):
        shape_of("Qwen/Qwen2.5-7BB")
