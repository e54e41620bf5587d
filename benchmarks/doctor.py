"""The doctor on runs whose fault is known: planted against found, and healthy runs that must come back clean.

    python benchmarks/doctor.py --work DIR [--only NAME] [--seeds 3] [--diagnose-only]

Every plant is a real run of the tiny lab (10 to 40 steps): through a setting where one makes the fault, otherwise
through a method object that is put into the composition after construction. Runs are kept in the work folder and are
not repeated, so an interrupted call goes on where it stopped. Written: `benchmarks/results/doctor.json` with, for
each run, all findings and the figures they rest on; printed: the confusion matrix.

A run counts as *found* where the planted fault is the first finding above "note", as *listed* where it stands above
"note" but not first, and as *missed* otherwise. Every other finding above "note" is an extra one, and is listed.

The rules were set on such runs, so most of this table is a fit and not a forecast; `TRIALS` says how often they were
right on runs that they had not seen.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout import engine as engine_module
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.grading import grade
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask
from rlvr_lab.train.config import load_config
from rlvr_lab.train.console import Lines
from rlvr_lab.train.doctor import Report, diagnose, examine
from rlvr_lab.train.doctor_record import History
from rlvr_lab.train.doctor_rules import RULES
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
HEALTHY = "healthy"

# fast steps (64 or 128 responses) and a small evaluation: what the doctor reads is the log, not the level of skill
QUICK = (
    "rollout.prompts=8", "rollout.group_size=8", "evaluation.problems=32", "evaluation.samples=8",
    "logging.tensorboard=false", "logging.samples=0", "checkpoint.every=1000",
)  # fmt: skip
SMALL = (*QUICK, "rollout.prompts=16")
RECOMPUTE = "update.recompute_old_logprob=true"


TRIALS = (
    "Rules set on seed 0 under an earlier recipe (lr 5e-4, groups of 16). Seed 1 of the same, unseen: 15 of 16 plants "
    "found, no extra finding, the healthy run clean. Missed: 'already_solved', whose pool was solved in 80 % of the "
    "samples only; that plant was replaced (it is now the healthy 'solves_easy_problems'), the rule was not.",
    "Same rules, recipe of today (lr 5.7e-4, 6 minibatches), seeds 0 to 2, all unseen: 46 of 48 found, no extra "
    "finding, 16 of 16 healthy runs clean. Missed: 'entropy_bonus_0.2' seed 1, which ended as its explosion began "
    "(entropy 1.49 times the early level, threshold 1.5), and 'lr_1.5e-3_no_warmup' seed 0 (median KL 0.019, "
    "threshold 0.02).",
    "Then two rules were amended (explosion: also the last three steps; learning rate: mean instead of median KL), "
    "which finds both. Seeds 3 and 4 of these two plants and of 'grpo_S', run afterwards: 4 of 4 found, 2 of 2 clean.",
)
"""What came out before the rules were last changed."""


# -- planted methods ------------------------------------------------------------------------------------------------


class LikelyPositiveOnly(Method):
    """Keeps of every minibatch the tokens of positive advantage that were likelier than typical."""

    slug = "likely_positive_only"
    requires = ("old_logprob", "token_entropy")

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        likely = batch.require("old_logprob", by=self.slug) > -batch.require("token_entropy", by=self.slug)
        return (likely & (advantage_BT > 0)).to(advantage_BT.dtype)


class MajorityReward(Method):
    """Pays for agreeing with the group's most frequent answer, right or wrong: likely tokens are made likelier."""

    slug = "majority_reward"
    replaces_reward = True

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        assert rollout.answer is not None
        paid = torch.zeros(len(rollout), device=rollout.response_ids.device)
        for group in rollout.group_id.unique():
            rows = (rollout.group_id == group).nonzero().squeeze(1).tolist()
            answers = [rollout.answer[i] for i in rows]
            most = max(set(answers), key=lambda a: (a is not None, answers.count(a), str(a)))
            for i in rows:
                paid[i] = float(rollout.answer[i] == most and most is not None)
        return {"majority": paid}


class NoisySampler(Method):
    """Reports log-probs with Gaussian noise, as a sampling engine of other numerics does, only more."""

    slug = "noisy_sampler"

    def __init__(self, nats: float = 0.1) -> None:
        self.nats = nats

    def sample(self, engine: TransformersEngine, *args: Any, **options: Any) -> Rollout:
        rollout = engine.sample(*args, **options)
        generator = torch.Generator().manual_seed(int(options.get("version", 0)))
        noise = self.nats * torch.randn(rollout.behaviour_logprob.shape, generator=generator)
        noisy = rollout.behaviour_logprob + noise * rollout.mask
        return rollout.with_(behaviour_logprob=noisy, old_logprob=noisy.clone())


