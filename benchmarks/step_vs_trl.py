"""A training step of this package against TRL 1.16's GRPOTrainer: same weights, same prompts, same mathematics.

    PYTHONPATH=. python benchmarks/step_vs_trl.py [--steps 24] [--quick]

Runs where TRL is installed (`nox -s trl` makes such an environment: .nox/trl/bin/python). The shipped policy S, 10
Countdown prompts x 16 responses of at most 32 tokens, 4 optimizer steps of 40 responses on each rollout, GRPO with a
mean over sequences of token means, one thread, float32.

1. Equality. TRL trains on recorded responses (`rollout_func`), we on the same rows in the same minibatches. Losses,
   gradients (cosine above 0.9999) and log-probs after all steps must agree, or nothing is timed.
2. Learn phase: recorded responses on both sides, from rewards to the last optimizer step.
3. Generate phase: until the end token, and with forced lengths (no token ends a response).
4. Full step: both sample, grade, score and learn. The learning rate is 1e-12, so that the policy and with it the
   lengths of responses stay what they are; it costs what any other rate costs. Rewards are set by place, so that
   exactly 0, 3 or 6 of the 10 groups are degenerate (all rewards equal).

TRL's own loop runs; after each of its rollouts, in its callback, ours takes its turn, so that both alternate in one
process: A B A B ... What is compared is processor time of this process per response token, pair by pair: the median
ratio with a 95 % bootstrap interval over pairs. Both grade every response with the task's verifier.

TRL **as shipped** has GRPOConfig's defaults wherever the experiment leaves them free: batches of 8 rows, bfloat16
autocast, gradient checkpointing where that is the default, a progress bar, logs every 10 steps. TRL **tuned** has
float32, no checkpointing, the batch size that a trial found fastest, no logs, no progress bar, no dataloader workers,
the key-value cache on. TRL scores old log-probs in a pass of its own, as it must with several optimizer steps per
rollout; we take those recorded while sampling, and `learn, both score` says what that is worth.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.integrations.trl_data import TaskReward
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import Method
from rlvr_lab.policy.forward import score, scored
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import TrainConfig, parse_config
from rlvr_lab.train.loop import Trainer, machine
from rlvr_lab.train.update import Updater, UpdateTotals

OUT = Path(__file__).resolve().parent / "results" / "step_vs_trl.json"
PROMPTS, GROUP, LENGTH, MINIBATCHES = 10, 16, 32, 4
ROWS = PROMPTS * GROUP // MINIBATCHES
DEGENERATE = {0: 0, 30: 3, 60: 6}
NOTHING = 1e-12
METHODS = {"grpo": {"preset": "paper", "eps": 1e-4}}  # TRL: loss_type grpo, scale_rewards group
TUNED = {"bf16": False, "gradient_checkpointing": False, "logging_strategy": "no", "disable_tqdm": True}


def rewards(degenerate: int) -> list[float]:
    """One reward per response: none in the first groups, alternately 1 and 0 in the others."""
    return [float(i // GROUP >= degenerate and i % 2 == 0) for i in range(PROMPTS * GROUP)]


# -- ours -------------------------------------------------------------------------------------------------------


class ByPlace(Method):
    """Rewards by place in the rollout, in place of the task's."""

    slug = "by_place"
    replaces_reward = True

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values)

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        return {"by_place": self.values}


class Replay(Method):
    """Recorded responses in place of sampling."""

    slug = "replay"

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def sample(self, engine: Any, *_: Any, **__: Any) -> Rollout:
        return self.rollout


class Ours:
    """A Trainer of this package whose step can be called at any time."""

    def __init__(self, folder: Path, degenerate: int, replay: Rollout | None = None, **update: Any) -> None:
        minibatches = update.pop("minibatches", MINIBATCHES)
        tree = {
            "steps": 10**6,
            "model": {"path": "tiny/S", "device": "cpu"},
            "data": {"pool": PROMPTS},
            "rollout": {"prompts": PROMPTS, "group_size": GROUP, "max_tokens": LENGTH},
            "methods": METHODS,
            "optimizer": {"lr": NOTHING, "warmup": 0},
            "update": {"minibatches": minibatches, "micro_batch_rows": ROWS, **update},
            "evaluation": {"problems": 0},
            "logging": {"tensorboard": False, "samples": 0},
            "ledger": {"rows": 0},
        }
        config: TrainConfig = parse_config(tree)
        self.trainer = Trainer(config, folder)
        extra: list[Method] = [ByPlace(rewards(degenerate))] + ([Replay(replay)] if replay is not None else [])
        pipeline = compose([build(slug, settings) for slug, settings in METHODS.items()] + extra)
        for part in (self.trainer, self.trainer.updater, self.trainer.collector):
            part.pipeline = pipeline
        self.done = 0

    def step(self) -> tuple[float, float]:
        """Processor seconds and response tokens of one step."""
        start = time.process_time()
        metrics = self.trainer.step(self.done)
        self.done += 1
        return time.process_time() - start, metrics["tokens"]


