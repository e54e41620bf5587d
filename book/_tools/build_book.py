"""Build the book from the stored outputs: ``python book/_tools/build_book.py`` -> ``_build/html``.

Further arguments go to ``jupyter-book build`` unchanged (``--builder latex``, ``--all``, …).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
SOURCE = BUILD / "source"
# written by make_book.py; it takes the place of the page in git that only says that there is no run yet
OWN_RUN = BUILD / "your_own_run.ipynb"
STAMP = BUILD / ".renderer_digest"


def renderer_digest() -> str:
    """Hash of what turns a page into HTML: configuration, extension and mime plug-in.

    Sphinx re-reads a page when the page changed, not when our Python code that renders it did.
    """
    digest = hashlib.sha256()
    files = [ROOT / "_config.yml", *ROOT.glob("book/_ext/*.py"), *ROOT.glob("rlvr_lab/show/*.py")]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def clean() -> None:
    """Remove what would make the result differ from a build in a fresh checkout."""
    if not STAMP.is_file() or STAMP.read_text() != renderer_digest():
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    # Always: Sphinx copies no assets if only assets changed, and never removes pages that left the contents.
    shutil.rmtree(BUILD / "html", ignore_errors=True)


def stage() -> None:
    """Copy the book's source below _build, with "Your own run" filled in where a run exists.

    Building from a copy keeps generated pages out of the checkout. Modification times are kept, so that Sphinx still
    re-reads only what changed.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        ROOT / "book", SOURCE, ignore=shutil.ignore_patterns("_tools", "_build", "__pycache__", "README.md")
    )
    if OWN_RUN.is_file():
        (SOURCE / "your_own_run.md").unlink()
        shutil.copy2(OWN_RUN, SOURCE / "your_own_run.ipynb")


def build(extra: list[str]) -> int:
    """Run jupyter-book with warnings as errors; its exit status."""
    # This interpreter's own jupyter-book, whether or not its environment is activated; a script found on PATH might
    # belong to another one. The package has no __main__, hence -c.
    launcher = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    options = ["--config", "_config.yml", "--path-output", ".", "-W", "-n", "--keep-going"]
    return subprocess.call([*launcher, "build", str(SOURCE.relative_to(ROOT)), *options, *extra], cwd=ROOT)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    clean()
    stage()
    status = build(sys.argv[1:] if argv is None else argv)
    if status != 0:
        print("The book was not built: see the warnings above.", file=sys.stderr)
        return status
    STAMP.write_text(renderer_digest())
    index = BUILD / "html" / "index.html"
    if index.is_file():  # absent with another builder
        print(f"\nThe book lies at {index}")
        print(f"Open it:  xdg-open {index}   (macOS: open, Windows: start); it needs no server and no network.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
