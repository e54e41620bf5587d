"""What a policy does with a verifier that has a hole: the tiny lab trained against Countdown's two checks.

    python benchmarks/reward_hacking.py --seeds 3

Arms differ in `data.settings.check` alone; seeds, problems and the number of responses are matched. Every response is
judged by both checks, and only the arm's own check is the reward. Results go to `book/data/verifiers.json`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import checked_digests

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "verifiers.json"
RECIPE = "arena/tiny"
SETTINGS = ("optimizer.lr=6e-4", "evaluation.problems=0", "logging.tensorboard=false", "logging.samples=0",
            "ledger.rows=0")  # fmt: skip
ARMS = ("at_least", "exact")
MODULES = ("methods.grpo", "tasks.countdown", "tasks.expressions")


class Audited:
    """A task whose responses are also judged by both checks."""

    def __init__(self, task: Any) -> None:
        self.task, self.name = task, task.name
        self.seen: list[dict[str, float]] = []

    def grade(self, problem: Any, response_text: str, finished: bool) -> Any:
        """The task's own verdict, which is the reward."""
        from rlvr_lab.tasks import countdown
        from rlvr_lab.tasks.expressions import parse

        both = {check: countdown.verify(problem, response_text, finished, check) for check in ARMS}
        answer = both["exact"].answer
        row = {check: float(verdict.correct) for check, verdict in both.items()}
        self.seen.append(
            row | {"excess": float("nan") if answer is None else float(parse(answer).value - problem.target)}
        )
        return self.task.grade(problem, response_text, finished)


def one_run(arm: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Every step's share of responses that each check accepts, mean excess over the target, and token entropy."""
    import torch

    torch.set_num_threads(1)
    from dataclasses import replace

    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", f"steps={steps}", *SETTINGS, f"data.settings.check={arm}"]
    columns: dict[str, list[float]] = {name: [] for name in (*ARMS, "excess", "token_entropy", "mean_tokens")}
    with tempfile.TemporaryDirectory(prefix=f"hack_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config(RECIPE, settings), Path(folder) / "run")
        audit = Audited(trainer.problems.task)
        trainer.problems = trainer.collector.problems = replace(trainer.problems, task=audit)
        for step in range(steps):
            audit.seen.clear()
            row = trainer.step(step)
            for name in (*ARMS, "excess"):
                values = [seen[name] for seen in audit.seen if seen[name] == seen[name]]
                columns[name].append(round(sum(values) / len(values), 5))
            for name in ("token_entropy", "mean_tokens"):
                columns[name].append(round(float(row[name]), 5))
        trainer.log.close()
    return columns


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 20,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run both arms; see the head of this file."""
    from rlvr_lab.train.loop import machine

    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    entry: dict[str, Any] = record.get("hacking", {"arms": {arm: {} for arm in ARMS}}) | {
        "command": "python benchmarks/reward_hacking.py",
        "recipe": RECIPE,
        "settings": list(SETTINGS),
        "steps": steps,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"threads": 1},
    }
    entry["digests"] = checked_digests(entry.get("digests", {}), MODULES, out)
    for seed in range(seeds):
        for arm in ARMS:
            if str(seed) in entry["arms"][arm]:
                continue
            entry["arms"][arm][str(seed)] = found = one_run(arm, seed, steps)
            # read again: benchmarks/verifiers.py may have added its part meanwhile
            record = (json.loads(out.read_text()) if out.exists() else {}) | {"hacking": entry}
            out.write_text(json.dumps(record, separators=(",", ":")) + "\n")
            print(arm, seed, {name: (values[0], values[-1]) for name, values in found.items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
