"""Light-IF in the tiny lab: the experiments of its card, three seeds each, on rows of digits under rules.

    python benchmarks/light_if.py

- `base`: the shipped base I by number of rules.
- `rl`: GRPO without a bonus, with TEA's token weights, with these dealt anew inside each response, and with their mean.
- `dense`: points beside strict success against strict success alone, on problems of two and of four rules.
- `sft`: a cold start with Entropy-SFT, plain cross-entropy and a random token mask of the same size on the same kept
  responses; then the same short GRPO run from each.

Every run is appended to `book/data/light_if.json` as it ends, and a repeated command makes what is missing. About eight
minutes on one idle core. Held equal within an experiment: problems, samples, steps, learning rate and seeds. `--card`
only writes the model card of base I.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from recording import checked_digests

from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.evaluate.evaluation import evaluate
from rlvr_lab.policy.load import Policy, load_policy, resolve
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.grading import grade, response_texts
from rlvr_lab.tasks import instructions
from rlvr_lab.train.cold_start import ColdStart, kept_rows, rates_of, rows_of
from rlvr_lab.train.config import TrainConfig, load_config
from rlvr_lab.train.loop import Trainer, machine
from rlvr_lab.train.sft import SFTSettings, fine_tune, measure

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "light_if.json"
SEEDS = (0, 1, 2)
MODULES = ("methods.grpo", "methods.light_if", "tasks.instructions")
SHORT = ("rollout.prompts=12", "rollout.group_size=8", "update.minibatches=4", "evaluation.problems=0", "ledger.rows=0",
         "logging.samples=0", "logging.tensorboard=false", "logging.view=quiet")  # fmt: skip
PLAIN = ("methods.light_if.coefficient=0",)
ARMS = {
    "grpo": PLAIN,
    "light_if": (),
    "light_if_permuted": ("methods.light_if.weighting=permuted",),
    "light_if_uniform": ("methods.light_if.weighting=uniform",),
}
CURVES = ("reward", "accuracy", "token_entropy", "mean_tokens", "light_if.mean_weight")
STEPS = {"rl": 24, "dense": 20, "sft": 12}
SFT = SFTSettings(epochs=3, batch=32, rows=32, lr=3e-4)
COLD_POOL, COLD_SAMPLES = 500, 8


def figures(policy: Policy, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Strict success and entropies on 48 held-out problems, 16 samples each."""
    task = instructions.InstructionsTask(sizes=sizes)
    result = evaluate(
        policy, task, task.problems(48, 0, evaluation=True), samples=16, sampling=Sampling(max_tokens=24, rows=768),
        seed=1000 + seed,
    )  # fmt: skip
    summary = result.summary((1, 4, 16))
    names = ("pass@1", "pass@4", "pass@16", "token_entropy", "answer_entropy", "distinct_correct", "mean_tokens")
    return {name: summary[name] for name in names}


def trained(config: TrainConfig, sizes: tuple[int, ...]) -> dict[str, Any]:
    """One run: its curves, and figures of the policy at its end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run")
        history = trainer.run().history
        end = figures(trainer.policy, sizes, config.seed)
    return {"curve": {name: [row.get(name) for row in history] for name in CURVES}, "end": end}


def rl_runs(seed: int) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Token weights against their controls."""
    for arm, change in ARMS.items():
        config = load_config("light_if/tiny", [*SHORT, f"seed={seed}", f"steps={STEPS['rl']}", *change])
        yield {"arm": arm}, partial(trained, config, (2, 3, 4))


