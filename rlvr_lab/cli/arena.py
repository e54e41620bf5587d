"""`rlvr-lab arena`: methods and their controls under equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ._common import table, user_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..arena.contest import Contest, Job
    from ..arena.results import Results

arena = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")


@arena.callback()
def run(
    context: typer.Context,
    methods: Annotated[
        str | None, typer.Option(help="Arms, separated by `;` or `,`: names of the catalogue, or `SLUG[:PRESET]`.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the contest; goes on where it is.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every arm; the same problems and draws for all.", min=1)] = 3,
    budget_tokens: Annotated[
        int | None, typer.Option(help="Generated tokens of a run, instead of the recipe's steps.", min=1)
    ] = None,
    recipe: Annotated[str, typer.Option(help="What all arms share.")] = "arena/tiny",
    controls: Annotated[bool, typer.Option(help="Also run the controls of every arm.")] = True,
    minibatches: Annotated[int | None, typer.Option(help="Updates per rollout: off-policy depth.", min=1)] = None,
    clip: Annotated[float | None, typer.Option(help="GRPO's clip range on both sides.", min=0.0)] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Any setting of the recipe, KEY=VALUE.")] = None,
    reference_every: Annotated[int, typer.Option(help="Steps between evaluations of GRPO's curve.", min=1)] = 5,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; by default one per core.", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Threads of each run.", min=1)] = 1,
    catalogue: Annotated[bool, typer.Option("--list", help="List the arms of the catalogue, then stop.")] = False,
) -> None:
    """Compare methods with each other and with their controls under equal conditions.

    Seeds, budget and evaluations are matched; GRPO, stopped early, is always among the arms.

    Two methods with their controls on the tiny lab, about two minutes a run and core:

        rlvr-lab arena --methods kl_cov,steer --seeds 3 --out runs/arena

    Equal generated tokens, deeper off-policy, settings of your own:

        rlvr-lab arena --methods "clip_higher;kl_cov:beta=3" --budget-tokens 400000 --minibatches 12 --out runs/deep

    The same command goes on where an earlier one stopped; more arms and seeds may be added. Then:

        rlvr-lab arena report runs/arena
    """
    if context.invoked_subcommand is not None:
        return
    if catalogue:
        _print_catalogue()
        return
    with user_errors():
        if methods is None or out is None:
            raise UserError("--methods and --out are needed: `rlvr-lab arena --methods kl_cov --out runs/arena`")
        from ..arena.contest import Contest

        settings = list(setting or [])
        settings += [f"update.minibatches={minibatches}"] if minibatches else []
        settings += [f"methods.grpo.clip_low={clip}", f"methods.grpo.clip_high={clip}"] if clip is not None else []
        contest = Contest(recipe, tuple(settings), budget_tokens, reference_every)
        _run(contest, _names(methods), list(range(seeds)), out, controls, jobs, threads)


@arena.command("report")
def report(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER_OR_FILE", help="A contest's folder, or its results file.", exists=True)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; `arena.html` beside the results.", show_default=False),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Arms drawn at first, separated like --methods.", show_default=False)
    ] = None,
) -> None:
    """Write one self-contained page of a contest: curves, frontier, tables at matched steps and matched accuracy.

    Examples:

        rlvr-lab arena report runs/arena

        rlvr-lab arena report results.json --arms kl_cov,kl_cov_random --out page.html

    The page needs no network, and any of its arms can be switched on and off there.
    """
    with user_errors():
        from ..arena.report import write_arena_report

        typer.echo(f"page: {write_arena_report(source, out, _names(arms or ''))}")


def _names(methods: str) -> list[str]:
    """Arms of the option. A semicolon parts arms whose own settings have commas."""
    parts = methods.split(";") if ";" in methods or "=" in methods else methods.split(",")
    return [part.strip() for part in parts if part.strip()]


def _print_catalogue() -> None:
    from ..arena import CATALOGUE

    rows = [[arm.name, arm.role, arm.control_of, arm.note or " ".join(arm.settings)] for arm in CATALOGUE.values()]
    table("Arms", ["arm", "role", "control of", "what it is"], rows)


def _run(
    contest: Contest,
    names: list[str],
    seeds: list[int],
    out: Path,
    controls: bool,
    parallel: int | None,
    threads: int,
) -> None:
    import os

    from ..arena import resolve
    from ..arena.contest import collect, prepare

    arms = resolve(names, controls=controls)
    jobs = prepare(contest, arms, seeds, out)
    typer.echo(f"{len(arms)} arms x {len(seeds)} seeds; {len(jobs)} runs left, in {out}")
    died = _show_progress(contest, jobs, parallel or max((os.cpu_count() or 1) // threads, 1), threads)
    for job in died:
        typer.echo(f"died: {job.arm.name} seed {job.seed}; see {job.log}", err=True)
    if not any(out.glob("runs/*/seed-*.json")):
        raise UserError(f"no run came to its end; the reasons stand in {out}/runs/*/seed-*.log")
    results = collect(out)
    _print_table(results)
    typer.echo(f"results: {out / 'results.json'}   page: rlvr-lab arena report {out}")
    if died:
        raise typer.Exit(3)


def _show_progress(contest: Contest, jobs: Sequence[Job], parallel: int, threads: int) -> list[Job]:
    """One bar for all runs, and one for each that is going on."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..arena.contest import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        whole = progress.add_task("runs", total=len(jobs))
        bars: dict[Job, TaskID] = {}

        def report(running: Sequence[Job], done: int, failed: int) -> None:
            text = f"runs ({failed} died)" if failed else "runs"
            progress.update(whole, completed=done, description=text)
            for job in [job for job in bars if job not in running]:
                progress.remove_task(bars.pop(job))
            for job in running:
                if job not in bars:
                    total = None if contest.budget_tokens else contest.config(job.arm, job.seed).steps
                    bars[job] = progress.add_task(f"  {job.arm.name} seed {job.seed}", total=total)
                progress.update(bars[job], completed=job.steps_done)

        return run(jobs, parallel, threads=threads, report=report)


def _print_table(results: Results) -> None:
    """Last evaluations, and the distance to early-stopped GRPO."""
    from ..arena import matched

    def cell(mean: float, half: float) -> str:
        return "-" if mean != mean else f"{mean:.3f} ± {half:.3f}"

    rows = []
    for name in results.arms:
        figures = [cell(*results.interval(name, m)) for m in ("pass@1", "distinct_correct", "token_entropy")]
        found = matched(results, name, "distinct_correct")
        rows.append([name, *figures, cell(found.mean, found.half)])
    headings = ["arm", "pass@1", "distinct_correct", "token_entropy", "distinct vs GRPO at equal pass@1"]
    table("Last evaluation, mean ± 95 % over seeds", headings, rows)
