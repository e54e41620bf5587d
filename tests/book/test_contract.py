"""What every chapter owes its reader, and what makes the notebook checks mean something.

Comparing notebooks is vacuous if no cell is compared, if a compared cell stores no output, or if the output holds no
value. These tests read files only; ``test_mutants.py`` then shows that a chapter notices a wrong library.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import colab_cell
import execute
import nbformat
import normalise
import pytest
import vendor_assets
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CHAPTERS = normalise.chapters()
CHECK_TAG = "nbval-check-output"
MIN_CHECKED = 3
MAX_BUDGET_S = 60
MAX_BUDGET_OF_SEVERAL_WORKS_S = 120  # the chapters on works of other fields, each a demonstration

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def prose(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def headings(notebook: Any) -> list[str]:
    return [line.lstrip("# ").strip() for line in prose(notebook).splitlines() if re.match(r"#{1,4} ", line)]


def widget_state(notebook: Any) -> dict[str, Any]:
    return dict(notebook.metadata.get("widgets", {}).get(normalise.STATE, {}).get("state", {}))


def toc_files() -> list[str]:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


def test_contents_and_files_agree() -> None:
    listed = toc_files()
    missing = [name for name in listed if not any((BOOK / f"{name}{ext}").is_file() for ext in (".md", ".ipynb"))]
    assert not missing, "pages in _toc.yml without a file"
    notebooks = {path.relative_to(BOOK).with_suffix("").as_posix() for path in CHAPTERS}
    assert notebooks <= set(listed), "chapters that no reader can find"


def test_slugs_are_unique() -> None:
    # A slug names chapter, mutant and recipe; two chapters in different parts must not share one.
    slugs = [path.stem for path in CHAPTERS]
    assert len(slugs) == len(set(slugs))


@each_chapter
def test_normalised(path: Path) -> None:
    assert normalise.is_normalised(path), f"run python book/_tools/normalise.py {path}"


@each_chapter
def test_starts_with_the_colab_cell(path: Path) -> None:
    first = code_cells(read(path))[0]
    assert first.source == colab_cell.source(), f"run python book/_tools/colab_cell.py {path}"
    assert first.metadata.tags == sorted(colab_cell.TAGS)
    assert not first.outputs


@each_chapter
def test_has_checked_cells_that_hold_values(path: Path) -> None:
    checked = [cell for cell in code_cells(read(path)) if CHECK_TAG in cell.metadata.get("tags", [])]
    assert len(checked) >= MIN_CHECKED, "otherwise nbval would only test that the chapter runs"
    for cell in checked:
        text = text_of(cell)
        assert re.search(r"\d|True|False", text), f"nothing to compare in: {cell.source}"
        assert not re.search(r"\d\.\d{6,}", text), f"round: other machines differ in the last digits: {text}"
        assert not re.search(r"0x[0-9a-f]{6}", text), f"an address changes in each run: {text}"
        # A figure holds packed floats that may differ in the last bit: check the numbers in a cell of their own.
        assert not any(normalise.PLOTLY in output.get("data", {}) for output in cell.outputs)


@each_chapter
def test_stored_outputs_are_clean_and_complete(path: Path) -> None:
    notebook = read(path)
    assert outputs(notebook), "pages are built from stored outputs: run python book/_tools/execute.py"
    for output in outputs(notebook):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", f"a warning would be printed in the book: {output.text}"
        data = output.get("data", {})
        # An image cannot follow the reader's theme and has no description; external scripts break the offline page.
        assert not any(kind.startswith("image/") for kind in data), "use rlvr_lab.show.theme.figure"
        assert "http" not in data.get("text/html", ""), "an output must not load anything"


@each_chapter
def test_every_figure_is_described(path: Path) -> None:
    data = [output.get("data", {}) for output in outputs(read(path))]
    figures = [bundle[normalise.PLOTLY] for bundle in data if normalise.PLOTLY in bundle]
    assert figures, "a chapter shows at least one figure"
    for spec in figures:
        alt = (spec["layout"].get("meta") or {}).get("alt", "")
        assert len(alt) >= 30, "make figures with rlvr_lab.show.theme.figure"
        assert spec["layout"]["xaxis"]["title"]["text"]
        assert spec["layout"]["yaxis"]["title"]["text"]


@each_chapter
def test_has_a_widget_that_works_without_a_kernel(path: Path) -> None:
    notebook = read(path)
    data = [output.get("data", {}) for output in outputs(notebook)]
    views = {bundle[normalise.VIEW]["model_id"] for bundle in data if normalise.VIEW in bundle}
    state = widget_state(notebook)
    assert views, "a chapter has something to move"
    assert views <= state.keys(), "the page draws widgets from the stored state: run python book/_tools/execute.py"
    names = {model["model_name"] for model in state.values()}
    assert names & {"AnyModel", "LinkModel"}, "a widget must react without a kernel: anywidget or jslink"
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(r"\b(interact|observe|FigureWidget)\(|\.on_click\(", source), "this is dead without a kernel"


@each_chapter
def test_stored_widget_code_is_current(path: Path) -> None:
    widgets = pytest.importorskip("rlvr_lab.show.widgets", reason="anywidget is not installed")
    current = {name: getattr(widgets, name) for name in widgets.__all__ if name != "javascript"}
    for model in widget_state(read(path)).values():
        kind = str(model["state"].get("_anywidget_id", "")).rpartition(".")[2]
        for part in ("_esm", "_css"):
            if kind in current:
                stored, now = model["state"][part], str(getattr(current[kind], part))
                assert stored == now, f"{part} of {kind} changed: run python book/_tools/execute.py {path}"


@each_chapter
def test_has_exercises_with_solutions(path: Path) -> None:
    text = prose(read(path))
    fence = r"^(?:`{3,}|:{3,})"
    exercises = set(re.findall(fence + r"\{exercise(?:-start)?\}.*\n:label:\s*(\S+)", text, flags=re.MULTILINE))
    solved = set(re.findall(fence + r"\{solution(?:-start)?\}\s+(\S+)", text, flags=re.MULTILINE))
    assert exercises, "at least one exercise with a label in its first line"
    assert exercises == solved, "each exercise has a solution"
    assert all(path.stem in label for label in exercises), "labels are global: put the slug into them"


@each_chapter
def test_says_what_is_disputed_and_cites(path: Path) -> None:
    notebook = read(path)
    titles = [heading.lower() for heading in headings(notebook)]
    assert any(title.startswith("what is disputed") for title in titles)
    assert any(title.startswith(("references", "further reading")) for title in titles)
    roles = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(notebook))
    cited = {key.strip() for keys in roles for key in keys.split(",")}
    bibliography = (BOOK / "references.bib").read_text(encoding="utf-8")
    known = set(re.findall(r"^@\w+\{([^,]+),", bibliography, flags=re.MULTILINE))
    assert cited, "a chapter names its sources"
    assert cited <= known


@each_chapter
def test_time_budget_is_one_that_a_reader_accepts(path: Path) -> None:
    # The budget itself is enforced by execute.py, which measures.
    budget = read(path).metadata.get("rlvr", {}).get("budget_s", execute.DEFAULT_BUDGET_S)
    several = path.parent.name == "8_elsewhere"
    assert 0 < budget <= (MAX_BUDGET_OF_SEVERAL_WORKS_S if several else MAX_BUDGET_S)


@each_chapter
def test_prose_is_calm_and_finished(path: Path) -> None:
    text = re.sub(r"\$[^$]*\$|`[^`]*`", "", prose(read(path)))  # "!=" and factorials belong to code and mathematics
    text = re.sub(r"!\[", "[", text)
    assert "!" not in text
    assert not re.search(r"\bTODO\b|\bTBD\b", text)


def test_vendored_files_match_their_lock() -> None:
    assert vendor_assets.check() == []


def test_pages_load_nothing_from_outside() -> None:
    """The browser test proves it for the built pages; this one needs no browser."""
    texts = (path for path in (BOOK / "_assets").iterdir() if path.suffix in {".css", ".js", ".svg"})
    own = [*texts, *(ROOT / "rlvr_lab" / "show" / "widgets").glob("*.js")]
    for path in own:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?://|^\s*import\b|import\(", text, flags=re.MULTILINE), path


def test_style_sheet_and_boot_script_use_the_palette_of_the_library() -> None:
    from rlvr_lab.show import theme

    css = (BOOK / "_assets" / "rlvr.css").read_text(encoding="utf-8")
    boot = (BOOK / "_assets" / "plotly-boot.js").read_text(encoding="utf-8")
    for name, light in theme.PALETTE.items():
        assert f"--rl-{name}: {light};" in css
        assert f"--rl-{name}: {theme.DARK[name]};" in css
        assert f'"{light}": "{theme.DARK[name]}"' in boot


def test_normalising_is_deterministic_and_keeps_widgets() -> None:
    """Two executions differ in their random widget ids only; both must give the same file."""

    def executed(view: str, layout: str, link: str) -> Any:
        state = {
            link: {"model_name": "LinkModel", "state": {"source": [f"IPY_MODEL_{view}", "value"]}},
            layout: {"model_name": "LayoutModel", "state": {}},
            view: {"model_name": "AnyModel", "state": {"layout": f"IPY_MODEL_{layout}"}},
        }
        output = nbformat.v4.new_output("display_data", data={normalise.VIEW: {"model_id": view}})
        cell = nbformat.v4.new_code_cell("w", id="c1", execution_count=7, outputs=[output])
        cell.metadata["execution"] = {"shell.execute_reply": "2026-01-01T00:00:00Z"}
        metadata = {"widgets": {normalise.STATE: {"state": state, "version_major": 2}}, "rlvr": {"budget_s": 5}}
        return nbformat.v4.new_notebook(cells=[cell], metadata=metadata)

    once = normalise.dumps(executed("aa", "bb", "cc"))
    # The second run's ids are the canonical names, in another order: renaming must not mix them up.
    assert once == normalise.dumps(executed("w0003", "w0001", "w0002"))
    assert once == normalise.dumps(nbformat.reads(once, as_version=4)), "normalising twice changes nothing"
    result = json.loads(once)
    assert result["metadata"]["rlvr"] == {"budget_s": 5}
    state = result["metadata"]["widgets"][normalise.STATE]["state"]
    order = [state[name]["model_name"] for name in ("w0001", "w0002", "w0003")]
    assert order == ["AnyModel", "LayoutModel", "LinkModel"]
    assert state["w0003"]["state"]["source"] == ["IPY_MODEL_w0001", "value"]
    assert result["cells"][0]["execution_count"] == 1
    assert result["cells"][0]["metadata"] == {}
