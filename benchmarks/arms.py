"""Run methods and their controls on the tiny lab, several seeds each, and record every step: the book's longer results.

    python benchmarks/arms.py --list
    python benchmarks/arms.py --arms kl_cov --arms kl_cov_random --seeds 3 --jobs 2

An arm is the recipe `arena/tiny` with a few settings changed; seeds, problems and the number of responses learned from
are matched (dynamic sampling generates more: `generated_tokens`). Results are added to `book/data/arms.json`: arms that
are already there and not asked for again stay.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "arms.json"
COLUMNS = (
    "step", "reward", "token_entropy", "top20_token_entropy", "answer_entropy", "distinct_correct",
    "mean_tokens", "dead_groups", "clip_low", "clip_high", "kl_old_new", "certain_tokens",
    "generated_tokens", "ledger_up_likely", "ledger_up_unlikely", "ledger_down_likely",
    "ledger_down_unlikely", "ledger_predicted", "ledger_gain", "ledger_forecast", "ledger_measured", "ledger_probe",
    "covariance",
)  # fmt: skip
KEPT = ("pass@1", "pass@4", "pass@16", "pass@32", "distinct_correct", "token_entropy", "answer_entropy", "mean_tokens")


def _with(**methods: str) -> list[str]:
    """Settings of a composition on top of GRPO's tiny preset."""
    parts = ", ".join(f"{slug}: {{{settings}}}" for slug, settings in methods.items())
    return [f"methods={{grpo: {{preset: tiny}}, {parts}}}"]


ARMS: dict[str, list[str]] = {
    "grpo": [],
    # the entropy mechanism, with the card's controls
    "kl_cov": _with(kl_cov="preset: tiny"),
    "kl_cov_random": _with(kl_cov="preset: tiny, selection: random"),
    "kl_cov_lowest": _with(kl_cov="preset: tiny, selection: lowest"),
    "clip_cov": _with(clip_cov="preset: tiny"),
    "clip_cov_random": _with(clip_cov="preset: tiny, selection: random"),
    "kl_cov_beta_0.1": _with(kl_cov="preset: tiny, beta: 0.1"),
    "kl_cov_beta_10": _with(kl_cov="preset: tiny, beta: 10.0"),
    # rewards that know nothing
    "random_reward": _with(spurious_rewards="preset: paper"),
    "random_reward_noclip": [
        "methods={grpo: {preset: tiny, clip_low: 1.0, clip_high: 1.0e9}, spurious_rewards: {preset: paper}}"
    ],
    # baselines
    "clip_higher": _with(clip_higher="preset: paper"),
    "rloo": _with(rloo="preset: paper"),
    "dr_grpo": _with(dr_grpo="preset: paper, max_length: 32"),
    "opo": _with(opo="preset: paper"),
    "reinforce_plus_plus": _with(reinforce_plus_plus="preset: paper"),
    "gspo": _with(gspo="preset: paper"),
    "cispo": _with(cispo="preset: paper"),
    "dynamic_sampling": _with(dynamic_sampling="preset: paper"),
    "entropy_bonus_0.003": _with(entropy_bonus="preset: paper, coefficient: 0.003"),
    "entropy_bonus_0.01": _with(entropy_bonus="preset: paper, coefficient: 0.01"),
    "entropy_bonus_0.03": _with(entropy_bonus="preset: paper, coefficient: 0.03"),
    "entropy_bonus_0.1": _with(entropy_bonus="preset: paper, coefficient: 0.1"),
    "adaptive_entropy": _with(adaptive_entropy="preset: released, target: 0.1, step: 0.002, maximum: 0.1"),
}


def one_run(arm: str, seed: int, steps: int, samples: int) -> dict[str, Any]:
    """Train one arm with one seed; every step's metrics, and evaluations half-way and at the end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", f"steps={steps}", f"evaluation.samples={samples}", "logging.tensorboard=false",
                "evaluation.problems=96", "evaluation.every=0",
                "logging.samples=0", *ARMS[arm]]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=f"arm_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("arena/tiny", settings), Path(folder) / "run")
        rows, evaluations = [], []
        for step in range(steps):
            metrics = trainer.step(step)
            rows.append({name: rounded(metrics[name]) for name in COLUMNS if name in metrics})
            if step + 1 in (steps // 2, steps):
                result = trainer.evaluate(step + 1)
                assert result is not None
                summary = result.summary((1, 4, 16, 32))
                evaluations.append({"step": step + 1} | {name: rounded(summary[name]) for name in KEPT})
        trainer.log.close()
    return {"steps": rows, "evaluations": evaluations}


def base_evaluation(samples: int) -> dict[str, float]:
    """Where every arm starts."""
    from rlvr_lab.evaluate.evaluation import evaluate
    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.tasks import countdown
    from rlvr_lab.tasks.registry import CountdownTask

    problems = countdown.problems(96, 0, evaluation=True)
    policy = load_policy("tiny/S", device="cpu")
    summary = evaluate(
        policy, CountdownTask(), problems, samples=samples, sampling=Sampling(1.0, 32, 512), seed=0
    ).summary((1, 4, 16, 32))
    return {name: rounded(summary[name]) for name in KEPT}


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 80,
    samples: Annotated[int, typer.Option(help="Responses per problem in an evaluation.", min=32)] = 32,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
    show: Annotated[bool, typer.Option("--list", help="List the arms, then stop.")] = False,
) -> None:
    """Run arms; see the head of this file."""
    if show:
        for name, settings in ARMS.items():
            print(f"{name:24s} {' '.join(settings)}")
        return
    from rlvr_lab.train.loop import machine

    chosen = arms or list(ARMS)
    if unknown := [a for a in chosen if a not in ARMS]:
        raise typer.BadParameter(f"no arm '{unknown[0]}'; --list shows them")
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"arms": {}}
    origin = {"date": time.strftime("%Y-%m-%d"), "machine": machine() | {"threads": 1}}
    if "base" not in record:
        record |= origin | {"command": "python benchmarks/arms.py", "recipe": "arena/tiny", "problems": 96}
        record |= {"samples": samples, "base": base_evaluation(samples)}
    if record["samples"] != samples:
        raise typer.BadParameter(f"{out} holds evaluations of {record['samples']} samples; use that, or another --out")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {
            pool.submit(one_run, arm, seed, steps, samples): (arm, seed) for arm in chosen for seed in range(seeds)
        }
        for future in as_completed(waiting):
            arm, seed = waiting[future]
            if error := future.exception():
                print(f"{arm} seed {seed}: {type(error).__name__}: {error}", flush=True)
                continue
            entry = record["arms"].setdefault(arm, {"settings": ARMS[arm], "seeds": {}})
            entry |= origin | {"settings": ARMS[arm]}  # arms may come from different machines
            entry["seeds"][str(seed)] = future.result()
            last = future.result()["evaluations"][-1]
            print(f"{arm} seed {seed}: pass@1 {last['pass@1']:.3f} pass@32 {last['pass@32']:.3f} distinct "
                  f"{last['distinct_correct']:.2f} token entropy {last['token_entropy']:.3f}", flush=True)  # fmt: skip
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    typer.run(main)
