"""What labels of thoughts are worth: TP-GRPO on the tiny lab with retries, beside its controls, several seeds.

    python benchmarks/tp_grpo.py --seeds 3

Base R attempts a problem up to five times; an attempt that ends in `no` and is tried again is a wrong thought of what
may become a right response. Arms differ in advantage and labels alone; seeds, problems and the number of responses are
matched. `blocks_of_5` and `blocks_of_20` collect and judge the rollouts of so many steps before they train on them, as
the paper does with 50. After the last step, responses to held-out problems are judged by the exact rules, whatever the
arm trained on. Results go to `book/data/tp_grpo.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "tp_grpo.json"
SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4", "update.micro_batch_rows=16",
            "optimizer.lr=4.0e-4", "optimizer.warmup=2", "evaluation.problems=32", "logging.tensorboard=false",
            "logging.samples=0", "ledger.rows=0")  # fmt: skip
TP = "methods={grpo: {preset: tiny}, tp_grpo: {preset: tiny%s}}"
ARMS = {
    "grpo": ["methods={grpo: {preset: tiny}}"],
    "tp_grpo": [TP % ""],
    "random_labels": [TP % "", "data.judge.shuffled=true"],
    "constant_scale": [TP % ", adaptive: false"],
    "oracle_70": [TP % "", "data.judge.accuracy=0.7"],
    "step_level": [TP % ", level: step, adaptive: false"],
    "blocks_of_5": [TP % "", "rollout.prompts=40", "update.minibatches=20", "optimizer.warmup=0"],
    "blocks_of_20": [TP % "", "rollout.prompts=160", "update.minibatches=80", "optimizer.warmup=0"],
}
BLOCKS = {"blocks_of_5": 5, "blocks_of_20": 20}
MODULES = ("methods.grpo", "methods.tp_grpo", "tasks.thoughts")
COLUMNS = ("accuracy", "token_entropy", "mean_tokens", "tokens")


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Every step's figures, and what responses to held-out problems look like afterwards."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    steps //= BLOCKS.get(arm, 1)
    settings = [f"seed={seed}", f"steps={max(steps, 1)}", *SETTINGS, *ARMS[arm]]
    with tempfile.TemporaryDirectory(prefix=f"tp_grpo_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("grpo/tiny_retries", settings), Path(folder) / "run")
        rows = [trainer.step(step) for step in range(steps)]
        trainer.log.close()
        return {"steps": {name: [rounded(row[name]) for row in rows] for name in COLUMNS}, "end": judged(trainer)}


def judged(trainer: Any, samples: int = 16) -> dict[str, float | None]:
    """Figures of held-out responses: accuracy, attempts, and how much of the right ones was undone."""
    import torch

    from rlvr_lab.core.reduce import masked_mean
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.rollout.judges import LABEL, CountdownJudge, with_thoughts

    task, problems, policy = trainer.problems.task, trainer.problems.evaluation, trainer.policy
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    generator = torch.Generator().manual_seed(trainer.config.seed)
    rollout = trainer.engine.sample(prompts, samples, Sampling(max_tokens=96), generator)
    rollout = with_thoughts(grade(rollout, task, problems, policy), CountdownJudge(policy), problems)
    right, bad = rollout.correct, 1 - rollout.statistics[LABEL]
    undone = ((bad > 0) & rollout.mask).any(1)
    no = policy.encode("no")[0]
    return {
        "responses": float(len(rollout)),
        "accuracy": rounded(float(right.float().mean())),
        "undone_tokens": rounded(float(masked_mean(bad, rollout.mask & right[:, None]))),
        "undone_responses": rounded(float(masked_mean(undone.float(), right))),
        "verdicts_no": rounded(float(((rollout.response_ids == no) & rollout.mask).sum(1).float().mean())),
        "mean_tokens": rounded(float(rollout.lengths.float().mean())),
        "token_entropy": rounded(float(masked_mean(rollout.statistics["token_entropy"], rollout.mask))),
    }


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 20,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"base": {}, "arms": {}}, "tp_grpo.py", "grpo/tiny_retries", SETTINGS, steps, MODULES)
    for seed in range(seeds):
        if str(seed) not in record["base"]:
            record["base"][str(seed)] = one_run("grpo", seed, 0)["end"]
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps))


if __name__ == "__main__":
    typer.run(main)
