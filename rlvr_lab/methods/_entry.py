"""One row of the listing of works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a work lives and where it comes from. `chapter` and `recipe` are paths without ending.

    `module` is dotted below `rlvr_lab`; `cls` is None for an analysis, which measures and does not train;
    `chapter` is None where it is still to be written.
    """

    slug: str
    title: str
    arxiv: str
    card: str
    stage: str
    module: str
    cls: str | None
    chapter: str | None
    recipe: str | None
    status: str
    """`tested`: golden values and gradients, invariance, presets, chapter with control."""
    group: str = "RLVR"
    """`elsewhere` for a work of another field: a demonstration, which nothing in training uses."""
