"""What a method adds to a step of GRPO, on the tiny lab.

    python benchmarks/step_cost.py [--methods steer,siren] [--repeats 9]

Every method is trained for one and the same step, from the same weights and optimizer state, interleaved with GRPO:
GRPO, method, GRPO, method, ... Processor time of this process with one thread is the measure, because wall time on a
shared machine is noise. Reported is the median of the ratios of neighbouring pairs, minus one, with the lowest and the
highest. Equal for both: problems, seed, weights, batch, ledger off. What a method needs of the loop (old log-probs by a
forward pass, extra responses) belongs to it and is counted; the table says which.

Writes `benchmarks/results/step_cost.json`, and the medians to `rlvr_lab/methods/step_cost.json`, which
`rlvr-lab methods` shows.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rlvr_lab.arena.arms import CATALOGUE, REFERENCE, Arm, resolve
from rlvr_lab.arena.contest import Contest
from rlvr_lab.methods import trainable
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_cost.json"
SHOWN = ROOT / "rlvr_lab" / "methods" / "step_cost.json"
CONTEST = Contest(settings=("ledger.rows=0", "evaluation.problems=0"))


class Stepper:
    """A trainer that can repeat its second step from the same state."""

    def __init__(self, arm: Arm, folder: Path) -> None:
        self.trainer = Trainer(CONTEST.config(arm, 0), folder / arm.name.replace(":", "-"))
        self.trainer.step(0)  # optimizer states exist from here on
        self.weights = copy.deepcopy(self.trainer.policy.model.state_dict())
        self.optimizer = copy.deepcopy(self.trainer.optimizer.state_dict())
        self.methods = copy.deepcopy(self.trainer.pipeline.state_dict())

    def seconds(self) -> float:
        """Processor time of the step."""
        self.trainer.policy.model.load_state_dict(self.weights)
        self.trainer.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        self.trainer.pipeline.load_state_dict(copy.deepcopy(self.methods))
        started = time.process_time()
        self.trainer.step(1)
        return time.process_time() - started


def extras(stepper: Stepper) -> list[str]:
    """What the method asks of the loop beside its own arithmetic."""
    trainer, found = stepper.trainer, []
    if trainer.config.update.recompute_old_logprob:
        found.append("a pass for old log-probs")
    if trainer.pipeline.any("needs_current"):
        found.append("a pass for current statistics")
    if trainer.pipeline.reader() is not None:
        found.append("statistics of the whole distribution")
    if trainer.pipeline.owner("sample"):
        found.append("extra responses")
    if trainer.pipeline.keeps_every_row:
        found.append("dead rows are not skipped")
    return found


def measure(slug: str, repeats: int) -> dict[str, Any]:
    """One method against GRPO."""
    named = CATALOGUE.get(slug)
    arm = named if named and named.method == slug else resolve([slug])[-1]
    with tempfile.TemporaryDirectory(prefix="step_cost_") as folder:
        plain, changed = Stepper(CATALOGUE[REFERENCE], Path(folder)), Stepper(arm, Path(folder))
        plain.seconds(), changed.seconds()
        pairs = [(plain.seconds(), changed.seconds()) for _ in range(repeats)]
    added = [b / a - 1 for a, b in pairs]
    return {
        "settings": list(arm.settings),
        "added": round(statistics.median(added), 4),
        "lowest": round(min(added), 4),
        "highest": round(max(added), 4),
        "grpo_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "also": extras(changed),
    }


def main(
    methods: Annotated[str | None, typer.Option(help="Slugs, separated by commas; all by default.")] = None,
    repeats: Annotated[int, typer.Option(help="Pairs for each method.", min=3)] = 9,
    out: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
) -> None:
    """Measure and write; see the head of this file."""
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"methods": {}}
    record |= {
        "command": "python benchmarks/step_cost.py",
        "recipe": CONTEST.recipe,
        "repeats": repeats,
        "load_note": load_note,
    }
    record |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    for slug in methods.split(",") if methods else [s for s in trainable() if s != REFERENCE]:
        record["methods"][slug] = found = measure(slug, repeats)
        print(f"{slug:32s} {found['added']:+.1%}  ({found['lowest']:+.1%} to {found['highest']:+.1%})  "
              f"{'; '.join(found['also'])}", flush=True)  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        if out == RESULTS:
            shown = {slug: row["added"] for slug, row in record["methods"].items()}
            SHOWN.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
