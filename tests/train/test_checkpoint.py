"""Checkpoints survive a kill, a full disk and a damaged file."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.train import checkpoint
from rlvr_lab.train.checkpoint import DiskError, TrainerState, newest, restore, save, verify


def with_momentum(policy: Policy) -> torch.optim.Optimizer:
    """An optimizer that has made a step, so that it has state."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    for i, p in enumerate(policy.model.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    optimizer.step()
    return optimizer


@pytest.fixture(scope="module")
def trained(tiny_s: Policy) -> tuple[Policy, torch.optim.Optimizer]:
    policy = load_policy("tiny/S", device="cpu")
    return policy, with_momentum(policy)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


Save = Callable[..., Path]


@pytest.fixture
def write(root: Path, trained: tuple[Policy, torch.optim.Optimizer]) -> Save:
    def write_step(step: int, keep: int = 2, methods: dict[str, Any] | None = None) -> Path:
        return save(root, *trained, TrainerState(step, methods or {"grpo": {}}), keep)

    return write_step


def test_everything_comes_back(write: Save, trained: tuple[Policy, torch.optim.Optimizer]) -> None:
    policy, optimizer = trained
    state = {"grpo": {}, "watcher": {"seen": 3, "names": ["a"], "mean": torch.tensor([1.5, 2.5])}}
    where = write(7, methods=state)
    assert verify(where) is None
    loaded = load_policy(str(where), device="cpu")
    for a, b in zip(loaded.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
    back = restore(where, fresh)
    assert back.step == 7
    assert back.parts["watcher"]["seen"] == 3
    assert back.parts["watcher"]["names"] == ["a"]
    assert torch.equal(back.parts["watcher"]["mean"], torch.tensor([1.5, 2.5]))
    ours, theirs = fresh.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, values in theirs.items():
        for name, value in values.items():
            assert torch.equal(ours[index][name], value), (index, name)


def test_no_file_is_a_pickle(write: Save) -> None:
    for path in write(1).rglob("*"):
        assert path.suffix in (".json", ".safetensors", ".jinja"), path


def test_only_the_newest_are_kept(write: Save, root: Path) -> None:
    for step in (1, 2, 3):
        write(step, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["step_000002", "step_000003"]


def test_the_same_step_may_be_written_again(write: Save, root: Path) -> None:
    write(1)
    write(1, methods={"grpo": {"x": 1}})
    assert json.loads((root / "step_000001" / "trainer.json").read_text())["parts"] == {"grpo": {"x": 1}}
    assert verify(root / "step_000001") is None


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json", "config.json"])
def test_a_truncated_file_is_refused_with_its_name_and_the_older_one_used(write: Save, root: Path, name: str) -> None:
    old, new = write(1), write(2)
    path = new / name
    path.write_bytes(path.read_bytes()[:-1])
    found, refused = newest(root)
    assert found == old
    assert refused == [f"{path} is truncated or was changed after it was written"]


def test_a_flipped_byte_is_seen(write: Save, root: Path) -> None:
    where = write(1)
    raw = bytearray((where / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (where / "model.safetensors").write_bytes(raw)
    found, refused = newest(root)
    assert found is None
    assert "model.safetensors is truncated or was changed" in refused[0]


def test_a_missing_file_and_a_missing_or_broken_manifest_are_refused(write: Save, root: Path) -> None:
    where = write(1)
    copy = root / "step_000002"
    shutil.copytree(where, copy)
    (copy / "trainer.json").unlink()
    assert verify(copy) == f"{copy} lacks trainer.json"
    (copy / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in str(verify(copy))
    (copy / "manifest.json").unlink()
    assert "it is not a complete checkpoint" in str(verify(copy))
    assert newest(root)[0] == where


def test_no_checkpoint_is_no_error(root: Path) -> None:
    assert newest(root) == (None, [])


@pytest.mark.parametrize("function", ["_write", "_seal"])
def test_a_failed_write_keeps_the_old_one_and_leaves_nothing(
    write: Save, root: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    old = write(1)
    real = getattr(checkpoint, function)

    def full_disk(where: Path, *rest: Any) -> None:
        real(where, *rest)
        (where / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, function, full_disk)
    with pytest.raises(DiskError, match=r"step_000002: No space left on device\. Earlier checkpoints are intact"):
        write(2)
    assert [p.name for p in root.iterdir()] == [old.name]
    assert verify(old) is None


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The kernel refuses files above 64 KB, which a write meets just as it meets a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_refuses_is_a_disk_error(
    write: Save, root: Path, request: pytest.FixtureRequest
) -> None:
    """Real writes by safetensors, whose errors are not OSErrors."""
    old = write(1)
    request.getfixturevalue("small_files_only")
    with pytest.raises(DiskError, match=r"cannot write .*step_000002"):
        write(2)
    assert [p.name for p in root.iterdir()] == [old.name]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train import checkpoint
policy = load_policy("tiny/S", device="cpu")
optimizer = torch.optim.AdamW(policy.model.parameters())
root = Path(sys.argv[1])
checkpoint.save(root, policy, optimizer, checkpoint.TrainerState(1, {}), 2)
real = checkpoint.save_file
def half(tensors, path):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = half
checkpoint.save(root, policy, optimizer, checkpoint.TrainerState(2, {}), 2)
"""


@pytest.mark.slow
def test_a_kill_during_a_write_leaves_the_older_checkpoint(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], capture_output=True, timeout=600)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert (root / "step_000002.partial").is_dir()
    found, refused = newest(root)
    assert found == root / "step_000001"
    assert refused == []
    assert not (root / "step_000002.partial").exists()


def test_a_checkpoint_of_an_older_version_is_refused_in_words(write: Any, trained: Any) -> None:
    where = write(1)
    (where / "trainer.json").write_text(json.dumps({"step": 1, "methods": {}}))
    with pytest.raises(UserError, match="written by an older version"):
        restore(where, trained[1])
