"""`rlvr-lab report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ._common import user_errors


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are drawn together.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; `report.html` in the run folder.", show_default=False)
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps whose transcripts are shown, such as 0,40,60.", show_default=False)
    ] = None,
) -> None:
    """Write one self-contained page of a whole run: settings, curves, evaluations, findings, transcripts.

    Examples:

        rlvr-lab report runs/first

        rlvr-lab report runs/first --steps 0,20,60 --out first.html

        rlvr-lab report runs/first runs/second --out both.html

    The page needs no network. Several runs share each figure, and the settings in which they differ come first.
    """
    with user_errors():
        if out is None and len(runs) > 1:
            raise UserError("--out is missing: name the page of several runs, such as --out both.html")
        target = out or runs[0] / "report.html"
        chosen = _numbers(steps)
        from ..train.report import write_report

        write_report(runs, target, chosen)
        typer.echo(f"page: {target}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--steps must be numbers with commas between them, such as 0,40,60, not '{text}'") from None
