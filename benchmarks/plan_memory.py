"""The planner's memory against what real training steps allocate.

    python benchmarks/plan_memory.py                 # CPU, about twenty minutes on one idle core
    python benchmarks/plan_memory.py --device cuda   # the same cases and larger ones, by CUDA's own counter
    python benchmarks/plan_memory.py --case 8M       # only this one; the other rows of the results stay

Every case is a process of its own (or two, for shards): it loads a randomly initialised model (or `tiny/S`), trains two
real steps through `Trainer` (rollout, scoring, update, optimizer) with rewards drawn at random, so that there are
gradients, and reports the peak of tensor memory. On the CPU that is every allocation and release of torch's allocator,
as `torch.profiler` records them from before the model is loaded, summed; on a GPU `torch.cuda.max_memory_allocated`.
Resident memory of the process is recorded too, but not compared: it holds Python, libraries and what malloc keeps.

The plan is made from the configuration alone, for the prompts' true longest length. Results, with machine, versions and
date, go to `benchmarks/results/plan_memory.json`; tests/plan plans every recorded case again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rlvr_lab.plan.devices import Device, detected
from rlvr_lab.plan.gate import main_memory, processor
from rlvr_lab.plan.job import job_of
from rlvr_lab.plan.memory import COLLECTIVES, CONTEXT, PHASES, memory
from rlvr_lab.plan.shapes import shape_from, shape_of
from rlvr_lab.policy.tiny import build_tokenizer
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.config import TrainConfig, parse_config
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan_memory.json"
AIM = 0.15
PHASE_OF = {"rollout": "rollout", "score": "score", "reference": "score", "ledger": "score", "loss": "update",
            "optimizer": "optimizer"}  # fmt: skip
Settings = dict[str, Any]


def model(
    family: str, vocabulary: int, hidden: int, layers: int, wide: int, heads: int, kv: int, tied: bool = False
) -> Settings:
    """The keys of a config.json."""
    return {
        "model_type": family, "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": wide, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads,
        "tie_word_embeddings": tied, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


M1 = model("llama", 1000, 128, 4, 512, 4, 2)
M1_WIDE = model("qwen2", 3000, 128, 4, 512, 4, 2)
M2 = model("llama", 4096, 128, 4, 512, 4, 2)  # 16-bit products are slow on a CPU without instructions for them
M8 = model("llama", 4096, 256, 6, 1024, 8, 4)
M8_QWEN3 = model("qwen3", 4096, 256, 6, 1024, 8, 4)
M30 = model("qwen2", 16384, 384, 8, 1792, 6, 2, tied=True)
M100 = model("llama", 32000, 640, 12, 1920, 10, 5)
M500 = model("qwen2", 151936, 896, 24, 4864, 14, 2, tied=True)


@dataclass(frozen=True)
class Case:
    """A model (None: `tiny/S`) with settings. `prompt_tokens` is the length of the longest prompt."""

    model: Settings | None
    settings: Settings = field(default_factory=dict)
    methods: Settings = field(default_factory=dict)
    prompt_tokens: int = 8
    ranks: int = 1


STEP = {"rollout.prompts": 4, "rollout.group_size": 8, "rollout.max_tokens": 24, "update.minibatches": 2,
        "update.micro_batch_rows": 16}  # fmt: skip
SHORT = {"rollout.prompts": 2, "rollout.group_size": 8, "rollout.max_tokens": 16, "update.minibatches": 2,
         "update.micro_batch_rows": 8}  # fmt: skip
LONG = {"rollout.prompts": 8, "rollout.group_size": 8, "rollout.max_tokens": 512, "update.minibatches": 2,
        "update.micro_batch_rows": 8}  # fmt: skip
CASES: dict[str, Case] = {
    "tiny/S": Case(None, {"rollout.prompts": 16, "rollout.group_size": 12, "update.minibatches": 6,
                          "update.micro_batch_rows": 32}),
    "1M, vocabulary 1000": Case(M1, STEP | {"rollout.max_tokens": 40}),
    "1M, vocabulary 3000, entropy bonus": Case(M1_WIDE, STEP | {"rollout.max_tokens": 40}, {"entropy_bonus": {}}),
    "8M": Case(M8, STEP),
    "8M, no ledger": Case(M8, STEP | {"ledger.rows": 0}),
    "8M, prompts of different lengths": Case(M8, STEP, prompt_tokens=36),
    "8M, packed": Case(M8, STEP | {"update.packing": True, "update.micro_batch_tokens": 700}),
    "8M, activation checkpointing": Case(M8, STEP | {"parallel.activation_checkpointing": True}),
    "8M, Qwen3": Case(M8_QWEN3, STEP),
    "8M, two processes, fsdp2": Case(M8, STEP | {"parallel.shard": "fsdp2", "update.micro_batch_rows": 8}, ranks=2),
    "30M": Case(M30, STEP),
    "30M, reference policy, old log-probs scored": Case(M30, SHORT | {"update.recompute_old_logprob": True},
                                                        {"kl_reference": {}}),
    "30M, many rows in flight": Case(M30, SHORT | {"rollout.prompts": 16, "update.minibatches": 16}),
    "2M, bfloat16 passes": Case(M2, STEP | {"model.precision": "bfloat16"}),
    "2M, bfloat16 weights": Case(M2, STEP | {"model.dtype": "bfloat16"}),
    "30M, LoRA": Case(M30, SHORT | {"model.lora.rank": 8}),
    "100M": Case(M100, SHORT),
}  # fmt: skip
GPU_CASES: dict[str, Case] = {
    "0.5B": Case(M500, LONG),
    "0.5B, bfloat16 passes": Case(M500, LONG | {"model.precision": "bfloat16"}),
    "0.5B, activation checkpointing": Case(M500, LONG | {"parallel.activation_checkpointing": True}),
}


def configuration(case: Case, folder: Path, device: str) -> TrainConfig:
    """The case as settings of a run whose files lie in `folder`."""
    tree: Settings = {
        "steps": 2,
        "model": {"path": str(folder / "model") if case.model else "tiny/S", "device": device},
        "methods": {"grpo": {"preset": "tiny"}, "spurious_rewards": {"rule": "random"}, **case.methods},
        "evaluation": {"problems": 0},
        "logging": {"tensorboard": False, "samples": 0},
    }
    if case.prompt_tokens != 8:
        tree["data"] = {"task": "math", "file": str(folder / "problems.jsonl"), "template": "{question}"}
    for key, value in case.settings.items():
        *parents, leaf = key.split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[leaf] = value
    return parse_config(tree)


def prepare(case: Case, folder: Path) -> None:
    """Write the model with the tiny lab's tokenizer, and problems of 3 to 36 tokens."""
    rows = [{"question": "a b c " * (i % 12 + 1), "answer": str(i)} for i in range(48)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if case.model is None:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        case.model["model_type"], **{k: v for k, v in case.model.items() if k != "model_type"}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")


# -- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def phases_recorded(spans: list[tuple[str, int, int]]) -> Iterator[None]:
    """Note when each part of the trainer's clock runs."""
    original = Clock.part

    @contextmanager
    def part(self: Clock, name: str) -> Iterator[None]:
        start = time.time_ns()
        with original(self, name):
            yield
        spans.append((PHASE_OF.get(name, name), start, time.time_ns()))

    Clock.part = part  # type: ignore[method-assign]
    try:
        yield
    finally:
        Clock.part = original  # type: ignore[method-assign]


def memory_events(tree: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes of every allocation; bytes are negative for a release."""
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def measured_cpu(work: Callable[[], object]) -> Settings:
    """Peak of live tensor bytes while `work` runs, whole and by phase."""
    spans: list[tuple[str, int, int]] = []
    with phases_recorded(spans):
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with profiler:
            work()
    live, peak = 0, 0
    held: dict[int, int] = {}
    by_phase = dict.fromkeys(PHASES, 0)
    changes = sorted(memory_events(profiler.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]
    for moment, address, size in changes:
        # an address that is given out again was freed, maybe in a thread of gloo's that the profiler does not follow
        live -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            live += size
        peak = max(peak, live)
        for phase, start, end in spans:
            if start <= moment <= end and phase in by_phase:
                by_phase[phase] = max(by_phase[phase], live)
    return {"measured_bytes": peak, "measured_phases": by_phase, "allocations": len(changes)}


def measured_cuda(work: Callable[[], object]) -> Settings:
    """Peak by CUDA's caching allocator."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return {"measured_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def child(name: str, device: str, folder: Path) -> Settings:
    """Run one case."""
    config = configuration((CASES | GPU_CASES)[name], folder, device)

    def work() -> None:
        Trainer(config, folder / "run").run()

    found = measured_cuda(work) if device.startswith("cuda") else measured_cpu(work)
    return found | {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def run(name: str, device: str) -> Settings:
    """Run one case in processes of its own and return what its first one measured."""
    case = (CASES | GPU_CASES)[name]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        command = [sys.executable, *(torchrun if case.ranks > 1 else []), __file__, "--device", device]
        command += ["--only", name, "--folder", folder]
        # the profiler does not see what threads of transformers' loader allocate
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: " + "\n".join(done.stderr.strip().splitlines()[-12:]))
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found: Settings = json.loads(line)
    return found


# -- comparing --------------------------------------------------------------------------------------------------------


def where_it_runs(device: str) -> Device:
    """The device to plan for."""
    if not device.startswith("cuda"):
        return processor(main_memory())
    found = torch.cuda.get_device_properties(0)
    return detected(found.name, found.total_memory)


def compared(name: str, found: Settings, device: str) -> Settings:
    """What was measured, beside the plan."""
    case = (CASES | GPU_CASES)[name]
    shape = shape_from(case.model, name, "the benchmark") if case.model else shape_of("tiny/S")
    config = configuration(case, Path("folder"), device)
    job = job_of(config, where_it_runs(device), case.ranks, prompt_tokens=case.prompt_tokens, shape=shape)
    planned = memory(job)
    # what is assumed outside torch's allocator is not in its count
    outside = (CONTEXT + (COLLECTIVES if case.ranks > 1 else 0)) if device.startswith("cuda") else 0
    estimate = planned.peak - outside
    keys = ("measured_bytes", "measured_phases", "reserved_bytes", "allocations", "peak_resident_bytes")
    return {
        "case": name,
        "parameters": shape.parameters,
        "planned_bytes": estimate,
        "ratio": estimate / found["measured_bytes"],
        "planned_phases": {phase: planned.phase(phase) for phase in PHASES},
        **{key: found[key] for key in keys if key in found},
        "model": case.model,
        "config": config.model_dump(mode="json"),
        "prompt_tokens": case.prompt_tokens,
        "ranks": case.ranks,
    }


def write(rows: list[Settings], device: str, out: Path) -> None:
    """Results with provenance."""
    errors = [abs(row["ratio"] - 1) for row in rows]
    result = {
        "what": "planned over measured peak of tensor memory in two training steps",
        "measure": "CUDA allocator" if device.startswith("cuda") else "torch.profiler: all allocations of torch",
        "aim": AIM,
        "within_aim": sum(error <= AIM for error in errors),
        "cases": len(rows),
        "largest_error": max(errors),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    case: Annotated[list[str] | None, typer.Option(help="Only these cases; other recorded rows stay.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULT,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare plans with real training steps, each case in a process of its own."""
    if only is not None and folder is not None:
        torch.set_num_threads(1)
        found = child(only, device, folder)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    every = CASES | (GPU_CASES if device.startswith("cuda") else {})
    old = {row["case"]: row for row in json.loads(out.read_text())["rows"]} if case and out.exists() else {}
    for name in case or every:
        old[name] = compared(name, run(name, device), device)
        sizes = [old[name][key] / 2**20 for key in ("measured_bytes", "planned_bytes")]
        print(
            f"{name:45s} measured {sizes[0]:8.1f} MiB  planned {sizes[1]:8.1f} MiB  {old[name]['ratio']:.3f}",
            flush=True,
        )
        write(list(old.values()), device, out)
    # plans are made again for all rows, so that they are those of one planner
    rows = [compared(name, old[name], device) for name in every if name in old]
    write(rows, device, out)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    print(f"{len(rows)} cases, largest error {abs(worst['ratio'] - 1):.1%} ({worst['case']}): {out}")


if __name__ == "__main__":
    typer.run(main)
