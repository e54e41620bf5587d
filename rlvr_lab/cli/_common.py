"""What all commands share: errors as one line, a polite Ctrl-C, tables."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import UserError

INTERRUPTED = 130


@contextmanager
def user_errors() -> Iterator[None]:
    """One clear line and a non-zero exit for what the user can mend; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or 'file'}: {error.strerror or error}", err=True)
        raise typer.Exit(2) from None
    except (RuntimeError, FloatingPointError) as error:
        reason = _known_stop(error)
        if reason is None:
            raise
        typer.echo(f"stopped: {reason}", err=True)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _known_stop(error: Exception) -> str | None:
    """What to tell the user about a run that could not go on; None for anything unforeseen."""
    # by name, because importing torch here would slow down every --help
    kind = type(error).__name__
    if kind in ("TrainingStopped", "FloatingPointError", "RankLost"):
        return str(error)
    if kind == "OutOfMemoryError":
        return (
            "the GPU's memory is full; lower rollout.rows, update.micro_batch_rows or rollout.max_tokens "
            "(`rlvr-lab plan RECIPE --gpu NAME` says by how much)"
        )
    return None


@contextmanager
def polite_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and SIGTERM) once: finish the step. Twice: stop at once."""
    asked: list[int] = []

    def remember(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        typer.echo("\nfinishing this step and saving; press Ctrl-C again to stop at once", err=True)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shown(summary: dict[str, Any]) -> list[str]:
    """The figures of an evaluation that a table shows, in order."""
    passes = [name for name in summary if name.startswith("pass@") and not name.endswith("interval")]
    return [
        *passes,
        "distinct_correct",
        "answer_entropy",
        "token_entropy",
        "sequence_entropy",
        "mean_tokens",
        "finished",
    ]


def cell(summary: dict[str, Any], name: str) -> str:
    """One figure as text; a dash where it is undefined."""
    value = summary.get(name)
    if value is None:
        return "-"
    return f"{value:.1%}" if name.startswith(("pass@", "avg@", "maj@", "finished", "truncated")) else f"{value:.3f}"


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is not wrapped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*row)
    Console().print(table)
