"""A cold start by rejection sampling (Light-IF, arXiv 2508.03178): sort prompts, keep what is right, fine-tune on it.

    sample     `samples` responses to every problem of a run's pool, from its model
    sort       hard (never right), easy (always right), pass (sometimes right)        difficulty.json
    keep       correct responses to pass prompts, each once, `per_prompt` at most, of at least `least_tokens` tokens
    train      `train.sft` with one of its objectives                                 model/

The paper keeps responses that are "deep enough and fluent" as well; a least length stands for the first, and nothing
for the second, because our verifiers have no opinion on style [inferred]. Every stage leaves a file, and the same
command goes on from what is there. `difficulty.json` is what `methods.light_if.split` reads.

`lengths: adaptive` keeps by length instead (ARES, see `adaptive_start`): right responses near the length that a prompt
of this difficulty should have, easy prompts included.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.rollout import Rollout
from ..errors import UserError, nearest
from ..methods.light_if import difficulty, digest
from ..policy.load import Policy, load_policy
from ..rollout.episodes import for_task
from ..rollout.factory import make_engine
from ..rollout.grading import grade
from . import checkpoint, logs
from .adaptive_start import adaptive_rows, length_ends
from .collect import sampling_of
from .config import TrainConfig
from .console import Console, Silent
from .data import Problems, load_problems
from .seeds import numpy_generator, torch_generator
from .sft import Example, SFTSettings, fine_tune, measure

HELD_OUT_SHARE = 0.1
PROMPTS_AT_ONCE = 64
Lengths = Literal["any", "adaptive"]


@dataclass(frozen=True)
class ColdStart:
    """Settings beside those of the run (model, data, rollout) and of the fine-tuning."""

    samples: int = 8
    per_prompt: int = 2
    least_tokens: int = 0
    lengths: str = "any"
    tolerance: float = 0.25

    def __post_init__(self) -> None:
        if self.lengths not in get_args(Lengths):
            raise UserError(f"unknown --lengths '{self.lengths}'; {nearest(self.lengths, get_args(Lengths))}")
        if not self.tolerance > 0:
            raise UserError(f"--tolerance must be above 0, not {self.tolerance}")
        for name, least in (("samples", 2), ("per_prompt", 1), ("least_tokens", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be at least {least}, not {getattr(self, name)}")


def cold_start(
    config: TrainConfig, out: Path, settings: ColdStart, sft: SFTSettings, console: Console | None = None
) -> dict[str, Any]:
    """Do what is not done yet in `out` and return the summary, which `summary.json` holds.

    Raises UserError where `out` holds a cold start of other settings or something else, and where no prompt is solved
    sometimes, so that nothing can be kept.
    """
    console = console or Silent()
    if (out / "summary.json").exists():
        raise UserError(f"{out} already holds a finished cold start; choose another --out")
    policy = load_policy(config.model.path, device=config.model.device, dtype=config.model.dtype)
    problems = load_problems(config, policy, console.say)
    _claim(out, config, settings, sft)
    rows = _sample(config, out, settings, policy, problems, console)
    rates = rates_of(rows, len(problems.train), settings.samples)
    write_difficulty(out / "difficulty.json", problems.prompts, rates, settings.samples)
    sorted_: Counter[str] = Counter(difficulty(rate) for rate in rates)
    console.say(", ".join(f"{sorted_[name]} {name}" for name in ("hard", "pass", "easy")))
    ends = _length_ends(rows, rates, settings)
    examples = [
        (problems.prompts[row["problem"]], row["ids"])
        for row in (kept_rows(rows, rates, settings) if ends is None else _near(rows, rates, ends, settings, sft.seed))
    ]
    if len(examples) < 2:
        few = _nothing(sorted_, len(examples), settings, out) if ends is None else _none_near(len(examples), ends)
        raise UserError(few)
    taught, held_out = _divide(examples, sft.seed)
    before = measure(policy, held_out)
    console.begin("fine-tuning", sft.epochs * -(-len(taught) // sft.batch))
    try:
        history = fine_tune(policy, taught, sft, held_out=held_out, state=out / "state.pt", report=console.advance)
    finally:
        console.end()
    checkpoint.save_policy(out / "model", policy)
    summary = {
        "prompts": dict(sorted_),
        "rate": sum(rates) / len(rates),
        "kept": len(examples),
        "held_out": len(held_out),
        "before": before,
        "epochs": history,
        "settings": asdict(settings) | asdict(sft),
        "date": time.strftime("%F"),
    }
    if ends is not None:
        summary["lengths"] = {"never_solved": ends[0], "always_solved": ends[1]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "state.pt").unlink(missing_ok=True)
    return summary


def _nothing(found: Mapping[str, int], kept: int, settings: ColdStart, out: Path) -> str:
    """Why there is nothing to train on, and what would help."""
    if not found["pass"]:
        way = "easier" if found["hard"] >= found["easy"] else "harder"
        return (
            f"no prompt is solved only sometimes ({found['hard']} never, {found['easy']} always): use {way} data or "
            "raise --samples, with another --out"
        )
    return (
        f"{kept} responses were kept and at least 2 are needed: lower --least-tokens (now {settings.least_tokens}), or "
        f"raise data.pool, with another --out than {out}"
    )


def _none_near(kept: int, ends: tuple[float, float]) -> str:
    return (
        f"{kept} right responses are near their target length ({ends[0]:g} tokens for a prompt that is never solved, "
        f"{ends[1]:g} for one that always is) and at least 2 are needed: raise --tolerance or data.pool, with another "
        "--out"
    )


# -- sampling ---------------------------------------------------------------------------------------------------------


def _claim(out: Path, config: TrainConfig, settings: ColdStart, sft: SFTSettings) -> None:
    """Write the settings into a new folder, or check that they are those of the folder."""
    tree = config.model_dump(mode="json")
    asked = {
        "run": {name: tree[name] for name in ("seed", "model", "data", "rollout")},
        "cold_start": asdict(settings),
        "sft": asdict(sft),
    }
    path = out / "cold_start.json"
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is broken; choose another --out") from None
        differing = [name for name in asked if saved.get(name) != asked[name]]
        if differing:
            raise UserError(f"{out} holds a cold start with other settings ({differing[0]}); choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no cold start; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked, indent=1) + "\n")


def _sample(
    config: TrainConfig, out: Path, settings: ColdStart, policy: Policy, problems: Problems, console: Console
) -> list[dict[str, Any]]:
    """One row per response; chunks of prompts that are complete in responses.jsonl are not sampled again."""
    path = out / "responses.jsonl"
    per_chunk = PROMPTS_AT_ONCE * settings.samples
    rows = logs.read_jsonl(path)
    total = len(problems.train) * settings.samples
    done = total if len(rows) >= total else len(rows) // per_chunk * per_chunk
    rows = rows[:done]
    path.unlink(missing_ok=True)
    logs.append_jsonl(path, rows)
    if done == total:
        return rows
    engine = make_engine(config.rollout.engine, policy, config.rollout.vllm, prompts=problems.prompts[:4])
    playing = for_task(engine, problems.task, problems.train)
    console.begin("sampling", total, done)
    try:
        for chunk in range(done // per_chunk, -(-total // per_chunk)):
            indices = list(range(chunk * PROMPTS_AT_ONCE, min((chunk + 1) * PROMPTS_AT_ONCE, len(problems.train))))
            generator = torch_generator(config.seed, "cold start", chunk, policy.device)
            prompts = [problems.prompts[i] for i in indices]
            rollout = playing.sample(
                prompts, settings.samples, sampling_of(config), generator, problem_ids=indices, report=console.advance
            )
            found = rows_of(grade(rollout, problems.task, problems.train, policy))
            logs.append_jsonl(path, found)
            rows += found
    finally:
        console.end()
        engine.close()
    return rows


def rows_of(rollout: Rollout) -> list[dict[str, Any]]:
    """Problem, token ids and correctness of each response of a graded rollout."""
    assert rollout.correct is not None
    columns = (rollout.prompt_id.tolist(), rollout.response_ids.tolist(), rollout.lengths.tolist(),
               rollout.correct.tolist())  # fmt: skip
    return [{"problem": i, "ids": ids[:n], "correct": right} for i, ids, n, right in zip(*columns, strict=True)]


# -- choosing ---------------------------------------------------------------------------------------------------------


def rates_of(rows: Iterable[Mapping[str, Any]], problems: int, samples: int) -> list[float]:
    """Share of each problem's responses that is correct."""
    right = Counter(row["problem"] for row in rows if row["correct"])
    return [right[i] / samples for i in range(problems)]


