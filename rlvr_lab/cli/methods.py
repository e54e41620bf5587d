"""`rlvr-lab methods`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import UserError
from ._common import table, user_errors

IMPORTANCE = (
    "slug",
    "group",
    "stage",
    "arXiv",
    "status",
    "title",
    "recipe",
    "hooks",
    "chapter",
    "presets",
    "step time",
)
LEAST = 12


def methods(
    slug: Annotated[str | None, typer.Argument(help="Show one method with its settings.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the works of other fields, group 'elsewhere'.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the methods with stage, citation, hooks, presets, chapter, recipe and status; or one with its settings.

    Examples:

        rlvr-lab methods

        rlvr-lab methods --all

        rlvr-lab methods kl_cov

        rlvr-lab methods --json

    Hooks marked * are exclusive: a composition can hold one owner of each beside its base. Compose methods on the
    command line: rlvr-lab train grpo/tiny "methods={grpo: {preset: tiny}, kl_cov: {preset: tiny}}" --out runs/kl

    Step time is what a method adds to a GRPO step of the tiny lab on a CPU, as `benchmarks/step_cost.py` measured it.
    """
    import json

    from ..methods import ELSEWHERE, REGISTRY

    with user_errors():
        if slug is not None:
            row = _method_row(slug)
            settings = _method_settings(slug)
            typer.echo(json.dumps(row | {"settings": settings}, indent=1)) if as_json else _show_method(row, settings)
            return
        rows = [_method_row(name) for name in (REGISTRY | ELSEWHERE if every else REGISTRY)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        if not every:
            rows = [{name: text for name, text in row.items() if name != "group"} for row in rows]
        shown = _columns(rows, _width())
        table("methods", shown, [[row[name] for name in shown] for row in rows])
        if left := [name for name in rows[0] if name not in shown]:
            typer.echo(f"not shown in this width: {', '.join(left)}; see rlvr-lab methods SLUG, or --json")


def _width() -> int:
    from rich.console import Console

    return Console().width


def _columns(rows: list[dict[str, str]], width: int) -> list[str]:
    """The columns that fit, the more important ones first, each but the slug at least `LEAST` characters wide."""
    used, kept = 1, []
    for name in (name for name in IMPORTANCE if name in rows[0]):
        longest = max(len(name), *(len(row[name]) for row in rows))
        used += 3 + (longest if name == "slug" else min(longest, LEAST))
        if used > width:
            break
        kept.append(name)
    return [name for name in rows[0] if name in kept]


def _method_row(slug: str) -> dict[str, str]:
    from ..errors import nearest
    from ..methods import ELSEWHERE, REGISTRY, hooks_of, load_class, step_costs

    listed = REGISTRY | ELSEWHERE
    if slug not in listed:
        raise UserError(f"no method '{slug}'; {nearest(slug, listed)}")
    entry = listed[slug]
    cls, added = load_class(slug) if entry.cls else None, step_costs().get(slug)
    return {
        "slug": entry.slug,
        "group": entry.group,
        "title": entry.title,
        "arXiv": entry.arxiv,
        "stage": entry.stage,
        "hooks": ", ".join(hooks_of(cls)) if cls else "",
        "presets": ", ".join(cls.presets) if cls else "",
        "chapter": entry.chapter or "",
        "recipe": entry.recipe or "",
        "step time": "" if added is None else f"{added:+.0%}",
        "status": entry.status,
    }


def _method_settings(slug: str) -> dict[str, dict[str, Any]]:
    """Every setting with its value in each preset."""
    from dataclasses import asdict

    from ..methods import load_class, trainable

    if slug not in trainable():
        return {}
    presets = {name: asdict(config) for name, config in load_class(slug).presets.items()}
    names = next(iter(presets.values()), {})
    return {name: {preset: values[name] for preset, values in presets.items()} for name in names}


def _show_method(row: dict[str, str], settings: dict[str, dict[str, Any]]) -> None:
    for name, value in row.items():
        if value:
            typer.echo(f"{name:8s} {value}")
    if settings:
        presets = list(next(iter(settings.values())))
        prefix = f"methods.{row['slug']}."
        rows = [[prefix + name, *(str(values[p]) for p in presets)] for name, values in settings.items()]
        table("settings by preset", ["setting", *presets], rows)
