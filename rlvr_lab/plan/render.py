"""A plan as tables for a terminal. Every number stands beside its formula, and says that it is an estimate."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .devices import GIB
from .memory import CONTEXT, PHASES, RESERVE
from .planner import ESTIMATE, Plan, fits_elsewhere


def show(plan: Plan, console: Console) -> None:
    """Print memory, verdict, time, assumptions and remedies."""
    console.print(Group(*_parts(plan)))


def verdict(plan: Plan) -> str:
    """One line: whether it fits, by how much, and in which phase."""
    m, name = plan.memory, plan.job.device.name
    need, room = m.peak / GIB, plan.available / GIB
    what = "fits" if plan.fits else "does not fit"
    return (
        f"{what}: about {need:.1f} GiB needed ({m.peak_phase} phase), {room:.1f} GiB usable of "
        f"{plan.job.device.memory / GIB:.1f} GiB on each of {plan.job.ranks} x {name}"
    )


def _parts(plan: Plan) -> Iterator[RenderableType]:
    job = plan.job
    yield Text(
        f"{plan.config.model.path}: {job.shape.parameters:,} parameters ({job.trained:,} trained), sizes from "
        f"{job.shape.source}\n{', '.join(plan.config.methods)}; {job.prompts} prompts x {job.group} responses, "
        f"{plan.config.steps} steps\nAll numbers are {ESTIMATE}.\n"
    )
    yield _memory(plan)
    yield Text(verdict(plan) + "\n", style="bold green" if plan.fits else "bold red")
    if not plan.fits:
        yield _remedies(plan)
    yield _times(plan)
    yield _cost(plan)
    yield _assumptions(plan)
    for note in plan.notes:
        yield Text(f"note: {note}")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _memory(plan: Plan) -> RenderableType:
    table = Table(title="memory of one GPU, GiB (estimate)", title_justify="left")
    table.add_column("part", no_wrap=True)
    for phase in PHASES:
        table.add_column(phase, justify="right", no_wrap=True)
    for part in plan.memory.parts:
        table.add_row(part.name, *(_gib(part.bytes.get(phase, 0)) for phase in PHASES))
    table.add_section()
    table.add_row("sum", *(_gib(plan.memory.phase(phase)) for phase in PHASES))
    usable = f"{plan.job.device.memory / GIB:.1f} GiB less {RESERVE:.0%} for fragmentation"
    return Group(table, _formulas([*((p.name, p.formula) for p in plan.memory.parts), ("usable", usable)]))


def _times(plan: Plan) -> RenderableType:
    table = Table(title="time of one step, seconds (estimate)", title_justify="left")
    table.add_column("part", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for part in plan.speed.parts:
        table.add_row(part.name, f"{part.seconds:.1f}")
    table.add_section()
    table.add_row("step", f"{plan.speed.seconds:.1f}")
    sampled = ("sampled", f"{plan.speed.generated:,} response tokens per step")
    return Group(table, _formulas([*((p.name, p.formula) for p in plan.speed.parts), sampled]))


def _formulas(rows: list[tuple[str, str]]) -> Table:
    """Names and formulas without a frame, so that long ones wrap within their column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, formula in rows:
        grid.add_row(f"  {name}", formula)
    grid.add_row("", "")
    return grid


def _cost(plan: Plan) -> Text:
    hours = plan.speed.seconds * plan.config.steps / 3600
    text = (
        f"{plan.config.steps} steps: about {hours:,.1f} hours on {plan.job.ranks} x {plan.job.device.name}, "
        f"{plan.gpu_hours:,.1f} GPU hours (step x steps x GPUs / 3600), evaluations not counted"
    )
    if plan.cost is None:
        return Text(f"{text}\nadd --price for the cost\n")
    return Text(f"{text}\ncost: about {plan.cost:,.0f} at {plan.price:g} per GPU and hour\n")


def _assumptions(plan: Plan) -> Text:
    a, job = plan.assumed, plan.job
    return Text(
        f"assumed: prompts of {job.prompt_tokens} tokens (--prompt-tokens), responses of {job.mean_tokens} on average "
        f"(--mean-tokens) and {job.max_tokens} at most; {a.mfu:.0%} of peak FLOP/s in training, {a.bandwidth:.0%} of "
        f"peak bandwidth in sampling, P = {job.shape.matmul_parameters:,} parameters in products, attention beside "
        f"them; {CONTEXT / GIB:g} GiB for CUDA itself\n"
    )


def _remedies(plan: Plan) -> RenderableType:
    lines = []
    if plan.remedies:
        lines.append("what to change, tried in this order until it fits:")
        lines += [f"  {r.override:45s} {r.effect}" for r in plan.remedies]
        if plan.job.ranks == 1 and any(r.key == "parallel.shard" for r in plan.remedies):
            lines.append("  shards need torchrun: torchrun --standalone --nproc-per-node 1 -m rlvr_lab.cli train ...")
    else:
        lines.append(f"no setting makes it fit on {plan.job.ranks} x {plan.job.device.name}")
    if plan.smallest is not None and plan.smallest != plan.job.ranks:
        lines.append(f"or --gpus {plan.smallest}, with settings that neither offload nor change the experiment")
    elsewhere = [name for name, good in fits_elsewhere(plan).items() if good]
    if elsewhere:
        lines.append(f"unchanged, it fits on {plan.job.ranks} x {' or '.join(elsewhere)}")
    return Text("\n".join(lines) + "\n")
