"""Measure the shipped bases: before and after GRPO over several seeds, beside sharpening by temperature alone.

Run by hand after the checkpoints or the loop change (about ten minutes on two cores for both bases):

    python benchmarks/tiny_lab.py --base S --base R

Writes, with provenance, `book/data/tiny_lab_<base>.json`, which the book reads. `--time` measures the steps alone, with
all threads and nothing beside them, into `benchmarks/results/tiny_lab_time.json`. `--cards` then writes the model cards
from both. Every seed changes problems of training, sampling, minibatches and evaluation draws; the
held-out problems are the same 96.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.evaluate.evaluation import Evaluation, evaluate
from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.grading import response_texts
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask
from rlvr_lab.train.config import load_config
from rlvr_lab.train.console import Lines
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
TIMES = ROOT / "benchmarks" / "results" / "tiny_lab_time.json"
RECIPES = {"S": "grpo/tiny", "R": "grpo/tiny_retries"}
# sha256 of the weights of S and R before the heads were widened from 24 to 32
NARROW_HEADS = (
    "b61b1d9dfe43e1e934c79c8d9211d07580155e4dc1d23d35c045bc981f0a991f",
    "c7a5864fe31e9775d77f1202a898a34385dc5870276378c3c0896d87f2588c59",
)
TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.3)
KS = (1, 2, 4, 8, 16, 32, 64)
CURVES = (
    "step", "reward", "token_entropy", "top20_token_entropy", "certain_tokens", "distinct_correct", "answer_entropy",
    "mean_tokens", "truncated", "dead_groups", "rows_skipped", "clip_low", "clip_high", "kl_old_new", "seconds",
)  # fmt: skip


def anatomy(policy: Policy, result: Evaluation) -> dict[str, Any]:
    """Mean entropy by token class, and the share of wrong arithmetic steps, over an evaluation's responses."""
    entropy: dict[str, list[float]] = defaultdict(list)
    wrong = total = 0
    rollout = result.rollout
    rows = zip(response_texts(rollout, policy), rollout.statistics["token_entropy"].tolist(), strict=True)
    for text, values in rows:
        words = text.split()
        for name, value in zip(countdown.token_class(words), values, strict=False):
            entropy[name].append(value)
        slips, steps = countdown.arithmetic_slips(words)
        wrong, total = wrong + slips, total + steps
    return {
        "entropy_by_class": {k: float(np.mean(v)) for k, v in entropy.items()},
        "tokens_by_class": {k: len(v) for k, v in entropy.items()},
        "wrong_arithmetic": wrong / total,
    }


def by_level(result: Evaluation) -> dict[str, dict[str, float]]:
    """pass@1 and pass@32 for problems of three and of four numbers."""
    levels = {}
    for count in (3, 4):
        chosen = [p for p in result.problems if p.problem.count(",") + 1 == count]
        part = Evaluation(tuple(chosen), result.temperature, 0.0, 0.0, result.rollout)
        levels[str(count)] = {"pass@1": part.pass_at(1), "pass@32": part.pass_at(32), "problems": len(chosen)}
    return levels


def figures(policy: Policy, result: Evaluation) -> dict[str, Any]:
    """Everything that is kept of one evaluation."""
    return result.summary(KS) | anatomy(policy, result) | {"by_level": by_level(result), "correct": result.correct}


