"""The training loop: prompts, rollout, score, reward, filter, advantage, update, observe; again.

Methods enter through the hooks of their composition (`methods.base`); the loop knows none of them by name. A run owns
a folder:

    config.yaml          all settings
    metrics.jsonl        one object per step
    evaluations.jsonl    held-out figures before, during and after
    samples.jsonl        transcripts
    checkpoints/         resumable state, each also a transformers directory
    model/               the trained policy
    summary.json         first and last evaluation, time, machine
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..core.rollout import Rollout
from ..core.rows import concatenate
from ..errors import UserError
from ..evaluate.evaluation import Evaluation, evaluate
from ..methods import build, compose
from ..policy.forward import score, scored
from ..policy.load import Policy, load_policy
from ..rollout.engine import Sampling, TransformersEngine
from ..rollout.grading import grade, response_texts
from . import checkpoint, logs
from .bookkeeper import Bookkeeper
from .clock import Clock
from .config import TrainConfig, parse_config
from .console import Console, Silent
from .data import Problems, load_problems
from .metrics import rollout_metrics, sampler_metrics
from .seeds import derive_seed, torch_generator
from .update import TrainingStopped, Updater, schedule

SAMPLES_EVERY = 20
LEDGER = "entropy ledger"  # its entry beside the methods' in a checkpoint
FAR = 1_000_003  # steps between the problems of a step and those of its further generation batches
# a resumed run may only differ in what does not change the steps already made
CHANGEABLE = ("steps", "evaluation", "checkpoint", "logging", "ledger")


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `first` and `last` are None where evaluation is switched off."""

    out: Path
    steps_done: int
    interrupted: bool
    first: dict[str, Any] | None
    last: dict[str, Any] | None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of every step."""
        return logs.read_jsonl(self.out / "metrics.jsonl")


class Trainer:
    """One run. `stop()` is asked after every step; when it says so the run writes a checkpoint and returns.

    Raises UserError for settings, files and folders that do not fit, TrainingStopped for a loss that is not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        resume: bool = False,
        console: Console | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.out, self.stop = config, out, stop
        self.console: Console = console or Silent()
        start = self._open_folder(resume)
        self.policy = self._load(start)
        self.problems: Problems = load_problems(config, self.policy, self.console.say)
        self.pipeline = compose([build(slug, settings) for slug, settings in config.methods.items()])
        self.reference = self._load_reference()
        self.optimizer = _make_optimizer(self.policy, config)
        self.engine = TransformersEngine(self.policy)
        self.bookkeeper = self._make_bookkeeper()
        self.first_step = self._restore(start)
        self.console.say(f"methods: {self.pipeline.describe()}")
        self.clock = Clock(self.policy.device)
        self._generated = {"generated_tokens": 0.0, "generation_batches": 0.0}
        self.updater = Updater(
            self.policy.model,
            self.optimizer,
            self.pipeline,
            epochs=config.update.epochs,
            minibatches=config.update.minibatches,
            micro_batch_rows=config.update.micro_batch_rows,
            skip_dead_rows=config.update.skip_dead_rows,
            grad_clip=config.optimizer.grad_clip,
        )
        self._write_settings()
        self.log = logs.RunLog(out, config.logging.tensorboard, self.first_step)

    # -- opening ------------------------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> Path | None:
        """Refuse a folder in use, or find the checkpoint to go on from."""
        settings = self.out / "config.yaml"
        if not resume:
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise UserError(f"{self.out} already exists; use --resume to continue it, or another --out")
            return None
        if not settings.exists():
            raise UserError(f"{self.out} holds no run to resume (no config.yaml)")
        _refuse_changes(parse_config(yaml.safe_load(settings.read_text())), self.config)
        found, refused = checkpoint.newest(self.out / "checkpoints")
        for reason in refused:
            self.console.say(f"checkpoint refused: {reason}")
        if found is None and refused:
            raise UserError(f"no sound checkpoint in {self.out}: {refused[0]}")
        return found

    def _write_settings(self) -> None:
        """Only once everything else is known to fit, so that a start that fails leaves no folder behind."""
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            tree = self.config.model_dump(mode="json")
            (self.out / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}; choose another --out") from error

    def _load(self, start: Path | None) -> Policy:
        section = self.config.model
        where = str(start) if start else section.path
        return load_policy(where, device=section.device, dtype=section.dtype)

    def _load_reference(self) -> Any:
        """A frozen copy of the policy the run started from, for methods that need its log-probs; else None."""
        if not self.pipeline.needs("ref_logprob"):
            return None
        section = self.config.model
        return load_policy(section.path, device=section.device, dtype=section.dtype).model.requires_grad_(False)

    def _make_bookkeeper(self) -> Bookkeeper | None:
        """The ledger, with held-out responses of the starting policy; a checkpoint brings its own."""
        rows = self.config.ledger.rows
        if not rows:
            return None
        settings = self.config.rollout
        prompts = [self.problems.task.prompt_ids(p, self.policy.tokenizer) for p in self.problems.evaluation[:rows]]
        if not prompts:
            return Bookkeeper(self.policy.model, None, rows, self.config.ledger.window)
        generator = torch_generator(self.config.seed, "ledger probe", 0, self.policy.device)
        sampling = Sampling(settings.temperature, settings.max_tokens, settings.rows)
        probe = self.engine.sample(prompts, 1, sampling, generator)
        return Bookkeeper(self.policy.model, probe, rows, self.config.ledger.window)

    def _restore(self, start: Path | None) -> int:
        if start is None:
            return 0
        state = checkpoint.restore(start, self.optimizer)
        parts = dict(state.parts)
        ledger = parts.pop(LEDGER, None)
        if self.bookkeeper is not None and ledger is not None:
            self.bookkeeper.load_state_dict(ledger)
        self.pipeline.load_state_dict(parts)
        self.console.say(f"resuming after step {state.step}")
        return state.step

    # -- running ------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Train to the last step, or until `stop` says so. Returns where the run stands."""
        config = self.config
        if not self._evaluated(self.first_step):
            self.evaluate(self.first_step)
        done, interrupted = self.first_step, False
        self.console.begin("training", config.steps, done)
        try:
            for step in range(self.first_step, config.steps):
                metrics = self.step(step)
                done = step + 1
                self.console.advance(1, metrics)
                interrupted = self.stop()
                if done % config.checkpoint.every == 0 or done == config.steps or interrupted:
                    self.checkpoint(done)
                if interrupted:
                    break
                if config.evaluation.every and done % config.evaluation.every == 0 and done < config.steps:
                    self.console.end()
                    self.evaluate(done)
                    self.console.begin("training", config.steps, done)
        finally:
            self.console.end()
            self.log.close()
        if not interrupted:
            self._finish(done)
        evaluations = logs.read_jsonl(self.out / "evaluations.jsonl")
        ends = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        return RunResult(self.out, done, interrupted, *ends)

    def step(self, step: int) -> dict[str, float]:
        """One turn of the data flow; returns and logs its metrics."""
        started = time.perf_counter()
        self.clock.reset()
        config, seed = self.config, self.config.seed
        factor = schedule(step, config.steps, config.optimizer.warmup, config.optimizer.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * factor
        rollout = self.collect(step)
        generator = torch_generator(seed, "minibatches", step, torch.device("cpu"))
        metrics = rollout_metrics(rollout)
        metrics |= sampler_metrics(rollout, step, self.policy.model.config.vocab_size) | self._generated
        self._begin_ledger(rollout, step)
        metrics |= self.updater.run(rollout, generator, self.clock, step)
        metrics |= self._end_ledger(step, factor)
        metrics |= {"lr": config.optimizer.lr * factor}
        self.pipeline.observe(metrics)
        if config.logging.samples and step % SAMPLES_EVERY == 0:
            self._write_samples(step, rollout)
        metrics |= self._times(time.perf_counter() - started, metrics["tokens"])
        self.log.metrics(step, metrics)
        return metrics

    def _begin_ledger(self, rollout: Rollout, step: int) -> None:
        if self.bookkeeper is not None:
            with self.clock.part("ledger"):
                generator = torch_generator(self.config.seed, "ledger rows", step, torch.device("cpu"))
                self.bookkeeper.begin(rollout, generator)
            self.updater.booking = self.bookkeeper.booking

    def _end_ledger(self, step: int, factor: float) -> dict[str, float]:
        if self.bookkeeper is None:
            return {}
        with self.clock.part("ledger"):
            return self.bookkeeper.end(step, factor)

    def collect(self, step: int) -> Rollout:
        """Prompts, rollout, score, reward, filter: a graded rollout that is ready for advantages."""
        rollout = self._graded(step, 0)
        if step == self.first_step:
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
        """One generation batch, scored and rewarded."""
        config = self.config
        try:
            with self.clock.part("rollout"):
                rollout = self._sample(step, attempt)
        except FloatingPointError as error:
            raise TrainingStopped(f"step {step}: {error}. Lower optimizer.lr and resume or restart.") from error
        if config.update.recompute_old_logprob:
            with self.clock.part("score"):
                rollout = score(self.policy.model, rollout, config.update.micro_batch_rows)
        if self.reference is not None:
            with self.clock.part("reference"):
                logprob, _ = scored(self.reference, rollout, config.update.micro_batch_rows)
                rollout = rollout.with_statistics(ref_logprob=logprob)
        with self.clock.part("reward"):
            rollout = grade(rollout, self.problems.task, self.problems.train, self.policy)
            return self.pipeline.reward(rollout)

    def _sample(self, step: int, attempt: int) -> Rollout:
        settings = self.config.rollout
        chooser, sampler = self.pipeline.owner("select"), self.pipeline.owner("sample")
        # a further batch of a step has its own problems and numbers, whatever came before it
        turn = step + attempt * FAR
        if chooser:
            rows = chooser.select(self.problems, turn)
        else:
            rows = self.problems.step_indices(self.config.seed, turn, settings.prompts)
        prompts = [self.problems.prompts[i] for i in rows]
        purpose = f"rollout {attempt}" if attempt else "rollout"
        generator = torch_generator(self.config.seed, purpose, step, self.policy.device)
        sampling = Sampling(settings.temperature, settings.max_tokens, settings.rows)
        sample = sampler.sample if sampler else TransformersEngine.sample
        rollout: Rollout = sample(
            self.engine, prompts, settings.group_size, sampling, generator, problem_ids=rows, version=step
        )
        before = self._generated["generated_tokens"] if attempt else 0.0
        tokens = before + float(rollout.mask.sum())
        self._generated = {"generated_tokens": tokens, "generation_batches": attempt + 1.0}
        return rollout

    def _times(self, total: float, tokens: float) -> dict[str, float]:
        parts = self.clock.reset()
        seconds = {f"seconds_{name}": value for name, value in parts.items()}
        return seconds | {
            "seconds_overhead": total - sum(parts.values()),
            "seconds": total,
            "tokens_per_second": tokens / total,
        }

    # -- evaluating and saving ----------------------------------------------------------------------------------

    def evaluate(self, step: int) -> Evaluation | None:
        """Evaluate the current policy and log it as the state after `step` updates; None where switched off."""
        section = self.config.evaluation
        if not section.problems:
            return None
        self.console.begin(f"evaluating after step {step}", len(self.problems.evaluation) * section.samples)
        rollout = self.config.rollout
        try:
            result = evaluate(
                self.policy,
                self.problems.task,
                self.problems.evaluation,
                samples=section.samples,
                sampling=Sampling(section.temperature, rollout.max_tokens, 2 * rollout.rows),
                # the same draws before and after, so that a difference is the policy's
                seed=derive_seed(self.config.seed, "evaluation", 0),
                report=lambda rows: self.console.advance(rows),
            )
        finally:
            self.console.end()
        summary = result.summary() | {"held_out": self.problems.held_out}
        self.log.evaluation(step, summary)
        folder = self.out / "evaluations"
        folder.mkdir(exist_ok=True)
        path = folder / f"step_{step:06d}.jsonl"
        path.unlink(missing_ok=True)
        logs.append_jsonl(path, [asdict(p) for p in result.problems])
        self.console.say(describe(step, summary))
        return result

    def _evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in logs.read_jsonl(self.out / "evaluations.jsonl"))

    def checkpoint(self, step: int) -> Path:
        """Write the state after `step` updates."""
        parts = self.pipeline.state_dict()
        if self.bookkeeper is not None:
            parts[LEDGER] = self.bookkeeper.state_dict()
        state = checkpoint.TrainerState(step, parts)
        keep = self.config.checkpoint.keep
        return checkpoint.save(self.out / "checkpoints", self.policy, self.optimizer, state, keep)

    def _finish(self, done: int) -> None:
        if not self._evaluated(done):
            self.evaluate(done)
        checkpoint.save_policy(self.out / "model", self.policy)
        evaluations = logs.read_jsonl(self.out / "evaluations.jsonl")
        summary = {
            "steps": done,
            "seconds_steps": sum(row["seconds"] for row in logs.read_jsonl(self.out / "metrics.jsonl")),
            "evaluations": evaluations,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def _write_samples(self, step: int, rollout: Rollout) -> None:
        assert rollout.correct is not None
        assert rollout.answer is not None
        some = torch.arange(min(self.config.logging.samples, len(rollout)))
        texts = response_texts(rollout.rows(some), self.policy)
        rows = [
            {
                "problem": str(self.problems.train[int(rollout.prompt_id[i])]),
                "response": text,
                "correct": bool(rollout.correct[i]),
                "answer": rollout.answer[i],
                "token_entropy": rollout.statistics["token_entropy"][i, : int(rollout.lengths[i])].tolist(),
            }
            for i, text in enumerate(texts)
        ]
        self.log.samples(step, rows)


def describe(step: int, summary: Mapping[str, Any]) -> str:
    """One line for people: pass@k, distinct solutions, entropy."""
    ks = [name for name in summary if name.startswith("pass@") and not name.endswith("interval")]
    shown = [k for k in ks if k in ("pass@1", "pass@32")] or ks[:1]
    passes = ", ".join(f"{k} {summary[k]:.1%}" for k in shown)
    note = "" if summary.get("held_out", True) else " (on training problems)"
    return (
        f"after step {step}: {passes}, {summary['distinct_correct']:.2f} distinct correct solutions, "
        f"token entropy {summary['token_entropy']:.3f} nats{note}"
    )


def machine() -> dict[str, Any]:
    """What a figure needs beside it to be compared: processor, cores, device, versions."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rlvr_lab": __version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    section = config.optimizer
    return torch.optim.AdamW(
        policy.model.parameters(),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        foreach=True,
    )


def _refuse_changes(saved: TrainConfig, asked: TrainConfig) -> None:
    before, after = saved.model_dump(mode="json"), asked.model_dump(mode="json")
    for name in before:
        if before[name] != after[name] and name not in CHANGEABLE:
            raise UserError(
                f"--resume cannot change '{name}': the run was started with {before[name]}, not {after[name]}. "
                f"Only {', '.join(CHANGEABLE)} may differ"
            )
