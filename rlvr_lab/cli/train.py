"""`rlvr-lab train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ._common import INTERRUPTED, cell, polite_interrupt, shown, table, user_errors

if TYPE_CHECKING:
    from ..train.config import TrainConfig
    from ..train.loop import RunResult


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A recipe (`grpo/tiny`, or a YAML file), then settings such as `optimizer.lr=3e-4`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; must not exist yet.")] = None,
    model: Annotated[str | None, typer.Option(help="Transformers directory, `tiny/S`, `tiny/R` or hub name.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with question|problem|prompt and answer.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start although the planner finds too little memory.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="List all settings and recipes, then stop.")] = False,
) -> None:
    """Train a policy with reinforcement learning from verifiable rewards.

    The tiny lab, about two minutes on two cores:

        rlvr-lab train grpo/tiny --out runs/first

    Your own model and problems:

        rlvr-lab train grpo/math --model path/to/model --data gsm8k.jsonl --out runs/gsm8k

    Change settings, see what there is, continue after an interruption:

        rlvr-lab train grpo/tiny optimizer.lr=3e-4 methods.grpo.clip_high=0.28 --out runs/higher

        rlvr-lab train --settings

        rlvr-lab train --resume --out runs/first

    Ctrl-C finishes the step, writes a checkpoint and stops; a second Ctrl-C stops at once.
    """
    if settings:
        _print_settings()
        return
    with user_errors():
        if out is None:
            raise UserError("--out is missing: name a folder for the run, such as --out runs/first")
        words = arguments or []
        recipe = next((w for w in words[:1] if "=" not in w), None)
        overrides = words[1:] if recipe else words
        config = _config(recipe, overrides, model, data, out if resume else None)
        _check_memory(config, force)
        _report(_train(config, out, resume), config)


def _config(
    recipe: str | None, overrides: list[str], model: str | None, data: Path | None, resumed: Path | None
) -> TrainConfig:
    from ..train.config import load_config

    for word in overrides:
        if "=" not in word:
            raise UserError(f"'{word}' is neither a setting (KEY=VALUE) nor the first word, where a recipe stands")
    if resumed is not None and recipe is None:
        recipe = str(resumed / "config.yaml")
        if not Path(recipe).exists():
            raise UserError(f"{resumed} holds no run to resume (no config.yaml)")
    short = [f"model.path={model}"] if model else []
    if data is not None:
        short += ["data.task=math", f"data.file={data}"]
        recipe = recipe or "grpo/math"
    return load_config(recipe or "grpo/tiny", [*short, *overrides])


def _check_memory(config: TrainConfig, force: bool) -> None:
    """Refuse a run that will not fit before anything is loaded; see `rlvr-lab plan`."""
    import os

    from ..plan.gate import refuse_what_does_not_fit

    main = os.environ.get("RANK", "0") == "0"
    refuse_what_does_not_fit(
        config,
        int(os.environ.get("WORLD_SIZE", "1")),
        force=force,
        say=lambda text: typer.echo(text, err=True) if main else None,
    )


def _train(config: TrainConfig, out: Path, resume: bool) -> RunResult:
    from ..train.console import for_terminal
    from ..train.loop import Trainer

    with polite_interrupt() as asked:
        console = for_terminal(config.logging.view, str(out))
        trainer = Trainer(config, out, resume=resume, console=console, stop=asked)
        return trainer.run()


def _report(result: RunResult, config: TrainConfig) -> None:
    if result.interrupted:
        typer.echo(f"stopped after step {result.steps_done} of {config.steps}; the state is saved. Continue with:")
        typer.echo(f"  rlvr-lab train --resume --out {result.out}")
        raise typer.Exit(INTERRUPTED)
    if result.first and result.last:
        table(
            "held-out problems" if result.last["held_out"] else "training problems",
            ["", "before", "after"],
            [[name, cell(result.first, name), cell(result.last, name)] for name in shown(result.last)],
        )
    typer.echo(f"policy: {result.out / 'model'}   page of the run: rlvr-lab report {result.out}")


def _print_settings() -> None:
    from ..train.config import describe_settings, packaged_recipes

    table("settings and their defaults", ["setting", "default"], [list(row) for row in describe_settings()])
    table("recipes", ["name"], [[name] for name in packaged_recipes()])
