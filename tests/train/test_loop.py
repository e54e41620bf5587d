"""Whole runs: the same with and without an interruption, and safe against what goes wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import TINY_RUN
from sample_methods import NeedsBundles, Watcher, WordBonus
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import compose
from rlvr_lab.methods.base import LossInputs, Method
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train import checkpoint, loop
from rlvr_lab.train.checkpoint import DiskError
from rlvr_lab.train.config import load_config
from rlvr_lab.train.console import Silent
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import RunResult, Trainer
from rlvr_lab.train.update import TrainingStopped

Add = Callable[..., list[Method]]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds methods to every run's composition. A word bonus always: no group is dead, however good or bad the policy
    is, so that every step moves the weights."""

    def add_methods(*make: Callable[[], Method]) -> list[Method]:
        added: list[Method] = []

        def composed(methods: list[Method]) -> Any:
            added[:] = [factory() for factory in (*make, WordBonus)]
            return compose([*methods, *added])

        monkeypatch.setattr(loop, "compose", composed)
        return added

    return add_methods


@pytest.fixture(autouse=True)
def live_groups(add: Add) -> None:
    add()


def trainer(out: Path, *overrides: str, **options: Any) -> Trainer:
    return Trainer(load_config("grpo/tiny", [*TINY_RUN, "optimizer.warmup=2", *overrides]), out, **options)


def run(out: Path, *overrides: str, **options: Any) -> RunResult:
    return trainer(out, *overrides, **options).run()


def stop_after(steps: int) -> Callable[[], bool]:
    left = iter([False] * (steps - 1) + [True])
    return lambda: next(left)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix == ".safetensors"}


MACHINE = ("seconds", "tokens_per_second", "memory")


def metrics(out: Path) -> list[dict[str, Any]]:
    """Everything that does not depend on the machine."""
    rows = read_jsonl(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path: Path, add: Add) -> None:
    added = add(Watcher)
    straight = run(tmp_path / "straight", "steps=6")
    assert straight.steps_done == 6
    state = added[0].state_dict()
    first = run(tmp_path / "stopped", "steps=6", stop=stop_after(3))
    assert (first.steps_done, first.interrupted) == (3, True)
    assert not (tmp_path / "stopped" / "model").exists()
    second = run(tmp_path / "stopped", "steps=6", resume=True)
    assert (second.steps_done, second.interrupted) == (6, False)
    assert added[0].state_dict()["seen"] == state["seen"] == 6
    assert torch.equal(added[0].state_dict()["mean_tokens"], state["mean_tokens"])
    for part in ("model", "checkpoints/step_000006"):
        assert digests(tmp_path / "stopped" / part) == digests(tmp_path / "straight" / part)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert [row["step"] for row in metrics(tmp_path / "stopped")] == list(range(6))
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("stopped", "straight")]
    assert samples[0] == samples[1] != ""
    moved = load_policy(str(tmp_path / "straight" / "model"), device="cpu").model
    assert not torch.equal(moved.lm_head.weight, load_policy("tiny/S", device="cpu").model.lm_head.weight)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, "steps=2", f"seed={seed}")
    assert digests(tmp_path / "a" / "model") == digests(tmp_path / "b" / "model")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert digests(tmp_path / "a" / "model") != digests(tmp_path / "c" / "model")


def test_micro_batches_and_skipping_change_a_run_by_rounding_only(tmp_path: Path) -> None:
    results = [
        run(tmp_path / str(i), "steps=1", *settings).history[0]
        for i, settings in enumerate([(), ("update.micro_batch_rows=1", "update.skip_dead_rows=false")])
    ]
    for name in ("loss", "grad_norm", "reward", "token_entropy"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4, abs=5e-6)


