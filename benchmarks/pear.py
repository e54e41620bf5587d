"""How far PEAR shortens thinking: the tiny lab with retries, PEAR beside its controls, several seeds.

    python benchmarks/pear.py --seeds 3

Base R attempts a problem up to five times before `</think>`, so that its thinking has a length to lose. Arms differ in
the reward alone; seeds, problems and the number of responses are matched. Every step's figures are those of its own
rollout; the end is evaluated on held-out problems. Results go to `book/data/pear.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "pear.json"
SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4", "update.micro_batch_rows=16",
            "evaluation.problems=32", "evaluation.every=0", "logging.tensorboard=false", "logging.samples=0",
            "ledger.rows=0")  # fmt: skip
ARMS = {
    "binary": "methods={grpo: {preset: tiny}, pear: {penalty: none}}",
    "pear": "methods={grpo: {preset: tiny}, pear: {}}",
    "shuffled": "methods={grpo: {preset: tiny}, pear: {penalty: shuffled}}",
    "no_std": "methods={grpo: {preset: tiny}, dr_grpo: {max_length: 96}, pear: {}}",
}
MODULES = ("methods.grpo", "methods.dr_grpo", "methods.pear")
COLUMNS = ("accuracy", "token_entropy", "mean_tokens", "truncated", "pear.thinking_entropy",
           "pear.answer_phase_entropy", "pear.thinking_tokens", "pear.penalty", "pear.all_correct_share")  # fmt: skip
KEPT = ("pass@1", "pass@8", "distinct_correct", "token_entropy", "mean_tokens")


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Every step's figures, and evaluations before and after."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", f"steps={steps}", "evaluation.samples=8", *SETTINGS, ARMS[arm]]
    with tempfile.TemporaryDirectory(prefix=f"pear_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("grpo/tiny_retries", settings), Path(folder) / "run")
        rows = [trainer.step(step) for step in range(steps)]
        result = trainer.evaluate(steps)
        assert result is not None
        trainer.log.close()
    columns = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
    return {"steps": columns, "end": _summary(result)}


def _summary(result: Any) -> dict[str, float | None]:
    summary = result.summary((1, 8))
    return {name: rounded(summary[name]) for name in KEPT}


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 24,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"arms": {}}, "pear.py", "grpo/tiny_retries", SETTINGS, steps, MODULES)
    for seed in range(seeds):
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps))


if __name__ == "__main__":
    typer.run(main)
