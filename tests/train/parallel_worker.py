"""One process of the runs of `test_parallel`: `parallel_worker.py SCENARIOS.json FOLDER` with RANK and WORLD_SIZE set.

Scenarios are {name: [settings]}; each becomes the run FOLDER/name. The first setting may be "as it is".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from sample_methods import WordBonus

from rlvr_lab.methods import compose
from rlvr_lab.train import loop
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import RunResult, Trainer

SMALL = (
    "data.pool=40",
    "rollout.prompts=5",
    "rollout.group_size=4",
    "rollout.max_tokens=16",
    "rollout.streams=prompt",
    "update.minibatches=2",
    "update.micro_batch_rows=3",
    "optimizer.warmup=2",
    "optimizer.eps=1e-6",
    "evaluation.problems=0",
    "checkpoint.every=9",
    "ledger.rows=4",
    "logging.tensorboard=false",
    "model.device=cpu",
    "steps=5",
)


@contextmanager
def live_groups() -> Iterator[None]:
    """A word bonus in every composition, so that every step moves the weights however good or bad the policy is."""
    with mock.patch.object(loop, "compose", lambda methods: compose([*methods, WordBonus()])):
        yield


def run(out: Path, settings: list[str], **options: Any) -> RunResult:
    """One run in this process; "as it is" leaves dead groups dead."""
    bare = settings[:1] == ["as it is"]
    with nullcontext() if bare else live_groups():
        return Trainer(load_config("arena/tiny", [*SMALL, *settings[bare:]]), out, **options).run()


if __name__ == "__main__":
    for name, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        run(Path(sys.argv[2]) / name, settings)