class StaleSampler(Method):
    """Hands out the rollout of `lag` steps ago, with the log-probs it was sampled with."""

    slug = "stale_sampler"

    def __init__(self, lag: int = 8) -> None:
        self.lag = lag
        self.queue: deque[Rollout] = deque()

    def sample(self, engine: TransformersEngine, *args: Any, **options: Any) -> Rollout:
        self.queue.append(engine.sample(*args, **options))
        return self.queue.popleft() if len(self.queue) > self.lag else self.queue[0]


class NucleusSampler(Method):
    """Samples from the smallest set of tokens that holds `top_p`, and reports the renormalised log-probs."""

    slug = "nucleus_sampler"

    def __init__(self, top_p: float = 0.8) -> None:
        self.top_p = top_p

    def sample(self, engine: TransformersEngine, *args: Any, **options: Any) -> Rollout:
        with _drawing(lambda *rest: nucleus_draw(*rest, top_p=self.top_p)):
            return engine.sample(*args, **options)


def nucleus_draw(logits_BV: Tensor, temperature: float, generator: torch.Generator, top_p: float) -> Any:
    """`rollout.engine.draw` under top-p: log-probs of the truncated distribution, entropy of the full one."""
    ordered, order = torch.softmax(logits_BV / temperature, -1).sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    kept = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    log_p = torch.log_softmax(logits_BV / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    tokens = torch.multinomial(kept, 1, generator=generator)
    return tokens.squeeze(-1), (kept / kept.sum(-1, keepdim=True)).gather(-1, tokens).log().squeeze(-1), entropy


@contextmanager
def _drawing(draw: Callable[..., Any]) -> Iterator[None]:
    before = engine_module.draw
    engine_module.draw = draw
    try:
        yield
    finally:
        engine_module.draw = before


class DeadBonus(Method):
    """An entropy bonus computed from detached entropies: it has a value and no gradient."""

    slug = "dead_bonus"
    needs_entropy = True

    def regularise(self, inputs: LossInputs) -> Tensor:
        assert inputs.entropy is not None
        return -0.01 * inputs.entropy.detach()


class LengthReward(Method):
    """Pays for every token, on top of the task's reward."""

    slug = "length_reward"

    def __init__(self, per_token: float = 0.05) -> None:
        self.per_token = per_token

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"length": self.per_token * rollout.lengths.float()}


# -- plants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """One planted fault (None: a healthy run) and how it is made. `pool` names a choice of problems."""

    name: str
    fault: str | None
    settings: tuple[str, ...]
    methods: tuple[Callable[[], Method], ...] = ()
    recipe: str = "arena/tiny"
    pool: str | None = None
    seeds: int | None = None
    after: str | None = None
    """Name of an earlier plant whose trained policy this run starts from."""


RETRIES = "grpo/tiny_retries"
PLANTS = (
    Plant("grpo_S", None, (*SMALL, "steps=40")),
    Plant("likely_positive_only", "collapse", (*SMALL, "steps=30", "optimizer.lr=1e-3"), (LikelyPositiveOnly,)),
    Plant("majority_reward", "collapse", (*SMALL, "steps=30"), (MajorityReward,)),
    Plant("entropy_bonus_0.2", "explosion", (*SMALL, "steps=24", "methods.entropy_bonus.coefficient=0.2")),
    Plant("narrow_clip", "clip_saturation", (*QUICK, "steps=12", "update.minibatches=16", "update.epochs=2",
          "methods.grpo.clip_low=0.001", "methods.grpo.clip_high=0.001")),
    Plant("noisy_logprobs", "mismatch", (*QUICK, "steps=12", RECOMPUTE), (NoisySampler,)),
    Plant("noisy_logprobs_not_recomputed", "mismatch", (*QUICK, "steps=12"), (NoisySampler,)),
    Plant("unsolvable", "degenerate_groups", (*QUICK, "steps=12"), pool="never"),
    Plant("unsolvable_or_always", "degenerate_groups", (*QUICK, "steps=12"), recipe=RETRIES, pool="mixed"),
    Plant("length_reward", "length_drift", (*QUICK, "steps=24"), (LengthReward,), recipe=RETRIES),
    # starts at 80 % and solves its few problems within the run: success, which must stay a note
    Plant("solves_easy_problems", None, (*QUICK, "steps=12"), recipe=RETRIES, pool="always"),
    Plant("already_solved", "reward_saturation", (*QUICK, "steps=12"), recipe=RETRIES, pool="always",
          after="solves_easy_problems"),
    Plant("lr_3e-3", "learning_rate", (*SMALL, "steps=24", "optimizer.lr=3e-3")),
    Plant("lr_1.5e-3_no_warmup", "learning_rate", (*SMALL, "steps=24", "optimizer.lr=1.5e-3", "optimizer.warmup=0")),
    Plant("stale_8", "stale_data", (*QUICK, "steps=24"), (StaleSampler,)),
    Plant("top_p_0.8", "sampler_truncation", (*QUICK, "steps=12", RECOMPUTE), (NucleusSampler,)),
    Plant("top_p_0.8_not_recomputed", "sampler_truncation", (*QUICK, "steps=12"), (NucleusSampler,)),
    Plant("detached_bonus", "dead_regulariser", (*QUICK, "steps=10"), (DeadBonus,)),
    Plant("grpo_S_other_evaluation", None, (*SMALL, "steps=30", "evaluation.every=10", "evaluation.samples=16"),
          seeds=1),
    Plant("grpo_S_recomputed", None, (*SMALL, "steps=24", RECOMPUTE), seeds=1),
    Plant("grpo_R", None, (*QUICK, "steps=30"), recipe=RETRIES, seeds=1),
    Plant("small_bonus", None, (*SMALL, "steps=24", "methods.entropy_bonus.coefficient=0.005"), seeds=1),
)  # fmt: skip


