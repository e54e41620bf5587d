"""Settings that do not fit the processes, the machine or the model are one line each, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN
from sample_methods import WordBonus

from rlvr_lab.errors import UserError
from rlvr_lab.methods import compose
from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train import loop, setup
from rlvr_lab.train.config import TrainConfig, load_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.parallel import World


def config(*settings: str) -> TrainConfig:
    return load_config("grpo/tiny", [*TINY_RUN, *settings])


def test_streams_follow_the_number_of_processes_and_a_resumed_run_keeps_its_own() -> None:
    one, two = World(0, 1), World(0, 2)
    assert setup.resolve(config(), None, one).rollout.streams == "step"
    assert setup.resolve(config(), None, two).rollout.streams == "prompt"
    began = setup.resolve(config(), None, two)
    assert setup.resolve(config(), began, one).rollout.streams == "prompt"
    with pytest.raises(UserError, match=r"rollout\.streams=step .* which 2 processes cannot share; set"):
        setup.resolve(config(), setup.resolve(config(), None, one), two)
    changed = config("rollout.streams=prompt")
    setup.refuse_changes(setup.resolve(config(), None, one), changed)  # what that line asks for is allowed


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ([], 3, r"3 processes share rollout\.prompts=2, and each needs at least one; raise rollout\.prompts"),
        (["parallel.shard=fsdp2"], 1, r"parallel\.shard=fsdp2 needs a process group.*torchrun --standalone"),
    ],
)
def test_settings_that_do_not_fit_the_processes(settings: list[str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        setup.resolve(config(*settings), None, World(0, size))


def test_offload_needs_shards_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"offload needs parallel\.shard: fsdp2"):
        config("parallel.offload=true")
    monkeypatch.setattr(World, "has_group", True)
    asked = config("parallel.shard=fsdp2", "parallel.offload=true", "model.device=cpu")
    with pytest.raises(UserError, match=r"parallel\.offload .* this run has no GPU; set it to false"):
        setup.resolve(asked, None, World.single())


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    for settings, message in (
        (["parallel.shard=fsdp2"], "needs a process group"),
        (["model.lora.rank=4", "model.lora.targets=[q_prj]"], "did you mean 'q_proj'"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(config(*settings), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_model_that_mixes_packed_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "packing_error", lambda model, rollout: 0.3)
    with pytest.raises(UserError, match=r"update\.packing: the attention of LlamaForCausalLM .* \(.* 0\.3 nats\)"):
        setup.load_models(config("update.packing=true"), World.single(), None, compose([]))


def test_a_tokenizer_without_a_pad_token_is_padded_with_its_end_token(tmp_path: Path) -> None:
    where = Path(shutil.copytree(tiny.shipped("S"), tmp_path / "S"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (where / name).exists():
            settings = json.loads((where / name).read_text())
            settings.pop("pad_token", None)
            (where / name).write_text(json.dumps(settings))
    policy = load_policy(str(where), device="cpu")
    assert policy.tokenizer.pad_token_id is None
    assert policy.pad_id == policy.eos_ids[0]
    rows = Trainer(config(f"model.path={where}", "steps=1"), tmp_path / "run").run().history
    assert len(rows) == 1


def test_adapters_train_alone_and_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(loop, "compose", lambda methods: compose([*methods, WordBonus()]))  # no group is dead
    settings = ["model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]", "methods.kl_reference={}", "steps=4"]
    settings += ["optimizer.lr=1e-2", "optimizer.warmup=0"]
    left = iter([False, True])
    straight = Trainer(config(*settings), tmp_path / "straight")
    straight.run()
    Trainer(config(*settings), tmp_path / "stopped", stop=lambda: next(left)).run()
    resumed = Trainer(config(*settings), tmp_path / "stopped", resume=True)
    resumed.run()
    names = [name for name, p in straight.policy.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    own = dict(resumed.policy.model.named_parameters())
    for name, p in straight.policy.model.named_parameters():
        assert torch.equal(own[name], p), name
    merged = load_policy(str(tmp_path / "straight" / "model"), device="cpu").model.state_dict()
    start = load_policy("tiny/S", device="cpu").model.state_dict()
    moved = {name for name, value in merged.items() if not torch.equal(value, start[name])}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)
    assert (tmp_path / "straight" / "model" / "adapter" / "adapter_config.json").exists()
    assert max(row["regularise_kl_reference"] for row in straight_rows(tmp_path)) > 0


def straight_rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "straight" / "metrics.jsonl").read_text().splitlines()]


def test_mixed_precision_without_shards_keeps_float32_weights(tmp_path: Path) -> None:
    half = Trainer(config("model.precision=bfloat16", "steps=1"), tmp_path / "half")
    full = Trainer(config("steps=1"), tmp_path / "full")
    rows = [trainer.run().history[0] for trainer in (half, full)]
    assert {p.dtype for p in half.policy.model.parameters()} == {torch.float32}
    assert rows[0]["behaviour_logprob"] != rows[1]["behaviour_logprob"]
    assert rows[0]["token_entropy"] == pytest.approx(rows[1]["token_entropy"], abs=0.1)
