"""`rlvr-lab pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError, nearest
from ._common import user_errors


def pretrain(
    base: Annotated[
        str, typer.Option(help="S: one attempt. R: up to five. I: rows of digits under rules. A: environments.")
    ] = "S",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the new base policy.")] = None,
    shape: Annotated[str, typer.Option(help="Size of the network: `tiny` as shipped, `28m` or `92m`.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; as shipped.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads; one is nearly as fast as two.", min=1)] = 1,
) -> None:
    """Pre-train a base policy of the tiny lab from scratch, as the shipped ones were made.

    Examples:

        rlvr-lab pretrain --base S --out bases/S

        rlvr-lab pretrain --base R --steps 1500 --out bases/R-short

        rlvr-lab pretrain --base I --out bases/I

        rlvr-lab pretrain --base A --out bases/A

        rlvr-lab pretrain --shape 28m --device cuda --batch 256 --steps 1500 --out bases/S-28m

    About an hour on one core for the shipped settings, five to ten minutes for bases I and A. Interrupted runs go on
    when the command is repeated.
    """
    with user_errors():
        import torch

        from ..policy import tiny
        from ..policy.pretrain import SHIPPED
        from ..policy.pretrain import pretrain as run
        from ..train.console import for_terminal

        if base not in tiny.BASES:
            raise UserError(f"no base '{base}'; there are {', '.join(tiny.BASES)}")
        if shape not in tiny.SHAPES:
            raise UserError(f"--shape '{shape}' does not exist; {nearest(shape, tiny.SHAPES)}")
        if out is None:
            raise UserError("--out is missing: name a directory for the new base, such as --out bases/S")
        from dataclasses import replace

        torch.set_num_threads(threads)
        kept = SHIPPED[base]
        total = steps or kept.steps
        # the second phase keeps its share of the whole
        broaden = round(kept.broaden_steps * total / kept.steps) if shape != "tiny" else kept.broaden_steps
        config = replace(kept, shape=shape, batch=batch, seed=seed, steps=total, broaden_steps=broaden)
        console = for_terminal()
        console.begin(f"pre-training {base}", config.total_steps)
        try:
            run(config, out, lambda step, loss, factor: console.advance(1), device)
        finally:
            console.end()
        recipe = {"I": "light_if/tiny", "A": "grpo/triples_tiny"}.get(base)
        measure = f"rlvr-lab train {recipe} --model {out}" if recipe else f"rlvr-lab evaluate --model {out}"
        typer.echo(f"written to {out}; measure it with: {measure}")
