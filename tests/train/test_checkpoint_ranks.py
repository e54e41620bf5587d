"""Checkpoints of two processes: written together, read by any number, and safe against what befalls one of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_ranks_worker import fresh, same, step
from safetensors.torch import load_file

from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.checkpoint import TrainerState, newest, restore, save, verify
from rlvr_lab.train.config import parse_config
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.parallel import World

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("checkpoint_ranks_worker.py")


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def on_two_ranks(*command: str, timeout: float = 400) -> list[subprocess.CompletedProcess[str]]:
    """Run a command as two ranks and wait for both."""
    world = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, *command], env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        return [subprocess.CompletedProcess(command, 0, *p.communicate(timeout=timeout)) for p in ranks]
    finally:
        for p in ranks:
            p.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """What rank 0 of the worker reports; rank 1 kills itself at the end."""
    one = fresh(False)
    step(*one)
    by_one = save(folder / "one", *one, TrainerState(1, {}), 2)
    first, _ = on_two_ranks(str(WORKER), str(folder), str(by_one))
    assert first.stdout.strip(), first.stderr[-3000:]
    report: dict[str, Any] = json.loads(first.stdout.strip().splitlines()[-1])
    return report


@pytest.mark.parametrize("name", ["plain", "fsdp2"])
def test_two_ranks_go_on_from_their_checkpoint_to_the_bit(told: dict[str, Any], name: str) -> None:
    assert told[f"{name} goes on"] is True
    assert told[f"{name} parts"] == [1, 3, [0.0, 1.0, 2.0]]


@pytest.mark.parametrize("name", ["plain", "fsdp2"])
def test_two_ranks_read_what_one_process_wrote(told: dict[str, Any], name: str) -> None:
    assert told[f"{name} reads one"] is True


@pytest.mark.parametrize("name", ["plain", "fsdp2"])
def test_one_process_reads_what_two_ranks_wrote(told: dict[str, Any], folder: Path, name: str) -> None:
    where = folder / name / "step_000001"
    assert verify(where) is None
    assert len(list((where / "state").iterdir())) == 2
    back, expected = fresh(False), fresh(False)
    state = restore(where, *back)
    step(*expected)
    assert state.parts["grpo"]["mean"].tolist() == [0.0, 1.0, 2.0]
    assert same(back, expected)
    for one in (back, expected):
        step(*one, 2)
    assert same(back, expected)


def test_the_export_of_a_sharded_policy_is_the_whole_policy_rounded_once(told: dict[str, Any], folder: Path) -> None:
    where = folder / "fsdp2" / "step_000001"
    settings = json.loads((where / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["dtype"] == "bfloat16"
    expected = fresh(False)
    step(*expected)
    exported = load_policy(str(where), device="cpu", dtype="bfloat16").model.state_dict()
    for name, value in expected[0].model.state_dict().items():
        assert torch.equal(exported[name], value.to(torch.bfloat16)), name
    assert {value.dtype for value in load_file(where / "model.safetensors").values()} == {torch.bfloat16}


def test_each_rank_writes_its_own_half(told: dict[str, Any], folder: Path) -> None:
    sizes = [p.stat().st_size for p in (folder / "fsdp2" / "step_000001" / "state").iterdir()]
    assert max(sizes) < 1.1 * min(sizes)
    by_one = next((folder / "one" / "step_000001" / "state").iterdir()).stat().st_size
    assert sum(sizes) < 1.1 * by_one


def test_a_full_disk_of_one_rank_is_an_error_on_both(told: dict[str, Any], folder: Path) -> None:
    report = told["full disk"]
    assert report["message"].startswith(f"cannot write {folder}/full/step_000002: File too large (rank 1).")
    assert report["found"] == f"{folder}/full/step_000001"
    assert report["refused"] == []
    assert report["after"] == "step_000002"


def test_ranks_without_a_shared_disk_are_told(told: dict[str, Any]) -> None:
    assert "which another rank wrote: put --out on a shared disk" in told["unseen"]


def test_a_rank_killed_during_the_write_leaves_no_half_checkpoint(told: dict[str, Any], folder: Path) -> None:
    assert "lost the connection to another process" in told["lost"]
    assert told["left"] == ["step_000001"]
    assert newest(folder / "killed") == (folder / "killed" / "step_000001", [])


# -- whole runs --------------------------------------------------------------------------------------------------------

RUN = [
    "-m", "rlvr_lab.cli", "train", "grpo/tiny", "data.pool=40", "rollout.prompts=2", "rollout.group_size=8",
    "update.minibatches=2", "evaluation.problems=0", "logging.tensorboard=false", "steps=6", "checkpoint.every=2",
    "parallel.timeout=60",
]  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def resume(out: Path) -> list[str]:
    return ["-m", "rlvr_lab.cli", "train", "--resume", "--out", str(out)]


def kill_rank_1_after_3_steps(out: Path) -> tuple[int, str]:
    """Start a run on two ranks, kill one of them, and wait for the other; its exit status and what it said."""
    world = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = (
        subprocess.Popen(
            [sys.executable, *RUN, "--out", str(out)],
            env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    )
    try:
        deadline = time.monotonic() + 300
        while len(read_jsonl(out / "metrics.jsonl")) < 3:
            assert first.poll() is None, first.communicate()[1].decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second.kill()
        output, errors = first.communicate(timeout=60)  # the rank that is left ends by itself
        return first.returncode, (output + errors).decode()
    finally:
        first.kill()
        second.kill()


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """An uninterrupted run on two ranks, and one that was killed, then continued on two ranks and on one."""
    found = {name: folder / "runs" / name for name in ("straight", "two", "one")}
    done = on_two_ranks(*RUN, "--out", str(found["straight"]))
    assert (found["straight"] / "model").exists(), done[0].stderr[-3000:]
    status, said = kill_rank_1_after_3_steps(found["two"])
    assert status != 0
    assert "lost the connection to another process" in " ".join(said.split())
    assert "Traceback" not in said
    assert not (found["two"] / "model").exists()
    shutil.copytree(found["two"], found["one"])
    done = on_two_ranks(*resume(found["two"]))
    assert (found["two"] / "model").exists(), done[0].stderr[-3000:]
    settings = parse_config(yaml.safe_load((found["one"] / "config.yaml").read_text()))
    Trainer(settings, found["one"], resume=True, world=World.single()).run()
    return found


def test_a_killed_run_of_two_ranks_resumes_to_the_same_parameters(runs: dict[str, Path]) -> None:
    straight, resumed = weights(runs["straight"]), weights(runs["two"])
    base = load_policy("tiny/S", device="cpu").model.state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in straight.items())
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert [row["step"] for row in read_jsonl(runs["two"] / "metrics.jsonl")] == list(range(6))


def test_one_process_continues_what_two_ranks_began(runs: dict[str, Path]) -> None:
    straight, alone = weights(runs["straight"]), weights(runs["one"])
    for name, value in straight.items():
        assert torch.allclose(alone[name], value, atol=1e-5), name
    newest_, refused = newest(runs["one"] / "checkpoints")
    assert refused == []
    assert newest_ is not None
    assert json.loads((newest_ / "trainer.json").read_text())["ranks"] == 1
    rows = [read_jsonl(runs[name] / "metrics.jsonl") for name in ("straight", "one")]
    for a, b in zip(*rows, strict=True):
        assert a["reward"] == pytest.approx(b["reward"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-6)
