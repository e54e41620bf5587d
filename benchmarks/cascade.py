"""Exploration in long tasks: entropy of early and late turns under EPO, EMPG and their controls, several seeds.

    python benchmarks/cascade.py --seeds 3

Episodes in a ring of rooms (`tasks.agents.maze`), one reward at the end. All arms begin with the shipped base A after
a short supervised warm-up on demonstrations of this task (`WARM`), as both method cards ask for, and differ in
`methods` alone; seeds, problems and the number of episodes are matched. Of every step: success, token entropy of all,
of early and of late turns. After the last step, episodes of unseen variations. The penalty of EPO's release, which has
no gradient, is no arm: its parameters are those of `bonus_small` to the last bit, which the chapter shows live. Results
go to `book/data/cascade.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "cascade.json"
RECIPE = "epo/maze_tiny"
WARM = {"steps": 45, "batch": 32, "lr": 2e-3, "slip": 0.15, "seed": 0}
SETTINGS = ("rollout.prompts=6", "optimizer.lr=7.0e-4", "evaluation.problems=24", "logging.tensorboard=false",
            "logging.samples=0", "ledger.rows=0", "logging.view=quiet")  # fmt: skip
GRPO = "grpo: {preset: tiny}"
EPO = f"methods={{{GRPO}, epo: {{preset: tiny, horizon: STEPS, %s}}}}"
EMPG = f"methods={{{GRPO}, empg: {{preset: paper%s}}}}"
ARMS = {
    "no_bonus": [f"methods={{{GRPO}}}"],
    "bonus_small": [EPO % "coefficient: 0.02, alpha: 0.0"],
    "bonus_large": [EPO % "coefficient: 0.1, alpha: 0.0"],
    "hinge_binding": [EPO % "coefficient: 0.02, alpha: 5.0, low: 0.5, high: 1.2"],
    "hinge_released": [EPO % "coefficient: 0.02, alpha: 5.0, low: 0.0, high: 2.0"],
    "empg": [EMPG % ""],
    "empg_shuffled": [EMPG % ", shuffled: true"],
}
MODULES = ("methods.grpo", "methods.epo", "methods.empg", "tasks.agents.maze")
COLUMNS = ("accuracy", "token_entropy", "early_token_entropy", "late_token_entropy", "turns", "invalid_episodes",
           "dead_groups", "tokens")  # fmt: skip


def warm_up(out: Path) -> Path:
    """Base A after `WARM` steps on demonstrations by a writer that slips so often, in rings of five rooms."""
    from random import Random

    import torch

    from rlvr_lab.core.rollout import pad
    from rlvr_lab.policy import tiny
    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.tasks.agents import demos, maze, words
    from rlvr_lab.tasks.agents.base import held_out
    from rlvr_lab.train.sft import supervised

    torch.set_num_threads(1)
    policy, rng, task, steps = load_policy("tiny/A", device="cpu"), Random(WARM["seed"]), maze.MazeTask(), WARM["steps"]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=WARM["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(int(steps)):
        batch: list[list[int]] = []
        while len(batch) < WARM["batch"]:
            problem = maze.draw(rng, ("five",))
            if not held_out(problem.key):
                writer = demos.Walker(problem, rng, WARM["slip"])
                batch.append(words.encode(demos.demonstration(task, problem, writer, rng, 0.0)[0]))
        for group in optimizer.param_groups:
            group["lr"] = WARM["lr"] * min(1.0, (step + 1) / 5) * (1 - step / steps)
        mask = pad([demos.learned(sequence) for sequence in batch], 0, torch.bool)
        nll, _ = supervised(policy, pad(batch, 0, torch.long), mask)
        nll.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tiny.export(policy.model.eval(), out, tiny.lexicon("A"))
    return out


def one_run(arm: str, seed: int, steps: int, base: Path) -> dict[str, Any]:
    """Every step's figures, and what episodes look like afterwards."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    own = [setting.replace("STEPS", str(max(steps, 2))) for setting in ARMS[arm]]
    settings = [f"seed={seed}", f"steps={max(steps, 1)}", f"model.path={base}", *SETTINGS, *own]
    with tempfile.TemporaryDirectory(prefix=f"cascade_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config(RECIPE, settings), Path(folder) / "run")
        rows = [trainer.step(step) for step in range(steps)]
        trainer.log.close()
        return {"steps": {name: [rounded(row[name]) for row in rows] for name in COLUMNS}, "end": played(trainer)}


def played(trainer: Any, samples: int = 4) -> dict[str, float | None]:
    """Success, turns and entropies (nats) in unseen variations."""
    from rlvr_lab.evaluate.evaluation import evaluate
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.train.metrics import turn_metrics

    sampling, seen = Sampling(max_tokens=trainer.config.rollout.max_tokens), trainer.problems
    found = evaluate(
        trainer.policy, seen.task, seen.evaluation, samples=samples, sampling=sampling, seed=trainer.config.seed
    )
    turns = turn_metrics(found.rollout)
    return {
        "episodes": float(len(found.rollout)),
        "success": rounded(found.pass_at(1)),
        "token_entropy": rounded(found.token_entropy),
        **{name: rounded(turns[name]) for name in ("early_token_entropy", "late_token_entropy", "turns")},
    }


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 14,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    empty = {"base": {}, "warm_up": WARM, "arms": {}}
    record = opened(out, empty, "cascade.py", RECIPE, SETTINGS, steps, MODULES)
    with tempfile.TemporaryDirectory(prefix="cascade_base_") as folder:
        base = warm_up(Path(folder))
        for seed in range(seeds):
            if str(seed) not in record["base"]:
                record["base"][str(seed)] = one_run("no_bonus", seed, 0, base)["end"]
            record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps, base))


if __name__ == "__main__":
    typer.run(main)
