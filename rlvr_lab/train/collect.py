"""The data flow up to a graded rollout: prompts, rollout, score, reward, filter; divided over processes.

Sampling and grading are divided by prompts and scoring by rows. In between every process has the whole: filters,
refills, rewards and advantages see what they would see in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.rollout import Rollout
from ..core.rows import concatenate
from ..core.temperature import TemperatureRule
from ..methods.base import Pipeline
from ..policy.forward import RAW, score, score_layer
from ..policy.load import Policy
from ..rollout.engine import Sampling
from ..rollout.episodes import for_task
from ..rollout.factory import Continues, Engine
from ..rollout.grading import grade
from ..rollout.meter import Meter
from .clock import Clock
from .config import TrainConfig
from .data import Problems
from .labels import Labels
from .parallel import World
from .seeds import torch_generator
from .setup import Reference
from .update import TrainingStopped

FAR = 1_000_003  # steps between the problems of a step and those of its further generation batches


@dataclass
class Collector:
    """Everything that a rollout needs. `model` is the one being trained, `sampler` names the tokens."""

    config: TrainConfig
    world: World
    problems: Problems
    pipeline: Pipeline
    engine: Engine
    model: Any
    sampler: Policy
    device: torch.device
    reference: Reference | None
    clock: Clock
    generated: dict[str, float] = field(default_factory=dict)
    """Tokens and batches generated in the last step."""
    temper: TemperatureRule | None = None
    """How this step's temperature follows entropy: one rule for all its generation batches."""
    solved: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Right and all responses to each problem of the last step, before any filter."""

    def __post_init__(self) -> None:
        self.labels = Labels(self.config, self.problems, self.sampler, self.engine)
        self.meter = Meter(self.engine)

    def collect(self, step: int, check: bool) -> Rollout:
        """A graded rollout that is ready for advantages. `check`: fail where a method needs a field that it lacks.

        Raises TrainingStopped where nothing is left to learn from, or the policy's weights are broken.
        """
        self.temper = self.pipeline.temper()
        self.labels.prepare(self.pipeline)
        rollout = self._graded(step, 0)
        if check:
            self.pipeline.check(rollout)
        rollout = self.pipeline.filter(rollout)
        if self.pipeline.refill:
            rollout = self._refill(step, rollout)
        if not bool(rollout.mask.any()):
            raise TrainingStopped(f"step {step}: the filters of this composition left no token to learn from")
        return rollout

    def _refill(self, step: int, rollout: Rollout) -> Rollout:
        """Sample further batches until enough groups passed the filters; surplus groups are dropped."""
        wanted, most = self.config.rollout.prompts, self.pipeline.refill
        parts, have = [rollout], len(torch.unique(rollout.group_id))
        for attempt in range(1, most):
            if have >= wanted:
                break
            more = self.pipeline.filter(self._graded(step, attempt))
            if len(more):
                parts.append(more)
                have += len(torch.unique(more.group_id))
        if have < wanted:
            raise TrainingStopped(
                f"step {step}: only {have} of {wanted} groups passed the filters in {most} generation batches. Most "
                "problems are always or never solved: choose others (data), enlarge rollout.group_size, or lower "
                "rollout.prompts"
            )
        joined = concatenate([part for part in parts if len(part)])
        kept = torch.unique(joined.group_id)[:wanted]
        return joined.rows(torch.isin(joined.group_id, kept).nonzero().squeeze(1))

    def _graded(self, step: int, attempt: int) -> Rollout:
        """One generation batch, whole, scored and rewarded."""
        if not attempt:
            self.meter.tokens = 0
        rollout = self._gather(self._own_share(step, attempt))
        tokens = self.world.sum_floats({"tokens": float(self.meter.tokens)})["tokens"]
        self.generated = {"generated_tokens": tokens, "generation_batches": attempt + 1.0, **self.labels.metrics()}
        self.solved = tally(rollout, self.solved if attempt else {})
        update, world = self.config.update, self.world
        tokens_a_pass = update.micro_batch_tokens if update.packing else None
        try:
            if update.recompute_old_logprob:
                with self.clock.part("score"):
                    read = self.pipeline.reader(old=True)
                    raw = [name for name in RAW if self.pipeline.needs(name)]
                    rollout = score(self.model, rollout, update.micro_batch_rows, tokens_a_pass, world, read, raw)
                    lens = self.pipeline.lens(step, self.model)
                    if lens is not None:
                        rollout = score_layer(self.model, rollout, lens, update.micro_batch_rows, tokens_a_pass, world)
            if self.reference is not None:
                with self.clock.part("reference"):
                    logprob = self.reference.logprob(rollout, update.micro_batch_rows, tokens_a_pass, world)
                    rollout = rollout.with_statistics(ref_logprob=logprob)
        except FloatingPointError as error:
            raise _broken(step, str(error)) from error
        with self.clock.part("reward"):
            return self.pipeline.reward(rollout)

    def _own_share(self, step: int, attempt: int) -> Rollout:
        """This process's prompts of one generation batch, sampled and graded."""
        problem, rollout = None, None
        with self.clock.part("rollout"):
            try:
                rollout = self._sample(step, attempt)
            except FloatingPointError as error:
                problem = error
            found = self.world.agree(problem)
        if found is not None or rollout is None:
            raise _broken(step, str(found)) from problem
        with self.clock.part("reward"):
            graded = grade(rollout, self.problems.task, self.problems.train, self.sampler)
            return self.labels.add(graded, self.pipeline, step)

    def _gather(self, rollout: Rollout) -> Rollout:
        if self.world.size == 1:
            return rollout
        with self.clock.part("gather"):
            return self.world.gather_rollout(rollout)

    def _sample(self, step: int, attempt: int) -> Rollout:
        settings = self.config.rollout
        chooser, sampler = self.pipeline.owner("select"), self.pipeline.owner("sample")
        # a further batch of a step has its own problems and numbers, whatever came before it
        turn = step + attempt * FAR
        if chooser:
            rows = chooser.select(self.problems, turn)
        else:
            rows = self.problems.step_indices(self.config.seed, turn, settings.prompts)
        share = self.world.share(len(rows))
        own = [rows[i] for i in share]
        purpose = f"rollout {attempt}" if attempt else "rollout"
        generator = torch_generator(self.config.seed, purpose, step, self.device)
        sampling = replace(sampling_of(self.config, first=share.start), temper=self.temper)
        engine = for_task(self.meter, self.problems.task, self.problems.train)
        sample = sampler.sample if sampler else type(engine).sample
        continues = sampler is not None or engine.turns is not None
        remembering = getattr(self.engine, "remembering", None) if continues and settings.prefix_memory else None
        with remembering(settings.prefix_memory << 20) if remembering else nullcontext():
            rollout: Rollout = sample(
                engine,
                [self.problems.prompts[i] for i in own],
                settings.group_size,
                sampling,
                generator,
                problem_ids=own,
                version=step,
            )
        return rollout.to(self.device)


