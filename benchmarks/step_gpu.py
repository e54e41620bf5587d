"""Steps of a randomly initialised Qwen2.5 on one GPU: tokens per second, MFU, peak memory; ten steps per method.

    python benchmarks/step_gpu.py --size 0.5B [--steps 10] [--method grpo ...]

No weights are needed: the model has Qwen2.5's shape (0.5B, 1.5B) with random weights, which cost what trained ones
cost. Its end token has probability 1 / V, so that nearly every response has `--tokens` tokens. Rewards are set by
place, because a random model solves nothing: half of each group is right. Prompts are Countdown's, all of one length.

MFU is that of the update alone: floating-point operations of forward and backward passes over the rows that were
trained, over the seconds of the loss and the device's dense peak. A pass over a token costs 2 N + 4 L H c for N
parameters that multiply (the input table does not), L layers of width H and c tokens of context; backward costs twice
that, and recomputed activations are not counted as work.

`--size tiny --device cpu` runs the same code on a processor in a minute; there MFU is not defined, and no file is
written. On an H100 the transformers engine takes nearly all of a step: 6.8 s of sampling to 0.3 s of update for 64
responses of 256 tokens (benchmarks/results/step_gpu_0.5B.json); vLLM, which that machine lacks, is what samples there.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose, trainable
from rlvr_lab.methods.base import Method
from rlvr_lab.plan.devices import detected
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.config import parse_config
from rlvr_lab.train.loop import Trainer, machine

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 5000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip
"""Qwen2.5's published shapes; both have tied embeddings."""
NEEDS: dict[str, dict[str, Any]] = {"dynamic_sampling": {"metric": "reward"}}
"""Settings without which a method has nothing to do here."""


class HalfRight(Method):
    """Reward 1 for every second response."""

    slug = "half_right"

    def reward(self, rollout: Rollout) -> dict[str, Tensor]:
        place = torch.arange(len(rollout), device=rollout.response_ids.device)
        return {"half_right": (place % 2 == 0).float()}


def make_model(folder: Path, size: str, context: int) -> Path:
    """A transformers directory: random weights of the shape, and the shipped tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_policy("tiny/S", device="cpu").tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**SHAPES[size], tie_word_embeddings=True, max_position_embeddings=context, **ends)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(folder: Path, model: Path, slug: str, options: dict[str, Any]) -> Trainer:
    """A run of one method, with rewards by place unless the method replaces them."""
    methods = {slug: NEEDS.get(slug, {})}
    tree = {
        "steps": 10**6,
        "model": {"path": str(model), "device": options["device"], "precision": options["precision"]},
        "data": {"pool": 1000},
        "rollout": {"prompts": options["prompts"], "group_size": options["group"], "max_tokens": options["tokens"],
                    "rows": options["prompts"] * options["group"]},
        "methods": methods,
        "optimizer": {"lr": 1e-6, "grad_clip": 1.0},
        "update": {"minibatches": 2, "micro_batch_rows": options["rows"]},
        "evaluation": {"problems": 0},
        "logging": {"tensorboard": False, "samples": 0},
        "ledger": {"rows": 0},
    }  # fmt: skip
    trainer = Trainer(parse_config(tree), folder)
    own = [build(name, settings) for name, settings in methods.items()]
    extra = [] if any(m.replaces_reward for m in own) else [HalfRight()]
    pipeline = compose([*own, *extra])
    for part in (trainer, trainer.updater, trainer.collector):
        part.pipeline = pipeline
    return trainer


def work(trainer: Trainer, rows: float, tokens: int) -> float:
    """Floating-point operations of the update: forward and backward of `rows` responses of `tokens` tokens."""
    config = trainer.policy.model.config
    parameters = sum(
        p.numel() for p in trainer.policy.model.parameters()
    )  # tied: the table is the head, and multiplies
    length = 8 + tokens
    per_token = 2 * parameters + 4 * config.num_hidden_layers * config.hidden_size * length / 2
    return 3 * rows * length * per_token


def measure(trainer: Trainer, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Real steps; medians without the first two, which warm up."""
    device = trainer.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rows = [trainer.step(step) for step in range(steps)]
    bad = [k for row in rows for k in ("loss", "grad_norm") if not math.isfinite(row[k])]
    if bad:
        raise SystemExit(f"{bad[0]} is not finite")
    kept = sorted(rows[min(2, steps - 1) :], key=lambda row: row["seconds"])
    middle = kept[len(kept) // 2]
    responses = options["prompts"] * options["group"]
    trained = responses * (1 - middle["rows_skipped"])
    peak = _peak_flops(device, options["precision"])
    return {
        "tokens_per_second": middle["tokens_per_second"],
        "seconds": {k.removeprefix("seconds_"): v for k, v in middle.items() if k.startswith("seconds_")},
        "mfu_update": work(trainer, trained, options["tokens"]) / middle["seconds_loss"] / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "rows_skipped": middle["rows_skipped"],
        "loss": [row["loss"] for row in rows],
        "token_entropy": [row["token_entropy"] for row in rows],
    }


def _peak_flops(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return detected(found.name, found.total_memory).throughput("bfloat16" if precision == "bfloat16" else "float32")


def main(
    size: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "0.5B",
    steps: Annotated[int, typer.Option(min=1, help="Real steps of each method.")] = 10,
    method: Annotated[list[str] | None, typer.Option(help="Only these; by default every registered one.")] = None,
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    group: Annotated[int, typer.Option(min=2)] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Length of every response.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Responses per forward and backward pass.")] = 8,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Measure and write benchmarks/results/step_gpu_SIZE.json; on a processor only print."""
    if size not in SHAPES:
        raise SystemExit(f"--size {size}: choose one of {', '.join(SHAPES)}")
    options: dict[str, Any] = {"prompts": prompts, "group": group, "tokens": tokens, "rows": rows, "device": device}
    options["precision"] = "bfloat16" if torch.cuda.is_available() and device != "cpu" else "same"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = make_model(root / "model", size, 8 + tokens)
        for slug in method or trainable():
            trainer = make_trainer(root / slug, model, slug, options)
            found[slug] = measure(trainer, steps, options)
            shown = {k: v for k, v in found[slug].items() if k not in ("loss", "token_entropy", "seconds")}
            print(slug, json.dumps(shown), flush=True)
            del trainer
            if torch.cuda.is_available() and device != "cpu":  # after each: a limit on time loses nothing
                torch.cuda.empty_cache()
                _write(size, steps, options, found)


def _write(size: str, steps: int, options: dict[str, Any], found: dict[str, Any]) -> None:
    about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "size": size, "steps": steps, **options}
    (RESULTS / f"step_gpu_{size}.json").write_text(json.dumps(about | {"methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
