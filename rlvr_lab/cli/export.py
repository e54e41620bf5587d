"""`rlvr-lab export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError, nearest
from ._common import user_errors

if TYPE_CHECKING:
    from ..train.config import TrainConfig

ENGINES = ("trl", "verl", "rlvr_lab")


def export(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file, or a packaged one such as `grpo/tiny`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings such as `optimizer.lr=1e-5`.")] = None,
    engine: Annotated[str, typer.Option(help="trl, verl, or rlvr_lab: our own.")] = "trl",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder; by default ENGINE_NAME here.")] = None,
) -> None:
    """Write a recipe as configuration and launch files of a training engine.

    Examples:

        rlvr-lab export grpo/tiny --engine trl

        rlvr-lab export entropy_mechanism/clip_cov data.file=train.jsonl --engine verl --out clip_cov_verl

        rlvr-lab export gspo/math data.file=train.jsonl --engine rlvr_lab --out gspo_slurm

    The engine itself is not needed here: copy the folder to where it is installed, beside this package.
    """
    with user_errors():
        if engine not in ENGINES:
            raise UserError(f"--engine '{engine}' is unknown; {nearest(engine, ENGINES)}")
        from ..train.config import load_config

        config = load_config(recipe, overrides or [])
        where = out or Path(f"{engine}_{Path(recipe).with_suffix('').as_posix().replace('/', '_').lstrip('._')}")
        for path in _exporter(engine)(config, where):
            typer.echo(str(path))


def _exporter(engine: str) -> Callable[[TrainConfig, Path], list[Path]]:
    if engine == "trl":
        from ..integrations import trl_export

        return trl_export.export
    if engine == "rlvr_lab":
        from ..integrations import launch_export

        return launch_export.export
    from ..integrations import verl_export

    return verl_export.export
