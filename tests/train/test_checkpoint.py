"""Checkpoints survive a kill, a full disk and a damaged file."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from rlvr_lab.errors import UserError
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.policy.lora import add_adapters
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
SHARD = "state/shard-00001-model-00001-of-00001.safetensors"


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
    for start in (str(where), "tiny/S"):  # whichever weights the policy has, the checkpoint's replace them
        loaded = load_policy(start, device="cpu")
        fresh = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
        back = restore(where, loaded, fresh)
        same_parameters(loaded, policy)
        same_optimizer(fresh, optimizer)
    assert back.step == 7
    assert back.parts["watcher"]["seen"] == 3
    assert back.parts["watcher"]["names"] == ["a"]
    assert torch.equal(back.parts["watcher"]["mean"], torch.tensor([1.5, 2.5]))


def same_parameters(one: Policy, other: Policy) -> None:
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def same_optimizer(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 0
    for index, values in theirs.items():
        for name, value in values.items():
            assert torch.equal(ours[index][name], value), (index, name)


def test_no_file_is_a_pickle(write: Save) -> None:
    for path in write(1).rglob("*.*"):
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


@pytest.mark.parametrize("name", ["model.safetensors", SHARD, "trainer.safetensors", "trainer.json", "config.json"])
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


def test_checkpoints_of_other_versions_are_refused_in_words(write: Save, trained: Any) -> None:
    where = write(1)
    (where / "trainer.json").write_text(json.dumps({"step": 1, "parts": {}}))
    with pytest.raises(UserError, match=r"written by an older version .*0\.1\.0.*model\.path="):
        restore(where, *trained)
    (where / "trainer.json").write_text(json.dumps({"format": 99, "step": 1}))
    with pytest.raises(UserError, match=r"has layout 99, this version .* reads 2"):
        restore(where, *trained)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 1}, r"holds 'model\.model\.layers\.1\..*', which this run has not"),
        ({"num_hidden_layers": 9}, r"lacks 'model\.model\.layers\..*'"),
        ({"intermediate_size": 8}, r"'model\.model\.layers\.0\.mlp\..*' has shape \(.*\) there and \(.*\) here"),
    ],
)
def test_the_state_of_another_model_is_refused_with_the_difference(
    write: Save, trained: tuple[Policy, torch.optim.Optimizer], change: dict[str, int], reason: str
) -> None:
    where, policy = write(1), trained[0]
    config = copy.deepcopy(policy.model.config)
    for name, value in change.items():
        setattr(config, name, value)
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = config.layer_types[:1] * config.num_hidden_layers
    other = replace(policy, model=type(policy.model)(config))
    with pytest.raises(UserError, match=f"written for another model or optimizer: it {reason}|optimizer: {reason}"):
        restore(where, other, torch.optim.AdamW(other.model.parameters()))


def test_training_in_another_precision_is_refused(write: Save, trained: tuple[Policy, torch.optim.Optimizer]) -> None:
    policy = trained[0]
    half = replace(policy, model=copy.deepcopy(policy.model).to(torch.bfloat16))
    with pytest.raises(UserError, match=r"is torch\.float32 there and torch\.bfloat16 here"):
        restore(write(1), half, torch.optim.AdamW(half.model.parameters()))


def test_a_bfloat16_export_keeps_float32_weights_for_resuming(
    root: Path, trained: tuple[Policy, torch.optim.Optimizer]
) -> None:
    policy, _ = trained
    where = save(root, *trained, TrainerState(1, {}), 2, export=torch.bfloat16)
    exported = load_file(where / "model.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    assert json.loads((where / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    back = load_policy(str(where), device="cpu")
    assert not torch.equal(back.model.lm_head.weight, policy.model.lm_head.weight)  # rounded
    restore(where, back, torch.optim.AdamW(back.model.parameters()))
    same_parameters(back, policy)


def test_tied_embeddings_are_kept_once_and_come_back_tied(root: Path, trained: Any) -> None:
    config = copy.deepcopy(trained[0].model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    policy = replace(trained[0], model=type(trained[0].model)(config).eval())
    optimizer = with_momentum(policy)
    where = save(root, policy, optimizer, TrainerState(1, {}), 2)
    for file in (where / "model.safetensors", where / SHARD):
        assert not any("lm_head" in name for name in load_file(file)), file
    back = load_policy(str(where), device="cpu")
    again = torch.optim.AdamW(back.model.parameters(), lr=1e-3)
    back.model.get_input_embeddings().weight.data.zero_()
    restore(where, back, again)
    assert back.model.lm_head.weight is back.model.get_input_embeddings().weight
    same_parameters(back, policy)
    same_optimizer(again, optimizer)


def test_a_checkpoint_before_the_first_update_leaves_the_optimizer_as_new(root: Path) -> None:
    policy = load_policy("tiny/S", device="cpu")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)  # as after minibatches that were all skipped
    where = save(root, policy, optimizer, TrainerState(0, {}), 2)
    assert len(optimizer.state) == 0  # saving changed nothing
    optimizer.zero_grad(set_to_none=True)
    save(root, policy, optimizer, TrainerState(0, {}), 2)
    assert len(optimizer.state) == 0
    used = with_momentum(policy)
    restore(where, policy, used)
    assert len(used.state) == 0


def test_an_optimizer_that_keeps_plain_numbers_gets_them_back(root: Path) -> None:
    policy = load_policy("tiny/S", device="cpu")
    optimizer = with_momentum(policy)
    for values in optimizer.state.values():
        values["calls"] = 3
    where = save(root, policy, optimizer, TrainerState(1, {}), 2)
    fresh = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    restore(where, policy, fresh)
    assert {values["calls"] for values in fresh.state.values()} == {3}


def test_the_optimizer_keeps_the_settings_of_the_resumed_run(write: Save, trained: Any) -> None:
    fresh = torch.optim.AdamW(trained[0].model.parameters(), lr=7e-5, betas=(0.8, 0.9))
    restore(write(1), trained[0], fresh)
    assert fresh.param_groups[0]["lr"] == 7e-5
    assert fresh.param_groups[0]["betas"] == (0.8, 0.9)


def test_the_global_random_generators_go_on_where_they_stood(write: Save, trained: Any) -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(numpy.random.rand()), float(torch.rand(()))]

    random.gauss(0, 1)  # leaves a cached second number
    where = write(1)
    expected = draws()
    draws()
    restore(where, *trained)
    assert draws() == expected


def test_a_kill_between_sealing_and_renaming_loses_nothing(
    write: Save, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step is written a second time, and its first directory was already moved away."""
    write(1)
    real, moved = os.replace, []

    def stop_at_second(source: Path, target: Path) -> None:
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", stop_at_second)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans up nothing
    with pytest.raises(KeyboardInterrupt):
        write(1, methods={"grpo": {"x": 2}})
    monkeypatch.undo()
    assert not (root / "step_000001").exists()
    assert newest(root) == (root / "step_000001", [])
    assert json.loads((root / "step_000001" / "trainer.json").read_text())["parts"] == {"grpo": {"x": 2}}
    assert [p.name for p in root.iterdir()] == ["step_000001"]


