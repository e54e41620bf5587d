"""`rlvr-lab plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UserError
from ._common import user_errors


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe (`grpo/math`), or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as for `rlvr-lab train`.", show_default=False),
    ] = None,
    gpu: Annotated[str, typer.Option(help="T4, L4, A100-40, A100-80, H100 or H200.")] = "A100-80",
    gpus: Annotated[int, typer.Option(help="How many of them.", min=1)] = 1,
    price: Annotated[float | None, typer.Option(help="Per GPU and hour, for the cost.", min=0.0)] = None,
    model: Annotated[str | None, typer.Option(help="Plan for this model instead of the recipe's.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompts; 512, or counted for the tiny lab, unless given.", min=1)
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option(help="Mean response; half the longest unless given.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say before a run whether a recipe fits the GPU, what a step will cost, and what to change.

    Examples:

        rlvr-lab plan grpo/math --gpu T4

        rlvr-lab plan grpo/math --gpu A100-80 --gpus 8 --price 2 --model Qwen/Qwen2.5-7B

        rlvr-lab plan dapo/math rollout.max_tokens=8192 --gpu H100 --gpus 32 --json

    Reads the model's config only; sizes of common models are in the package, so that no network is needed. All numbers
    are estimates, and every formula and assumption is shown. Exit code 1: it does not fit.
    """
    import json

    with user_errors():
        from ..plan.planner import plan as make
        from ..train.config import load_config

        for word in overrides or []:
            if "=" not in word:
                raise UserError(f"'{word}' is not a setting (KEY=VALUE)")
        short = [f"model.path={model}"] if model else []
        config = load_config(recipe, [*short, *(overrides or [])])
        found = make(config, gpu, gpus, price=price, prompt_tokens=prompt_tokens, mean_tokens=mean_tokens)
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1))
        else:
            from rich.console import Console

            from ..plan.render import show

            show(found, Console())
    if not found.fits:
        raise typer.Exit(1)
