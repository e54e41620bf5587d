"""The three environments of the tiny lab and their base policy: one recorded run of each recipe per seed.

    python benchmarks/environments.py --seeds 3

Every run is `grpo/<environment>_tiny` as it is shipped. Before the first step and after the last, episodes of held-out
problems are played and replayed: success, turns, the share of actions that could not be read, entropy of the first and
the last third of turns, in nats. The maze is measured on seen and on unseen variations. Results go to
`book/data/environments.json`; `--card` only writes the model card of base A from them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "environments.json"
SETTINGS = ("evaluation.problems=64", "logging.tensorboard=false", "logging.samples=0", "logging.view=quiet",
            "ledger.rows=0")  # fmt: skip
ARMS = {name: f"grpo/{name}_tiny" for name in ("triples", "maze", "feedback")}
MODULES = ("methods.grpo", "tasks.agents.triples", "tasks.agents.maze", "tasks.agents.feedback")
COLUMNS = ("accuracy", "reward", "token_entropy", "early_token_entropy", "late_token_entropy", "turns", "tool_calls",
           "mean_tokens", "seconds")  # fmt: skip
SAMPLES = 8


def played(trainer: Any, problems: list[Any], seed: int) -> dict[str, float | None]:
    """Figures of `SAMPLES` episodes of each problem."""
    import torch

    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.episodes import EpisodeEngine, actions_of
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks.agents.base import replay
    from rlvr_lab.train.metrics import turn_metrics

    task, policy = trainer.problems.task, trainer.policy
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    sampling = Sampling(max_tokens=trainer.config.rollout.max_tokens, rows=512)
    engine = EpisodeEngine(trainer.engine, task, problems)
    rollout = engine.sample(prompts, SAMPLES, sampling, torch.Generator().manual_seed(1000 + seed))
    graded = grade(rollout, task, problems, policy)
    episodes = [
        replay(task, problems[i], actions_of(rollout, row, policy)) for row, i in enumerate(rollout.prompt_id.tolist())
    ]
    turns = turn_metrics(graded)
    assert graded.correct is not None
    rates = graded.correct.float().view(-1, SAMPLES).mean(1)
    return {
        "episodes": float(len(rollout)),
        "success": rounded(float(rates.mean())),
        "mixed_groups": rounded(float(((rates > 0) & (rates < 1)).float().mean())),
        "turns": rounded(turns["turns"]),
        "invalid": rounded(sum(e.invalid for e in episodes) / sum(len(e.turns) for e in episodes)),
        "token_entropy": rounded(float(graded.statistics["token_entropy"][graded.mask].mean())),
        "early_token_entropy": rounded(turns["early_token_entropy"]),
        "late_token_entropy": rounded(turns["late_token_entropy"]),
        "tokens": rounded(float(rollout.lengths.float().mean())),
    }


def measured(trainer: Any, seed: int) -> dict[str, Any]:
    """`played` on unseen problems, and on as many that training may see."""
    unseen = list(trainer.problems.evaluation)
    return {
        "unseen": played(trainer, unseen, seed),
        "seen": played(trainer, list(trainer.problems.train)[: len(unseen)], seed),
    }


def one_run(arm: str, seed: int, steps: int | None) -> dict[str, Any]:
    """The base's figures, every step's, and those of the policy at its end."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    changes = [f"seed={seed}", *SETTINGS, *([] if steps is None else [f"steps={steps}"])]
    config = load_config(ARMS[arm], changes)
    with tempfile.TemporaryDirectory(prefix=f"environments_{arm}_{seed}_") as folder:
        trainer = Trainer(config, Path(folder) / "run")
        base = measured(trainer, seed)
        rows = [trainer.step(step) for step in range(config.steps)]
        trainer.log.close()
        curve = {name: [rounded(row.get(name)) for row in rows] for name in COLUMNS if name in rows[0]}
        return {"base": base, "steps": curve, "end": measured(trainer, seed)}


def digest() -> str:
    """sha256 of the shipped weights."""
    from rlvr_lab.policy.load import resolve

    return hashlib.sha256((Path(resolve("tiny/A")) / "model.safetensors").read_bytes()).hexdigest()


def _cell(values: list[float], share: bool) -> str:
    from rlvr_lab.core.statistics import seed_interval

    mean, half = seed_interval(values)
    return f"{mean:.1%} ± {half:.1%}" if share else f"{mean:.2f} ± {half:.2f}"


