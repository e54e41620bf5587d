"""What the vocabulary head costs: log-probability and entropy, forward and backward, against what others ship.

    python benchmarks/head.py [--device cpu|cuda] [--trl DIR] [--quick]
    python benchmarks/head.py --device cuda --check

Protocol: one process; contenders interleaved, in a rotated order each round; the same tensors, upstream gradients for
the log-probability *and* the entropy of every token, temperature not 1, fresh gradients each time. Medians over
rounds; a ratio is the median over rounds of the pair within a round. CPU time of this process on a CPU (one thread),
device events on a GPU. Peak memory is what a call needs beyond its inputs, gradients included. Beside each time stand
the errors against float64 on "mixed" rows (a share of confident, a share of unsure tokens); errors of ours and of
plain autograd on flat and near-deterministic rows follow. The products alone (3 with kept logits, 4 without) are a
floor, not a contender.

`--trl DIR`: where `pip install --no-deps --target DIR trl==1.16.0` put TRL (kernels/chunked_logprob.py is enough).
verl's and Liger's heads take part where they can be imported. `--check` compares all statistics and gradients of the
Triton kernels with float64 autograd first, and fails if they disagree. Results go to
`benchmarks/results/head_<device>.json`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from rlvr_lab.core.head import HeadStatistics, head_statistics

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.8
DEFAULTS = {"cpu": (256, 896, "151936,300", 31, 150.0), "cuda": (8192, 3584, "151936,129920,300", 31, 20.0)}
COMPILED = "torch.compile of plain"
Contender = Callable[["Problem"], tuple[Tensor, Tensor]]


@dataclass
class Problem:
    """Inputs and upstream gradients of one comparison; rows outside `live` have upstream gradient 0."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    upstream: tuple[Tensor, Tensor]
    live: Tensor | None = None

    def with_live(self, share: float) -> Problem:
        """The same rows, of which a share reaches the loss."""
        g = torch.Generator().manual_seed(5)
        live = (torch.rand(len(self.ids), generator=g) < share).to(self.ids.device)
        a, b = self.upstream
        return Problem(self.hidden, self.weight, self.ids, (a * live, b * live), live)


def make_problem(rows: int, width: int, vocabulary: int, kind: str, device: str) -> Problem:
    """Random weight; hidden states that are flat, peaked, or mixed: towards the given token, by 0 to 25 nats."""
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = normal(vocabulary, width)
    ids = torch.randint(vocabulary, (rows,), generator=g, device=device)
    nats = {"flat": 0.0, "peaked": 22.0, "mixed": 25 * torch.rand(rows, 1, generator=g, device=device)}[kind]
    noise = {"flat": 1e-3, "peaked": 0.0, "mixed": 1.0}[kind]
    hidden = normal(rows, width) * noise / width**0.5 + nats * weight[ids] / width
    return Problem(
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids, (normal(rows), normal(rows))
    )


# --- contenders


def ours(problem: Problem, **settings: Any) -> tuple[Tensor, Tensor]:
    stats = head_statistics(
        problem.hidden, problem.weight, problem.ids, temperature=TEMPERATURE, live=problem.live, **settings
    )
    return stats.logprob, stats.entropy


