"""A recipe as launch files for our own trainer: torchrun on one machine, torchrun under Slurm."""

from __future__ import annotations

from pathlib import Path

from ..train.config import TrainConfig
from .verl_export import recipe_text, write_files

FILES = {"launch.sh": "torchrun.sh", "slurm.sbatch": "torchrun_slurm.sbatch"}


def export(config: TrainConfig, out: Path) -> list[Path]:
    """Write `recipe.yaml`, `launch.sh` and `slurm.sbatch` into `out`; returns their paths.

    Raises UserError for a folder in use.
    """
    words = {"TITLE": " + ".join(config.methods), "NAME": "-".join(config.methods)}
    return write_files(out, {"recipe.yaml": recipe_text(config)}, FILES, words)
