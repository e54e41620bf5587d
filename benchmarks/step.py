"""Where a tiny step's time goes, and what each saving is worth.

    python benchmarks/step.py [--base S] [--repeats 9]

Two tables. First the parts of a step, from the trainer's own clock. Then factors, each measured in one process,
interleaved A B A B ..., as the median of the ratios of neighbouring pairs, with the lowest and highest ratio:

- rollout against transformers' `generate`, at equal responses: `generate` is given the same prompts and runs to the
  same number of steps, and both times are divided by the response tokens they produced;
- eviction of finished rows on and off, same seed, hence the same work up to the order of random draws;
- micro-batches sorted by length against one micro-batch per minibatch, and dead rows skipped or not: same rollout,
  gradients compared before timing.

CPU time of this process is the measure, because wall time on a shared machine is noise. Results go to
`benchmarks/results/step_<base>.json` with machine, versions and date.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.rollout import engine as engine_module
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer, machine
from rlvr_lab.train.update import UpdateTotals

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"S": "grpo/tiny", "R": "grpo/tiny_retries"}


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of one call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def ratios(a: Callable[[], float], b: Callable[[], float], repeats: int) -> dict[str, float]:
    """Cost of `a` over cost of `b`, pair by pair, after one warm-up of each."""
    a(), b()
    values = [a() / b() for _ in range(repeats)]
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def parts(trainer: Trainer, steps: int) -> dict[str, float]:
    """Median wall seconds of each part of a step."""
    rows = [trainer.step(step) for step in range(steps)][1:]
    names = sorted({k for row in rows for k in row if k.startswith("seconds")})
    return {name: statistics.median(row[name] for row in rows) for name in names}


def rollout_costs(trainer: Trainer) -> tuple[Callable[[], float], Callable[[], float], Callable[[], float]]:
    """CPU seconds per response token of our engine, of ours without eviction, and of `generate`."""
    settings = trainer.config.rollout
    prompts = [trainer.problems.prompts[i] for i in trainer.problems.step_indices(0, 0, settings.prompts)]
    sampling = Sampling(1.0, settings.max_tokens, settings.rows)

    def ours() -> float:
        generator = torch.Generator().manual_seed(0)
        seconds, rollout = cpu(lambda: trainer.engine.sample(prompts, settings.group_size, sampling, generator))
        return seconds / int(rollout.mask.sum())

    def without_eviction() -> float:
        share, engine_module.EVICT_SHARE = engine_module.EVICT_SHARE, 2.0
        try:
            return ours()
        finally:
            engine_module.EVICT_SHARE = share

    ids = torch.tensor(prompts).repeat_interleave(settings.group_size, 0)
    policy = trainer.policy

    def generate() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            seconds, out = cpu(
                lambda: policy.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=settings.max_tokens,
                    pad_token_id=policy.pad_id,
                    eos_token_id=list(policy.eos_ids),
                )
            )
        return seconds / int((out[:, ids.shape[1] :] != policy.pad_id).sum())

    return ours, without_eviction, generate


def loss_costs(trainer: Trainer, rollout: Rollout) -> dict[str, Callable[[], float]]:
    """CPU seconds of forward and backward over all minibatches of one rollout, in three variants."""
    advantage = trainer.pipeline.advantage(rollout)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0))
    batches = [rollout.rows(rows) for rows in order.tensor_split(trainer.config.update.minibatches)]
    shares = [advantage[r] for r in order.tensor_split(trainer.config.update.minibatches)]

    def run(rows: int, skip: bool) -> float:
        updater = trainer.updater
        updater.micro_batch_rows, updater.skip_dead_rows = rows, skip

        def work() -> None:
            for batch, share in zip(batches, shares, strict=True):
                updater.accumulate(batch, share[:, : batch.response_ids.shape[1]], UpdateTotals())

        trainer.policy.model.zero_grad(set_to_none=True)
        return cpu(work)[0]

    rows = trainer.config.update.micro_batch_rows
    return {
        "as_shipped": lambda: run(rows, True),
        "no_skip": lambda: run(rows, False),
        "unsorted_no_skip": lambda: run(10**6, False),
    }


def assert_equal_gradients(trainer: Trainer, costs: dict[str, Callable[[], float]]) -> float:
    """Largest gradient difference between the variants, relative to the largest gradient; must be rounding only."""
    found = []
    for cost in costs.values():
        cost()
        grads = [p.grad.flatten() for p in trainer.policy.model.parameters() if p.grad is not None]
        found.append(torch.cat(grads).clone())
    worst = max(float((g - found[0]).abs().max() / found[0].abs().max()) for g in found[1:])
    if worst > 1e-4:
        raise SystemExit(f"variants disagree by {worst}: not a saving but another computation")
    return worst


def main(
    base: Annotated[str, typer.Option(help="S or R.")] = "S",
    repeats: Annotated[int, typer.Option(help="Pairs per ratio.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps for the table of parts.")] = 9,
) -> None:
    """Measure a tiny step; see the head of this file."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["evaluation.problems=0", "logging.tensorboard=false", "update.recompute_old_logprob=true"]
        trainer = Trainer(load_config(RECIPES[base], settings), Path(folder) / "run")
        rollout = trainer.collect(0)
        ours, without_eviction, generate = rollout_costs(trainer)
        variants = loss_costs(trainer, rollout)
        difference = assert_equal_gradients(trainer, variants)
        factors = {
            "generate / ours, per token": ratios(generate, ours, repeats),
            "no eviction / eviction": ratios(without_eviction, ours, repeats),
            "one micro-batch, no skip / sorted, no skip": ratios(
                variants["unsorted_no_skip"], variants["no_skip"], repeats
            ),
            "no skip / dead rows skipped": ratios(variants["no_skip"], variants["as_shipped"], repeats),
        }
        dead = 1 - float((trainer.pipeline.advantage(rollout) != 0).any(1).float().mean())
        trainer.updater.micro_batch_rows = trainer.config.update.micro_batch_rows
        trainer.updater.skip_dead_rows = True
        report = {
            "recipe": RECIPES[base],
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "responses": len(rollout),
            "response_tokens": int(rollout.mask.sum()),
            "dead_rows": dead,
            "gradient_difference": difference,
            "factors_cpu_time": factors,
            "parts_wall_seconds": parts(trainer, steps),
        }
    path = ROOT / "benchmarks" / "results" / f"step_{base}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    _show(report)


def _show(report: dict[str, Any]) -> None:
    print(f"{report['responses']} responses, {report['response_tokens']} tokens, {report['dead_rows']:.0%} dead rows")
    for name, value in report["parts_wall_seconds"].items():
        print(f"  {name:22} {value:.3f} s")
    for name, value in report["factors_cpu_time"].items():
        print(f"  {name:45} {value['median']:.2f}  ({value['lowest']:.2f} to {value['highest']:.2f})")


if __name__ == "__main__":
    typer.run(main)
