"""The training loop: prompts, rollout, score, reward, advantage, update, observe; then again.

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
from ..errors import UserError
from ..evaluate.evaluation import Evaluation, evaluate
from ..methods import build, compose
from ..policy.forward import score
from ..policy.load import Policy, load_policy
from ..rollout.engine import Sampling, TransformersEngine
from ..rollout.grading import grade, response_texts
from . import checkpoint, logs
from .clock import Clock
from .config import TrainConfig, parse_config
from .console import Console, Silent
from .data import Problems, load_problems
from .metrics import logprob_mismatch, rollout_metrics
from .seeds import derive_seed, torch_generator
from .update import TrainingStopped, Updater, schedule

SAMPLES_EVERY = 20
# a resumed run may only differ in what does not change the steps already made
CHANGEABLE = ("steps", "evaluation", "checkpoint", "logging")


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
        self.optimizer = _make_optimizer(self.policy, config)
        self.first_step = self._restore(start)
        self.clock = Clock(self.policy.device)
        self.engine = TransformersEngine(self.policy)
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

    def _restore(self, start: Path | None) -> int:
        if start is None:
            return 0
        state = checkpoint.restore(start, self.optimizer)
        self.pipeline.load_state_dict(state.methods)
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
        metrics |= {"mismatch": logprob_mismatch(rollout)}
        metrics |= self.updater.run(rollout, generator, self.clock, step)
        metrics |= {"lr": config.optimizer.lr * factor}
        self.pipeline.observe(metrics)
        if config.logging.samples and step % SAMPLES_EVERY == 0:
            self._write_samples(step, rollout)
        metrics |= self._times(time.perf_counter() - started, metrics["tokens"])
        self.log.metrics(step, metrics)
        return metrics

    def collect(self, step: int) -> Rollout:
        """Prompts, rollout, score, reward: a graded rollout that is ready for advantages."""
        config = self.config
        try:
            with self.clock.part("rollout"):
                rollout = self._sample(step)
        except FloatingPointError as error:
            raise TrainingStopped(f"step {step}: {error}. Lower optimizer.lr and resume or restart.") from error
        if config.update.recompute_old_logprob:
            with self.clock.part("score"):
                rollout = score(self.policy.model, rollout, config.update.micro_batch_rows)
        with self.clock.part("reward"):
            rollout = grade(rollout, self.problems.task, self.problems.train, self.policy)
            rollout = self.pipeline.reward(rollout)
        if step == self.first_step:
            self.pipeline.check(rollout)
        return rollout

    def _sample(self, step: int) -> Rollout:
        settings = self.config.rollout
        chooser, sampler = self.pipeline.owner("select"), self.pipeline.owner("sample")
        if chooser:
            rows = chooser.select(self.problems, step)
        else:
            rows = self.problems.step_indices(self.config.seed, step, settings.prompts)
        prompts = [self.problems.prompts[i] for i in rows]
        generator = torch_generator(self.config.seed, "rollout", step, self.policy.device)
        sampling = Sampling(settings.temperature, settings.max_tokens, settings.rows)
        sample = sampler.sample if sampler else TransformersEngine.sample
        rollout: Rollout = sample(
            self.engine, prompts, settings.group_size, sampling, generator, problem_ids=rows, version=step
        )
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
        state = checkpoint.TrainerState(step, self.pipeline.state_dict())
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
