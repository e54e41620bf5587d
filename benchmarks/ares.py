"""Does length follow difficulty under ARES? The tiny lab with retries, GRPO and a control beside it, several seeds.

    python benchmarks/ares.py --seeds 3

Base R attempts a problem up to five times, so that a response's length is free to follow how difficult its problem is.
Arms differ in reward and KL alone; seeds, problems and the number of responses are matched, generated tokens are
recorded. How difficult a held-out problem is was measured once per seed, on the policy before training: every arm is
held against the same difficulties, and against the same threshold of an event. After the last step: slopes of length
and of the number of events on difficulty (1 - rate of success before), and means by bucket. Results go to
`book/data/ares.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "ares.json"
MODULES = (
    "methods.ares",
    "methods._ares_settings",
    "methods._ares_code",
    "core.windows",
    "core.entropy",
    "methods.grpo",
)
SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4", "update.micro_batch_rows=16",
            "optimizer.lr=4.0e-4", "optimizer.warmup=2", "evaluation.problems=64", "logging.tensorboard=false",
            "logging.samples=0", "ledger.rows=0")  # fmt: skip
ARES = "methods={grpo: {preset: tiny}, ares: {preset: tiny%s}}"
ARMS = {
    "grpo": ["methods={grpo: {preset: tiny}}"],
    "ares": [ARES % ""],
    "permuted": [ARES % ", control: permuted"],
    "ares_kl": [ARES % ", kl: windows"],
}
COLUMNS = ("accuracy", "token_entropy", "mean_tokens", "tokens")
OWN = ("shaping", "length_slope", "event_slope", "theta")
SAMPLES = 16


def one_run(arm: str, seed: int, steps: int, base: dict[str, Any] | None) -> dict[str, Any]:
    """Every step's figures, and what responses to held-out problems look like afterwards."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", f"steps={max(steps, 1)}", *SETTINGS, *ARMS[arm]]
    with tempfile.TemporaryDirectory(prefix=f"ares_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("ares/tiny", settings), Path(folder) / "run")
        rows = [trainer.step(step) for step in range(steps)]
        trainer.log.close()
        curves = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
        curves |= {name: [rounded(row[f"ares.{name}"]) for row in rows] for name in OWN if rows and arm != "grpo"}
        return {"steps": curves, "end": judged(trainer, base)}


def judged(trainer: Any, base: dict[str, Any] | None) -> dict[str, Any]:
    """Figures of held-out responses against the difficulties and the threshold of `base`; of itself without one."""
    import torch

    from rlvr_lab.core.entropy import window_entropy
    from rlvr_lab.core.reduce import masked_mean
    from rlvr_lab.core.windows import (
        BUCKETS,
        bucket_moments,
        difficulty_buckets,
        pooled_threshold,
        row_quantiles,
        slope,
        window_events,
    )  # fmt: skip
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.grading import grade

    task, problems, policy = trainer.problems.task, trainer.problems.evaluation, trainer.policy
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    generator = torch.Generator().manual_seed(trainer.config.seed)
    rollout = trainer.engine.sample(prompts, SAMPLES, Sampling(max_tokens=96), generator)
    rollout = grade(rollout, task, problems, policy)
    windows = window_entropy(rollout.statistics["token_entropy"], rollout.mask, 4)
    if base is None:
        quantile = row_quantiles(windows, ~windows.isnan(), 0.95)
        theta = float(pooled_threshold(quantile, rollout.group_id)[0])
        rate = rollout.correct.double().reshape(-1, SAMPLES).mean(1)
        bucket = difficulty_buckets(rollout.correct, rollout.group_id).reshape(-1, SAMPLES)[:, 0]
    else:
        theta, rate, bucket = base["theta"], torch.tensor(base["rate"]).double(), torch.tensor(base["bucket"])
    events = window_events(windows, torch.full((len(rollout),), theta)).sum(1).double()
    length = rollout.lengths.double()
    by_problem = {"length": length, "events": events, "accuracy": rollout.correct.double()}
    by_problem = {name: value.reshape(-1, SAMPLES).mean(1) for name, value in by_problem.items()}
    operands = torch.tensor([len(problem.numbers) for problem in problems])
    found: dict[str, Any] = {
        "responses": float(len(rollout)),
        "accuracy": rounded(float(rollout.correct.float().mean())),
        "mean_tokens": rounded(float(length.mean())),
        "events": rounded(float(events.mean())),
        "token_entropy": rounded(float(masked_mean(rollout.statistics["token_entropy"], rollout.mask))),
        "length_slope": rounded(slope(1 - rate, by_problem["length"])),
        "event_slope": rounded(slope(1 - rate, by_problem["events"])),
        "length_per_operand": rounded(slope(operands, by_problem["length"])),
    }
    for name, value in by_problem.items():
        means = bucket_moments(value, bucket)[0].tolist()
        found |= {f"{name}_{kind}": rounded(mean) for kind, mean in zip(BUCKETS, means, strict=True)}
    if base is None:
        found |= {"theta": theta, "rate": rate.tolist(), "bucket": bucket.tolist()}
    return found


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 25,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"base": {}, "arms": {}}, "ares.py", "ares/tiny", SETTINGS, steps, MODULES)
    for seed in range(seeds):
        if str(seed) not in record["base"]:
            record["base"][str(seed)] = one_run("grpo", seed, 0, None)["end"]
            save(out, record)
        base = record["base"][str(seed)]
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed, base=base: one_run(arm, seed, steps, base))


if __name__ == "__main__":
    typer.run(main)
