"""One training problem against the whole pool, chosen in five ways, with and without entropy: the tiny lab, some seeds.

    python benchmarks/one_shot.py --seeds 3

For each seed the whole pool of 16 problems is trained on first; its `problems.jsonl` ranks the problems (`rlvr-lab
select`). One problem each then comes from that ranking: the top; the bottom; and one drawn at random among those with a
mean accuracy of 0.3 to 0.7. Seeds, held-out problems and responses per step are matched; the entropy-only arm stops
early, as it collapses, and so does its control, whose every gradient has its size and random signs. Held-out accuracy
is that of the end of each run. Results go to `book/data/one_shot.json`.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import opened, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "one_shot.json"
SETTINGS = ("data.pool=16", "rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4",
            "update.micro_batch_rows=32", "optimizer.warmup=2", "evaluation.problems=32", "evaluation.samples=16",
            "logging.tensorboard=false", "logging.samples=0", "ledger.rows=0")  # fmt: skip
ONE = "methods={grpo: {preset: tiny}, one_shot: {preset: tiny, rows: 8, problems: [%d]%s}}"
MODULES = ("methods.grpo", "methods.one_shot", "methods.spurious_rewards", "train.selection")
COLUMNS = ("accuracy", "token_entropy", "dead_groups", "mean_tokens")
KEPT = ("pass@1", "pass@16", "distinct_correct", "token_entropy", "mean_tokens", "finished")
ENTROPY_ONLY_STEPS = 8
SHORT = ("entropy_only", "sign_noise")


def one_run(setting: str, seed: int, steps: int, folder: Path, every: int, noise: bool = False) -> dict[str, Any]:
    """Every step's figures, and evaluations every so often and at the end."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    config = load_config("arena/tiny", [f"seed={seed}", f"steps={steps}", *SETTINGS, setting])
    trainer = Trainer(config, folder / "run")
    if noise:
        randomise_signs(trainer.optimizer, seed)
    rows, evaluations = [], {}
    for step in range(steps):
        rows.append(trainer.step(step))
        if (step + 1) % every == 0 or step + 1 == steps:
            evaluations[str(step + 1)] = _evaluated(trainer, step + 1)
    trainer.log.close()
    columns = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
    return {"setting": setting, "steps": columns, "evaluations": evaluations}


def randomise_signs(optimizer: Any, seed: int) -> None:
    """Give each number of every gradient a random sign, anew in each step and after clipping, which sees no signs."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def flip(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    signs = torch.randint(0, 2, parameter.grad.shape, generator=generator)
                    parameter.grad.mul_(2 * signs - 1)

    optimizer.register_step_pre_hook(flip)


def _evaluated(trainer: Any, step: int) -> dict[str, float | None]:
    summary = trainer.evaluate(step).summary((1, 16))
    return {name: rounded(summary[name]) for name in KEPT}


def base(seed: int) -> dict[str, float | None]:
    """Held-out figures before any training."""
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    with tempfile.TemporaryDirectory(prefix="one_shot_") as folder:
        config = load_config("arena/tiny", [f"seed={seed}", *SETTINGS])
        return _evaluated(Trainer(config, Path(folder) / "run"), 0)


def choices(run: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The problems that the arms train on, from the log of the whole pool's run."""
    from rlvr_lab.train.selection import rank, read_histories

    ranked = rank(read_histories(run))
    middle = [one for one in ranked[1:] if 0.3 <= one.history.mean <= 0.7]
    drawn = random.Random(seed).choice(middle or ranked[1:])
    return {name: one.as_dict() for name, one in (("top", ranked[0]), ("bottom", ranked[-1]), ("middle", drawn))}


def arms(chosen: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Settings of every arm that trains on one problem."""
    top, bottom, middle = (chosen[name]["problem"] for name in ("top", "bottom", "middle"))
    return {
        "one_top": ONE % (top, ""),
        "one_top_no_entropy": ONE % (top, ", entropy_coefficient: 0.0"),
        "one_bottom": ONE % (bottom, ""),
        "one_random_middle": ONE % (middle, ""),
        "one_format_reward": ONE % (top, "}, spurious_rewards: {rule: format"),
        "entropy_only": ONE % (top, ", pg_coefficient: 0.0"),
        "sign_noise": ONE % (top, ", pg_coefficient: 0.0"),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Arms to run beside the pool's; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 24,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run everything; see the head of this file."""
    record = opened(out, {"seeds": {}}, "one_shot.py", "arena/tiny", SETTINGS, steps, MODULES)
    for seed in range(seeds):
        found = record["seeds"].setdefault(str(seed), {"arms": {}})
        if "base" not in found:
            found["base"] = base(seed)
        if "full" not in found["arms"]:
            with tempfile.TemporaryDirectory(prefix="one_shot_") as folder:
                setting = "methods={grpo: {preset: tiny}}"
                found["arms"]["full"] = one_run(setting, seed, steps, Path(folder), steps // 2)
                found["chosen"] = choices(Path(folder) / "run", seed)
            save(out, record)
        for name, setting in arms(found["chosen"]).items():
            if name in found["arms"] or (only and name not in only):
                continue
            count = ENTROPY_ONLY_STEPS if name in SHORT else steps
            with tempfile.TemporaryDirectory(prefix="one_shot_") as folder:
                found["arms"][name] = one_run(setting, seed, count, Path(folder), steps // 2, name == "sign_noise")
            save(out, record)
            print(seed, name, list(found["arms"][name]["evaluations"].items())[-1], flush=True)


if __name__ == "__main__":
    typer.run(main)
