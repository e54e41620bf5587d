"""`rlvr-lab pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ._common import user_errors


def pretrain(
    base: Annotated[str, typer.Option(help="S: one attempt. R: up to five attempts.")] = "S",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the new base policy.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of 64 sequences; as shipped.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads; one is nearly as fast as two.", min=1)] = 1,
) -> None:
    """Pre-train a base policy of the tiny lab from scratch, as the shipped ones were made.

    Examples:

        rlvr-lab pretrain --base S --out bases/S

        rlvr-lab pretrain --base R --steps 1500 --out bases/R-short

    About an hour on one core for the shipped settings. Interrupted runs go on when the command is repeated.
    """
    with user_errors():
        import torch

        from ..policy import tiny
        from ..policy.pretrain import SHIPPED
        from ..policy.pretrain import pretrain as run
        from ..train.console import for_terminal

        if base not in tiny.BASES:
            raise UserError(f"no base '{base}'; there are {', '.join(tiny.BASES)}")
        if out is None:
            raise UserError("--out is missing: name a directory for the new base, such as --out bases/S")
        from dataclasses import replace

        torch.set_num_threads(threads)
        config = replace(SHIPPED[base], seed=seed, steps=steps or SHIPPED[base].steps)
        console = for_terminal()
        console.begin(f"pre-training {base}", config.total_steps)
        try:
            run(config, out, lambda step, loss, factor: console.advance(1))
        finally:
            console.end()
        typer.echo(f"written to {out}; measure it with: rlvr-lab evaluate --model {out}")
