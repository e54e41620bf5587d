"""Where branches sit and what they buy: AEPO, ARPO and controls on questions with tools, at equal generated tokens.

    python benchmarks/agentic_aepo.py --seeds 3

Two comparisons on base A, each arm with the same seeds and questions. `rollouts`: from the base itself, a prompt's
trajectories in the order in which they were sampled until a budget of generated tokens is used; probes count. How many
different sequences of tool calls, was one of them right, and where do branches sit. `training`: steps until as many
tokens were generated, probes included, then episodes on held-out questions. An equal number of tokens is not an equal
number of updates: branches share prefixes, so that tree arms make more steps. Results go to
`book/data/agentic_aepo.json`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "agentic_aepo.json"
SETTINGS = ("data.settings={hops: [2, 3]}", "rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4",
            "update.epochs=2", "update.micro_batch_rows=16", "evaluation.problems=48", "logging.tensorboard=false",
            "logging.samples=0", "ledger.rows=0")  # fmt: skip
AEPO = "methods={grpo: {preset: tiny}, agentic_aepo: {preset: tiny%s}}"
ARMS = {
    "grpo": ["methods={grpo: {preset: tiny}}"],
    "arpo": [AEPO % ", monitor: false, rule: arpo, coefficient: 0.0, preserve: false"],
    "aepo": [AEPO % ""],
    "random": [AEPO % ", weight: 0.0"],
    "ppo_clip": [AEPO % ", preserve: false"],
}
ROLLOUT_ARMS = {name: ARMS[name] for name in ("grpo", "arpo", "aepo", "random")}
"""The clip plays no part in a rollout."""
MODULES = ("methods.agentic_aepo", "methods._branching")
COLUMNS = ("accuracy", "token_entropy", "generated_tokens", "clip_high", "ratio_max")
SAMPLES = 8
DISTANCES = 12


def trainer_of(arm: str, seed: int, folder: str, further: list[str]) -> Any:
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", "steps=200", *SETTINGS, *ARMS[arm], *further]
    return Trainer(load_config("agentic_aepo/tiny", settings), Path(folder) / "run")


def calls_of(rollout: Any, row: int, policy: Any) -> tuple[str, ...]:
    """The tool calls of one episode, in order: its identity in the count of different sequences."""
    from rlvr_lab.rollout.episodes import actions_of

    actions = (" ".join(text.split()) for text in actions_of(rollout, row, policy))
    return tuple(text for text in actions if not text.endswith("</answer>"))


def by_distance(rollout: Any) -> list[float | None]:
    """Mean token entropy at 0, 1, ... actions behind the newest answer of a tool."""
    sums, counts = [0.0] * DISTANCES, [0] * DISTANCES
    entropy = rollout.statistics["token_entropy"].tolist()
    chosen, lengths = rollout.action_mask.tolist(), rollout.lengths.tolist()
    for row, length in enumerate(lengths):
        distance: int | None = None  # nothing was answered yet
        for t in range(length):
            if not chosen[row][t]:
                distance = 0
            elif distance is not None:
                if distance < DISTANCES:
                    sums[distance] += entropy[row][t]
                    counts[distance] += 1
                distance += 1
    return [rounded(s / n) if n >= 20 else None for s, n in zip(sums, counts, strict=True)]


def held_out(trainer: Any) -> dict[str, Any]:
    """Episodes of the policy on held-out questions, sampled plainly whatever the arm."""
    import torch

    from rlvr_lab.core.reduce import masked_mean
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.episodes import for_task
    from rlvr_lab.rollout.grading import grade

    task, problems, policy = trainer.problems.task, trainer.problems.evaluation, trainer.policy
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    engine = for_task(trainer.engine, task, problems)
    rollout = engine.sample(prompts, SAMPLES, Sampling(max_tokens=112), torch.Generator().manual_seed(99))
    rollout = grade(rollout, task, problems, policy)
    calls = [calls_of(rollout, row, policy) for row in range(len(rollout))]
    different = [len(set(calls[i : i + SAMPLES])) for i in range(0, len(calls), SAMPLES)]
    right = rollout.correct.view(-1, SAMPLES)
    return {
        "episodes": len(rollout),
        "success": rounded(float(right.float().mean())),
        "solved": rounded(float(right.any(1).float().mean())),
        "sequences": rounded(sum(different) / len(different)),
        "calls": rounded(sum(map(len, calls)) / len(calls)),
        "token_entropy": rounded(float(masked_mean(rollout.statistics["token_entropy"], rollout.mask))),
        "entropy_by_distance": by_distance(rollout),
    }


def trained(arm: str, seed: int, budget: int) -> dict[str, Any]:
    """Steps until `budget` tokens were generated, then held-out episodes."""
    with tempfile.TemporaryDirectory(prefix=f"aepo_{arm}_{seed}_") as folder:
        trainer, rows, spent, started = trainer_of(arm, seed, folder, []), [], 0.0, time.process_time()
        while spent < budget:
            rows.append(trainer.step(len(rows)))
            spent += rows[-1]["generated_tokens"]
        trainer.log.close()
        steps = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
        return {"steps": steps, "end": held_out(trainer), "generated": spent,
                "cpu_seconds": rounded(time.process_time() - started)}  # fmt: skip


def rolled_out(arm: str, seed: int, budget: int, prompts: int = 32, size: int = 12) -> dict[str, Any]:
    """A prompt's trajectories from the base, cut where `budget` tokens a prompt are used."""
    import torch

    from rlvr_lab.methods.agentic_aepo import most_branched_share
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.episodes import for_task
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.rollout.meter import Meter

    with tempfile.TemporaryDirectory(prefix=f"aepo_{arm}_{seed}_") as folder:
        trainer = trainer_of(arm, seed, folder, [])
    task, problems, policy = trainer.problems.task, trainer.problems.train[:prompts], trainer.policy
    owner, meter = trainer.pipeline.owner("sample"), Meter(trainer.engine)
    engine = for_task(meter, task, problems)
    sampling, generator = Sampling(max_tokens=112, streams="prompt"), torch.Generator().manual_seed(seed)
    sample = owner.sample if owner else type(engine).sample
    given = (engine, trainer.problems.prompts[:prompts], size, sampling, generator)
    rollout = grade(sample(*given, problem_ids=list(range(prompts))), task, problems, policy)
    probes = (meter.tokens - int(rollout.sampled.sum())) / prompts
    kept, sequences, solved = [], [], []
    for group in range(prompts):
        rows = (rollout.group_id == group).nonzero().squeeze(1).tolist()
        spent, mine = probes, []
        for row in rows:
            spent += int(rollout.sampled[row].sum())
            if spent > budget:
                break
            mine.append(row)
        kept.append(len(mine))
        sequences.append(len({calls_of(rollout, row, policy) for row in mine}))
        solved.append(any(bool(rollout.correct[row]) for row in mine))
    parents = rollout.parent_id
    return {
        "prompts": prompts,
        "probe_tokens": rounded(probes),
        "tokens_per_response": rounded(float(rollout.sampled.sum()) / len(rollout)),
        "responses": rounded(sum(kept) / prompts),
        "sequences": rounded(sum(sequences) / prompts),
        "solved": rounded(sum(solved) / prompts),
        "branches": rounded(float((parents >= 0).sum()) / prompts),
        "most_branched": rounded(most_branched_share(rollout.group_id, rollout.path_id, parents)),
        "entropy_by_distance": by_distance(rollout) if arm == "grpo" else None,
    }


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    budget: Annotated[int, typer.Option(help="Generated tokens of a training run.")] = 12000,
    prompt_budget: Annotated[int, typer.Option(help="Generated tokens a prompt of a rollout.")] = 110,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    empty = {"base": {}, "rollouts": {}, "arms": {}}
    record = opened(out, empty, "agentic_aepo.py", "agentic_aepo/tiny", SETTINGS, 0, MODULES)
    record |= {"budget": budget, "prompt_budget": prompt_budget, "group_of_a_rollout": 12, "samples": SAMPLES}
    for seed in map(str, range(seeds)):
        if seed not in record["base"]:
            with tempfile.TemporaryDirectory() as folder:
                record["base"][seed] = held_out(trainer_of("grpo", int(seed), folder, []))
        for kind, known, run, tokens in (
            ("rollouts", ROLLOUT_ARMS, rolled_out, prompt_budget),
            ("arms", ARMS, trained, budget),
        ):
            for arm in (arm for arm in chosen if arm in known):
                entry = record[kind].setdefault(arm, {"setting": ARMS[arm], "seeds": {}})
                if seed not in entry["seeds"]:
                    entry["seeds"][seed] = found = run(arm, int(seed), tokens)
                    save(out, record)
                    print(kind, arm, seed, {k: v for k, v in found.items() if k != "steps"}, flush=True)


if __name__ == "__main__":
    typer.run(main)