def plain(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What one writes down first: all logits, in float32 after the product."""
    logits = (hidden @ weight.t()).float() / temperature
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def adapt(function: Callable[..., tuple[Tensor, Tensor]]) -> Contender:
    return lambda p: function(p.hidden, p.weight, p.ids, TEMPERATURE)


def trl_contender(folder: Path | None) -> Contender:
    """TRL's kernel as its trainer calls it (tiles of 32768 columns).

    Its backward imports the trainers only for a DeepSpeed context, which is a no-op here and stands in for them, so
    that TRL's dependencies need not be installed.
    """
    if folder is None or not (folder / "trl/kernels/chunked_logprob.py").exists():
        raise ImportError("TRL's kernels not found; give --trl DIR")
    for name in ("trl", "trl.kernels", "trl.trainer"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    stand_in = types.ModuleType("trl.trainer.utils")
    stand_in.__dict__["maybe_gather_lm_head_ctx"] = lambda *_: contextlib.nullcontext()
    sys.modules["trl.trainer.utils"] = stand_in
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def run(p: Problem) -> tuple[Tensor, Tensor]:
        found = function.apply(p.hidden, p.weight, None, p.ids, TEMPERATURE, 32768, None, 1.0, ("entropy",))
        return found[0], found[1]

    return run


def verl_chunks_contender() -> Contender:
    fused = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return adapt(lambda h, w, ids, t: fused(h, w, ids, temperature=t))


def verl_triton_contender() -> Contender:
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return adapt(lambda h, w, ids, t: function(h, w, ids, t, "none"))


def liger_contender() -> Contender:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def run(h: Tensor, w: Tensor, ids: Tensor, t: float) -> tuple[Tensor, Tensor]:
        loss, entropy = function.apply(h, w, ids, t, return_entropy=True)
        return -loss, entropy

    return adapt(run)


def contenders(device: str, trl: Path | None) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run, and why the others cannot."""
    found: dict[str, Contender] = {"ours": ours, "ours, nothing kept": lambda p: ours(p, keep_bytes=0)}
    if device == "cuda":
        found["ours, torch tiles"] = lambda p: ours(p, implementation="torch")
    found["plain autograd"] = adapt(plain)
    absent: dict[str, str] = {}
    optional: dict[str, Callable[[], Contender]] = {
        COMPILED: lambda: adapt(torch.compile(plain, dynamic=False)),
        "TRL 1.16": lambda: trl_contender(trl),
        "verl, row chunks": verl_chunks_contender,
        "verl, Triton": verl_triton_contender,
        "Liger": liger_contender,
    }
    for name, make in optional.items():
        try:
            found[name] = make()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent


def products(p: Problem, count: int) -> Callable[[], None]:
    """The matrix products alone, in the inputs' type: one forward, two backward, and one more without kept logits."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    logits = hidden @ weight.t()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for _ in range(count - 2):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return run


# --- measures


class Clock:
    """Seconds of the device's own work, or CPU seconds of this process."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def mark(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        if not self.cuda:
            return float(b - a)
        b.synchronize()
        return float(a.elapsed_time(b)) / 1e3


def gradients(p: Problem, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    upstream = [g.to(x.dtype) for g, x in zip(p.upstream, found, strict=True)]
    a, b = torch.autograd.grad(list(found), [p.hidden, p.weight], upstream)
    return a, b


def timed(clock: Clock, p: Problem, contender: Contender) -> tuple[float, float]:
    """Seconds forward and backward."""
    start = clock.mark()
    found = contender(p)
    middle = clock.mark()
    gradients(p, found)
    end = clock.mark()
    return clock.between(start, middle), clock.between(middle, end)


def peak_megabytes(p: Problem, contender: Contender) -> float | None:
    """Highest memory during a call, beyond what was held before it."""
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(p, contender(p))
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc kept from earlier calls would hide this one's
        reset.write_text("5")
        before = _status_kilobytes(status, "VmRSS")
        gradients(p, contender(p))
        return (_status_kilobytes(status, "VmHWM") - before) / 1e3
    except (OSError, LookupError, AttributeError):
        return None  # not Linux: unknown


def _status_kilobytes(status: Path, name: str) -> int:
    match = re.search(name + r":\s+(\d+)", status.read_text())
    if match is None:
        raise LookupError(name)
    return int(match[1])


@dataclass
class Exact:
    """float64 values: statistics and dhidden of all rows, dweight of some tokens."""

    logprob: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    tokens: Tensor


def exact(p: Problem, chunk: int = 512) -> Exact:
    """By rows, from the formulas (checked against autograd in tests/core/test_head.py)."""
    hidden, weight = p.hidden.detach().double(), p.weight.detach().double()
    g = torch.Generator().manual_seed(2)
    some = torch.randint(len(weight), (min(512, len(weight)),), generator=g).to(p.ids.device)
    tokens = torch.cat([some, p.ids[:256]])
    d_weight = hidden.new_zeros((len(tokens), hidden.shape[1]))
    parts = []
    for rows in torch.arange(len(hidden), device=p.ids.device).split(chunk):
        log_p = torch.log_softmax(hidden[rows] @ weight.t() / TEMPERATURE, -1)
        prob = log_p.exp()
        entropy = -(prob * log_p).sum(-1)
        logprob = log_p.gather(1, p.ids[rows, None]).squeeze(1)
        a, b = (x[rows, None].double() for x in p.upstream)
        grad = log_p.add_(entropy[:, None]).mul_(-b).sub_(a).mul_(prob)
        grad = grad.scatter_add_(1, p.ids[rows, None], a).div_(TEMPERATURE)
        d_weight += grad[:, tokens].t() @ hidden[rows]
        parts.append((logprob, entropy, grad @ weight))
    return Exact(*(torch.cat(x) for x in zip(*parts, strict=True)), d_weight, tokens)


def errors(p: Problem, contender: Contender, truth: Exact) -> dict[str, float]:
    """Largest absolute error of the statistics in nats; relative error (norms) of the gradients."""
    logprob, entropy = found = contender(p)
    d_hidden, d_weight = gradients(p, found)

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm().clamp_min(1e-300))

    return {
        "logprob": float((logprob.detach().double() - truth.logprob).abs().max()),
        "entropy": float((entropy.detach().double() - truth.entropy).abs().max()),
        "d_hidden": relative(d_hidden, truth.d_hidden),
        "d_weight": relative(d_weight[truth.tokens], truth.d_weight),
    }


# --- one vocabulary


def compare(
    p: Problem, entrants: dict[str, Contender], clock: Clock, repeats: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the table, and contenders that failed."""
    sparse = p.with_live(0.2)
    truth, sparse_truth = exact(p), exact(sparse)
    jobs: dict[str, tuple[Problem, Contender]] = {name: (p, c) for name, c in entrants.items()}
    jobs["ours, 20% of rows live"] = (sparse, ours)
    rows, failed = {}, {}
    for name, (problem, contender) in jobs.items():
        try:
            found = errors(problem, contender, sparse_truth if problem is sparse else truth)  # also the warm-up
            rows[name] = {"name": name, "peak_megabytes": peak_megabytes(problem, contender), "errors": found}
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    del truth, sparse_truth
    times = interleave({k: jobs[k] for k in rows}, p, clock, repeats, seconds)
    for name, pairs in times.items():
        row = rows.setdefault(name, {"name": name})
        totals = [a + b for a, b in pairs]
        ratios = [t / sum(o) for t, o in zip(totals, times["ours"], strict=True)]
        row |= {"rounds": len(pairs), "seconds": statistics.median(totals)}
        row |= {"lowest": min(totals), "highest": max(totals)}
        row |= {"forward": statistics.median(a for a, _ in pairs), "backward": statistics.median(b for _, b in pairs)}
        row |= {"over_ours": statistics.median(ratios)}
    return list(rows.values()), failed


def interleave(
    jobs: dict[str, tuple[Problem, Contender]], p: Problem, clock: Clock, repeats: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Seconds (forward, backward) per round of every job, until `repeats` rounds or `seconds` of wall time are over."""
    work: dict[str, Callable[[], tuple[float, float]]] = {
        name: (lambda problem=problem, c=c: timed(clock, problem, c)) for name, (problem, c) in jobs.items()
    }
    for count in (3, 4):
        run = products(p, count)
        run()

        def floor(run: Callable[[], None] = run) -> tuple[float, float]:
            start = clock.mark()
            run()
            return clock.between(start, clock.mark()), 0.0

        work[f"{count} products alone"] = floor
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    names, deadline = list(work), time.monotonic() + seconds
    for turn in range(repeats):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(work[name]())
    return times


def machine_facts() -> dict[str, Any]:
    """As `rlvr_lab.train.loop.machine`, also where the trainer's dependencies are not installed."""
    try:
        from rlvr_lab.train.loop import machine

        return machine()
    except ImportError:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        facts = {"system": platform.system(), "processor": platform.machine(), "gpu": gpu}
        return facts | {
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }


# --- correctness of the Triton kernels on this device


def check(device: str) -> bool:
    """All statistics and gradients of the default implementation against float64 autograd; prints one line a case."""
    good = True
    for vocabulary in (7, 300, 1024, 129920, 151936):
        for kind in ("random", "flat", "peaked"):
            for dtype in (torch.float32, torch.bfloat16):
                worst = _check_case(vocabulary, kind, dtype, device)
                limit = 1e-3 if dtype == torch.float32 else 1e-2
                passed = worst["statistics"] < 2e-4 and worst["gradients"] < limit
                good &= passed
                print(
                    f"{'ok  ' if passed else 'FAIL'} V={vocabulary:6} {kind:6} {str(dtype)[6:]:8} {worst}", flush=True
                )
    return good


def _check_case(vocabulary: int, kind: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    g = torch.Generator().manual_seed(vocabulary)
    rows, width = 96, 64
    scale = {"random": 1.0, "flat": 1e-4, "peaked": 6.0}[kind]
    inputs = [torch.randn(rows, width, generator=g) * scale, torch.randn(vocabulary, width, generator=g) * 0.3]
    inputs.append(torch.randn(vocabulary, generator=g))
    single = [x.to(device, dtype).requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in single]
    ids = torch.randint(vocabulary, (rows,), generator=g).to(device)
    live = (torch.rand(rows, generator=g) < 0.5).to(device)
    names = [f.name for f in fields(HeadStatistics)]
    upstream = [torch.randn(rows, generator=g).to(device) for _ in names]
    settings: dict[str, Any] = {"temperature": 0.7, "live": live}
    got = head_statistics(single[0], single[1], ids, bias=single[2], **settings)
    want = head_statistics(double[0], double[1], ids, bias=double[2], implementation="reference", **settings)
    pairs = [(getattr(got, n).detach().double(), getattr(want, n).detach()) for n in names]
    worst = max(float(((a - b).abs() / b.abs().clamp_min(1)).max()) for a, b in pairs)
    a = torch.autograd.grad([getattr(got, n) for n in names], single, upstream)
    b = torch.autograd.grad([getattr(want, n) for n in names], double, [u.double() for u in upstream])
    gradient = max(float((x.double() - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))
    return {"statistics": worst, "gradients": gradient}


def other_rows(rows: int, width: int, vocabulary: int, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """Errors where log-probabilities are nearly equal, and where nearly all mass is on one token."""
    found = {}
    for kind in ("flat", "peaked"):
        p = make_problem(min(rows, 256), width, vocabulary, kind, device)
        truth = exact(p)
        found[kind] = {"ours": errors(p, ours, truth), "plain autograd": errors(p, adapt(plain), truth)}
    return found


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[int | None, typer.Option(help="Tokens; default 256 on a CPU, 8192 on a GPU.")] = None,
    width: Annotated[int | None, typer.Option(help="Hidden units; default 896 on a CPU, 3584 on a GPU.")] = None,
    vocabularies: Annotated[str | None, typer.Option(help="Comma-separated sizes.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds at most; default 31.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Wall time per vocabulary after which no round starts.")] = None,
    trl: Annotated[Path | None, typer.Option(help="Folder that holds the package trl (1.16).")] = None,
    only_check: Annotated[bool, typer.Option("--only-check", help="Stop after the check.")] = False,
    run_check: Annotated[bool, typer.Option("--check", help="Check all statistics against float64 first.")] = False,
    quick: Annotated[bool, typer.Option(help="Seven rounds, a quarter of the time.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the result.")] = None,
) -> None:
    """Measure the vocabulary head; see the head of this file."""
    if device == "cpu":
        torch.set_num_threads(1)
    if (run_check or only_check) and not check(device):
        raise SystemExit("the implementation disagrees with float64 autograd")
    if only_check:
        return
    default = DEFAULTS[device]
    n, h = rows or default[0], width or default[1]
    most, budget = (7, default[4] / 4) if quick else (repeats or default[3], seconds or default[4])
    entrants, absent = contenders(device, trl)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_facts(),
        "device": device,
        "rows": n,
        "width": h,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "temperature": TEMPERATURE,
        "measure": "device seconds" if device == "cuda" else "CPU seconds of one thread",
        "absent": absent,
        "vocabularies": {},
    }
    for place, vocabulary in enumerate(int(v) for v in (vocabularies or default[2]).split(",")):
        if place:  # it would be compiled anew for each shape
            entrants.pop(COMPILED, None)
        p = make_problem(n, h, vocabulary, "mixed", device)
        table, failed = compare(p, entrants, Clock(device == "cuda"), most, budget)
        del p
        others = other_rows(n, h, vocabulary, device)
        report["vocabularies"][str(vocabulary)] = {"table": table, "failed": failed, "errors_on_other_rows": others}
        _show(vocabulary, n, h, table, failed, others)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason[:100]}")
    folder = out or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"head_{device}.json").write_text(json.dumps(report, indent=1) + "\n")


def _show(
    vocabulary: int,
    rows: int,
    width: int,
    table: Sequence[dict[str, Any]],
    failed: dict[str, str],
    others: dict[str, dict[str, dict[str, float]]],
) -> None:
    print(f"\nN={rows} H={width} V={vocabulary}   milliseconds; peak in MB beyond inputs; errors against float64")
    print(f"{'':24} rounds  forward backward    total /ours    peak  logprob entropy dhidden dweight")
    for row in table:
        peak, found = row.get("peak_megabytes"), row.get("errors")
        print(
            f"{row['name']:24} {row['rounds']:6} {row['forward'] * 1e3:8.2f} {row['backward'] * 1e3:8.2f} "
            f"{row['seconds'] * 1e3:8.2f} {row['over_ours']:5.2f} {'' if peak is None else f'{peak:.0f}':>7} "
            + (
                ""
                if found is None
                else " ".join(f"{found[k]:7.0e}" for k in ("logprob", "entropy", "d_hidden", "d_weight"))
            ),
            flush=True,
        )
    for kind, both in others.items():
        for name, found in both.items():
            print(f"{name} on {kind} rows: " + ", ".join(f"{k} {v:.0e}" for k, v in found.items()))
    for name, reason in failed.items():
        print(f"failed: {name}: {reason[:200]}")


if __name__ == "__main__":
    typer.run(main)