def test_recomputed_log_probs_are_those_of_the_sampler(tmp_path: Path) -> None:
    plain, again = (
        run(tmp_path / flag, "steps=1", f"update.recompute_old_logprob={flag}").history[0] for flag in ("no", "yes")
    )
    assert plain["mismatch"] is None  # nothing was compared: undefined, not zero
    assert 0 < again["mismatch"] < 1e-4
    assert again["token_entropy"] == pytest.approx(plain["token_entropy"], abs=1e-4)
    assert again["loss"] == pytest.approx(plain["loss"], abs=1e-4)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(
        out, "steps=3", "evaluation.problems=3", "evaluation.samples=2", "evaluation.every=2", "logging.samples=2",
        "logging.tensorboard=true",
    )  # fmt: skip
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "problems.jsonl", "evaluations.jsonl", "evaluations", "samples.jsonl",
        "samples.html", "checkpoints", "model", "summary.json", "tensorboard",
    }  # fmt: skip
    evaluations = read_jsonl(out / "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [0, 2, 3]
    assert result.first == evaluations[0]
    assert result.last == evaluations[-1]
    assert all(e["held_out"] and 0 <= e["pass@1"] <= e["pass@2"] <= 1 for e in evaluations)
    assert len(read_jsonl(out / "evaluations" / "step_000003.jsonl")) == 3
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["machine"]["torch"] == torch.__version__
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    samples = read_jsonl(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [0, 0]
    assert len(samples[0]["token_entropy"]) == len(samples[0]["response"].split())
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 3
    row = result.history[0]
    parts = [v for k, v in row.items() if k.startswith("seconds_")]
    assert row["seconds"] == pytest.approx(sum(parts), rel=1e-6)
    # two warm-up steps: the first has half of the recipe's rate
    assert row["lr"] == pytest.approx(load_config("grpo/tiny").optimizer.lr / 2)
    assert list((out / "tensorboard").iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(UserError, match=r"already exists; use --resume to continue it, or another --out"):
        trainer(out)
    assert [p.name for p in out.iterdir()] == ["precious"]
    with pytest.raises(UserError, match="already exists"):
        trainer(out / "precious")
    with pytest.raises(UserError, match="holds no run to resume"):
        trainer(out, resume=True)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert run(tmp_path, "steps=1").steps_done == 1


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    """Otherwise the corrected command is refused because the folder exists, and --resume because settings differ."""
    out = tmp_path / "run"
    with pytest.raises(UserError, match="does not exist"):
        trainer(out, "model.path=/no/such/model")
    with pytest.raises(UserError, match="no problem fits"):
        trainer(out, "rollout.max_tokens=125")
    assert not out.exists()
    assert run(out, "steps=1").steps_done == 1


def test_a_resumed_run_may_change_its_length_but_not_its_learning(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, "steps=2")
    with pytest.raises(UserError, match=r"--resume cannot change 'optimizer'.*Only steps, evaluation"):
        trainer(out, "steps=2", "optimizer.lr=2e-4", resume=True)
    with pytest.raises(UserError, match="--resume cannot change 'seed'"):
        trainer(out, "steps=2", "seed=5", resume=True)
    assert run(out, "steps=3", "checkpoint.every=1", resume=True).steps_done == 3
    assert run(out, "steps=3", resume=True).steps_done == 3  # nothing left to do is no error
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


class NanFrom(Method):
    """A regulariser whose value is nan from step `step` on."""

    slug = "nan_from"

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def observe(self, values: Mapping[str, float]) -> None:
        self.seen += 1

    def regularise(self, inputs: LossInputs) -> Tensor:
        return inputs.logprob * (math.nan if self.seen >= self.step else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])


def test_a_nan_loss_names_the_step_and_spares_weights_and_checkpoint(tmp_path: Path, add: Add) -> None:
    add(lambda: NanFrom(3))
    out = tmp_path / "run"
    broken = trainer(out, "steps=6", "checkpoint.every=1")
    with pytest.raises(TrainingStopped, match=r"^step 3: loss is nan"):
        broken.run()
    saved, refused = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert (saved.name, refused) == ("step_000003", [])
    stored = load_policy(str(saved), device="cpu").model
    for a, b in zip(broken.policy.model.parameters(), stored.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]
    assert not (out / "model").exists()
    add(lambda: NanFrom(99))  # whatever the reason was, it is mended
    assert run(out, "steps=6", "checkpoint.every=1", resume=True).steps_done == 6


def test_a_full_disk_ends_the_run_with_the_older_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "run", checkpoint._write

    def full(where: Path, *rest: Any) -> None:
        real(where, *rest)
        if "step_000004" in where.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(DiskError, match=r"No space left on device.*--resume"):
        run(out, "steps=4")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_000002"]
    monkeypatch.setattr(checkpoint, "_write", real)
    run(out, "steps=4", resume=True)
    run(tmp_path / "straight", "steps=4")
    assert digests(out / "model") == digests(tmp_path / "straight" / "model")


class Recorder(Silent):
    """Keeps what the console was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_damaged_checkpoint_is_reported_and_the_older_one_used(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, "steps=4")
    good = digests(out / "model")
    weights = out / "checkpoints" / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    console = Recorder()
    run(out, "steps=4", resume=True, console=console)
    assert console.said[0] == f"checkpoint refused: {weights} is truncated or was changed after it was written"
    assert console.said[1] == "resuming after step 2"
    assert digests(out / "model") == good
    for where in (out / "checkpoints").iterdir():
        (where / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no sound checkpoint in .*trainer\.json is truncated or was changed"):
        trainer(out, "steps=4", resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = trainer(out, "steps=2")
    first.step(0)  # and then the process dies
    run(out, "steps=2", resume=True)
    assert [row["step"] for row in metrics(out)] == [0, 1]


def test_a_method_that_lacks_a_field_fails_before_any_update(tmp_path: Path, add: Add) -> None:
    add(NeedsBundles)
    start = trainer(tmp_path / "run", "steps=2")
    before = [p.detach().clone() for p in start.policy.model.parameters()]
    with pytest.raises(UserError, match=r"method 'needs_bundles' needs 'bundle_id'.*forms bundles"):
        start.run()
    for p, b in zip(start.policy.model.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_every_problem_of_the_pool_is_seen_once_an_epoch(tmp_path: Path) -> None:
    problems = trainer(tmp_path / "run").problems
    assert len(problems.train) == 12
    seen = [i for step in range(6) for i in problems.step_indices(0, step, 4)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert problems.step_indices(0, 2, 5)[:2] == [i for s in range(2, 4) for i in problems.step_indices(0, s, 5)][:2]
    assert len(problems.step_indices(0, 0, 40)) == 40  # more than the pool


# -- real processes ----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "rlvr_lab.cli", "train"]
REAL_RUN = [
    "grpo/tiny", "data.pool=40", "rollout.prompts=2", "rollout.group_size=4", "update.minibatches=2",
    "evaluation.problems=0", "logging.tensorboard=false", "steps=8", "checkpoint.every=2",
]  # fmt: skip


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300  # far more than it needs: a loaded machine starts slowly
    while len(read_jsonl(out / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *REAL_RUN, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(*arguments: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(*REAL_RUN, "--out", str(out))
    return out


@pytest.mark.slow
def test_kill_9_in_the_middle_then_resume_gives_the_same_policy(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for_steps(out, 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "model").exists()
    finish("--resume", "--out", str(out))
    assert digests(out / "model") == digests(uninterrupted / "model")
    assert metrics(out) == metrics(uninterrupted)
    base = load_policy("tiny/S", device="cpu").model.lm_head.weight
    trained = load_policy(str(out / "model"), device="cpu").model.lm_head.weight
    assert not torch.equal(base, trained)


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out)
    wait_for_steps(out, 1, process)
    process.send_signal(signal.SIGINT)
    output, errors = (text.decode() for text in process.communicate(timeout=300))
    assert process.returncode == 130, errors
    assert "finishing this step and saving; press Ctrl-C again to stop at once" in errors
    assert "Traceback" not in errors
    assert f"rlvr-lab train --resume --out {out}" in output.replace("\n", " ")
    saved, refused = checkpoint.newest(out / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{len(read_jsonl(out / 'metrics.jsonl')):06d}"
    assert refused == []
    finish("--resume", "--out", str(out))
    assert digests(out / "model") == digests(uninterrupted / "model")


class Keep(Method):
    """Keeps a group only if its first response begins with a token whose id leaves `rest` when divided by 3."""

    slug = "keep"
    refill = 6

    def __init__(self, rest: int | None) -> None:
        self.rest = rest

    def filter(self, rollout: Rollout) -> Rollout:
        first = torch.stack([rollout.response_ids[rollout.group_id == g][0, 0] for g in rollout.group_id])
        return rollout.rows((first % 3 == -1 if self.rest is None else first % 3 == self.rest).nonzero().squeeze(1))


def test_dropped_groups_are_replaced_until_the_batch_is_full(tmp_path: Path, add: Add) -> None:
    add(lambda: Keep(1))
    row = run(tmp_path / "a", "steps=2").history
    again = run(tmp_path / "b", "steps=2").history
    for one, other in zip(row, again, strict=True):
        assert one["generation_batches"] == other["generation_batches"]
        assert one["generated_tokens"] == other["generated_tokens"] >= one["tokens"]
    assert max(r["generation_batches"] for r in row) > 1
    rollout = trainer(tmp_path / "c").collect(0)
    assert len(rollout) == 8
    assert torch.bincount(rollout.group_id.unique(return_inverse=True)[1]).tolist() == [4, 4]


def test_a_filter_that_keeps_nothing_stops_and_says_what_to_change(tmp_path: Path, add: Add) -> None:
    add(lambda: Keep(None))
    with pytest.raises(TrainingStopped, match="step 0: only 0 of 2 groups passed the filters in 6 generation batches"):
        run(tmp_path / "a", "steps=1")


class Anchor(Method):
    """Needs the starting policy's log-probs, and remembers how far the policy is from them."""

    slug = "anchor"
    requires = ("ref_logprob",)

    def __init__(self) -> None:
        self.distances: list[float] = []

    def advantage(self, rollout: Rollout) -> Tensor:
        assert rollout.old_logprob is not None
        difference = (rollout.old_logprob - rollout.require("ref_logprob", by=self.slug))[rollout.mask]
        self.distances.append(float(difference.abs().max()))
        return torch.ones_like(rollout.behaviour_logprob)


def test_the_reference_is_the_starting_policy_also_after_a_resume(tmp_path: Path, add: Add) -> None:
    anchors = add(Anchor)
    run(tmp_path / "a", "steps=2", "optimizer.lr=1e-2")
    first = anchors[0].distances  # type: ignore[attr-defined]
    assert first[0] < 1e-4 < first[1]
    run(tmp_path / "a", "steps=3", "optimizer.lr=1e-2", resume=True)
    assert anchors[0].distances[0] > 1e-4  # type: ignore[attr-defined]
