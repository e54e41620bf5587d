"""`make book`: train the tiny lab, write "Your own run" from it, build the HTML, say where it lies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build_book
import own_run

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "book" / "data" / "tiny_lab_S.json"


def train(settings: Sequence[str]) -> Path:
    """A new run in `runs/`, with its progress shown; returns its folder. Exits with the trainer's status on failure."""
    out = ROOT / "runs" / time.strftime("book-%Y%m%d-%H%M%S")
    command = [sys.executable, "-m", "rlvr_lab.cli", "train", "grpo/tiny", *settings, "--out", str(out)]
    status = subprocess.call(command, cwd=ROOT)
    if status:
        raise SystemExit(status)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: further arguments are settings of the run, such as `steps=20`."""
    settings = list(sys.argv[1:] if argv is None else argv)
    print("1/3  training the tiny lab, about two minutes on two idle cores", flush=True)
    run = train(settings)
    print("2/3  writing the page about your run", flush=True)
    own_run.write(run, RECORDED, build_book.OWN_RUN)
    print("3/3  building the HTML", flush=True)
    return build_book.main([])


if __name__ == "__main__":
    sys.exit(main())
