"""Evaluate a policy on problems: sample, grade, and report pass@k and maj@k with intervals, and entropies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..core.entropy import answer_entropy, pooled_token_entropy, sequence_entropy
from ..core.rollout import Rollout
from ..core.statistics import bootstrap_interval
from ..policy.load import Policy
from ..rollout.engine import Sampling, TransformersEngine
from ..rollout.episodes import for_task
from ..rollout.grading import grade
from ..tasks.base import Task
from .majority import Votes, majority_at_k, votes_of
from .passk import pass_at_k

DEFAULT_K = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class ProblemResult:
    """What one problem's samples gave. `distinct` counts different correct answers; entropies in nats.

    `finished`: share of responses that ended by themselves; the rest was cut at the length limit.
    """

    problem: str
    samples: int
    correct: int
    distinct: int
    answer_entropy: float
    mean_tokens: float
    finished: float
    token_entropy: float | None = None
    """Mean over all tokens of the problem's responses; None where the engine records no entropies."""
    votes: Votes = ()
    """Samples per answer, and whether it is correct; see `majority`."""


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
        """Figures as plain numbers; see `summarise`."""
        own = {"token_entropy": self.token_entropy, "sequence_entropy": self.sequence_entropy}
        return summarise(self.problems, self.temperature, ks, seed) | own


def summarise(
    problems: Sequence[ProblemResult], temperature: float, ks: Sequence[int] = DEFAULT_K, seed: int = 0
) -> dict[str, Any]:
    """Figures over problems as plain numbers, each k up to the number of samples.

    `avg@n`: mean correctness of all n samples. `pass@k`, `maj@k`: mean over problems. Each of them has a 95 %
    bootstrap interval over problems, `..._interval`. `token_entropy` weighs every token alike, `sequence_entropy` is
    the mean over responses of summed token entropies; both None where the engine records none. `truncated` is the
    share of responses cut at the length limit. Raises ValueError for no problem, or unequal numbers of samples.
    """
    if len({p.samples for p in problems}) != 1:
        raise ValueError("a summary needs at least one problem, and as many samples for each")
    samples, rng = problems[0].samples, np.random.default_rng(seed)
    out: dict[str, Any] = {"problems": len(problems), "samples": samples, "temperature": temperature}
    ks = [k for k in ks if k <= samples]
    for k in ks:
        out |= _with_interval(f"pass@{k}", pass_at_k(samples, [p.correct for p in problems], k), rng)
    # the same resampled problems for what follows, so that avg@n and maj@1 agree with pass@1 in their intervals too
    again = partial(np.random.default_rng, seed)
    out |= _with_interval(f"avg@{samples}", np.array([p.correct / samples for p in problems]), again())
    votes = np.array([majority_at_k(samples, p.votes, ks) for p in problems])
    for i, k in enumerate(ks):
        out |= _with_interval(f"maj@{k}", votes[:, i], again())
    for name in ("distinct", "answer_entropy", "mean_tokens", "finished"):
        key = "distinct_correct" if name == "distinct" else name
        out[key] = float(np.mean([getattr(p, name) for p in problems]))
    out["truncated"] = 1.0 - out["finished"]
    return out | _entropies(problems)


def _with_interval(name: str, values: Any, rng: np.random.Generator) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name}_interval": list(bootstrap_interval(values, rng))}


def _entropies(problems: Sequence[ProblemResult]) -> dict[str, float | None]:
    tokens = [p.mean_tokens * p.samples for p in problems]
    known = [p.token_entropy for p in problems if p.token_entropy is not None]
    if len(known) < len(problems) or not sum(tokens):
        return {"token_entropy": None, "sequence_entropy": None}
    summed = sum(h * n for h, n in zip(known, tokens, strict=True))
    return {"token_entropy": summed / sum(tokens), "sequence_entropy": summed / sum(p.samples for p in problems)}


def evaluate(
    policy: Policy,
    task: Task[Any],
    problems: Sequence[Any],
    *,
    samples: int,
    sampling: Sampling,
    seed: int = 0,
    report: Callable[[int], None] = lambda rows: None,
    engine: Any = None,
) -> Evaluation:
    """Draw `samples` responses per problem and grade them. The same seed gives the same figures on CPU.

    `engine`: what samples (`rollout.factory.Engine`), by default the policy itself, in episodes where the task is an
    environment; an engine that is given must play them itself. `report(rows)` is called as
    responses are completed. Raises ValueError for no problem or no sample.
    """
    if not problems or samples < 1:
        raise ValueError("an evaluation needs at least one problem and one sample per problem")
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    generator = torch.Generator(device=policy.device).manual_seed(seed)
    engine = engine or for_task(TransformersEngine(policy), task, problems)
    rollout = engine.sample(prompts, samples, sampling, generator, report=report)
    rollout = grade(rollout, task, problems, policy)
    entropy = rollout.statistics["token_entropy"]
    return Evaluation(
        problems=tuple(
            problem_result(rollout, slice(i * samples, (i + 1) * samples), problem)
            for i, problem in enumerate(problems)
        ),
        temperature=sampling.temperature,
        token_entropy=float(pooled_token_entropy(entropy, rollout.mask)),
        sequence_entropy=float(sequence_entropy(entropy, rollout.mask)),
        rollout=rollout,
    )


def problem_result(rollout: Rollout, rows: slice, problem: Any) -> ProblemResult:
    """The figures of one problem from its rows of a graded rollout."""
    assert rollout.correct is not None
    assert rollout.answer is not None
    correct, answers = rollout.correct[rows].tolist(), rollout.answer[rows]
    entropy = rollout.statistics.get("token_entropy")
    pooled = None if entropy is None else float(pooled_token_entropy(entropy[rows], rollout.mask[rows]))
    return ProblemResult(
        problem=str(problem),
        samples=len(correct),
        correct=sum(correct),
        distinct=len({a for a, c in zip(answers, correct, strict=True) if c}),
        answer_entropy=answer_entropy(answers),
        mean_tokens=float(rollout.lengths[rows].float().mean()),
        finished=float(rollout.finished[rows].float().mean()),
        token_entropy=pooled,
        votes=votes_of(answers, correct),
    )
