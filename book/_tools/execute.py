"""Execute chapters in place, store outputs and widget state, normalise, and hold each to its time budget.

``python book/_tools/execute.py CHAPTER.ipynb …`` (without names: all chapters). The budget in seconds is
``metadata.rlvr.budget_s`` of the notebook, 60 by default; it is what a reader with two CPU cores waits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that it also works when imported by path

import colab_cell
import normalise

DEFAULT_BUDGET_S = 60.0
CELL_TIMEOUT_S = 600  # a hanging cell must end; the budget below is the real limit


def execute(path: Path) -> tuple[float, float]:
    """Run one chapter and rewrite its file; return wall time and budget in seconds.

    The file is written only after the whole chapter ran: a failing cell leaves the last good outputs in place.
    """
    notebook = nbformat.read(path, as_version=4)
    colab_cell.install_in(notebook)
    started = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        store_widget_state=True,
        resources={"metadata": {"path": str(path.resolve().parent)}},  # relative paths work as they do for a reader
    ).execute()
    wall = time.perf_counter() - started
    path.write_text(normalise.dumps(notebook), encoding="utf-8")
    return wall, float(notebook.metadata.get("rlvr", {}).get("budget_s", DEFAULT_BUDGET_S))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if a chapter failed or was too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    failed = False
    for path in parser.parse_args(argv).notebooks or normalise.chapters():
        try:
            wall, budget = execute(path)
        except CellExecutionError as error:
            print(f"{path}: FAILED\n{error}")
            failed = True
            continue
        verdict = "ok" if wall <= budget else "TOO SLOW"
        print(f"{path}: {wall:.1f} s of {budget:.0f} s, {verdict}")
        failed |= wall > budget
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
