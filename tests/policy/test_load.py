"""Opening a policy, and one clear line where that cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import Policy, load_policy, pick_device, resolve
from rlvr_lab.tasks import countdown


@pytest.fixture
def copy_of_s(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.shipped("S"), tmp_path / "S"))


def refused(path: str | Path, message: str, **settings: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_policy(str(path), device=settings.pop("device", "cpu"), **settings)
    assert "\n" not in str(caught.value)


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none' does not exist")
    refused("./none", "model directory './none' does not exist")
    refused("none", "model directory 'none' does not exist")


def test_a_directory_without_model(tmp_path: Path) -> None:
    refused(tmp_path, "holds no config.json: it is not a transformers model directory")


def test_a_directory_without_tokenizer(copy_of_s: Path) -> None:
    for path in copy_of_s.glob("tokenizer*"):
        path.unlink()
    refused(copy_of_s, "holds no tokenizer .*save one beside the model")


def test_a_directory_without_weights(copy_of_s: Path) -> None:
    (copy_of_s / "model.safetensors").unlink()
    refused(copy_of_s, "cannot load a causal language model from")


def test_truncated_weights(copy_of_s: Path) -> None:
    weights = copy_of_s / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(copy_of_s, "cannot load a causal language model from")


def test_a_broken_config(copy_of_s: Path) -> None:
    (copy_of_s / "config.json").write_text("{")
    refused(copy_of_s, "cannot load a causal language model from")


def test_a_tokenizer_with_more_words_than_the_model(copy_of_s: Path) -> None:
    path = copy_of_s / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"] |= {f"extra{i}": 128 + i for i in range(3)}
    path.write_text(json.dumps(tree))
    refused(copy_of_s, "has 131 words, the model only embeds")


def test_neither_model_nor_tokenizer_names_an_end(copy_of_s: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        tree = json.loads((copy_of_s / name).read_text())
        tree = {k: v for k, v in tree.items() if not k.startswith("eos")}
        (copy_of_s / name).write_text(json.dumps(tree))
    refused(copy_of_s, "names an end token; set eos_token in the tokenizer")


def test_a_hub_name_without_network() -> None:
    refused("no-such-owner/no-such-model", "cannot load a causal language model from 'no-such-owner/no-such-model'")


def test_unknown_names() -> None:
    refused("tiny/Q", "no shipped policy 'tiny/Q'; did you mean 'tiny/[RS]'")
    refused("tiny/S", "model.dtype 'float23' is unknown; did you mean 'float32'", dtype="float23")
    refused("tiny/S", "model.device 'gpu' is not a device", device="gpu")
    with pytest.raises(KeyError, match="no shipped base 'Q'"):
        tiny.shipped("Q")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there() -> None:
    refused("tiny/S", "model.device is 'cuda:0', but torch sees no GPU here", device="cuda:0")
    assert pick_device("auto") == torch.device("cpu")


def test_paths_are_left_as_they_are() -> None:
    assert resolve("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert resolve("tiny/S") == str(tiny.shipped("S"))


def test_a_loaded_policy_is_in_evaluation_mode_and_knows_its_ends(tiny_s: Policy) -> None:
    assert not tiny_s.model.training
    assert tiny_s.eos_ids == (countdown.EOS,)
    assert tiny_s.pad_id == countdown.PAD
    assert tiny_s.device == torch.device("cpu")
    assert next(tiny_s.model.parameters()).dtype == torch.float32


def test_half_precision(copy_of_s: Path) -> None:
    policy = load_policy(str(copy_of_s), device="cpu", dtype="bfloat16")
    assert next(policy.model.parameters()).dtype == torch.bfloat16
