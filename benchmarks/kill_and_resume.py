"""Kill a run again and again, on two processes and on one, and compare its parameters with those of a run left alone.

    python benchmarks/kill_and_resume.py --kills 5

Two processes train the tiny lab, one of them is killed (SIGKILL) at a random moment, and the run is resumed, `kills`
times; the last part runs on one process. Written to book/data/training_at_scale.json with provenance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rlvr_lab.train.checkpoint import newest, verify
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import machine

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "book" / "data" / "training_at_scale.json"
SETTINGS = [
    "grpo/tiny", "model.path=tiny/R", "rollout.prompts=4", "rollout.group_size=8", "rollout.max_tokens=64",
    "rollout.streams=prompt", "update.minibatches=2", "evaluation.problems=0", "logging.tensorboard=false",
    "steps=12", "checkpoint.every=2", "parallel.timeout=120",
]  # fmt: skip


def start(size: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """One process, or several that find each other on a free port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "rlvr_lab.cli", "train", *arguments]
    ranks = [world | ({"RANK": str(r), "LOCAL_RANK": str(r)} if size > 1 else {}) for r in range(size)]
    return [subprocess.Popen(command, env=os.environ | env, **quiet) for env in ranks]


def steps_of(out: Path) -> int:
    return len(read_jsonl(out / "metrics.jsonl"))


def straight(out: Path, size: int) -> None:
    """Run to the end."""
    for process in start(size, *SETTINGS, "--out", str(out)):
        if process.wait():
            raise RuntimeError(f"the run in {out} failed")


def killed_once(out: Path, draw: random.Random, arguments: list[str]) -> dict[str, Any]:
    """Start, wait for one to three steps and a random moment more, kill a random rank; what was lost."""
    before = steps_of(out)
    ranks = start(2, *arguments)
    wanted = before + draw.randint(1, 3)
    while steps_of(out) < wanted and all(p.poll() is None for p in ranks):
        time.sleep(0.02)
    if any(p.poll() is not None for p in ranks):
        raise RuntimeError(f"the run in {out} ended by itself")
    time.sleep(draw.uniform(0, 2.0))
    victim = draw.randrange(2)
    ranks[victim].kill()
    began = time.perf_counter()
    status = ranks[1 - victim].wait(timeout=120)
    partial = [p.name for p in (out / "checkpoints").glob("*.partial")]
    found, refused = newest(out / "checkpoints")
    done = steps_of(out)
    saved = int(found.name.removeprefix("step_")) if found else 0
    return {"rank": victim, "steps_done": done, "checkpoint": saved, "steps_lost": done - saved, "refused": refused,
            "partial": partial, "other_rank_status": status,
            "other_rank_seconds": round(time.perf_counter() - began, 2)}  # fmt: skip


def largest_difference(one: Path, other: Path) -> float:
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def parts(where: Path) -> dict[str, int]:
    """Bytes of a checkpoint by what they are for."""
    sizes = {p.relative_to(where).as_posix(): p.stat().st_size for p in where.rglob("*") if p.is_file()}
    state = sum(size for name, size in sizes.items() if name.startswith("state/"))
    export = sizes["model.safetensors"]
    return {"export": export, "state": state, "other": sum(sizes.values()) - state - export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="keeps runs that need not be made again")
    asked = parser.parse_args()
    kills, folder = asked.kills, asked.folder or Path(tempfile.mkdtemp())
    draw = random.Random(0)
    for name, size in (("straight", 2), ("one", 1)):
        if not (folder / name / "model").exists():
            straight(folder / name, size)
    out = folder / "killed"
    found = [killed_once(out, draw, [*SETTINGS, "--out", str(out)])]
    while len(found) < kills and steps_of(out) < 12:
        found.append(killed_once(out, draw, ["--resume", "--out", str(out)]))
    on_one = folder / "killed_then_one"
    shutil.copytree(out, on_one)
    for size, where in ((2, out), (1, on_one)):
        for process in start(size, "--resume", "--out", str(where)):
            if process.wait():
                raise RuntimeError(f"the run in {where} did not resume")
    where, _ = newest(out / "checkpoints")
    assert where is not None
    began = time.perf_counter()
    assert verify(where) is None
    result = {
        "provenance": {"script": "benchmarks/kill_and_resume.py", "date": time.strftime("%Y-%m-%d"),
                       "machine": machine(), "settings": SETTINGS, "processes": 2, "backend": "gloo"},
        "kills": found,
        "largest_parameter_difference": {
            name: largest_difference(folder / one, folder / "straight")
            for name, one in (
                ("killed, resumed on 2 processes", "killed"),
                ("killed, resumed on 1 process", "killed_then_one"),
                ("1 process, not killed", "one"),
            )
        },
        "checkpoint_bytes": parts(where),
        "seconds_to_verify": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
