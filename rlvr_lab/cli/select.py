"""`rlvr-lab select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import table, user_errors


def select(
    run: Annotated[Path, typer.Argument(help="Run folder, as given to `rlvr-lab train --out`.", show_default=False)],
    by: Annotated[str, typer.Option(help="variance, lim or random.")] = "variance",
    top: Annotated[int, typer.Option(min=1, help="Problems to show.")] = 10,
    bottom: Annotated[bool, typer.Option(help="The last ones instead of the first.")] = False,
    least: Annotated[int, typer.Option(min=1, help="Fewest visits of a problem.")] = 2,
    seed: Annotated[int, typer.Option(help="Of --by random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Rank the problems of a run by how their training accuracy varied, for training on one or a few of them.

    Examples:

        rlvr-lab select runs/first

        rlvr-lab select runs/first --by lim --top 3 --json

        rlvr-lab train one_shot/tiny "methods.one_shot.problems=[17]" --out runs/one

    Indices are those of the run's own pool: keep its data settings and its seed.
    """
    import json

    with user_errors():
        from ..train.selection import rank, read_histories

        ranked = rank(read_histories(run), by, least, seed)
        shown = ranked[-top:] if bottom else ranked[:top]
        if as_json:
            typer.echo(json.dumps([one.as_dict() for one in shown], indent=1))
            return
        columns = ["rank", "problem", by, "mean accuracy", "visits", "first to last", "text"]
        rows = [
            [str(one.rank), str(one.history.problem), "-" if one.score is None else f"{one.score:.4f}",
             f"{one.history.mean:.1%}", str(len(one.history.accuracy)),
             f"{one.history.accuracy[0]:.0%} to {one.history.accuracy[-1]:.0%}", one.history.text]
            for one in shown
        ]  # fmt: skip
        table(f"{len(ranked)} problems by {by}", columns, rows)
        typer.echo(f"train on the first: methods.one_shot.problems=[{shown[0].history.problem}]")
