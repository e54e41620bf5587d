"""Recorded results that chapters read: beside the book, or of the release where only the notebook is."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

DATA = Path("../data")
"""Where the book's data lie from a chapter's folder, in which notebooks run."""


def recorded(name: str, folder: Path = DATA) -> Path:
    """The file `name` of the book's data; as on Colab, where the folder is missing, a copy of the release's.

    Raises FileNotFoundError where the folder is there and lacks the file, and OSError where it cannot be fetched.
    """
    path = folder / name
    if path.exists():
        return path
    if folder.exists():
        raise FileNotFoundError(f"{path} is not there; the book's data has {sorted(p.name for p in folder.iterdir())}")
    address = f"https://raw.githubusercontent.com/rlvr-lab/rlvr-lab/v{version('rlvr-lab')}/book/data/{name}"
    copy = Path(tempfile.mkdtemp(prefix="rlvr_lab_")) / name
    with urlopen(address, timeout=30) as answer:
        copy.write_bytes(answer.read())
    return copy