def record(policy: Policy, seed: int = 0) -> Rollout:
    """Responses of the starting policy to the benchmark's prompts."""
    prompts = [list(p.prompt_ids) for p in countdown.problems(PROMPTS, 0)]
    generator = torch.Generator().manual_seed(seed)
    return TransformersEngine(policy).sample(prompts, GROUP, Sampling(1.0, LENGTH), generator)


# -- TRL --------------------------------------------------------------------------------------------------------


class Trl:
    """GRPOTrainer on the same prompts. `turn` is called after each of its rollouts; its time is not TRL's."""

    def __init__(self, folder: Path, degenerate: int, replay: Rollout | None = None, **settings: Any) -> None:
        self.policy = load_policy("tiny/S", device="cpu")
        problems = list(countdown.problems(PROMPTS, 0))
        text = [self.policy.tokenizer.decode(list(p.prompt_ids)) for p in problems]
        data = Dataset.from_dict({"prompt": text, "problem_id": list(range(PROMPTS))})
        self.grade = TaskReward(_task(), problems, self.policy)
        self.values, self.replay, self.tokens = rewards(degenerate), replay, 0.0
        rows = settings.pop("rows", ROWS)
        minibatches = settings.pop("minibatches", MINIBATCHES)
        share = PROMPTS * GROUP // minibatches
        fixed = {
            "use_cpu": True,
            "loss_type": "grpo",
            "num_generations": GROUP,
            "max_completion_length": LENGTH,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": share // rows,
            "steps_per_generation": PROMPTS * GROUP // rows,
            "learning_rate": NOTHING,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.3,
            "adam_beta2": 0.95,
            "shuffle_dataset": False,
            "save_strategy": "no",
            "report_to": [],
        }
        self.config = GRPOConfig(str(folder), **(fixed | settings))
        self.minibatches = minibatches
        extra = {} if replay is None else {"rollout_func": self._recorded}
        self.trainer = GRPOTrainer(
            self.policy.model, self._reward, self.config, data, processing_class=self.policy.tokenizer, **extra
        )

    def _reward(self, completion_ids: list[list[int]], problem_id: list[int], **_: Any) -> list[float]:
        self.grade(completion_ids, problem_id)
        self.tokens = float(sum(map(len, completion_ids)))
        return self.values

    def _recorded(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        rollout = self.replay
        assert rollout is not None
        lengths = rollout.lengths.tolist()
        prompt = [row[mask].tolist() for row, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        ids = [row[:n].tolist() for row, n in zip(rollout.response_ids, lengths, strict=True)]
        # each row carries its number where TRL keeps the sampler's log-probs, which this loss does not read
        return {
            "prompt_ids": prompt,
            "completion_ids": ids,
            "logprobs": [[float(i)] * n for i, n in enumerate(lengths)],
        }

    def run(self, rollouts: int, turn: Callable[[float, float], None]) -> None:
        """Train for so many rollouts."""
        self.config.max_steps = rollouts * self.minibatches
        self.trainer.args.max_steps = self.config.max_steps
        self.trainer.add_callback(_Turns(self, turn))
        self.trainer.train()


class _Turns(TrainerCallback):
    def __init__(self, trl: Trl, turn: Callable[[float, float], None]) -> None:
        self.trl, self.turn, self.mark = trl, turn, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mark = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.trl.minibatches == 0:
            self.turn(time.process_time() - self.mark, self.trl.tokens)
            self.mark = time.process_time()


def _task() -> Any:
    from rlvr_lab.tasks.registry import CountdownTask

    return CountdownTask()


# -- equality ---------------------------------------------------------------------------------------------------


def equality(folder: Path, rollout: Rollout) -> dict[str, float]:
    """One rollout, four optimizer steps on each side at the tiny recipe's learning rate; raises where they differ."""
    trl = Trl(folder, 3, rollout, **TUNED, learning_rate=5.7e-4)
    losses, gradients, parts = _spy(trl)
    with silence():
        trl.run(1, lambda *_: None)
    policy = load_policy("tiny/S", device="cpu")
    start = score(policy.model, rollout, ROWS).with_(reward=torch.tensor(rewards(3)))
    pipeline = compose([build(slug, settings) for slug, settings in METHODS.items()])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=5.7e-4, betas=(0.9, 0.95), weight_decay=0.0)
    updater = Updater(policy.model, optimizer, pipeline, minibatches=MINIBATCHES, micro_batch_rows=ROWS)
    advantage = pipeline.advantage(start)
    worst = {"loss": 0.0, "gradient": 0.0, "cosine": 1.0}
    for rows, loss, gradient in zip(parts, losses, gradients, strict=True):
        batch = start.rows(rows)
        optimizer.zero_grad(set_to_none=False)
        mine = updater.accumulate(batch, advantage[rows][:, : batch.response_ids.shape[1]], UpdateTotals())
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 0.3)
        own = _gradient(policy.model)
        worst["loss"] = max(worst["loss"], abs(mine - loss))
        worst["gradient"] = max(worst["gradient"], float((own - gradient).abs().max()))
        worst["cosine"] = min(worst["cosine"], float(torch.cosine_similarity(own, gradient, dim=0)))
        optimizer.step()
    mine, theirs = (scored(m, rollout, ROWS)[0] for m in (policy.model, trl.policy.model))
    before, _ = scored(load_policy("tiny/S", device="cpu").model, rollout, ROWS)
    worst["logprob_after"] = float((mine - theirs).abs().max())
    worst["logprob_moved"] = float((mine - before).abs().max())
    if worst["loss"] > 1e-5 or worst["cosine"] < 0.9999 or worst["logprob_after"] > 1e-3:
        raise SystemExit(f"TRL and rlvr_lab disagree, so that no ratio means anything: {worst}")
    return worst


