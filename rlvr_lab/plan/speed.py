"""Time of one step: an estimate from FLOPs, bytes and stated efficiencies, nothing measured.

With P parameters that multiply every token, a forward pass takes 2 P FLOP a token and 4 L n_q D times the mean context
for attention; a backward pass twice that, and checkpointing one forward more. Sampling a token reads all weights and
the caches of all rows in flight, so that it is bound by bandwidth until many rows are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import UserError
from .job import Job


@dataclass(frozen=True)
class Assumptions:
    """What the time estimate takes for granted. None of it is measured on your machine."""

    mfu: float = 0.35
    """Share of peak FLOP/s in training and scoring."""
    prefill: float = 0.35
    """Share of peak FLOP/s when prompts are read."""
    bandwidth: float = 0.6
    """Share of peak bandwidth when tokens are sampled."""
    launch_transformers: float = 1e-3
    """Seconds of a decoding step per layer that transformers' Python takes at least."""
    launch_vllm: float = 5e-5
    """The same of vLLM with CUDA graphs."""
    network: float = 0.7
    """Share of the link's bandwidth in gathers and sums."""
    kept: float = 0.5
    """Share of groups that dynamic sampling keeps."""
    update_rows: float = 1.0
    """Share of responses with a gradient; groups of equal rewards have none and are skipped."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) > 0:
                raise UserError(f"the assumption '{f.name}' must be positive, not {getattr(self, f.name)}")


@dataclass(frozen=True)
class Duration:
    """Seconds of one part of a step, with its formula."""

    name: str
    formula: str
    seconds: float


@dataclass(frozen=True)
class Speed:
    """An estimate of one step."""

    parts: tuple[Duration, ...]
    generated: int
    """Response tokens sampled in a step, over all ranks."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(part.seconds for part in self.parts)


def speed(job: Job, assumed: Assumptions) -> Speed:
    """Seconds of a step on `job.ranks` GPUs that share the responses evenly."""
    batches = _batches(job, assumed)
    parts = [*_sampling(job, assumed, batches), *_scoring(job, assumed, batches), *_learning(job, assumed)]
    return Speed(tuple(parts), round(batches * job.responses * job.mean_tokens))


def _batches(job: Job, assumed: Assumptions) -> float:
    return min(1 / assumed.kept, float(job.refill)) if job.refill > 1 else 1.0


def flops_per_token(job: Job, context: float) -> float:
    """Forward pass: 2 P + 4 L n_q D context."""
    return 2 * job.shape.matmul_parameters + 4 * job.shape.layers * job.shape.query_width * context


