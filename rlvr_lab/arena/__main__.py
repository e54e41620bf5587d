"""`python -m rlvr_lab.arena OUT ARM SEED`: one run of a contest, as `contest.run` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

from .worker import open_job, run_job


def main(arguments: list[str]) -> None:
    """Run the job that the arguments name."""
    out, arm, seed = arguments
    run_job(*open_job(Path(out), arm, int(seed)))


if __name__ == "__main__":
    main(sys.argv[1:])
