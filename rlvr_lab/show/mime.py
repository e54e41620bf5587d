"""MyST-NB plug-in: show plotly's JSON output with the book's own plotly.js, loaded only on pages that need it.

Plotly's default renderer stores ``application/vnd.plotly.v1+json``: a few kilobytes that Colab, JupyterLab and VS
Code draw natively. Stock MyST-NB drops that type. The alternatives plotly offers would inline 4.6 MB into every
notebook or fetch a script from a CDN. This class is registered as an entry point, see ``myst_nb.mime_renderers`` in
pyproject.toml.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from docutils import nodes

MIME = "application/vnd.plotly.v1+json"
_HTML_BUILDERS = ("html", "dirhtml", "singlehtml")
_DEFAULT_HEIGHT = 380


class PlotlyMime:
    """Renderer of one plotly output; the interface is MyST-NB's ``MimeRenderPlugin``."""

    mime_priority_overrides = [(builder, MIME, 1) for builder in (*_HTML_BUILDERS, "latex", "text")]  # noqa: RUF012

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[Any] | None:
        """Nodes for a plotly output, or None to let MyST-NB handle another type."""
        if inline or data.mime_type != MIME:
            return None
        spec: dict[str, Any] = data.content if isinstance(data.content, dict) else json.loads(data.content)
        layout = spec.get("layout") or {}
        meta = layout.get("meta")
        alt = str(meta.get("alt", "")) if isinstance(meta, dict) else ""
        if not alt:  # with -W this stops the build
            renderer.logger.warning("plotly figure without layout.meta['alt']", line=data.line, subtype="alt")
        environment = renderer.renderer.sphinx_env
        if environment is not None and environment.app.builder.name not in _HTML_BUILDERS:
            return [nodes.paragraph(text=f"[Interactive figure: {alt or 'see the web edition'}]")]
        renderer.add_js_file("plotly_vendored", "vendor/plotly.min.js", {"defer": "defer"})
        renderer.add_js_file("plotly_boot", "plotly-boot.js", {"defer": "defer"})
        # The node must not get the class ``text_html``: the theme paints such output on a pale box in dark mode.
        return [nodes.raw(text=figure_html(spec, alt), format="html", classes=["output", "rlvr_figure"])]


def figure_html(spec: dict[str, Any], alt: str) -> str:
    """The ``<figure>`` that ``plotly-boot.js`` draws into; its height is reserved so that the page does not jump."""
    kept = {key: spec[key] for key in ("data", "layout") if key in spec}  # "config" only names plotly's server
    body = json.dumps(kept, separators=(",", ":"), sort_keys=True).replace("</", "<\\/")
    height = int((spec.get("layout") or {}).get("height") or _DEFAULT_HEIGHT)
    return (
        '<figure class="rlvr-plotly">'
        f'<script type="application/json">{body}</script>'
        f'<div class="rlvr-plotly-box" style="min-height:{height}px"></div>'
        f'<figcaption class="rlvr-visually-hidden">{escape(alt)}</figcaption></figure>'
    )
