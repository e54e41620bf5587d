"""How long a scan of condition numbers takes, how much memory, and which algorithm resolves what.

    python benchmarks/kappa_scan.py

The model is Qwen2.5-0.5B's configuration with random weights (nothing is downloaded). `scan` is what `kappatune` runs:
every matrix of the model, embeddings included, with the median of random matrices of each shape. Memory is the peak
resident set of the process, less what it was with the model loaded. `accuracy` sets known singular values, from 1 down
to 1 / kappa, in a matrix between random orthogonal ones, and gives the relative error of three ways to kappa. Results
go to `benchmarks/results/kappa_scan.json`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kappa_scan.json"
# Qwen/Qwen2.5-0.5B, config.json
QWEN = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
KAPPAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e10)


def peak_mb() -> float:
    """Peak resident set of this process in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured_scan(layers: int, dtype: str) -> dict[str, Any]:
    """Time, memory and figures of a scan of the random model."""
    import torch
    from rich.progress import Progress
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlvr_lab.methods.kappatune import KappaTuneConfig, scan

    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN | {"num_hidden_layers": layers})).to(getattr(torch, dtype))
    loaded = peak_mb()
    total = sum(p.ndim > 1 for p in model.parameters())
    started, cpu = time.perf_counter(), time.process_time()
    with Progress(transient=True) as bar:
        task = bar.add_task("condition numbers", total=total)
        found = scan(
            ((n, p) for n, p in model.named_parameters() if p.ndim > 1),
            KappaTuneConfig(),
            lambda name: bar.advance(task),
        )
    seconds, busy = time.perf_counter() - started, time.process_time() - cpu
    by_shape: dict[str, list[float]] = {}
    for one in found:
        by_shape.setdefault("x".join(map(str, one.shape)), []).append(one.matched)
    return {
        "layers": layers,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": len(found),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "model_mb": round(loaded),
        "scan_mb": round(peak_mb() - loaded),
        "matched_median": {shape: round(sorted(v)[len(v) // 2], 3) for shape, v in by_shape.items()},
    }


def accuracy(rows: int = 896, columns: int = 512) -> list[dict[str, Any]]:
    """Relative error of kappa for known spectra, by three ways: the last is that of `core.condition`."""
    import torch

    from rlvr_lab.core.condition import condition_number

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, columns, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    table = []
    for kappa in KAPPAS:
        values = torch.logspace(0, -float(torch.tensor(kappa).log10()), columns, dtype=torch.float64)
        weight = left * values @ right.T
        single = torch.linalg.svdvals(weight.float())
        squares = torch.linalg.eigvalsh(weight.T @ weight).clamp_min(0).sqrt()
        ways = {
            "svdvals_float32": float(single[0] / single[-1]),
            "gram_float64": float(squares[-1] / squares[0]),
            "condition_number": condition_number(weight, eps=0.0),
        }
        errors = {name: abs(k / kappa - 1) for name, k in ways.items()}
        table.append({"kappa": kappa} | {n: float(f"{e:.1e}") if math.isfinite(e) else None for n, e in errors.items()})
    return table


def main(
    layers: Annotated[int, typer.Option(help="Layers of the model; 24 are Qwen2.5-0.5B.")] = 24,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Scan, and measure the accuracy; see the head of this file."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # threads that spin would fight other processes for the cores
    import torch

    torch.set_num_threads(2)
    from rlvr_lab.train.loop import machine

    record = {
        "command": "python benchmarks/kappa_scan.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"load_average": round(os.getloadavg()[0], 1)},
        "scan": measured_scan(layers, dtype),
        "accuracy": accuracy(),
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(json.dumps(record["scan"]))
    for row in record["accuracy"]:
        typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
