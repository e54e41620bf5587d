"""Bring notebooks into one canonical form, so that a diff shows what an author changed and nothing else.

``python book/_tools/normalise.py CHAPTER.ipynb …``   rewrite in place (without names: all chapters)
``python book/_tools/normalise.py --check …``         exit 1 and name the notebooks that are not in canonical form

Removed: timings, the kernel's patch version, editor state. Joined: what one cell printed, which a busy machine sends in
several parts. Kept: outputs, because the pages are built from them, and
widget state, because a page without a kernel draws its widgets from it. Made the same in every run: widget ids, which
are random, become ``w0001``, ``w0002``, … in the order in which the widgets appear on the page; execution counts become
1, 2, 3, … as in one run from top to bottom (nbval refuses a cell that has outputs and no count).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"

KEPT_CELL_METADATA = {"tags", "mystnb", "rlvr"}
KEPT_NOTEBOOK_METADATA = {"rlvr", "widgets"}
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
# Without the patch version, which differs between machines. The lexer is what lets a page highlight magics (%pip).
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}


def chapters() -> list[Path]:
    """All notebooks of the book."""
    return sorted(path for path in (ROOT / "book").glob("*/*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def normalised(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A canonical copy of a notebook."""
    result = copy.deepcopy(notebook)
    count = 0
    for index, cell in enumerate(result.cells):
        _clean_cell(cell, index)
        if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", []):
            count += 1
            _set_execution_count(cell, count)
    widgets = result.metadata.get("widgets")
    result.metadata = {key: value for key, value in result.metadata.items() if key in KEPT_NOTEBOOK_METADATA}
    result.metadata |= {"kernelspec": dict(KERNELSPEC), "language_info": dict(LANGUAGE)}
    result.nbformat, result.nbformat_minor = 4, 5
    if widgets and widgets.get(STATE, {}).get("state"):
        result = _with_stable_widget_ids(result)
    else:
        result.metadata.pop("widgets", None)
    return nbformat.from_dict(result)


def _clean_cell(cell: Any, index: int) -> None:
    cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT_CELL_METADATA}
    if "tags" in cell.metadata:
        cell.metadata["tags"] = sorted(set(cell.metadata["tags"]))
    if not cell.get("id"):  # notebooks older than format 4.5; a hash keeps the id the same on every machine
        cell["id"] = hashlib.sha256(f"{index}:{cell.source}".encode()).hexdigest()[:12]
    cell.source = cell.source.rstrip()
    if cell.cell_type != "code":
        cell.pop("outputs", None)
        return
    cell.execution_count = None
    cell.outputs = _joined(cell.outputs)
    for output in cell.outputs:
        if "metadata" in output:
            output.metadata = {}
        if PLOTLY in output.get("data", {}):
            output.data.pop("text/html", None)  # some front ends add 4.6 MB of plotly.js there


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbours of one stream as one."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _set_execution_count(cell: Any, count: int) -> None:
    cell.execution_count = count
    for output in cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = count


def _with_stable_widget_ids(notebook: Any) -> Any:
    state: dict[str, Any] = notebook.metadata["widgets"][STATE]["state"]
    names = {old: f"w{number:04d}" for number, old in enumerate(_order_of_appearance(notebook, state), start=1)}
    text = json.dumps({"cells": notebook.cells, "widgets": notebook.metadata["widgets"]})
    # Two passes through placeholders: an old id may already look like another widget's new one.
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"\0{new}"').replace(f'"IPY_MODEL_{old}"', f'"IPY_MODEL_\0{new}"')
    renamed = json.loads(text.replace("\0", ""))
    notebook["cells"] = renamed["cells"]
    notebook.metadata["widgets"] = renamed["widgets"]
    return notebook


def _order_of_appearance(notebook: Any, state: dict[str, Any]) -> list[str]:
    """Ids of all models: those on the page in reading order, each followed by what it refers to; then the rest."""
    order: dict[str, None] = {}

    def visit(model_id: str) -> None:
        if model_id in state and model_id not in order:
            order[model_id] = None
            for reference in _references(state[model_id]):
                visit(reference)

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(VIEW)
            if view:
                visit(view["model_id"])
    # Links (jslink) have no view of their own. Their order must not depend on their random ids, so: on their content.
    ranks = {model_id: str(rank) for rank, model_id in enumerate(order)}

    def content(model_id: str) -> str:
        text = json.dumps(state[model_id], sort_keys=True)
        for known, rank in ranks.items():
            text = text.replace(known, rank)
        return text

    for model_id in sorted(state.keys() - order.keys(), key=content):
        visit(model_id)
    return list(order)


def _references(value: Any) -> Iterator[str]:
    """Ids that a model's state refers to, in an order that does not depend on how the state was written."""
    if isinstance(value, str):
        if value.startswith("IPY_MODEL_"):
            yield value.removeprefix("IPY_MODEL_")
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _references(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def dumps(notebook: nbformat.NotebookNode) -> str:
    """The bytes of a canonical notebook: sorted keys, one space of indent, text not escaped, a newline at the end."""
    return nbformat.writes(normalised(notebook), version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def is_normalised(path: Path) -> bool:
    """Does the file equal its canonical form?"""
    text = path.read_text(encoding="utf-8")
    return text == dumps(nbformat.reads(text, as_version=4))


def rewrite(path: Path) -> None:
    """Normalise one file in place."""
    path.write_text(dumps(nbformat.read(path, as_version=4)), encoding="utf-8")


def main(argv: Iterable[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args(None if argv is None else list(argv))
    paths: list[Path] = options.notebooks or chapters()
    if not options.check:
        for path in paths:
            rewrite(path)
        return 0
    failing = [path for path in paths if not is_normalised(path)]
    for path in failing:
        print(f"{path}: not normalised; run python book/_tools/normalise.py {path}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
