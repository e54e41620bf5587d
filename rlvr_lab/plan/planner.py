"""The plan of a run: memory by part, whether it fits, time and cost of a step, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import UserError
from ..train.config import TrainConfig
from .devices import DEVICES, Device, device
from .job import Job, job_of
from .memory import PHASES, RESERVE, Memory, memory
from .remedies import COUNTS, Remedy, change, remedies
from .shapes import shape_of
from .speed import Assumptions, Speed, speed

ESTIMATE = "estimates from formulas; nothing here was measured on this GPU"


@dataclass(frozen=True)
class Plan:
    """What a configuration needs of `ranks` GPUs of one kind."""

    config: TrainConfig
    job: Job
    memory: Memory
    available: int
    """Bytes of one GPU that the run may use."""
    speed: Speed
    assumed: Assumptions
    remedies: tuple[Remedy, ...]
    """Overrides that together make it fit; empty where it fits, or where nothing helps."""
    smallest: int | None
    """The least of 1, 2, 4, ... GPUs of this kind on which it fits without offloading or another experiment."""
    price: float | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the greediest phase fits into the memory."""
        return self.memory.peak <= self.available

    @property
    def gpu_hours(self) -> float:
        """Of all steps, without evaluations, on all GPUs."""
        return self.speed.seconds * self.config.steps * self.job.ranks / 3600

    @property
    def cost(self) -> float | None:
        """In the currency of `price`, which is per GPU and hour."""
        return None if self.price is None else self.gpu_hours * self.price

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, times in seconds."""
        m = self.memory
        return {
            "label": ESTIMATE,
            "model": self.config.model.path,
            "sizes_from": self.job.shape.source,
            "parameters": self.job.shape.parameters,
            "trained_parameters": self.job.trained,
            "gpu": self.job.device.name,
            "gpus": self.job.ranks,
            "fits": self.fits,
            "peak_bytes": m.peak,
            "peak_phase": m.peak_phase,
            "available_bytes": self.available,
            "memory_bytes": self.job.device.memory,
            "phases": {name: m.phase(name) for name in PHASES},
            "parts": [asdict(part) for part in m.parts],
            "main_memory_bytes": m.on_host,
            "step_seconds": self.speed.seconds,
            "times": [asdict(part) for part in self.speed.parts],
            "generated_tokens_per_step": self.speed.generated,
            "steps": self.config.steps,
            "gpu_hours": self.gpu_hours,
            "price": self.price,
            "cost": self.cost,
            "assumptions": asdict(self.assumed)
            | {"prompt_tokens": self.job.prompt_tokens, "mean_tokens": self.job.mean_tokens},
            "remedies": [asdict(r) for r in self.remedies],
            "smallest_gpus": self.smallest,
            "notes": list(self.notes),
        }


def plan(
    config: TrainConfig,
    gpu: str | Device,
    n: int = 1,
    *,
    price: float | None = None,
    prompt_tokens: int | None = None,
    mean_tokens: int | None = None,
    assumed: Assumptions | None = None,
) -> Plan:
    """Plan a configuration for `n` GPUs of a kind, reading nothing of the model but its config.

    `price` is per GPU and hour. `prompt_tokens` is the length of the longest prompts and `mean_tokens` the mean length
    of responses; without them 512 (counted for the
    tasks of the tiny lab) and half of rollout.max_tokens are assumed.
    Raises UserError for an unknown GPU or a number that makes no sense, NoPlan for a model that cannot be counted.
    """
    for name, value in (("--gpus", n), ("--prompt-tokens", prompt_tokens), ("--mean-tokens", mean_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if price is not None and price < 0:
        raise UserError(f"--price must not be negative, not {price}")
    where = device(gpu) if isinstance(gpu, str) else gpu
    shape, assumed = shape_of(config.model.path), assumed or Assumptions()

    def make(other: TrainConfig, ranks: int) -> Job:
        return job_of(other, where, ranks, prompt_tokens=prompt_tokens, mean_tokens=mean_tokens, shape=shape)

    job, room = make(config, n), available(where)
    needed = memory(job)
    found: Sequence[Remedy] = ()
    smallest: int | None = n
    if needed.peak > room:
        found = remedies(config, lambda other: memory(make(other, n)).lacking(room)) or ()
        smallest = _smallest(config, room, make)
    notes = _notes(config, job, needed, assumed)
    return Plan(config, job, needed, room, speed(job, assumed), assumed, tuple(found), smallest, price, notes)


def available(where: Device) -> int:
    """Bytes of a device that a run may use: what is reserved against fragmentation is taken off."""
    return int(where.memory * (1 - RESERVE))


def fitted(plan_: Plan) -> TrainConfig:
    """The configuration with the plan's remedies."""
    return change(plan_.config, {r.key: r.value for r in plan_.remedies})


def fits_elsewhere(plan_: Plan) -> dict[str, bool]:
    """Whether the configuration fits unchanged on as many of every GPU of the table."""
    return {
        name: memory(replace(plan_.job, device=other)).peak <= available(other)
        for name, other in DEVICES.items()
        if name != plan_.job.device.name
    }


def _smallest(config: TrainConfig, room: int, make: Any) -> int | None:
    for ranks in (count for count in COUNTS if count <= config.rollout.prompts):

        def lacking(other: TrainConfig, ranks: int = ranks) -> int:
            return memory(make(other, ranks)).lacking(room)

        if remedies(config, lacking, only_mild=True) is not None:
            return ranks
    return None


def _notes(config: TrainConfig, job: Job, needed: Memory, assumed: Assumptions) -> tuple[str, ...]:
    """What the tables do not say by themselves."""
    notes = []
    if job.dtype == "bfloat16" and "bfloat16" not in job.device.peak and job.device.kind == "cuda":
        notes.append(f"{job.device.name} has no bfloat16 units: products run at its float32 rate; use float32 here")
    if config.model.dtype == "bfloat16" and not job.lora_rank:
        notes.append(
            "model.dtype bfloat16 has no float32 master weights: AdamW steps below 1/256 of a weight are rounded away; "
            "model.dtype=float32 model.precision=bfloat16 keeps them"
        )
    if job.refill > 1:
        notes.append(
            f"dynamic sampling draws up to {job.refill} batches a step; {assumed.kept:.0%} of the groups are assumed "
            "to be kept"
        )
    if job.ranks > 8:
        notes.append("links are those within a machine; between machines gathers take longer than shown")
    if job.sharded:
        whole = job.shape.parameters * job.stored / 2**30
        notes.append(f"while loading, every process holds the whole model in main memory: {whole:,.0f} GiB each")
    if needed.on_host:
        notes.append(f"offloaded: {needed.on_host / 2**30:.1f} GiB of main memory for every GPU")
    if job.turns > 1:
        notes.append(
            f"an episode has up to {job.turns} turns, and rollout.max_tokens bounds it with what the environment says: "
            "fewer tokens are sampled than shown"
        )
    if job.replayed:
        notes.append(
            f"a step learns from up to {job.replayed:,} responses of earlier steps beside the new ones: counted in the "
            "memory, not in the times"
        )
    if job.engine == "server":
        notes.append("the vLLM server has GPUs of its own, which are not counted here")
    return tuple(notes)