def write_difficulty(path: Path, prompts: Sequence[Sequence[int]], rates: Sequence[float], samples: int) -> None:
    """What `methods.light_if.split` reads: the pool's name, and every prompt's rate of success."""
    kinds = [difficulty(rate) for rate in rates]
    path.write_text(json.dumps({"pool": digest(prompts), "samples": samples, "rates": list(rates), "kinds": kinds}))


def kept_rows(
    rows: Iterable[Mapping[str, Any]], rates: Sequence[float], settings: ColdStart
) -> list[Mapping[str, Any]]:
    """Correct responses to pass prompts, each text once, the first `per_prompt` of a prompt."""
    kept: list[Mapping[str, Any]] = []
    seen: set[tuple[int, ...]] = set()
    taken: Counter[int] = Counter()
    for row in rows:
        i, key = row["problem"], (row["problem"], *row["ids"])
        if not row["correct"] or difficulty(rates[i]) != "pass" or len(row["ids"]) < settings.least_tokens:
            continue
        if key in seen or taken[i] == settings.per_prompt:
            continue
        seen.add(key)
        taken[i] += 1
        kept.append(row)
    return kept


def _length_ends(
    rows: Sequence[Mapping[str, Any]], rates: Sequence[float], settings: ColdStart
) -> tuple[float, float] | None:
    """L(0) and L(1) of an adaptive cold start, None for another. Raises UserError where one is unknown."""
    if settings.lengths == "any":
        return None
    never, always = ends = length_ends(rows, rates)
    for value, often, way in ((never, "never", "harder"), (always, "always", "easier")):
        if math.isnan(value):
            raise UserError(
                f"no prompt is {often} solved, so that target lengths are unknown: use {way} data, raise data.pool, or "
                "set --lengths any, with another --out"
            )
    return ends


def _near(
    rows: Sequence[Mapping[str, Any]], rates: Sequence[float], ends: tuple[float, float], settings: ColdStart, seed: int
) -> list[Mapping[str, Any]]:
    generator = numpy_generator(seed, "cold start brackets", 0)
    cut = settings.tolerance, settings.per_prompt, settings.least_tokens
    return adaptive_rows(rows, rates, ends, *cut, generator)


def _divide(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and a tenth, at least one, to measure on."""
    order = numpy_generator(seed, "cold start held out", 0).permutation(len(examples)).tolist()
    n = max(1, round(HELD_OUT_SHARE * len(examples)))
    return [examples[i] for i in order[n:]], [examples[i] for i in order[:n]]