def _table(record: dict[str, Any]) -> str:
    """One row per environment: the base on unseen problems, and success after the recipe."""
    lines = []
    for arm, entry in record["arms"].items():
        runs = list(entry["seeds"].values())
        base = {name: [run["base"]["unseen"][name] for run in runs] for name in runs[0]["base"]["unseen"]}
        after = [run["end"]["unseen"]["success"] for run in runs]
        cells = [_cell(base[name], name in ("success", "mixed_groups", "invalid")) for name in
                 ("success", "mixed_groups", "turns", "invalid", "token_entropy", "tokens")]  # fmt: skip
        lines.append(f"| {arm} | {' | '.join(cells)} | {_cell(after, True)} |")
    return "\n".join(lines)


def card(record: dict[str, Any]) -> str:
    """The model card that lies beside the weights."""
    from rlvr_lab.policy.load import resolve
    from rlvr_lab.tasks.agents.demos import HASTY

    recipe = json.loads((Path(resolve("tiny/A")) / "pretrain.json").read_text())
    config, s = recipe["config"], HASTY
    count = len(next(iter(record["arms"].values()))["seeds"])
    return f"""---
license: apache-2.0
library_name: transformers
---

# Base policy A of the tiny lab

Acts in the three environments of `rlvr_lab/tasks/agents`: questions over triples with a search and a calculator, a
treasure hunt in a ring of rooms, and equations with feedback and retries. 3 layers of width 96 over 192 words of its
own (`rlvr_lab/tasks/agents/words.py`), a context of 256 tokens, 435,264 parameters of which 37,152 are zero, untied
embeddings, float32. For teaching and tests; it knows nothing else.

## Recipe

`rlvr-lab pretrain --base A --out DIR` runs this recipe: {config["steps"]:,} steps of {config["batch"]} demonstrations,
seed {config["seed"]}, Muon {config["muon_lr"]} and AdamW {config["adamw_lr"]}; the loss counts what the policy writes,
not what an environment says. {s.triples:.0%} of the demonstrations are questions, {s.maze:.0%} treasure hunts of every
family, {s.feedback:.0%} equations. A step is a useless, missing or wrong one with probability {s.triples_slip},
{s.maze_slip} and {s.feedback_slip}; {s.garbled:.0%} of the actions lack a word. Mean loss of the last 200 steps:
{recipe["loss_last_200"]:.4f} nats per token. Written {recipe["written"]}; sha256 of `model.safetensors`:

    {record["weights_sha256"]}

One tenth of all problems, chosen by a hash of the question, was never trained on; the figures below use it.

## Measured

{count} seeds, 64 held-out problems with {SAMPLES} episodes each, temperature 1:
mean ± half-width of the 95 % Student-t interval. `mixed` is the share of problems with both outcomes, `invalid` the
share of actions that could not be read, `after` success after the recipe `grpo/<environment>_tiny`.

| environment | success | mixed | turns | invalid | token_entropy | tokens | after |
|---|---|---|---|---|---|---|---|
{_table(record)}

`{record["command"]}` on {record["machine"]["processor"]}, {record["date"]}, torch {record["machine"]["torch"]},
transformers {record["machine"]["transformers"]}.
"""


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Environments to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Training steps; those of the recipe by default.")] = None,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
    write_card: Annotated[bool, typer.Option("--card", help="Only write the model card.")] = False,
) -> None:
    """Run the recipes; see the head of this file."""
    if write_card:
        from rlvr_lab.policy.load import resolve

        (Path(resolve("tiny/A")) / "README.md").write_text(card(json.loads(out.read_text())))
        return
    recipe = ", ".join(ARMS.values())
    record = opened(out, {"arms": {}}, "environments.py", recipe, SETTINGS, steps or 0, MODULES)
    if record.setdefault("weights_sha256", digest()) != digest():
        raise typer.BadParameter(f"{out} was measured on other weights of base A; move it")
    record |= {"load_note": load_note, "seeds": seeds}
    for seed in range(seeds):
        record_arms(record, ARMS, chosen_arms(arms, ARMS), seed, out, lambda arm, seed: one_run(arm, seed, steps))
    save(out, record)


if __name__ == "__main__":
    typer.run(main)