def _sampling(job: Job, assumed: Assumptions, batches: float) -> list[Duration]:
    s, ranks = job.shape, job.ranks
    peak, band = job.device.throughput(job.dtype), job.device.bandwidth * assumed.bandwidth
    times = f" x {batches:.3g} generation batches" if batches != 1 else ""
    prompts = -(-job.prompts // ranks) * job.prompt_tokens
    reading = batches * prompts * flops_per_token(job, job.prompt_tokens / 2) / (peak * assumed.prefill)
    waves = -(-job.own_responses // job.rows)
    # finished rows leave and, in vLLM, others take their place: the mean step has the mean number of rows
    steps = waves * job.max_tokens
    mean_rows = job.own_responses * job.mean_tokens / steps
    # under autocast every step reads wide weights, writes narrow ones and reads those
    casting = job.autocast and job.engine == "transformers"
    weights = s.parameters * (job.stored + 2 * job.computed if casting else job.computed)
    cache = mean_rows * (job.prompt_tokens + job.mean_tokens / 2) * s.kv_bytes(job.computed)
    launch = (assumed.launch_vllm if job.engine != "transformers" else assumed.launch_transformers) * s.layers
    by_bytes, by_flops = (
        (weights + cache) / band,
        mean_rows * flops_per_token(job, job.mean_tokens / 2) / (peak * assumed.prefill),
    )
    step = max(by_bytes, by_flops, launch)
    bound = "bandwidth" if step == by_bytes else "FLOPs" if step == by_flops else "launches"
    decode = (
        f"{steps:,} decoding steps ({waves} waves x {job.max_tokens} tokens) x max(({weights / 1e9:.1f} + "
        f"{cache / 1e9:.1f}) GB / {band / 1e9:.0f} GB/s, FLOPs, {launch * 1e3:.3g} ms): bound by {bound}{times}"
    )
    prefill = f"{prompts:,} prompt tokens x 2 P / ({peak / 1e12:.0f} TFLOP/s x {assumed.prefill:g}){times}"
    parts = [Duration("read prompts", prefill, reading), Duration("sample", decode, batches * steps * step)]
    return parts + _turns(job, assumed, batches)


def _turns(job: Job, assumed: Assumptions, batches: float) -> list[Duration]:
    """Episodes are read again at every turn but the first, as far as `rollout.prefix_memory` does not keep them."""
    whole = job.own_responses * job.longest * job.shape.kv_bytes(job.computed)
    forgotten = max(0.0, 1 - job.prefix_memory / whole)
    if job.turns == 1 or job.engine != "transformers" or not forgotten:
        return []
    again = -(-job.turns // 2) - 1
    context = job.prompt_tokens + job.mean_tokens / 2
    peak = job.device.throughput(job.dtype) * assumed.prefill
    seconds = forgotten * batches * again * job.own_responses * context * flops_per_token(job, context / 2) / peak
    formula = f"{again} further turns x {job.own_responses:,} episodes x {context:,.0f} tokens x 2 P x {forgotten:.0%}"
    return [Duration("read episodes again", f"{formula} not kept, half of the most turns assumed", seconds)]


def _scoring(job: Job, assumed: Assumptions, batches: float) -> list[Duration]:
    """Old log-probs and reference log-probs of every sampled response, and those that methods ask of a minibatch."""
    peak = job.device.throughput(job.dtype) * assumed.mfu
    tokens = job.own_responses * (job.prompt_tokens + job.mean_tokens)
    one = tokens * flops_per_token(job, job.mean_tokens / 2) / peak
    passes = [
        ("old log-probs", job.recompute, batches),
        ("reference log-probs", job.reference, batches),
        ("current log-probs", job.needs_current, float(job.epochs)),
    ]
    text = f"{tokens:,} tokens x 2 P / ({peak / 1e12:.0f} TFLOP/s)"
    return [
        Duration(name, text + (f" x {count:.3g}" if count != 1 else ""), count * one)
        for name, wanted, count in passes
        if wanted
    ]


def _learning(job: Job, assumed: Assumptions) -> list[Duration]:
    s = job.shape
    peak = job.device.throughput(job.dtype) * assumed.mfu
    rows = job.own_responses * assumed.update_rows
    tokens = rows * (job.prompt_tokens + job.mean_tokens)
    factor = 4 if job.checkpointing else 3
    work = job.epochs * tokens * factor * flops_per_token(job, job.mean_tokens / 2) / peak
    formula = f"{tokens:,.0f} tokens x {2 * factor} P / ({peak / 1e12:.0f} TFLOP/s)"
    parts = [Duration("forward and backward", formula + (f" x {job.epochs} epochs" if job.epochs > 1 else ""), work)]
    parts += _communication(job, assumed, work)
    updates = job.epochs * job.minibatches
    # weights, gradients and what is kept with them are read, all but the gradients written
    numbers = 3 + 2 * job.kept_per_weight
    moved = numbers * job.trained * job.trained_bytes / job.shards
    over, where = (job.device.link, "link to main memory") if job.offload else (job.device.bandwidth, "bandwidth")
    step = updates * moved / (over * assumed.bandwidth)
    name = "CLASSP" if job.optimizer == "classp" else "AdamW"
    parts.append(Duration(name, f"{updates} updates x {numbers} x {moved / numbers / 1e9:.2f} GB / {where}", step))
    if job.engine != "transformers" or job.replica:
        size = s.parameters * job.computed
        band = job.device.link if job.ranks > 1 else job.device.bandwidth
        seconds = size / (band * assumed.network)
        parts.append(Duration("weights to the engine", f"{size / 1e9:.1f} GB / {band / 1e9:.0f} GB/s", seconds))
    return parts


def _communication(job: Job, assumed: Assumptions, work: float) -> list[Duration]:
    """Gathers of FSDP2 for every micro-batch, or one sum of gradients per minibatch; hidden behind the work as far as
    it goes."""
    if job.ranks == 1:
        return []
    away = (job.ranks - 1) / job.ranks
    band = job.device.link * assumed.network
    if job.sharded:
        passes = job.epochs * max(job.passes * assumed.update_rows, job.minibatches)
        moved = passes * away * job.shape.parameters * (2 * job.computed + job.stored)
        formula = f"{passes:,.0f} micro-batches x (2 gathers + 1 scatter) of the weights"
    else:
        moved = job.epochs * job.minibatches * 2 * away * job.trained * 4
        formula = f"{job.epochs * job.minibatches} sums of {job.trained:,} gradients"
    seconds = max(0.0, moved / band - work) if job.sharded else moved / band
    note = ", beyond what hides behind forward and backward" if job.sharded else ""
    return [Duration("between GPUs", f"{formula}: {moved / 1e9:.0f} GB / {band / 1e9:.0f} GB/s{note}", seconds)]
