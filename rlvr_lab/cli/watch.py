"""`rlvr-lab watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import user_errors


def watch(
    run: Annotated[Path, typer.Argument(help="Run folder, as given to `rlvr-lab train --out`.", show_default=False)],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show the present state, then stop.")] = False,
) -> None:
    """Watch a run that another process makes: the live view, and what the doctor says so far.

    Examples:

        rlvr-lab watch runs/first

        rlvr-lab watch runs/first --once

    Reads the run folder only, from any terminal of the machine or over a shared disk. Ctrl-C stops watching, never the
    run. Without a terminal it prints one line per step.
    """
    with user_errors():
        from rich.console import Console

        from ..train.watch import Watcher, follow

        console = Console()
        watcher = Watcher(run)
        if once:
            watcher.refresh()
            unicode = "utf" in str(console.encoding).lower()
            typer.echo("\n".join(watcher.text(console.width, unicode=unicode)))
            return
        follow(watcher, console, every)