def _spy(trl: Trl) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses, gradients and row numbers of TRL's optimizer steps, as they come."""
    losses: list[float] = []
    gradients: list[Tensor] = []
    parts: list[Tensor] = []
    compute = trl.trainer._compute_loss

    def watched(model: Any, inputs: Any) -> Tensor:
        loss: Tensor = compute(model, inputs)
        losses.append(float(loss.detach()))
        parts.append(inputs["sampling_per_token_logps"][:, 0].long())
        return loss

    class Spy(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.append(_gradient(model))

    trl.trainer._compute_loss = watched
    trl.trainer.add_callback(Spy())
    return losses, gradients, parts


def _gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.detach().flatten().clone() for p in model.parameters()])


# -- timing -----------------------------------------------------------------------------------------------------


def interleaved(trl: Trl, ours: dict[str, Ours], steps: int, warmup: int) -> dict[str, Any]:
    """TRL's rollouts and ours in turn; seconds per response token, and their ratios."""
    theirs: list[float] = []
    mine: dict[str, list[float]] = {name: [] for name in ours}
    tokens: list[float] = []

    def turn(seconds: float, count: float) -> None:
        theirs.append(seconds / count)
        tokens.append(count)
        names = list(ours)
        shift = len(theirs) % len(names)
        for name in names[shift:] + names[:shift]:
            own, own_count = ours[name].step()
            mine[name].append(own / own_count)

    with silence():
        trl.run(steps + warmup, turn)
    kept = slice(warmup, None)
    return {
        "trl_seconds": statistics.median(s * n for s, n in zip(theirs[kept], tokens[kept], strict=True)),
        "trl_tokens_per_second": 1 / statistics.median(theirs[kept]),
        "ours": {name: _compared(theirs[kept], values[kept]) for name, values in mine.items()},
    }


def _compared(theirs: list[float], mine: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
    return {"tokens_per_second": 1 / statistics.median(mine), "trl / ours": _interval(ratios)}


def _interval(ratios: list[float]) -> dict[str, Any]:
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[1949], "pairs": len(ratios)}


