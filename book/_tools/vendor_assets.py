"""Put every browser asset the book needs under ``book/_assets/vendor``, so that no page asks a CDN for anything.

The result is committed: a reader can build the book without npm and without a network. Run this tool only to change a
pin. ``lock.json`` holds the sha512 of every npm archive and of every file taken from it:

* ``python book/_tools/vendor_assets.py``            rebuild; fails if an archive differs from the locked one
* ``python book/_tools/vendor_assets.py --update``   rebuild and accept new archives (after editing a pin below)
* ``python book/_tools/vendor_assets.py --check``    offline: do the committed files match the lock?
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "book" / "_assets" / "vendor"
LOCK = VENDOR / "lock.json"
AXE = ROOT / "tests" / "book" / "vendor" / "axe.min.js"

# npm package -> [(path or glob inside the package, target below VENDOR)].
# MathJax is pruned to what a page can reach: the TeX input with its on-demand extensions, the CHTML fonts, and the
# accessibility explorer (offered in MathJax's own menu) with English speech rules. requirejs stays at the version that
# html-manager's AMD build expects. html-manager's fonts carry the icons of stock ipywidgets.
PINS: dict[str, list[tuple[str, str]]] = {
    "mathjax@3.2.2": [
        ("es5/tex-mml-chtml.js", "mathjax/tex-mml-chtml.js"),
        ("es5/output/chtml/fonts", "mathjax/output/chtml/fonts"),
        ("es5/input/tex/extensions", "mathjax/input/tex/extensions"),
        ("es5/a11y", "mathjax/a11y"),
        ("es5/sre/mathmaps/base.json", "mathjax/sre/mathmaps/base.json"),
        ("es5/sre/mathmaps/en.json", "mathjax/sre/mathmaps/en.json"),
        ("LICENSE", "mathjax/LICENSE"),
    ],
    "requirejs@2.3.8": [("require.js", "widgets/require.js")],
    "@jupyter-widgets/html-manager@1.0.15": [
        ("dist/embed-amd.js", "widgets/embed-amd.js"),
        ("dist/*.woff2", "widgets/@jupyter-widgets/html-manager/dist"),
    ],
}
AXE_PIN = "axe-core@4.10.3"  # a test tool, hence vendored beside the tests and not shipped with the pages


def sha512(path: Path) -> str:
    """Hex sha512 of a file."""
    return hashlib.sha512(path.read_bytes()).hexdigest()


def npm_pack(spec: str, into: Path) -> tuple[Path, str]:
    """Download one package through the npm client; return its unpacked folder and the sha512 of the archive."""
    subprocess.run(["npm", "pack", "--silent", spec], cwd=into, check=True, stdout=subprocess.DEVNULL)
    (archive,) = into.glob("*.tgz")
    digest = sha512(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    return into / "package", digest


def copy_from(package: Path, pattern: str, target: str) -> None:
    """Copy what ``pattern`` matches inside the package to ``target``; a pattern that matches nothing is an error."""
    matches = sorted(package.glob(pattern))
    if not matches:
        raise SystemExit(f"{pattern}: not in the package any more")
    for match in matches:
        destination = VENDOR / target / match.name if "*" in pattern else VENDOR / target
        destination.parent.mkdir(parents=True, exist_ok=True)
        if match.is_dir():
            shutil.copytree(match, destination)
        else:
            shutil.copy2(match, destination)


def wheel_assets() -> dict[str, Path]:
    """Two assets come from the installed wheels, so that they always match the Python side."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise SystemExit("plotly is not installed in this environment")
    nbextensions = Path(sysconfig.get_path("data")) / "share" / "jupyter" / "nbextensions"
    return {
        "plotly.min.js": Path(spec.origin).parent / "package_data" / "plotly.min.js",
        "widgets/anywidget.js": nbextensions / "anywidget" / "index.js",
    }


def committed_files() -> dict[str, Path]:
    """Every vendored file by the name the lock uses."""
    files = {p.relative_to(VENDOR).as_posix(): p for p in VENDOR.rglob("*") if p.is_file() and p != LOCK}
    files["axe.min.js"] = AXE
    return dict(sorted(files.items()))


def check() -> list[str]:
    """Names of files that are missing, unknown or changed since the lock was written."""
    locked: dict[str, str] = json.loads(LOCK.read_text())["files"]
    present = {name: sha512(path) for name, path in committed_files().items() if path.is_file()}
    return sorted(name for name in locked.keys() | present.keys() if locked.get(name) != present.get(name))


def rebuild(*, accept_new: bool) -> None:
    """Fetch all pins, refuse an archive whose bytes changed under the same version, write files and lock."""
    old: dict[str, str] = json.loads(LOCK.read_text())["archives"] if LOCK.is_file() else {}
    archives: dict[str, str] = {}
    shutil.rmtree(VENDOR, ignore_errors=True)
    for spec in [*PINS, AXE_PIN]:
        with tempfile.TemporaryDirectory() as scratch:
            package, digest = npm_pack(spec, Path(scratch))
            if not accept_new and old.get(spec, digest) != digest:
                raise SystemExit(f"{spec}: the registry now serves another archive than the locked one")
            archives[spec] = digest
            for pattern, target in PINS.get(spec, []):
                copy_from(package, pattern, target)
            if spec == AXE_PIN:
                AXE.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(package / "axe.min.js", AXE)
    for target, source in wheel_assets().items():
        shutil.copy2(source, VENDOR / target)
    files = committed_files()
    lock = {"archives": archives, "files": {name: sha512(path) for name, path in files.items()}}
    LOCK.write_text(json.dumps(lock, indent=1, sort_keys=True) + "\n")
    size = sum(path.stat().st_size for path in files.values())
    print(f"vendored {len(files)} files, {size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare the committed files with the lock; no network")
    mode.add_argument("--update", action="store_true", help="accept archives that differ from the lock")
    options = parser.parse_args(argv)
    if options.check:
        changed = check()
        print("\n".join(changed) or "vendored files match the lock")
        return 1 if changed else 0
    rebuild(accept_new=options.update)
    return 0


if __name__ == "__main__":
    sys.exit(main())
