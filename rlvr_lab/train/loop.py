"""The training loop: prompts, rollout, score, reward, filter, advantage, update, observe; again.

Methods enter through the hooks of their composition (`methods.base`); the loop knows none of them by name. Several
processes run it side by side (`train.parallel`); the main one writes and talks. A run owns a folder:

    config.yaml          all settings
    metrics.jsonl        one object per step
    problems.jsonl       right and all responses to each problem of a step
    evaluations.jsonl    held-out figures before, during and after
    samples.jsonl        transcripts, token by token; samples.html shows the newest
    checkpoints/         resumable state, each also a transformers directory
    model/               the trained policy
    summary.json         first and last evaluation, time, machine
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..core.rollout import Rollout
from ..errors import UserError
from ..evaluate.evaluation import Evaluation, evaluate
from ..methods import Pipeline, build, compose
from ..policy.access import parts
from ..policy.load import pick_device
from ..policy.shard import whole_weights
from ..rollout.engine import Sampling
from ..rollout.episodes import for_task
from ..rollout.factory import Engine, make_engine
from . import checkpoint, logs, setup
from .bookkeeper import Bookkeeper
from .clock import Clock
from .collect import Collector, DividedEngine, sampling_of
from .config import TrainConfig
from .console import Console, Silent
from .data import Problems, load_problems
from .guard import Guard
from .memory import memory_metrics
from .metrics import rollout_metrics, sampler_metrics
from .parallel import World
from .samples import sample_rows
from .seeds import derive_seed, torch_generator
from .update import Updater, schedule

LEDGER = "entropy ledger"  # its entry beside the methods' in a checkpoint
GUARD = "guard"


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

    `world`: the processes of the run, by default those that torchrun started; all of them construct and run one.

    Raises UserError for settings, files and folders that do not fit, TrainingStopped for a loss that is not finite,
    RankLost where another process is gone.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        resume: bool = False,
        console: Console | None = None,
        stop: Callable[[], bool] = lambda: False,
        world: World | None = None,
    ) -> None:
        world = world or World.from_environment(config.parallel.timeout, config.model.device)
        self.world, self.out, self.stop = world, out, stop
        self.console: Console = (console if world.is_main else None) or Silent()
        logs.check_installed(config.logging)
        saved = world.on_main(lambda: setup.saved_settings(config, out, resume))
        self.config = config = setup.resolve(config, saved, world)
        start = setup.starting_point(out, world, self.console) if resume else None
        self.pipeline = compose([build(slug, settings) for slug, settings in config.methods.items()])
        models = setup.load_models(config, world, start, self.pipeline)
        self.policy, self.sampler = models.policy, models.sampler
        self._bind(self.pipeline)
        self.device = pick_device(config.model.device)
        self.problems: Problems = load_problems(config, self.policy, self.console.say)
        self.optimizer = setup.make_optimizer(self.policy.model, config.optimizer)
        self.clock = Clock(self.device)
        self.updater = self._make_updater()
        self.engine = self._make_engine(models.replica)
        self.bookkeeper = self._make_bookkeeper()
        self.first_step = self._restore(start)
        self.collector = Collector(
            config, world, self.problems, self.pipeline, self.engine, self.policy.model, self.sampler,
            self.device, models.reference, self.clock,
        )  # fmt: skip
        self.console.say(f"methods: {self.pipeline.describe()}")
        world.on_main(lambda: setup.write_settings(config, out))
        self.log = logs.RunLog(
            out, config.logging, self.first_step, main=world.is_main, warn=self.console.warn,
            run_settings=config.model_dump(mode="json"),
        )  # fmt: skip

    def use(self, pipeline: Pipeline) -> None:
        """Train with another composition than the settings name: methods of your own, before `run`.

        Raises UserError for one that chooses which parameters train: the optimizer is made already.
        """
        if (owner := pipeline.owner("trainable")) is not None:
            raise UserError(f"method '{owner.slug}' chooses what trains, for which it is too late; name it in methods")
        self._bind(pipeline)
        self.pipeline = self.updater.pipeline = self.collector.pipeline = pipeline

    def _bind(self, pipeline: Pipeline) -> None:
        """Let the methods find their texts in this vocabulary, and refuse what this run cannot fulfil."""
        pipeline.bind(self.policy.encode)
        model = self.policy.model
        pipeline.check_run(model.config.vocab_size, self.config.steps)
        if pipeline.owner("lens") is not None:
            parts(model)
            pipeline.lens(0, model)

    # -- opening ------------------------------------------------------------------------------------------------

    def _make_updater(self) -> Updater:
        update, optimizer = self.config.update, self.config.optimizer
        return Updater(
            self.policy.model,
            self.optimizer,
            self.pipeline,
            epochs=update.epochs,
            minibatches=update.minibatches,
            micro_batch_rows=update.micro_batch_rows,
            micro_batch_tokens=update.micro_batch_tokens if update.packing else None,
            skip_dead_rows=update.skip_dead_rows,
            grad_clip=optimizer.grad_clip,
            guard=Guard(**optimizer.guard.model_dump()),
            world=self.world,
        )

    def _make_engine(self, replica: bool) -> Engine:
        name = setup.engine_name(self.config)
        policy = self.policy if name == "vllm" else self.sampler
        self._needs_sync, self._synced = replica or name == "vllm", -1
        self._sync_metrics: dict[str, float] = {}
        prompts = self.problems.prompts[: self.config.rollout.vllm.probe_responses]
        tempers = self.pipeline.owner("temper") is not None
        return make_engine(name, policy, self.config.rollout.vllm, replica=replica, prompts=prompts, tempers=tempers)

    def _make_bookkeeper(self) -> Bookkeeper | None:
        """The ledger, with held-out responses of the starting policy; a checkpoint brings its own."""
        rows = self.config.ledger.rows
        if not rows:
            return None
        prompts = [self.problems.task.prompt_ids(p, self.policy.tokenizer) for p in self.problems.evaluation[:rows]]
        probe = None
        if prompts:
            generator = torch_generator(self.config.seed, "ledger probe", 0, self.device)
            with self._passes():
                self._sync(0)
                sampling = replace(sampling_of(self.config), streams="step")  # one process draws
                engine = for_task(self.engine, self.problems.task, self.problems.evaluation)

                def sample() -> Rollout:
                    return engine.sample(prompts, 1, sampling, generator).to("cpu")

                probe = self.world.on_main(sample).to(self.device)
        return Bookkeeper(self.policy.model, probe, rows, self.config.ledger.window)

    def _restore(self, start: Path | None) -> int:
        if start is None:
            return 0
        state = checkpoint.restore(start, self.policy, self.optimizer, self.world)
        parts = dict(state.parts)
        ledger, guard = parts.pop(LEDGER, None), parts.pop(GUARD, None)
        if self.bookkeeper is not None and ledger is not None:
            self.bookkeeper.load_state_dict(ledger)
        if guard is not None:
            self.updater.guard.load_state_dict(guard)
        self.pipeline.load_state_dict(parts)
        self._synced = -1
        self.console.say(f"resuming after step {state.step}")
        return state.step

    def _passes(self) -> torch.autocast:
        return setup.passes_in(self.config, self.device)

    def _sync(self, version: int) -> None:
        """Let an engine with weights of its own take up those after `version` steps."""
        if self._needs_sync and self._synced != version:
            with self.clock.part("sync"):
                report = self.engine.sync(whole_weights(self.policy.model, self.device), version)
            self._sync_metrics = report.metrics() if report is not None else {}
            self._synced = version

    # -- running ------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Train to the last step, or until `stop` says so. Returns where the run stands."""
        try:
            with self.world.watch():
                done, interrupted = self._run()
                if not interrupted:
                    self._finish(done)
                self.world.barrier()
        finally:
            self.engine.close()  # the last evaluation samples too
        evaluations = logs.read_jsonl(self.out / "evaluations.jsonl")
        ends = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        return RunResult(self.out, done, interrupted, *ends)

    def _run(self) -> tuple[int, bool]:
        config = self.config
        self.evaluate_once(self.first_step)
        done, interrupted = self.first_step, False
        self.console.begin("training", config.steps, done)
        try:
            for step in range(self.first_step, config.steps):
                metrics = self.step(step)
                done = step + 1
                self.console.advance(1, metrics)
                interrupted = self.world.any(self.stop())
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
        return done, interrupted

    def step(self, step: int) -> dict[str, float]:
        """One turn of the data flow; returns and logs its metrics."""
        started = time.perf_counter()
        self.clock.reset()
        config, seed = self.config, self.config.seed
        factor = schedule(step, config.steps, config.optimizer.warmup, config.optimizer.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * factor
        with self._passes():
            rollout = self.collect(step)
            generator = torch_generator(seed, "minibatches", step, torch.device("cpu"))
            metrics = rollout_metrics(rollout)
            cap = self.pipeline.importance_cap
            metrics |= sampler_metrics(rollout, step, self.policy.model.config.vocab_size, cap)
            metrics |= self.collector.generated | self._sync_metrics
            self._begin_ledger(rollout, step)
            metrics |= self.updater.run(rollout, generator, self.clock, step)
            metrics |= self._end_ledger(step, factor) | self.pipeline.metrics()
        metrics |= {"lr": config.optimizer.lr * factor}
        self.pipeline.observe(metrics)
        for text in self.pipeline.notices():
            self.console.warn(text)
        if config.logging.samples and step % config.logging.samples_every == 0:
            self.log.samples(step, sample_rows(rollout, self.problems.train, self.policy, config.logging.samples))
        metrics |= self._times(time.perf_counter() - started, metrics["tokens"]) | memory_metrics(self.device)
        self.log.problems(step, self.collector.solved, lambda i: str(self.problems.train[i]))
        self.log.metrics(step, metrics)
        return metrics

    def collect(self, step: int) -> Rollout:
        """Prompts, rollout, score, reward, filter: a graded rollout that is ready for advantages."""
        self.engine.wake()
        self._sync(step)
        rollout = self.collector.collect(step, check=step == self.first_step)
        self.engine.sleep()
        return rollout

    def _begin_ledger(self, rollout: Rollout, step: int) -> None:
        if self.bookkeeper is not None:
            with self.clock.part("ledger"):
                generator = torch_generator(self.config.seed, "ledger rows", step, torch.device("cpu"))
                self.bookkeeper.begin(rollout, generator)
            # a prediction for a layer's policy would stand beside what happened to the model's own
            through_lens = self.pipeline.lens(step, self.policy.model) is not None
            self.updater.booking = None if through_lens else self.bookkeeper.booking

    def _end_ledger(self, step: int, factor: float) -> dict[str, float]:
        if self.bookkeeper is None:
            return {}
        with self.clock.part("ledger"):
            booked = self.updater.booking is not None
            found = self.bookkeeper.end(step, factor) if booked else self.bookkeeper.measure()
            return self.world.broadcast_object(found)  # type: ignore[no-any-return]

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
        sets = {"": (self.problems.task, self.problems.evaluation), **self.problems.benchmarks}
        responses = section.samples * sum(len(problems) for _, problems in sets.values())
        self.console.begin(f"evaluating after step {step}", responses)
        rollout = self.config.rollout
        sampling = Sampling(section.temperature, rollout.max_tokens, 2 * rollout.rows, sampling_of(self.config).streams)
        rows = self.config.update.micro_batch_rows
        self.engine.wake()
        self._sync(step)
        try:
            with self._passes():
                results = {
                    name: evaluate(
                        self.sampler,
                        task,
                        problems,
                        samples=section.samples,
                        sampling=sampling,
                        # the same draws before and after, so that a difference is the policy's
                        seed=derive_seed(self.config.seed, "evaluation", 0),
                        report=lambda rows: self.console.advance(rows),
                        engine=DividedEngine(
                            for_task(self.engine, task, problems), self.world, self.policy.model, rows
                        ),
                    )
                    for name, (task, problems) in sets.items()
                }
        finally:
            self.console.end()
        if self.world.is_main:
            self._write_evaluation(step, results)
        return results[""]

    def _write_evaluation(self, step: int, results: Mapping[str, Evaluation]) -> None:
        """`results`: of the evaluation problems under the name "", and of benchmarks, whose figures are `NAME/...`."""
        summary = results[""].summary() | {"held_out": self.problems.held_out}
        for name in self.problems.benchmarks:
            summary |= {f"{name}/{figure}": value for figure, value in results[name].summary().items()}
        self.log.evaluation(step, summary)
        folder = self.out / "evaluations"
        folder.mkdir(exist_ok=True)
        for name, result in results.items():
            path = folder / f"step_{step:06d}{'_' if name else ''}{name}.jsonl"
            path.unlink(missing_ok=True)
            logs.append_jsonl(path, [asdict(p) for p in result.problems])
        self.console.say(describe(step, summary))
        for name in self.problems.benchmarks:
            self.console.say(f"{name} {describe(step, results[name].summary())}")

    def evaluate_once(self, step: int) -> None:
        """Evaluate after `step` updates unless the record has it already, as where a run was resumed."""
        path = self.out / "evaluations.jsonl"
        if not self.world.on_main(lambda: any(row["step"] == step for row in logs.read_jsonl(path))):
            self.evaluate(step)

    def checkpoint(self, step: int) -> Path:
        """Write the state after `step` updates."""
        parts = self.pipeline.state_dict()
        if self.bookkeeper is not None:
            parts[LEDGER] = self.bookkeeper.state_dict()
        if guard := self.updater.guard.state_dict():
            parts[GUARD] = guard
        state = checkpoint.TrainerState(step, parts)
        keep = self.config.checkpoint.keep
        where, export = self.out / "checkpoints", setup.export_dtype(self.config)
        return checkpoint.save(where, self.policy, self.optimizer, state, keep, self.world, export=export)

    def _finish(self, done: int) -> None:
        self.evaluate_once(done)
        export = setup.export_dtype(self.config)
        checkpoint.save_policy(self.out / "model", self.policy, self.world, export=export)
        if not self.world.is_main:
            return
        evaluations = logs.read_jsonl(self.out / "evaluations.jsonl")
        summary = {
            "steps": done,
            "seconds_steps": sum(row["seconds"] for row in logs.read_jsonl(self.out / "metrics.jsonl")),
            "evaluations": evaluations,
            "machine": machine() | ({"processes": self.world.size} if self.world.size > 1 else {}),
            "date": time.strftime("%Y-%m-%d"),
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


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
