from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.policy import pretrain as module
from rlvr_lab.policy.load import load_policy
from rlvr_lab.policy.pretrain import SHIPPED, PretrainConfig, pretrain
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.agents import words

# four steps and then two of the second phase, whose shard is its own
SMALL = PretrainConfig(steps=4, broaden_steps=2, batch=8, shard=32, warmup=2, save_every=2)


def interrupt_at(step: int) -> module.Progress:
    def progress(done: int, loss: float, factor: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    losses: list[float] = []
    out = tmp_path_factory.mktemp("straight") / "base"
    pretrain(SMALL, out, lambda step, loss, factor: losses.append(loss))
    return out, losses


@pytest.mark.parametrize("step", [1, 4, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    straight: tuple[Path, list[float]], tmp_path: Path, step: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain(SMALL, tmp_path, interrupt_at(step))
    assert not (tmp_path / "model.safetensors").exists()
    resumed: list[int] = []
    pretrain(SMALL, tmp_path, lambda done, loss, factor: resumed.append(done))
    assert resumed == list(range({1: 0, 4: 2, 5: 4}[step] + 1, 7))
    expected = (straight[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_the_result_is_a_policy_with_its_record_and_learned_something(straight: tuple[Path, list[float]]) -> None:
    out, losses = straight
    assert load_policy(str(out), device="cpu").eos_ids == (2,)
    record = json.loads((out / "pretrain.json").read_text())
    assert record["config"]["steps"] == 4
    assert record["loss_last_200"] == pytest.approx(sum(losses) / 6)
    assert not (out / "state.pt").exists()
    assert losses[0] == pytest.approx(math.log(128), abs=0.3)
    assert losses[-1] < losses[0] - 0.1


def test_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pretrain(SMALL, tmp_path, interrupt_at(3))
    with pytest.raises(UserError, match="with other settings; choose another --out or remove it"):
        pretrain(replace(SMALL, seed=1), tmp_path)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_step", lambda *arguments: math.nan)
    with pytest.raises(FloatingPointError, match="pre-training loss is nan at step 0; lower muon_lr or adamw_lr"):
        pretrain(SMALL, tmp_path)
    assert not (tmp_path / "state.pt").exists()


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    config = PretrainConfig(steps=100, warmup=10, decay_share=0.4)
    factors = [module._schedule(step, config) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == factors[59] == 1
    assert factors[80] == pytest.approx(0.5)
    broadened = replace(config, broaden_steps=10, broaden_factor=0.2)
    assert [module._schedule(step, broadened) for step in (99, 100, 105)] == [factors[99], 0.2, 0.1]
    assert 0 < factors[99] < 0.03
    assert factors[60:] == sorted(factors[60:], reverse=True)


def test_batches_hold_each_sequence_of_a_shard_once_and_start_anywhere() -> None:
    whole = list(module._batches(SMALL, 0))
    assert [len(batch) for batch in whole] == [8] * 6
    first_shard = [tuple(s) for batch in whole[:4] for s in batch]
    assert len(set(first_shard)) > 24  # hardly any two traces are the same
    assert list(module._batches(SMALL, 3)) == whole[3:]


def test_base_i_learns_demonstrations_of_instructions(tmp_path: Path) -> None:
    small = replace(SMALL, base="I", steps=2, broaden_steps=0)
    sequences = [s for batch in module._batches(small, 0) for s in batch]
    assert {len(s) for s in sequences} <= set(range(small.prompt_tokens + 3, 14 + 22))
    assert all(s[13] == countdown.THINK and s[-1] == countdown.EOS for s in sequences)
    assert list(module._batches(small, 1)) == list(module._batches(small, 0))[1:]
    losses: list[float] = []
    pretrain(small, tmp_path / "base", lambda step, loss, factor: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(128), abs=0.3)
    with pytest.raises(UserError, match="does not learn from Countdown traces"):
        _ = small.traces


def test_base_a_learns_demonstrations_of_the_environments(tmp_path: Path) -> None:
    """In its own vocabulary, and without a loss on what the environments say: no gradient asks for those words."""
    small = replace(SMALL, base="A", steps=2, broaden_steps=0)
    sequences = [s for batch in module._batches(small, 0) for s in batch]
    assert all(words.ID["?"] in s and s[-1] == words.ID["<eos>"] for s in sequences)
    assert min(s.index(words.ID["?"]) + 1 for s in sequences) >= small.prompt_tokens
    losses: list[float] = []
    pretrain(small, tmp_path / "base", lambda step, loss, factor: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(192), abs=0.3)
    tokens, mask = module._pad(sequences, small.learned)
    told = [words.ID[word] for word in ("<result>", "</result>", "none", "invalid", "?", "query")]
    assert not torch.isin(tokens[mask], torch.tensor(told)).any()
    assert (tokens == words.ID["<result>"]).sum() > len(sequences) / 2
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (192, 256)


@pytest.mark.parametrize("base", list(SHIPPED))
def test_the_shipped_settings_fill_whole_shards(base: str) -> None:
    assert SHIPPED[base].shard % SHIPPED[base].batch == 0
    assert SHIPPED[base].base == base