def generation(folder: Path, steps: int, warmup: int, forced: bool) -> dict[str, Any]:
    """Sampling alone: TRL's `_generate_single_turn` with transformers' generate, and our engine."""
    trl = Trl(folder, 0, **TUNED)
    policy = load_policy("tiny/S", device="cpu")
    engine = TransformersEngine(policy)
    prompts = [list(p.prompt_ids) for p in countdown.problems(PROMPTS, 0)]
    repeated = [p for p in prompts for _ in range(GROUP)]
    if forced:
        never = policy.model.config.vocab_size + 1
        engine._eos = torch.tensor([never])
        trl.trainer.generation_config.eos_token_id = trl.trainer.generation_kwargs["eos_token_id"] = never
        trl.trainer.eos_token_ids = [never]
    theirs, mine = [], []
    for turn in range(steps + warmup):
        start = time.process_time()
        ids, _ = trl.trainer._generate_single_turn(repeated, None, {}, GROUP)
        theirs.append((time.process_time() - start) / sum(map(len, ids)))
        start = time.process_time()
        rollout = engine.sample(prompts, GROUP, Sampling(1.0, LENGTH), torch.Generator().manual_seed(turn))
        mine.append((time.process_time() - start) / float(rollout.mask.sum()))
        if forced and (min(map(len, ids)), int(rollout.lengths.min())) != (LENGTH, LENGTH):
            raise SystemExit("a response ended although lengths are forced")
    compared = _compared(theirs[warmup:], mine[warmup:])
    return {"trl_tokens_per_second": 1 / statistics.median(theirs[warmup:]), "ours": {"rollout": compared}}


def fastest_rows(root: Path) -> tuple[int, dict[int, float]]:
    """Rows per forward pass with which tuned TRL learns fastest, by a short trial of each."""
    seconds: dict[int, float] = {}
    rollout = record(load_policy("tiny/S", device="cpu"))
    for rows in (ROWS, ROWS // 2, ROWS // 4):
        times: list[float] = []
        trl = Trl(root / f"rows{rows}", 0, rollout, rows=rows, **TUNED)
        with silence():
            trl.run(5, lambda s, n, times=times: times.append(s))  # type: ignore[misc]
        seconds[rows] = min(times[1:])
    return min(seconds, key=seconds.__getitem__), seconds


@contextmanager
def silence() -> Iterator[None]:
    """TRL's output goes nowhere; that it is written still costs TRL what it costs."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


# -- the whole --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where things go, and how long to measure."""

    root: Path
    steps: int
    warmup: int
    rows: int
    """Rows per forward pass of tuned TRL."""

    def learn(self, share: int) -> dict[str, Any]:
        """Recorded responses, TRL tuned; three ways of ours."""
        groups, rollout = DEGENERATE[share], record(load_policy("tiny/S", device="cpu"))
        variants = {
            "recorded log-probs": Ours(self.root / "a", groups, rollout),
            "both score": Ours(self.root / "b", groups, rollout, recompute_old_logprob=True),
            "no row skipped": Ours(self.root / "c", groups, rollout, skip_dead_rows=False),
        }
        trl = Trl(self.root / "trl", groups, rollout, rows=self.rows, **TUNED)
        return interleaved(trl, variants, self.steps, self.warmup)

    def generate(self, forced: bool) -> dict[str, Any]:
        """Sampling alone."""
        return generation(self.root, self.steps, self.warmup, forced)

    def full(self, share: int, minibatches: int = MINIBATCHES, shipped: bool = False) -> dict[str, Any]:
        """Whole steps, TRL tuned or as shipped."""
        groups = DEGENERATE[share]
        settings: dict[str, Any] = {"rows": 8} if shipped else {"rows": self.rows, **TUNED}
        trl = Trl(self.root / "trl", groups, minibatches=minibatches, **settings)
        ours = {"step": Ours(self.root / "ours", groups, minibatches=minibatches)}
        found = interleaved(trl, ours, self.steps, self.warmup)
        shown = ("bf16", "gradient_checkpointing", "logging_steps", "per_device_train_batch_size")
        return found | {"trl_settings": {name: getattr(trl.config, name) for name in shown}}


SECTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "full step, 30 % degenerate": lambda run: run.full(30),
    "full step, 60 % degenerate": lambda run: run.full(60),
    "full step, 0 % degenerate": lambda run: run.full(0),
    "learn, 30 % degenerate": lambda run: run.learn(30),
    "generate, until the end token": lambda run: run.generate(False),
    "generate, forced lengths": lambda run: run.generate(True),
    "learn, 60 % degenerate": lambda run: run.learn(60),
    "learn, 0 % degenerate": lambda run: run.learn(0),
    "full step, 30 % degenerate, one update per rollout": lambda run: run.full(30, minibatches=1),
    "full step, 30 % degenerate, TRL as shipped": lambda run: run.full(30, shipped=True),
}


