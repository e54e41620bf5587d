"""The first code cell of every chapter, in one place.

``python book/_tools/colab_cell.py CHAPTER.ipynb …`` puts the cell into chapters, or brings it up to date after the
version in ``rlvr_lab/__init__.py`` changed. A test compares every chapter with this text.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]

# skip-execution: nbclient leaves it out (execute.py). nbval-skip: nbval needs its own tag.
TAGS = ["colab-setup", "hide-cell", "nbval-skip", "skip-execution"]

# Only our own tag is pinned, and torch and numpy are left as Colab ships them: exact pins in install cells are what
# breaks old notebooks. Without Colab the cell does nothing.
_TEMPLATE = """\
# Google Colab only: install the release of rlvr-lab that this page was made with. Elsewhere this cell does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "rlvr-lab[colab] @ git+https://github.com/rlvr-lab/rlvr-lab@v{version}"
    import torch

    if torch.cuda.is_available():
        print("GPU found:", torch.cuda.get_device_name(0))
        print("This page runs as it is. To train a larger model on the GPU, run !rlvr-lab --help in a new cell.")
    else:
        print("No GPU found, and none is needed: every cell of this page runs on the CPU.")
        print("To train a larger model choose Runtime > Change runtime type.")"""


def version() -> str:
    """The library's version, read without importing it (the import would load torch)."""
    text = (ROOT / "rlvr_lab" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise SystemExit("rlvr_lab/__init__.py names no __version__")
    return match.group(1)


def source() -> str:
    """Text of the cell."""
    return _TEMPLATE.format(version=version())


def install_in(notebook: nbformat.NotebookNode) -> None:
    """Replace the chapter's Colab cell, or insert one before the first code cell."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and "colab-setup" in cell.metadata.get("tags", []):
            cell.source, cell.metadata.tags, cell.outputs = source(), list(TAGS), []
            return
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    notebook.cells.insert(first, nbformat.v4.new_code_cell(source(), id="colab-setup", metadata={"tags": list(TAGS)}))


def main(paths: list[str]) -> int:
    """Command line."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        install_in(notebook)
        nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