def dense_runs(seed: int) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Points beside strict success, and strict success alone."""
    for size in (4, 2):
        for dense in (True, False):
            settings = [f"data.settings.sizes=[{size}]", f"data.settings.dense={str(dense).lower()}"]
            config = load_config(
                "light_if/tiny", [*SHORT, *PLAIN, f"seed={seed}", f"steps={STEPS['dense']}", *settings]
            )
            name = {"size": size, "reward": "dense" if dense else "strict"}
            yield name, partial(trained, config, (size,))


def cold_examples(seed: int) -> tuple[list[Any], dict[str, Any]]:
    """Correct responses of base I to prompts that it solves sometimes, and how the prompts were sorted."""
    policy, task = load_policy("tiny/I", device="cpu"), instructions.InstructionsTask()
    pool = task.problems(COLD_POOL, 100 + seed)
    prompts = [task.prompt_ids(problem) for problem in pool]
    generator = torch.Generator().manual_seed(seed)
    rollout = TransformersEngine(policy).sample(prompts, COLD_SAMPLES, Sampling(max_tokens=24, rows=800), generator)
    rows = rows_of(grade(rollout, task, pool, policy))
    rates = rates_of(rows, len(pool), COLD_SAMPLES)
    kept = [(prompts[row["problem"]], row["ids"]) for row in kept_rows(rows, rates, ColdStart(samples=COLD_SAMPLES))]
    sorted_ = {"hard": sum(r == 0 for r in rates), "easy": sum(r == 1 for r in rates), "kept": len(kept)}
    return kept, sorted_


def sft_runs(seed: int) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Three objectives on the same responses, then the same reinforcement learning from each."""
    made: list[Any] = []

    def run(objective: str) -> dict[str, Any]:
        if not made:
            made.extend(cold_examples(seed))
        examples, sorted_ = made
        held_out, taught = examples[: len(examples) // 10], examples[len(examples) // 10 :]
        policy = load_policy("tiny/I", device="cpu")
        before = measure(policy, held_out)
        history = fine_tune(policy, taught, replace(SFT, objective=objective, seed=seed), held_out=held_out)
        after = figures(policy, (2, 3, 4), seed)
        with tempfile.TemporaryDirectory() as folder:
            policy.model.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            settings = [*SHORT, *PLAIN, f"seed={seed}", f"steps={STEPS['sft']}", f"model.path={folder}"]
            later = trained(load_config("light_if/tiny", settings), (2, 3, 4))
        return {"prompts": sorted_, "before": before, "epochs": history, "end": after, "rl": later}

    for objective in ("entropy", "plain", "random"):
        yield {"objective": objective}, partial(run, objective)


def base_runs(seed: int) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The shipped base by number of rules: success, complete previews, previewed rules kept."""
    for size in (2, 3, 4):
        yield {"size": size}, partial(figures_of_base, size, seed)


def figures_of_base(size: int, seed: int) -> dict[str, Any]:
    """`figures`, and what the previews are worth."""
    policy, problems = load_policy("tiny/I", device="cpu"), instructions.problems(48, 0, True, (size,))
    generator = torch.Generator().manual_seed(1000 + seed)
    rollout = TransformersEngine(policy).sample(
        [p.prompt_ids for p in problems], 16, Sampling(max_tokens=24, rows=768), generator
    )
    complete = loose = minded = kept = 0
    for i, text in zip(rollout.prompt_id.tolist(), response_texts(rollout, policy), strict=True):
        rules = problems[i].rules
        loose += instructions.verify(problems[i], text, scoring="loose").correct
        marks = text.split("</think>")[0].split()
        complete += marks == [instructions.MARKS[rule.kind] for rule in rules]
        row, _ = instructions.answer_of(text)
        for rule in rules:
            if row is not None and instructions.MARKS[rule.kind] in marks:
                minded += 1
                kept += instructions.keeps(row, rule)
    n = len(rollout)
    shares = {"loose": loose / n, "complete_preview": complete / n, "kept_of_previewed": kept / max(minded, 1)}
    return figures(policy, (size,), seed) | shares


EXPERIMENTS = {"base": base_runs, "rl": rl_runs, "dense": dense_runs, "sft": sft_runs}


def digest() -> str:
    """sha256 of the shipped weights."""
    return hashlib.sha256((Path(resolve("tiny/I")) / "model.safetensors").read_bytes()).hexdigest()


def about(load_note: str) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "command": "python benchmarks/light_if.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_note": load_note,
        "weights_sha256": digest(),
        "recipe": "light_if/tiny",
        "settings": list(SHORT),
        "steps": STEPS,
        "seeds": list(SEEDS),
        "evaluation": "48 held-out problems, 16 samples each, temperature 1",
    }


def card(record: dict[str, Any]) -> str:
    """The model card that lies beside the weights."""
    recipe = json.loads((Path(resolve("tiny/I")) / "pretrain.json").read_text())
    config = recipe["config"]
    columns = ("pass@1", "pass@16", "loose", "complete_preview", "kept_of_previewed", "token_entropy", "mean_tokens")
    lines = []
    for size in (2, 3, 4):
        rows = [row for row in record["base"] if row["size"] == size]
        cells = [_cell([row[name] for row in rows], name) for name in columns]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"""---
license: apache-2.0
library_name: transformers
---

# Base policy I of the tiny lab

Writes rows of digits under rules (`rlvr_lab/tasks/instructions.py`) and minds only some of the rules. Network,
tokenizer and size are those of the bases S and R: 3 layers of width 96 over 128 words, 422,976 parameters of which
37,152 are zero, untied embeddings, float32. For teaching and tests; it knows nothing else.

## Recipe

`rlvr-lab pretrain --base I --out DIR` runs this recipe: {config["steps"]:,} steps of {config["batch"]} demonstrations,
seed {config["seed"]}, Muon {config["muon_lr"]} and AdamW {config["adamw_lr"]}. A demonstration previews each rule with
probability {config["attention"]} and keeps what it previews. Mean loss of the last 200 steps:
{recipe["loss_last_200"]:.4f} nats per response token. Written {recipe["written"]}; sha256 of `model.safetensors`:

    {record["about"]["weights_sha256"]}

One tenth of all problems, chosen by a hash of the rules, was never trained on; the figures below use it.

## Measured

{record["about"]["evaluation"]}, 3 seeds: mean ± half-width of the 95 % Student-t interval, by number of rules.
`pass@1` is strict success; `complete_preview` the share of responses whose thinking part names every rule;
`kept_of_previewed` the share of named rules that the answer keeps.

| rules | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{table}

`python benchmarks/light_if.py` on {record["about"]["machine"]["processor"]}, {record["about"]["date"]}, torch
{record["about"]["machine"]["torch"]}, transformers {record["about"]["machine"]["transformers"]}.
"""


def _cell(values: list[float], name: str) -> str:
    mean, half = seed_interval(values)
    number = name in ("token_entropy", "mean_tokens")
    return f"{mean:.2f} ± {half:.2f}" if number else f"{mean:.1%} ± {half:.1%}"


def main(
    only: Annotated[list[str] | None, typer.Option(help="base, rl, dense, sft; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = len(SEEDS),
    out: Annotated[Path, typer.Option(help="The data file.")] = DATA,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
    write_card: Annotated[bool, typer.Option("--card", help="Only write the model card.")] = False,
) -> None:
    """Run the experiments; see the head of this file."""
    record = json.loads(out.read_text()) if out.exists() else {"about": about(load_note)}
    if write_card:
        (Path(resolve("tiny/I")) / "README.md").write_text(card(record))
        return
    if record["about"]["weights_sha256"] != digest():
        raise SystemExit(f"{out} was measured on other weights: remove it")
    record["about"]["digests"] = checked_digests(record["about"].get("digests", {}), MODULES, out)
    torch.set_num_threads(1)
    for seed in range(seeds):
        for experiment in only or list(EXPERIMENTS):
            rows = record.setdefault(experiment, [])
            for name, run in EXPERIMENTS[experiment](seed):
                key = name | {"seed": seed}
                if any(all(row[k] == v for k, v in key.items()) for row in rows):
                    continue
                started = time.process_time()
                rows.append(key | run() | {"cpu_seconds": round(time.process_time() - started, 1)})
                out.write_text(json.dumps(record, indent=1) + "\n")
                print(experiment, key, f"{rows[-1]['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