def solve_rates(base: str, work: Path, count: int = 600, samples: int = 16) -> list[float]:
    """Share of correct responses of a shipped base on each training problem of seed 0; kept in the work folder."""
    path = work / f"solve_rates_{base}.json"
    if path.exists():
        found: list[float] = json.loads(path.read_text())
        return found
    policy, problems = load_policy(f"tiny/{base}", device="cpu"), countdown.problems(count, 0)
    prompts = [list(p.prompt_ids) for p in problems]
    sampling = Sampling(1.0, 32 if base == "S" else 96, 512)
    rollout = TransformersEngine(policy).sample(prompts, samples, sampling, torch.Generator().manual_seed(0))
    graded = grade(rollout, CountdownTask(), problems, policy)
    assert graded.correct is not None
    rates: list[float] = graded.correct.float().view(count, samples).mean(1).tolist()
    path.write_text(json.dumps(rates))
    return rates


def unsolvable(count: int, seed: int = 0) -> list[countdown.Problem]:
    """Problems without any solution: three numbers up to 3 give at most 27, the target lies above. (Problems that the
    base missed in 24 samples are no plant: it solves some of them later and learns from that.)"""
    rng = np.random.default_rng(seed)
    rows = zip(rng.integers(1, 4, (count, 3)).tolist(), rng.integers(40, 61, count).tolist(), strict=True)
    return [countdown.Problem(tuple(numbers), target) for numbers, target in rows]


def restrict(trainer: Trainer, pool: str, base: str, work: Path) -> None:
    """Train on problems that have no solution, that the base always solves, or an equal number of both."""
    chosen = unsolvable(64)
    if pool != "never":
        rates, problems = solve_rates(base, work), countdown.problems(600, 0)
        always = [problems[i] for i, rate in enumerate(rates) if rate == 1]
        chosen = always if pool == "always" else [*always[:64], *chosen[: len(always)]]
    prompts = [list(problem.prompt_ids) for problem in chosen]
    trainer.problems = replace(trainer.problems, train=chosen, prompts=prompts)


def make_run(plant: Plant, seed: int, work: Path) -> Path:
    """Train one plant unless its run is already there; returns the run folder."""
    out = work / "runs" / f"{plant.name}-{seed}"
    if (out / "summary.json").exists() or (out / "stopped.txt").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    started = time.process_time()
    start = [f"model.path={work / 'runs' / f'{plant.after}-{seed}' / 'model'}"] if plant.after else []
    settings = [*plant.settings, *start, f"seed={seed}"]
    trainer = Trainer(load_config(plant.recipe, settings), out, console=Lines())
    if plant.methods:
        own = [build(slug, settings) for slug, settings in trainer.config.methods.items()]
        trainer.use(compose([*own, *(make() for make in plant.methods)]))
    if plant.pool:
        restrict(trainer, plant.pool, "R" if plant.recipe.endswith("retries") else "S", work)
    try:
        trainer.run()
    except RuntimeError as error:  # a run that breaks off is a run to be diagnosed
        (out / "stopped.txt").write_text(str(error))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if plant.name not in {p.after for p in PLANTS}:
        shutil.rmtree(out / "model", ignore_errors=True)
    print(f"{out.name}: {time.process_time() - started:.0f} CPU s", flush=True)
    return out


