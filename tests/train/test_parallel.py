"""Two processes are one run: the same parameters after five steps as one process, however the work is divided.

Each scenario is run by two real processes that meet over gloo, and by this one alone, in float32. They agree within
1e-5 where the weights moved by several 1e-3: 1e-6 was seen, which is rounding in sums of another order, times Adam.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_worker import run
from safetensors.torch import load_file

from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.checkpoint import restore
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.parallel import World

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("parallel_worker.py")
TOLERANCE = 1e-5

# No KL-Cov: its |log ratio| has the sign of a rounding error as gradient while the policy has not moved.
SCENARIOS = {
    "plain": ["evaluation.problems=3", "evaluation.samples=2", "evaluation.every=3"],
    "composition": ["methods.clip_cov={}", "methods.kl_reference={}", "update.recompute_old_logprob=true"],
    "tempered": ["methods.hapo={preset: paper}"],
    "again": ["methods.arbitrary_entropy={preset: tiny}", "update.recompute_old_logprob=true", "rollout.prompts=6"],
    "episodes": [
        "model.path=tiny/A",
        "data.task=triples",
        "rollout.max_tokens=64",
        "evaluation.problems=3",
        "evaluation.samples=2",
    ],
    "trees": ["methods.cure={preset: tiny, n1: 2, n2: 1}", "rollout.max_tokens=24"],
    "branching episodes": [
        "model.path=tiny/A",
        "data.task=triples",
        "rollout.max_tokens=64",
        "methods.agentic_aepo={preset: tiny}",
    ],
    "replay": [
        "model.path=tiny/A",
        "data.task=triples",
        "rollout.max_tokens=64",
        "methods.spear={preset: tiny, buffer: 4}",
    ],
    "refill": ["methods.dynamic_sampling={}", "rollout.prompts=3", "rollout.max_tokens=32"],
    "every row": [
        "as it is",
        "rollout.max_tokens=32",
        "update.skip_dead_rows=false",
        "update.packing=true",
        "update.micro_batch_tokens=90",
    ],
    # 10 rows by 4 are three passes: the second process runs along in the last round
    "fsdp2": [
        "parallel.shard=fsdp2",
        "parallel.activation_checkpointing=true",
        "methods.clip_cov={}",
        "methods.kl_reference={}",
        "update.micro_batch_rows=4",
    ],
    "adapters": ["parallel.shard=fsdp2", "model.lora.rank=4", "methods.kl_reference={}", "optimizer.lr=1e-3"],
    # the gate and the history of divided weights; eps above the rounding of a gradient that is nearly 0
    "classp": [
        "parallel.shard=fsdp2",
        "optimizer={name: classp, lr: 2e-3, warmup: 2, grad_clip: 0.3, classp: {eps: 1e-3}}",
        "update.micro_batch_rows=4",
    ],
    "classp released": [
        "parallel.shard=fsdp2",
        "optimizer={name: classp, lr: 2e-3, warmup: 2, grad_clip: 0.3, classp: {eps: 1e-3, rule: released}}",
        "update.micro_batch_rows=4",
    ],
    # two steps through the lens of layer 1, then three of the whole model
    "layer": [
        "parallel.shard=fsdp2",
        "parallel.activation_checkpointing=true",
        "methods.bupo={preset: tiny, s_inter: 2}",
        "update.recompute_old_logprob=true",
        "update.micro_batch_rows=4",
    ],
    "half": ["parallel.shard=fsdp2", "model.precision=bfloat16", "steps=2"],
}
# what the one process does differently
ALONE = {
    "every row": ["as it is", "rollout.max_tokens=32"],
    "half": ["steps=2"],
}


def launch(count: int, *command: str, timeout: float = 500) -> list[tuple[int, str]]:
    """A command as `count` processes that can meet; exit status and standard error of each."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    tests = str(Path(__file__).parents[1])
    world = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": tests,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [p.communicate(timeout=timeout)[1] for p in ranks]
        return [(p.returncode, text) for p, text in zip(ranks, errors, strict=True)]
    finally:
        for p in ranks:
            p.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario as run by two processes, in `two/`."""
    root = tmp_path_factory.mktemp("parallel")
    (root / "scenarios.json").write_text(json.dumps(SCENARIOS))
    for status, errors in launch(2, str(WORKER), str(root / "scenarios.json"), str(root / "two")):
        assert status == 0, errors[-4000:]
    return root


def alone(folder: Path, name: str) -> Path:
    """The scenario as run by this process alone."""
    out = folder / "one" / name
    settings = ALONE.get(name, [s for s in SCENARIOS[name] if not s.startswith("parallel.shard")])
    run(out, settings)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def start(name: str) -> dict[str, torch.Tensor]:
    path = next((s.removeprefix("model.path=") for s in SCENARIOS[name] if s.startswith("model.path=")), "tiny/S")
    return dict(load_policy(path, device="cpu").model.state_dict())


MACHINE = ("seconds", "tokens_per_second", "memory")


def assert_same_rows(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() - {k for k in a if k.startswith(MACHINE)} == b.keys() - {k for k in b if k.startswith(MACHINE)}
        for key, value in a.items():
            if not key.startswith(MACHINE):
                assert b[key] == (value if value is None else pytest.approx(value, rel=2e-3, abs=2e-5)), key


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "half"])
def test_two_processes_train_the_parameters_of_one(folder: Path, name: str) -> None:
    one, two = alone(folder, name), folder / "two" / name
    moved = largest_difference(weights(one), start(name))
    assert moved > 1e-3
    assert largest_difference(weights(one), weights(two)) < TOLERANCE
    rows = [read_jsonl(out / "metrics.jsonl") for out in (one, two)]
    if name == "refill":
        assert max(row["generation_batches"] for row in rows[1]) > 1
    if name == "every row":  # the switch changes what is computed, never the result
        assert max(row["rows_skipped"] for row in rows[0]) > 0
        for row in rows[0] + rows[1]:
            row.pop("rows_skipped")
            for key in [k for k in row if k.startswith(("ratio", "kl_old", "clip_"))]:
                row.pop(key)  # means over the rows that took part
    assert_same_rows(*rows)


def test_evaluation_and_files_are_those_of_one_process(folder: Path) -> None:
    one, two = folder / "one" / "plain", folder / "two" / "plain"
    if not one.exists():
        alone(folder, "plain")
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    assert_same_rows(*(read_jsonl(out / "evaluations.jsonl") for out in (one, two)))
    assert len(read_jsonl(two / "evaluations" / "step_000005.jsonl")) == 3
    settings = [(out / "config.yaml").read_text() for out in (one, two)]
    assert settings[0] == settings[1]
    assert json.loads((two / "summary.json").read_text())["machine"]["processes"] == 2


def test_mixed_precision_keeps_float32_weights_and_trains_nearly_the_same(folder: Path) -> None:
    two = folder / "two" / "half"
    assert {value.dtype for value in weights(two).values()} == {torch.bfloat16}  # for engines
    policy = load_policy("tiny/S", device="cpu")
    restore(two / "checkpoints" / "step_000002", policy, torch.optim.AdamW(policy.model.parameters()))
    master = dict(policy.model.state_dict())
    assert all(value.dtype == torch.float32 for value in master.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in master.values())
    exact = weights(alone(folder, "half"))
    moves = [torch.cat([(w[n] - v).flatten() for n, v in start("half").items()]) for w in (master, exact)]
    assert float(torch.nn.functional.cosine_similarity(*moves, dim=0)) > 0.9


@pytest.fixture
def group_of_one() -> Iterator[World]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    world = World.from_environment()
    yield world
    world.close()


def test_one_process_may_shard_too(folder: Path, group_of_one: World) -> None:
    settings = SCENARIOS["fsdp2"]
    run(folder / "alone", settings, world=group_of_one)
    assert largest_difference(weights(folder / "alone"), weights(folder / "two" / "fsdp2")) < TOLERANCE


def test_more_processes_than_prompts_is_one_line(tmp_path: Path) -> None:
    """Through torchrun and the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "rlvr_lab.cli", "train", "grpo/tiny", "rollout.prompts=1", "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "rollout.prompts" in line]
    assert said[0].startswith("error: 2 processes share rollout.prompts=1, and each needs at least one")
    assert "rlvr_lab" not in "".join(line for line in done.stderr.splitlines() if line.startswith('  File "/work'))
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "rlvr_lab.cli", "train", "grpo/tiny", "--out", str(tmp_path / "run")]
        done = subprocess.run(command, env=os.environ | world, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"error: port in use: 127.0.0.1:{world['MASTER_PORT']} is taken by another program" in done.stderr
    assert "Traceback" not in done.stderr


# -- without processes -------------------------------------------------------------------------------------------------


def test_shares_cover_everything_once_and_rounds_are_equal() -> None:
    for count in range(9):
        worlds = [World(rank, 3) for rank in range(3)]
        assert [i for w in worlds for i in w.share(count)] == list(range(count))
        assert max(len(w.share(count)) for w in worlds) - min(len(w.share(count)) for w in worlds) <= 1
        dealt = [w.deal(list(range(count))) for w in worlds]
        assert len({len(items) for items in dealt}) == 1
        assert sorted(i for items in dealt for i in items if i is not None) == list(range(count))


def test_a_single_world_needs_no_group() -> None:
    world = World.single()
    value = torch.ones(2)
    assert world.sum_(value) is value
    assert world.gather_objects(3) == [3]
    assert world.on_main(lambda: 4) == 4
    assert world.sum_floats({"a": 1.0}) == world.max_floats({"a": 1.0}) == {"a": 1.0}
    assert not world.has_group
    world.barrier()
    with pytest.raises(RuntimeError, match="my own"), world.watch():
        raise RuntimeError("my own timeout")  # nobody to lose
