"""What the recorders of this folder share: rounded figures, runs by arm and seed that go on where they stopped, and
digests of the modules that made them, so that a test can tell when these change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer


def rounded(value: float | None) -> float | None:
    """Four digits; None where a figure is undefined."""
    return float(f"{value:.4g}") if value is not None and value == value else None


def module_digests(modules: Iterable[str]) -> dict[str, str]:
    """`rlvr_lab.arena.digests.code_digest` of each module, named below `rlvr_lab`; "" for one that is gone."""
    from rlvr_lab.arena.digests import code_digest

    found = {}
    for name in modules:
        spec = find_spec(f"rlvr_lab.{name}")
        origin = spec.origin if spec else None
        found[name] = code_digest(Path(origin).read_text(encoding="utf-8")) if origin else ""
    return found


def checked_digests(recorded: Mapping[str, str], modules: Iterable[str], out: Path) -> dict[str, str]:
    """Digests of the modules as they are. Raises typer.BadParameter where some of `out` come from other code."""
    now = module_digests(modules)
    if changed := [name for name, digest in now.items() if recorded.get(name, digest) != digest]:
        raise typer.BadParameter(
            f"{out} was recorded with another {', '.join(changed)}; choose another --out, or move it"
        )
    return now


def opened(
    out: Path, empty: Mapping[str, Any], script: str, recipe: str, settings: Sequence[str], steps: int,
    modules: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The results so far, with the provenance of this run and digests of `modules`."""
    from rlvr_lab.train.loop import machine

    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else dict(empty)
    if digests := checked_digests(record.get("digests", {}), modules, out):
        record["digests"] = digests
    return record | {
        "command": f"python benchmarks/{script}",
        "recipe": recipe,
        "settings": list(settings),
        "steps": steps,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"threads": 1},
    }


def save(out: Path, record: Mapping[str, Any]) -> None:
    """Write the results so far."""
    out.write_text(json.dumps(record, separators=(",", ":")) + "\n")


def chosen_arms(wanted: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The arms asked for, all by default. Raises typer.BadParameter for one that does not exist."""
    if unknown := [arm for arm in wanted or () if arm not in known]:
        raise typer.BadParameter(f"no arm '{unknown[0]}'; there are {', '.join(known)}")
    return list(wanted or known)


def record_arms(
    record: dict[str, Any], arms: Mapping[str, Any], chosen: Sequence[str], seed: int, out: Path,
    run: Callable[[str, int], dict[str, Any]],
) -> None:  # fmt: skip
    """Run every chosen arm that the record lacks for this seed, and save after each."""
    for arm in chosen:
        entry = record["arms"].setdefault(arm, {"setting": arms[arm], "seeds": {}})
        if str(seed) not in entry["seeds"]:
            entry["seeds"][str(seed)] = found = run(arm, seed)
            save(out, record)
            print(f"{arm} seed {seed}: {found['end']}", flush=True)