# -- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the doctor said of one run: the first finding above "note", all above "note", and all notes."""

    run: str
    planted: str
    report: Report

    @property
    def listed(self) -> list[str]:
        return [f.fault for f in self.report.findings if f.severity != "note"]

    @property
    def found(self) -> str:
        return self.listed[0] if self.listed else HEALTHY

    @property
    def outcome(self) -> str:
        if self.planted == HEALTHY:
            return "clean" if not self.listed else "false alarm"
        return "found" if self.found == self.planted else "listed" if self.planted in self.listed else "missed"

    def record(self) -> dict[str, Any]:
        """What is kept of the run."""
        return {
            "run": self.run,
            "planted": self.planted,
            "outcome": self.outcome,
            "above_note": self.listed,
            "extra": [fault for fault in self.listed if fault != self.planted],
            **{k: v for k, v in self.report.as_dict().items() if k != "run"},
        }


def verdicts(work: Path) -> list[Verdict]:
    """Diagnose every run of the work folder, in the order of the plants."""
    found = []
    for plant in PLANTS:
        for out in sorted((work / "runs").glob(f"{plant.name}-?")):
            found.append(Verdict(out.name, plant.fault or HEALTHY, diagnose(out)))
    return found


def recorded() -> list[Verdict]:
    """The 80-step runs of both shipped bases that the book shows; they hold fewer columns than a run of today."""
    found = []
    for base in ("S", "R"):
        for seed in json.loads((ROOT / "book" / "data" / f"tiny_lab_{base}.json").read_text())["seeds"]:
            rows = seed["history"]
            columns = {k: np.array([float(row[k]) for row in rows]) for k in rows[0] if k != "step"}
            evaluations = [{"step": int(step), **values} for step, values in seed["evaluations"].items()]
            history = History(np.array([row["step"] for row in rows]), columns, evaluations)
            name = f"recorded_{base}-{seed['seed']}"
            found.append(Verdict(name, HEALTHY, examine(history, name)))
    return found


def matrix(found: list[Verdict]) -> dict[str, dict[str, int]]:
    """Planted fault -> first finding above "note" (or healthy) -> number of runs."""
    faults = [HEALTHY, *(rule.fault for rule in RULES)]
    table = {planted: dict.fromkeys(faults, 0) for planted in faults}
    for verdict in found:
        table[verdict.planted][verdict.found] += 1
    return table


def tell(found: list[Verdict]) -> None:
    """Print the matrix, and every run that was not as it should be."""
    table = matrix(found)
    names = list(table)
    print(f"\n{'planted':20s} " + " ".join(f"{i:>3d}" for i in range(len(names))) + "   found first (column)")
    for i, (planted, row) in enumerate(table.items()):
        print(f"{i:2d} {planted:17s} " + " ".join(f"{row[name] or '.':>3}" for name in names))
    for verdict in found:
        extra = [fault for fault in verdict.listed if fault != verdict.planted]
        if verdict.outcome not in ("found", "clean") or extra:
            print(f"{verdict.run}: planted {verdict.planted}, {verdict.outcome}; above a note: {verdict.listed}")
    counts = {o: sum(v.outcome == o for v in found) for o in ("found", "listed", "missed", "clean", "false alarm")}
    print(counts, flush=True)


def main(
    work: Annotated[Path, typer.Option(help="Where runs are kept; a second call goes on there.")] = Path("doctor_runs"),
    only: Annotated[list[str] | None, typer.Option(help="Plants to run, by name.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each planted fault.")] = 3,
    diagnose_only: Annotated[bool, typer.Option("--diagnose-only", help="Train nothing.")] = False,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
) -> None:
    """Plant every fault, ask the doctor, print the confusion matrix; see the head of this file."""
    torch.set_num_threads(1)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    for seed in range(0 if diagnose_only else max(seeds, 3)):
        for plant in PLANTS:
            if seed < (plant.seeds or seeds) and (not only or plant.name in only):
                make_run(plant, seed, work)
    found = [*verdicts(work), *recorded()]
    tell(found)
    record = {
        "command": f"python benchmarks/doctor.py --seeds {seeds}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "load_note": load_note,
        "plants": {p.name: {"fault": p.fault, "recipe": p.recipe, "settings": p.settings} for p in PLANTS},
        "trials": TRIALS,
        "matrix": matrix(found),
        "runs": [verdict.record() for verdict in found],
    }
    path = ROOT / "benchmarks" / "results" / "doctor.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
