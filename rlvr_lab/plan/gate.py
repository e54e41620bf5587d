"""The check before a model is loaded: a run that will not fit is refused, with what to change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..policy.load import pick_device, resolve
from ..train.config import TrainConfig
from .devices import GIB, Device, detected
from .planner import Plan, plan
from .shapes import NoPlan, shape_of

SMALL = 1_000_000_000
"""Parameters up to which main memory is not checked."""


def refuse_what_does_not_fit(
    config: TrainConfig, ranks: int = 1, *, force: bool = False, say: Callable[[str], None] = lambda text: None
) -> Plan | None:
    """Plan the run for the device that it would use, and refuse it where it does not fit.

    On a GPU always; on the processor for more than a billion parameters only. Returns the plan, or None where nothing
    was checked: a model family that is not counted is let through, and said so. With `force` a run that does not fit
    is announced instead of refused. Raises UserError otherwise.
    """
    try:
        where = _device(config, ranks)
        if where is None:
            return None
        found = plan(config, where, ranks)
    except NoPlan as error:
        # where there is no config at all, loading will say so
        if (Path(resolve(config.model.path)) / "config.json").is_file():
            say(f"memory is not checked: {error}")
        return None
    if found.fits:
        return found
    message = _message(found)
    if not force:
        raise UserError(f"{message}; or start it all the same with --force")
    say(f"--force: {message}")
    return found


def _device(config: TrainConfig, ranks: int) -> Device | None:
    where = pick_device(config.model.device)
    if where.type == "cuda":
        import torch

        found = torch.cuda.get_device_properties(where)
        return detected(found.name, found.total_memory)
    if shape_of(config.model.path).parameters <= SMALL:
        return None
    # processes on this machine share its memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return processor(main_memory() // max(here, 1))


def processor(memory: int) -> Device:
    """Main memory as a device. Its rates are placeholders: no time is estimated from them."""
    return Device("main memory", memory, 50e9, {"float32": 1e12}, 10e9, "cpu")


def main_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(text)) if text.isdigit() else whole


def _message(found: Plan) -> str:
    m, job = found.memory, found.job
    need, room = m.peak / GIB, found.available / GIB
    parts = sorted(m.parts, key=lambda part: -part.bytes.get(m.peak_phase, 0))[:3]
    largest = ", ".join(f"{part.name} {part.bytes[m.peak_phase] / GIB:.1f}" for part in parts)
    text = (
        f"this run does not fit: it needs about {need:.1f} GiB in the {m.peak_phase} phase ({largest}) and "
        f"{job.device.name} has {room:.1f} GiB to give"
    )
    if found.remedies:
        return f"{text}. Change: {' '.join(r.override for r in found.remedies)}"
    return f"{text}, and no setting helps; take a smaller model, more GPUs (parallel.shard=fsdp2) or a larger one"
