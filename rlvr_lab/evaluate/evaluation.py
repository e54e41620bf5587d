"""Evaluate a policy on problems: sample, grade, and report pass@k with intervals, distinct solutions and entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.entropy import answer_entropy, pooled_token_entropy, sequence_entropy
from ..core.rollout import Rollout
from ..core.statistics import bootstrap_interval
from ..policy.load import Policy
from ..rollout.engine import Sampling, TransformersEngine
from ..rollout.grading import grade
from ..tasks.base import Task
from .passk import pass_at_k

DEFAULT_K = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class ProblemResult:
    """What one problem's samples gave. `distinct` counts different correct answers; entropy in nats."""

    problem: str
    samples: int
    correct: int
    distinct: int
    answer_entropy: float
    mean_tokens: float
    finished: float


@dataclass(frozen=True)
class Evaluation:
    """Results per problem, and token-level figures over all samples."""

    problems: tuple[ProblemResult, ...]
    temperature: float
    token_entropy: float
    sequence_entropy: float
    rollout: Rollout

    @property
    def samples(self) -> int:
        """Samples per problem."""
        return self.problems[0].samples

    @property
    def correct(self) -> list[int]:
        """Correct samples of each problem."""
        return [p.correct for p in self.problems]

    def pass_at(self, k: int) -> float:
        """Mean pass@k over problems."""
        return float(pass_at_k(self.samples, self.correct, k).mean())

    def mean(self, name: str) -> float:
        """Mean over problems of a field of `ProblemResult`."""
        return float(np.mean([getattr(p, name) for p in self.problems]))

    def summary(self, ks: Sequence[int] = DEFAULT_K, seed: int = 0) -> dict[str, Any]:
        """Figures as plain numbers; `pass@k` with a 95 % bootstrap interval over problems."""
        rng = np.random.default_rng(seed)
        out: dict[str, Any] = {
            "problems": len(self.problems),
            "samples": self.samples,
            "temperature": self.temperature,
        }
        for k in ks:
            if k <= self.samples:
                values = pass_at_k(self.samples, self.correct, k)
                out[f"pass@{k}"] = float(values.mean())
                out[f"pass@{k}_interval"] = list(bootstrap_interval(values, rng))
        out["distinct_correct"] = self.mean("distinct")
        out["answer_entropy"] = self.mean("answer_entropy")
        out["token_entropy"] = self.token_entropy
        out["sequence_entropy"] = self.sequence_entropy
        out["mean_tokens"] = self.mean("mean_tokens")
        out["finished"] = self.mean("finished")
        return out


def evaluate(
    policy: Policy,
    task: Task[Any],
    problems: Sequence[Any],
    *,
    samples: int,
    sampling: Sampling,
    seed: int = 0,
    report: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Draw `samples` responses per problem and grade them. The same seed gives the same figures on CPU.

    `report(rows)` is called as responses are completed. Raises ValueError for no problem or no sample.
    """
    if not problems or samples < 1:
        raise ValueError("an evaluation needs at least one problem and one sample per problem")
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    rollout = TransformersEngine(policy).sample(prompts, samples, sampling, generator, report=report)
    rollout = grade(rollout, task, problems, policy)
    entropy = rollout.statistics["token_entropy"]
    return Evaluation(
        problems=tuple(_one(rollout, i, problem, samples) for i, problem in enumerate(problems)),
        temperature=sampling.temperature,
        token_entropy=float(pooled_token_entropy(entropy, rollout.mask)),
        sequence_entropy=float(sequence_entropy(entropy, rollout.mask)),
        rollout=rollout,
    )


def _one(rollout: Rollout, i: int, problem: Any, samples: int) -> ProblemResult:
    rows = slice(i * samples, (i + 1) * samples)
    assert rollout.correct is not None
    assert rollout.answer is not None
    correct, answers = rollout.correct[rows].tolist(), rollout.answer[rows]
    return ProblemResult(
        problem=str(problem),
        samples=samples,
        correct=sum(correct),
        distinct=len({a for a, c in zip(answers, correct, strict=True) if c}),
        answer_entropy=answer_entropy(answers),
        mean_tokens=float(rollout.lengths[rows].float().mean()),
        finished=float(rollout.finished[rows].float().mean()),
    )
