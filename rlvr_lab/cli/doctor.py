"""`rlvr-lab doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import user_errors


def doctor(
    run: Annotated[Path, typer.Argument(help="Run folder, as given to `rlvr-lab train --out`.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write a page with a plot per finding here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Read a run's log and name what is likely wrong: evidence, cause, and the setting to change.

    Examples:

        rlvr-lab doctor runs/first

        rlvr-lab doctor runs/first --html doctor.html

        rlvr-lab doctor runs/first --json

    Works on runs that are still going, were interrupted, or lost part of their log. Findings are notes, warnings or
    critical, in order of likelihood; a healthy run has nothing above a note.
    """
    import json

    with user_errors():
        from ..train.doctor import diagnose, page, read_history, render

        report = diagnose(run)
        if html is not None:
            html.write_text(page(report, read_history(run)[0]), encoding="utf-8")
        typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else render(report))
        if html is not None:
            typer.echo(f"page: {html}", err=as_json)