def tally(rollout: Rollout, before: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Right and all responses to each problem, added to those of `before`."""
    assert rollout.correct is not None
    found = dict(before)
    for problem, right in zip(rollout.prompt_id.tolist(), rollout.correct.tolist(), strict=True):
        solved, count = found.get(problem, (0, 0))
        found[problem] = solved + int(right), count + 1
    return found


def _broken(step: int, reason: str) -> TrainingStopped:
    return TrainingStopped(f"step {step}: {reason}. Lower optimizer.lr and resume or restart.")


def sampling_of(config: TrainConfig, first: int = 0) -> Sampling:
    """Sampling settings of the rollout, for the prompts from place `first` on."""
    settings = config.rollout
    streams = "step" if settings.streams == "auto" else settings.streams
    return Sampling(settings.temperature, settings.max_tokens, settings.rows, streams, first)


@dataclass(frozen=True)
class DividedEngine:
    """An engine whose prompts are divided over processes; all of them get the whole rollout, scored by `model` where
    the engine records no entropies."""

    engine: Continues
    world: World
    model: Any
    score_rows: int

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
        report: Callable[[int], None] = lambda rows: None,
    ) -> Rollout:
        """See `rollout.factory.Engine`. Progress is reported for all processes by this one's."""
        share = self.world.share(len(prompts))
        ids = problem_ids if problem_ids is not None else range(len(prompts))
        part = None
        if len(share):
            part = self.engine.sample(
                [prompts[i] for i in share],
                group_size,
                replace(sampling, first=share.start),
                generator,
                problem_ids=[ids[i] for i in share],
                version=version,
                report=lambda rows: report(rows * self.world.size),
            )
        rollout = self.world.gather_rollout(part).to(generator.device)
        if "token_entropy" not in rollout.statistics:
            rollout = score(self.model, rollout, self.score_rows, world=self.world)
        return rollout
