"""`rlvr-lab cold-start`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ._common import user_errors


def cold_start(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A recipe (`light_if/tiny`, or a YAML file), then settings such as `data.pool=500`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the cold start.")] = None,
    model: Annotated[str | None, typer.Option(help="Transformers directory, `tiny/I` or hub name.")] = None,
    objective: Annotated[str, typer.Option(help="entropy, plain, or random (the control).")] = "entropy",
    samples: Annotated[int, typer.Option(help="Responses to every prompt.")] = 8,
    per_prompt: Annotated[int, typer.Option(help="Correct responses to keep of a prompt.")] = 2,
    least_tokens: Annotated[int, typer.Option(help="Shorter responses are not kept.")] = 0,
    lengths: Annotated[str, typer.Option(help="any, or adaptive: long for hard prompts, short for easy.")] = "any",
    tolerance: Annotated[float, typer.Option(help="How far from the target length, as a share of it.")] = 0.25,
    weight: Annotated[float, typer.Option(help="Weight of the entropy in the choice of tokens.")] = 0.8,
    ratio: Annotated[float, typer.Option(help="Share of the tokens that is learned.")] = 0.8,
    epochs: Annotated[int, typer.Option(help="Passes over the kept responses.")] = 3,
    batch: Annotated[int, typer.Option(help="Responses of an optimizer step.")] = 32,
    rows: Annotated[int, typer.Option(help="Responses of a pass; tokens are chosen within one.")] = 32,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-5,
) -> None:
    """Sort prompts by difficulty, keep correct responses to those solved sometimes, and fine-tune on them (Light-IF).

    In the tiny lab, then training from what it made:

        rlvr-lab cold-start light_if/tiny --lr 3e-4 --out warm

        rlvr-lab train light_if/tiny model.path=warm/model methods.light_if.split=warm/difficulty.json -o runs/if

    With `--lengths adaptive` right responses are kept whose length fits the prompt's difficulty, easy prompts included:

        rlvr-lab cold-start ares/tiny --lengths adaptive --objective plain --lr 3e-4 --out warm

    Interrupted, it goes on when the command is repeated.
    """
    with user_errors():
        if out is None:
            raise UserError("--out is missing: name a folder, such as --out runs/warm")
        from ..train.cold_start import ColdStart
        from ..train.cold_start import cold_start as run
        from ..train.config import load_config
        from ..train.console import for_terminal
        from ..train.sft import SFTSettings

        words = arguments or []
        recipe = next((w for w in words[:1] if "=" not in w), None)
        overrides = words[1:] if recipe else words
        config = load_config(recipe or "light_if/tiny", [*([f"model.path={model}"] if model else []), *overrides])
        settings = ColdStart(samples, per_prompt, least_tokens, lengths, tolerance)
        sft = SFTSettings(objective, weight, ratio, epochs, batch, rows, lr, seed=config.seed)  # type: ignore[arg-type]
        summary = run(config, out, settings, sft, for_terminal(config.logging.view))
        last = summary["epochs"][-1]
        typer.echo(
            f"{summary['kept']} responses kept; held-out nll {summary['before']['nll']:.3f} -> {last['nll']:.3f} nats, "
            f"token entropy {summary['before']['token_entropy']:.3f} -> {last['token_entropy']:.3f} nats"
        )
        typer.echo(f"policy: {out / 'model'}   difficulty of the prompts: {out / 'difficulty.json'}")
