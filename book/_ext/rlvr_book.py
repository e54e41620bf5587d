"""Sphinx extension of the book: no request to another host, no script twice, no outdated ARIA role; an arena page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _is_thebe(asset: Any) -> bool:
    """Thebe would run cells on a remote kernel; jupyter-book declares its scripts even when no button offers it.

    They name a CDN, and one of them is declared twice, which is an uncaught SyntaxError on every page.
    """
    body = (getattr(asset, "attributes", None) or {}).get("body") or ""
    return "thebe" in _name(asset) or "THEBE_JS_URL" in body


def _name(asset: Any) -> str:
    return str(getattr(asset, "filename", asset) or "")


def _identity(asset: Any) -> tuple[str, str]:
    return _name(asset), str((getattr(asset, "attributes", None) or {}).get("body") or "")


def clean_assets(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Drop thebe and duplicates from the page's scripts and style sheets; the order of the rest is kept."""
    for kind in ("script_files", "css_files"):
        kept: dict[tuple[str, str], Any] = {}
        for asset in context.get(kind, []):
            if not _is_thebe(asset):
                kept.setdefault(_identity(asset), asset)
        context[kind] = list(kept.values())


def modernise_roles(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """docutils 0.21 marks bibliography entries with a role that ARIA has deprecated; they lie in a ``role="list"``."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def write_arena_page(app: Any, error: Exception | None) -> None:
    """The page of the recorded contest, which the chapter "Choosing an intervention" reads with its reader."""
    results = Path(app.srcdir) / "data" / "arena.json"
    if error is None and app.builder.format == "html" and results.exists():
        from rlvr_lab.arena.report import write_arena_report

        write_arena_report(results, Path(app.outdir) / "_static" / "arena.html")


def setup(app: Any) -> dict[str, Any]:
    """Entry point for Sphinx."""
    # 900: after the theme and MyST-NB have added their own assets
    app.connect("html-page-context", clean_assets, priority=900)
    app.connect("html-page-context", modernise_roles)
    app.connect("build-finished", write_arena_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
