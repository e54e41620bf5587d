"""vLLM against transformers on the tiny lab: the same tokens, two programs. For chapter rollout_mismatch.

    python benchmarks/rollout_mismatch.py            # in the environment of `nox -s vllm`; CPU, minutes

vLLM samples from `tiny/S` in float32 and in bfloat16; transformers scores every sampled token in float32, and the
bfloat16 samples in bfloat16 too. Then GRPO trains with each sampler, float32 weights in the trainer, and every step's
mismatch is logged. Writes `book/data/rollout_mismatch.json`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_settings import VllmSection, installed_version
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer, machine

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "rollout_mismatch.json"
PROBLEMS, SAMPLES, TOKENS, STEPS = 64, 16, 28, 15
EDGES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0)
COLUMNS = (
    "step", "reward", "token_entropy", "mismatch", "mismatch_mean", "mismatch_kl", "importance_weight_mean",
    "importance_weight_ess", "importance_weight_truncated", "sync_mismatch", "sync_mismatch_max",
)  # fmt: skip
TRAINING = (
    "rollout.engine=vllm", "rollout.vllm.eager=true", "update.recompute_old_logprob=true", f"steps={STEPS}",
    "methods={grpo: {preset: tiny}, truncated_importance_sampling: {}}", "rollout.prompts=8", "rollout.group_size=16",
    "update.minibatches=4", f"rollout.max_tokens={TOKENS}", "optimizer.lr=1e-3", "evaluation.problems=0",
    "logging.tensorboard=false", "model.device=cpu", "ledger.rows=0", "checkpoint.every=1000",
)  # fmt: skip


def sample(dtype: str) -> Rollout:
    """Responses of vLLM in `dtype`, at temperature 1, to held-out problems."""
    engine = VllmEngine(load_policy("tiny/S", device="cpu"), VllmSection(dtype=dtype, eager=True))  # type: ignore[arg-type]
    prompts = [list(p.prompt_ids) for p in countdown.problems(PROBLEMS, 0, evaluation=True)]
    rollout = engine.sample(prompts, SAMPLES, Sampling(1.0, TOKENS), torch.Generator().manual_seed(0))
    engine.close()
    return rollout


def compared(rollout: Rollout, dtype: str) -> dict[str, Any]:
    """Log-ratio trainer minus sampler, per token and summed over responses, and the trainer's probabilities."""
    model = load_policy("tiny/S", device="cpu", dtype=dtype).model
    old = scored(model, rollout, 64)[0].float()
    ratio = (old - rollout.behaviour_logprob) * rollout.mask
    flat, p = ratio[rollout.mask], old[rollout.mask].exp()
    weight = flat.double().exp()
    return {
        "tokens": len(flat),
        "responses": len(rollout),
        "mean_abs": float(flat.abs().mean()),
        "mean": float(flat.mean()),
        "largest": float(flat.abs().max()),
        "quantiles": {str(q): float(flat.abs().quantile(q)) for q in (0.5, 0.9, 0.99)},
        "weight_mean": float(weight.mean()),
        "weight_ess": float(weight.sum() ** 2 / (len(weight) * weight.square().sum())),
        "by_probability": [by_probability(flat, p, *edges) for edges in pairwise(EDGES)],
        "by_length": by_length(ratio, rollout),
    }


def by_probability(flat: torch.Tensor, p: torch.Tensor, low: float, high: float) -> dict[str, Any]:
    """Root mean square and largest |log-ratio| of tokens whose probability lies in (low, high]."""
    inside = flat[(p > low) & (p <= high)].double()
    n = len(inside)
    rms = float(inside.square().mean().sqrt()) if n else None
    return {"low": low, "high": high, "tokens": n, "rms": rms, "largest": float(inside.abs().max()) if n else None}


def by_length(ratio: torch.Tensor, rollout: Rollout) -> list[dict[str, Any]]:
    """Root mean square of the log-ratio summed over the first t tokens, over responses that have so many."""
    total = ratio.double().cumsum(1)
    rows = []
    for t in range(1, ratio.shape[1] + 1):
        long = total[rollout.lengths >= t, t - 1]
        if len(long) >= 30:
            rows.append({"tokens": t, "responses": len(long), "rms": float(long.square().mean().sqrt())})
    return rows


def trained(dtype: str, folder: Path) -> list[dict[str, Any]]:
    """Every step's mismatch of a short GRPO run whose sampler is vLLM in `dtype`."""
    Trainer(load_config(None, [*TRAINING, f"rollout.vllm.dtype={dtype}"]), folder / dtype).run()
    rows = [json.loads(line) for line in (folder / dtype / "metrics.jsonl").read_text().splitlines()]
    return [{name: round(row[name], 8) for name in COLUMNS} for row in rows]


def main() -> None:
    """Measure and write."""
    started = time.perf_counter()
    single, half = sample("float32"), sample("bfloat16")
    static = {
        "float32 sampler, float32 trainer": compared(single, "float32"),
        "bfloat16 sampler, float32 trainer": compared(half, "float32"),
        "bfloat16 sampler, bfloat16 trainer": compared(half, "bfloat16"),
    }
    with tempfile.TemporaryDirectory() as folder:
        training = {dtype: trained(dtype, Path(folder)) for dtype in ("float32", "bfloat16")}
    result = {
        "command": "python " + " ".join(["benchmarks/rollout_mismatch.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"vllm": installed_version(), "cores": os.cpu_count()},
        "settings": {"policy": "tiny/S", "problems": PROBLEMS, "samples": SAMPLES, "temperature": 1.0,
                     "max_tokens": TOKENS, "training": list(TRAINING)},
        "seconds": round(time.perf_counter() - started),
        "static": static,
        "training": training,
    }  # fmt: skip
    DATA.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in static.items():
        print(name, {key: value for key, value in found.items() if not isinstance(value, list | dict)})


if __name__ == "__main__":
    main()