def measure(
    steps: int, warmup: int, names: list[str], result: dict[str, Any], done: Callable[[dict[str, Any]], None]
) -> None:
    """The sections `names` into `result`; `done` is told after each. Equality comes first, always."""
    with tempfile.TemporaryDirectory() as folder:
        result["equality"] = equality(Path(folder), record(load_policy("tiny/S", device="cpu")))
    if "trl_rows" not in result:
        with tempfile.TemporaryDirectory() as folder:
            best, trial = fastest_rows(Path(folder))
        result["trl_rows"] = {"fastest": best, "seconds": trial}
    for name in names:
        load, start = os.getloadavg()[0], (time.perf_counter(), time.process_time())
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[name](Run(Path(folder), steps, warmup, result["trl_rows"]["fastest"]))
        spent = (time.perf_counter() - start[0], time.process_time() - start[1])
        about = {"load": [load, os.getloadavg()[0]], "wall_seconds": spent[0], "processor_seconds": spent[1]}
        result[name] = found | about | {"pairs": steps}
        done(result)


def _shown(part: dict[str, Any]) -> str:
    texts = []
    for name, values in part["ours"].items():
        r = values["trl / ours"]
        texts.append(f"{name} {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
    return "; ".join(texts)


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    m = record["machine"]
    lines = [
        "# A step of rlvr_lab against TRL's GRPOTrainer",
        "",
        f"Written by benchmarks/step_vs_trl.py on {record['date']}: {m['processor']}, one thread, torch {m['torch']}, "
        f"transformers {m['transformers']}, TRL {m['trl']}. Processor time per response token, TRL over rlvr_lab: "
        "median of interleaved pairs with a 95 % bootstrap interval. Load: average number of running processes on this "
        "two-core machine before and after a part; what is not ours slows both sides.",
        "",
        "| part | ours | tokens/s TRL | tokens/s ours | TRL / ours | pairs | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SECTIONS:
        part = record["result"].get(name, {"ours": {}})
        for variant, values in part["ours"].items():
            r = values["trl / ours"]
            lines.append(
                f"| {name} | {variant} | {part['trl_tokens_per_second']:.0f} | {values['tokens_per_second']:.0f} | "
                f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] | {r['pairs']} | "
                f"{part['load'][0]:.0f}, {part['load'][1]:.0f} |"
            )
    e, trial = record["result"]["equality"], record["result"]["trl_rows"]
    lines += [
        "",
        f"Equality before timing, over four optimizer steps that moved log-probs by up to {e['logprob_moved']:.2f} "
        f"nats: largest difference of losses {e['loss']:.1e}, of gradients {e['gradient']:.1e}, least cosine "
        f"{e['cosine']:.7f}, log-probs afterwards within {e['logprob_after']:.1e} nats. Tuned TRL runs "
        f"{trial['fastest']} rows per pass, the fastest of {', '.join(map(str, trial['seconds']))}. As shipped, TRL "
        "runs under bfloat16 autocast with gradient checkpointing in batches of 8: on a processor bfloat16 is slow, so "
        "that this row says what its defaults cost here, nothing about a GPU. Where no group is degenerate, what is "
        "left is TRL's pass for old log-probs, padding and overhead; the same products are computed on both sides.",
        "",
    ]
    return "\n".join(lines)


def main(
    steps: Annotated[int, typer.Option(help="Pairs after warm-up.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(min=1)] = 2,
    section: Annotated[list[str] | None, typer.Option(help="Only these parts, into the file that exists.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One pair of each, and no file: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="JSON file; a table goes beside it.")] = OUT,
) -> None:
    """Measure, print, write."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    if quick:
        steps, warmup = 1, 1
    again = section is not None and out.exists()
    result: dict[str, Any] = json.loads(out.read_text())["result"] if again else {}
    record_ = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"trl": version("trl"), "threads": 1},
        "setting": {
            "prompts": PROMPTS, "group_size": GROUP, "max_tokens": LENGTH, "minibatches": MINIBATCHES, "warmup": warmup
        },
        "result": result,
    }  # fmt: skip

    def write(_: dict[str, Any]) -> None:
        newest = list(result)[-1]
        print(f"{newest}: {_shown(result[newest])}", file=sys.stderr, flush=True)
        if not quick:
            out.write_text(json.dumps(record_, indent=1) + "\n")
            out.with_suffix(".md").write_text(markdown(record_))

    for name in section or []:
        result.pop(name, None)
    measure(steps, warmup, section or list(SECTIONS), result, write)
    print(markdown(record_))


if __name__ == "__main__":
    typer.run(main)
