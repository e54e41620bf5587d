"""The command `rlvr-lab`: one module per command. Heavy imports wait until a command runs."""

from __future__ import annotations

import os

import typer

from .arena import arena
from .cold_start import cold_start
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .methods import methods
from .plan import plan
from .pretrain import pretrain
from .report import report
from .select import select
from .serve import serve
from .train import train
from .watch import watch

app = typer.Typer(
    name="rlvr-lab",
    help="Entropy in reinforcement learning with verifiable rewards: train, evaluate and watch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Entropy in reinforcement learning with verifiable rewards: train, evaluate and watch."""


app.add_typer(arena, name="arena")
for command in (train, plan, export, evaluate, pretrain, cold_start, methods, doctor, select, watch, report, serve):
    app.command()(command)


def main() -> None:
    """Entry point of the `rlvr-lab` command."""
    # Threads that spin while they wait fight any other busy process for the cores: with one core taken, a tiny step
    # took 39 s instead of 1.3 s. Never spinning costs a fifth on idle cores, a short spin nothing that was measurable.
    # Must be set before torch loads its OpenMP runtime (libgomp).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    app()