def one_seed(base: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Train with the packaged recipe and evaluate every `every` steps."""
    out = Path(tempfile.mkdtemp(prefix=f"tiny_lab_{base}{seed}_"))
    settings = [f"seed={seed}", f"steps={steps}", f"evaluation.every={every}", "logging.tensorboard=false"]
    trainer = Trainer(load_config(RECIPES[base], settings), out / "run", console=Lines())
    kept: dict[int, dict[str, Any]] = {}
    plain = trainer.evaluate

    def keep(step: int) -> Evaluation | None:
        result = plain(step)
        if result is not None:
            kept[step] = figures(trainer.policy, result)
        return result

    trainer.evaluate = keep  # type: ignore[method-assign]
    started = time.perf_counter()
    run = trainer.run()
    history = [{k: row[k] for k in CURVES} for row in run.history]
    shutil.rmtree(out)
    return {
        "seed": seed,
        "history": history,
        "evaluations": {str(step): value for step, value in kept.items()},
        "seconds_steps": sum(row["seconds"] for row in history),
        "seconds_all": time.perf_counter() - started,
    }


def timed(base: str, load_note: str) -> None:
    """How long the recipe's steps take as they are shipped, without evaluations; added to `TIMES`."""
    with tempfile.TemporaryDirectory(prefix=f"tiny_lab_{base}_") as folder:
        config = load_config(RECIPES[base], ["evaluation.problems=0"])
        run = Trainer(config, Path(folder) / "run", console=Lines()).run()
        seconds = sum(row["seconds"] for row in run.history)  # read from the run's folder
    record = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    record[base] = {
        "command": f"python benchmarks/tiny_lab.py --base {base} --time",
        "recipe": RECIPES[base],
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_note": load_note,
    }
    TIMES.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{config.steps} steps in {seconds:.1f} s, written to {TIMES}", flush=True)


def each_seed(base: str, seeds: int, steps: int, every: int, jobs: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """All seeds, and sharpening beside them; `jobs` processes of one thread, or in turn with all threads."""
    if jobs <= 1:
        return [one_seed(base, seed, steps, every) for seed in range(seeds)], sharpening(base, seeds)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(one_seed, base, seed, steps, every) for seed in range(seeds)]
        tempered = pool.submit(sharpening, base, seeds)
        return [run.result() for run in runs], tempered.result()


def sharpening(base: str, seeds: int) -> list[dict[str, Any]]:
    """The base policy sampled at lower temperatures: what re-weighting gives without training."""
    policy = load_policy(f"tiny/{base}", device="cpu")
    problems = countdown.problems(96, 0, evaluation=True)
    rows = []
    for temperature in TEMPERATURES:
        for seed in range(seeds):
            sampling = Sampling(temperature, tiny.BASES[base].max_tokens + 3, 512)
            result = evaluate(policy, CountdownTask(), problems, samples=64, sampling=sampling, seed=1000 + seed)
            rows.append({"temperature": temperature, "seed": seed, **result.summary(KS)})
        print(f"temperature {temperature}: pass@1 {rows[-1]['pass@1']:.1%}", flush=True)
    return rows


def digest(base: str) -> str:
    """sha256 of the shipped weights."""
    return hashlib.sha256((tiny.shipped(base) / "model.safetensors").read_bytes()).hexdigest()


def spread(record: dict[str, Any], step: int, name: str) -> str:
    """Mean and 95 % interval over seeds, in percent for rates."""
    values = [seed["evaluations"][str(step)][name] for seed in record["seeds"]]
    mean, half = seed_interval(values)
    if name.startswith(("pass@", "wrong", "finished")):
        return f"{mean:.1%} ± {half:.1%}" if name != "wrong_arithmetic" else f"{mean:.2%} ± {half:.2%}"
    return f"{mean:.3f} ± {half:.3f}"


def model_card(base: str, record: dict[str, Any]) -> str:
    """The card that lies beside the weights."""
    recipe = json.loads((tiny.shipped(base) / "pretrain.json").read_text())
    config = recipe["config"]
    steps = record["steps"]
    names = ("pass@1", "pass@4", "pass@32", "pass@64", "distinct_correct", "token_entropy", "answer_entropy",
             "mean_tokens", "finished", "wrong_arithmetic")  # fmt: skip
    table = "\n".join(f"| {n} | {spread(record, 0, n)} | {spread(record, steps, n)} |" for n in names)
    tempered = "\n".join(_tempered_row(record, t) for t in TEMPERATURES)
    kinds = record["seeds"][0]["evaluations"]["0"]["entropy_by_class"]
    classes = "\n".join(_class_row(record, name) for name in kinds)
    return f"""---
license: apache-2.0
library_name: transformers
---

# Base policy {base} of the tiny lab

{_attempts(base)} A Llama-format network (Qwen2's, see `rlvr_lab/policy/tiny.py`) of 3
layers and width 96 over a vocabulary of 128 words, untied embeddings, float32, for the Countdown task of
`rlvr_lab/tasks/countdown.py`. For teaching and tests; it knows nothing else. It was trained with attention heads of
width 24, 385,824 parameters, and is written with heads of width 32, which vLLM can run on a CPU: 422,976 parameters,
of which the 37,152 added ones are zero and stay zero in training.

## Recipe

`rlvr-lab pretrain --base {base} --out DIR` runs this recipe: {config["steps"]:,} steps of {config["batch"]} sequences,
seed {config["seed"]}, Muon {config["muon_lr"]} and AdamW {config["adamw_lr"]}, {config["goal_directed"]:.0%} of the
attempts goal-directed, give-up probability {config["give_up"]}. {_broadening(config)}Mean loss of the last 200 steps:
{recipe["loss_last_200"]:.4f} nats per response token. Written {recipe["written"]}; sha256 of `model.safetensors`:

    {digest(base)}

One tenth of all problems, chosen by a hash of numbers and target, was never trained on; the figures below use it.

## Measured

{record["problems"]} held-out problems, {record["samples"]} samples each, temperature 1, {len(record["seeds"])} seeds:
mean ± half-width of the 95 % Student-t interval. After: {steps} GRPO steps, `rlvr-lab train {RECIPES[base]}`.

| | before | after GRPO |
|---|---|---|
{table}

Sharpening without training (same problems, {len({r["seed"] for r in record["sharpening"]})} seeds, means):

| temperature | pass@1 | pass@32 | distinct_correct | token_entropy |
|---|---|---|---|---|
{tempered}

Mean token entropy in nats by what the token does, before and after (first seed):

| token | before | after |
|---|---|---|
{classes}

{_provenance(base, record)}
"""


def _attempts(base: str) -> str:
    attempts = tiny.BASES[base].attempts
    return "Writes a single attempt." if attempts == 1 else f"Writes up to {attempts} attempts."


def _broadening(config: dict[str, Any]) -> str:
    if not config["broaden_steps"]:
        return ""
    return (
        f"Then {config['broaden_steps']:,} steps with\nfresh optimizers, learning rate falling from "
        f"{config['broaden_factor']:.0%} to 0 and {config['broaden_goal_directed']:.0%} of the attempts goal-directed:"
        "\nthis lowers pass@1 and leaves pass@32, so that a run has room to show what it does.\n"
    )


def _provenance(base: str, record: dict[str, Any]) -> str:
    machine = record["machine"]
    other = "" if record["weights_sha256"] == digest(base) else _other_weights(record["weights_sha256"])
    return (
        f"Measured {record['date']} on {machine['processor']} with torch {machine['torch']}, transformers "
        f"{machine['transformers']}.{_time(base)}{other}"
    )


def _time(base: str) -> str:
    found = json.loads(TIMES.read_text()).get(base) if TIMES.exists() else None
    if found is None:
        return ""
    return (
        f"\nThe {found['steps']} steps without evaluations took {found['seconds']:.0f} s on "
        f"{found['machine']['processor']}, {found['machine']['threads']} threads\n({found['load_note']}, "
        f"{found['date']})."
    )


def _other_weights(measured: str) -> str:
    if measured in NARROW_HEADS:
        return (
            f"\nMeasured on the weights as they were before the heads were widened, sha256\n`{measured}`:\nthe same "
            "function up to rounding; only AdamW's steps on the query weights were 1.15 times as large relative to "
            "them."
        )
    return f"\nMeasured on other weights, sha256\n`{measured}`."


def _tempered_row(record: dict[str, Any], temperature: float) -> str:
    rows = [r for r in record["sharpening"] if r["temperature"] == temperature]
    mean = {n: float(np.mean([r[n] for r in rows])) for n in ("pass@1", "pass@32", "distinct_correct", "token_entropy")}
    return (
        f"| {temperature} | {mean['pass@1']:.1%} | {mean['pass@32']:.1%} | {mean['distinct_correct']:.2f} "
        f"| {mean['token_entropy']:.3f} |"
    )


def _class_row(record: dict[str, Any], name: str) -> str:
    ends = [record["seeds"][0]["evaluations"][s]["entropy_by_class"] for s in ("0", str(record["steps"]))]
    return f"| {name} | " + " | ".join(f"{e[name]:.3f}" if name in e else "-" for e in ends) + " |"


def main(
    base: Annotated[list[str] | None, typer.Option(help="S, R, or both.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 80,
    every: Annotated[int, typer.Option(help="Evaluate every so many steps.")] = 20,
    jobs: Annotated[int, typer.Option(help="Processes of one thread each; 1 runs with all threads.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the data files.")] = ROOT / "book" / "data",
    time_only: Annotated[bool, typer.Option("--time", help="Only time the steps of a run.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Only write the model cards from the data.")] = False,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
) -> None:
    """Measure the shipped bases; see the head of this file."""
    if cards:
        for name in base or ["S", "R"]:
            record = json.loads((ROOT / "book" / "data" / f"tiny_lab_{name}.json").read_text())
            (tiny.shipped(name) / "README.md").write_text(model_card(name, record))
        return
    if time_only:
        for name in base or ["S", "R"]:
            timed(name, load_note)
        return
    for name in base or ["S", "R"]:
        runs, tempered = each_seed(name, seeds, steps, every, jobs)
        record = {
            "command": f"python benchmarks/tiny_lab.py --base {name} --seeds {seeds} --steps {steps} --every {every}",
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | ({"threads": 1} if jobs > 1 else {}),
            "load_note": load_note,
            "weights_sha256": digest(name),
            "recipe": RECIPES[name],
            "problems": 96,
            "samples": 64,
            "steps": steps,
            "seeds": runs,
            "sharpening": tempered,
        }
        path = out / f"tiny_lab_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(record)) + "\n")
        print(f"written {path}; now: python benchmarks/tiny_lab.py --cards", flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
