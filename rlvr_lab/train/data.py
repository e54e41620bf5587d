"""Problems of a run, and which of them a step sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..policy.load import Policy, check_words
from ..tasks.base import Task
from ..tasks.benchmarks import benchmark, load_benchmark
from ..tasks.benchmarks import make_task as benchmark_task
from ..tasks.registry import entry
from .config import DataSection, TrainConfig
from .seeds import numpy_generator

Report = Callable[[str], None]


@dataclass(frozen=True)
class Problems:
    """A task with its training and evaluation problems; prompts are encoded once."""

    task: Task[Any]
    train: list[Any]
    prompts: list[list[int]]
    evaluation: list[Any]
    held_out: bool
    """False where the evaluation problems are training problems too."""
    benchmarks: dict[str, tuple[Task[Any], list[Any]]] = field(default_factory=dict)
    """Measured beside the evaluation problems, each with the task that asks and grades as it does."""

    def step_indices(self, seed: int, step: int, count: int) -> list[int]:
        """`count` problems for a step: the pool in a new order each epoch, without random state to keep."""
        total = len(self.train)
        chosen: list[int] = []
        position = step * count
        while len(chosen) < count:
            epoch, offset = divmod(position + len(chosen), total)
            order = numpy_generator(seed, "problem order", epoch).permutation(total)
            chosen += order[offset : offset + count - len(chosen)].tolist()
        return chosen


def load_problems(config: TrainConfig, policy: Policy, report: Report) -> Problems:
    """Problems for training and evaluation. Prompts that leave no room for `rollout.max_tokens` are dropped and
    counted; where none is left, UserError names the setting."""
    data, task = config.data, config.data.make_task()
    check_words(policy, data.task)
    if entry(data.task).file is None:
        train = _made(task, data, config.seed, report)
        evaluation = entry(data.task).problems(task, max(config.evaluation.problems, 1), 0, evaluation=True)
        held_out = True
    else:
        train = _read(task, data.file, data.pool, data, report)
        other = config.evaluation.file
        held_out = other is not None and other != data.file
        evaluation = _read(task, other, None, data, report) if held_out else train
    train, prompts = that_fit(train, task, policy, config.rollout.max_tokens, report)
    evaluation, _ = that_fit(evaluation, task, policy, config.rollout.max_tokens, report)
    benchmarks = _benchmarks(config, policy, report)
    return Problems(task, train, prompts, evaluation[: config.evaluation.problems], held_out, benchmarks)


def _made(task: Task[Any], data: DataSection, seed: int, report: Report) -> list[Any]:
    problems = entry(data.task).problems(task, data.pool, seed)
    if len(problems) < data.pool:
        report(f"task '{data.task}' has {len(problems)} distinct problems, fewer than data.pool={data.pool}")
    return problems


def _benchmarks(config: TrainConfig, policy: Policy, report: Report) -> dict[str, tuple[Task[Any], list[Any]]]:
    if config.evaluation.benchmarks and config.data.task != "math":
        raise UserError(f"evaluation.benchmarks needs data.task: math, not {config.data.task}")
    found: dict[str, tuple[Task[Any], list[Any]]] = {}
    for item in config.evaluation.benchmarks:
        name, _, file = item.partition("=")
        bad = config.data.max_bad_lines
        loaded = load_benchmark(benchmark(name), Path(file) if file else None, max_bad_rows=bad, report=report)
        task = benchmark_task(loaded.benchmark)
        kept, _ = that_fit(list(loaded.problems), task, policy, config.rollout.max_tokens, report)
        found[loaded.benchmark.name] = task, kept
    return found


def _read(task: Any, path: Path | None, limit: int | None, data: DataSection, report: Report) -> list[Any]:
    assert path is not None
    return list(task.load(path, limit=limit, max_bad_lines=data.max_bad_lines, report=report))


def that_fit(
    problems: list[Any],
    task: Task[Any],
    policy: Policy,
    max_tokens: int,
    report: Report,
    setting: str = "rollout.max_tokens",
) -> tuple[list[Any], list[list[int]]]:
    """Problems whose prompts leave room for `max_tokens`, with their prompts; the others are counted in one line of
    `report`. Raises UserError that names `setting` where none is left."""
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    window = getattr(policy.model.config, "max_position_embeddings", None)
    if window is None:
        return problems, prompts
    kept = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) <= window - max_tokens]
    if not kept:
        shortest = min(map(len, prompts))
        raise UserError(
            f"the model reads {window} tokens, the shortest prompt has {shortest} and {setting} is "
            f"{max_tokens}: no problem fits. Lower {setting} to at most {max(window - shortest, 0)}"
        )
    if len(kept) < len(problems):
        report(f"{len(problems) - len(kept)} of {len(problems)} prompts are too long for the model and were left out")
    return [problems[i] for i in kept], [prompts[i] for i in kept]