def test_steps_are_ordered_by_number(root: Path) -> None:
    for name in ("step_999999", "step_1000000", "step_x", "step_000007"):
        (root / name).mkdir(parents=True)
    assert [p.name for p in checkpoint._directories(root)] == ["step_000007", "step_999999", "step_1000000"]


def test_adapters_are_saved_alone_and_merged_and_the_base_stays_as_it_was(root: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> tuple[Policy, torch.optim.Optimizer]:
        policy = load_policy("tiny/S", device="cpu")
        policy.model = add_adapters(policy.model, rank=4, alpha=8.0, targets=(), seed=0)
        return policy, torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2)

    def step(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        for i, p in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            p.grad = torch.full_like(p, 0.01 * (i + 1) * (-1) ** i)
        optimizer.step()

    policy, optimizer = adapted()
    step(policy, optimizer)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    where = save(root, policy, optimizer, TrainerState(1, {}), 2)
    assert verify(where) is None
    for name, value in policy.model.state_dict().items():
        assert torch.equal(before[name], value), name  # merging for the export left no rounding
    ids = torch.arange(30, 60)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        base = load_policy("tiny/S", device="cpu").model
        merged = load_policy(str(where), device="cpu").model(input_ids=ids).logits
        alone = peft.PeftModel.from_pretrained(base, str(where / "adapter")).eval()(input_ids=ids).logits
    assert torch.allclose(merged, expected, atol=1e-4)
    assert torch.equal(alone, expected)
    assert not torch.allclose(load_policy("tiny/S", device="cpu").model(input_ids=ids).logits, expected, atol=1e-2)
    back = adapted()
    restore(where, *back)
    for name, value in back[0].model.state_dict().items():
        assert torch.equal(before[name], value), name
    for one in (back, (policy, optimizer)):
        step(*one)
    same_parameters(back[0], policy)
    assert all("lora_" in name for name in load_file(where / SHARD))
    plain = load_policy("tiny/S", device="cpu")
    with pytest.raises(UserError, match="written for another model or optimizer: it lacks"):
        restore(where, plain, torch.optim.AdamW(plain.model.parameters()))
