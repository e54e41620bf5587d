"""Checkpoints that survive a kill, a full disk and a truncated file, on one rank or many.

    step_000040/
        config.json, model*.safetensors, tokenizer ...   the policy, as transformers and vLLM open it
        adapter/                  of a LoRA policy: its adapters for peft; the weights above then have them merged in
        state/shard-*.safetensors weights in training precision and optimizer state, a file per rank
        trainer.safetensors       tensors of methods and ledger
        trainer.json              everything else that a resumed run needs
        manifest.json             digest of every file

A checkpoint is written beside its final place: every rank writes, syncs and digests its own files, rank 0 seals them
with the manifest and renames the directory. A directory without a complete manifest is no checkpoint. No file is a
pickle. The data order needs no entry: which problems a step sees follows from seed and step (`seeds`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..errors import UserError
from ..policy.load import Policy
from .export import export_policy
from .parallel import World
from .sharded import read_state, write_state

PARTIAL = ".partial"
REPLACED = ".replaced"
MANIFEST = "manifest.json"
FORMAT = 2  # of the directory; 0.1.0 had no number and kept the optimizer in trainer.safetensors
SINGLE = World.single()
T = TypeVar("T")


class DiskError(UserError):
    """The checkpoint could not be written; earlier ones are untouched."""


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run needs besides weights and optimizer: the next step, and the state of every part by name
    (method slugs, and the entropy ledger)."""

    step: int
    parts: Mapping[str, Any]


def save(
    root: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    keep: int,
    world: World = SINGLE,
    *,
    export: torch.dtype | None = None,
) -> Path:
    """Write `root/step_NNNNNN` atomically and drop all but the newest `keep` (collective: every rank calls it).

    `export`: precision of the weights for transformers and vLLM; None keeps that of training. The state to resume from
    is always in the precision of training. Raises DiskError on all ranks where one of them cannot write.
    """
    final = root / f"step_{state.step:06d}"
    _atomically(final, world, lambda where: _write(where, policy, optimizer, state, world, export))
    if world.is_main:
        for old in _directories(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def save_policy(final: Path, policy: Policy, world: World = SINGLE, *, export: torch.dtype | None = None) -> Path:
    """Write a transformers directory atomically, in place of an older one (collective). Raises DiskError."""
    _atomically(final, world, lambda where: _write_policy(where, policy, world, export))
    return final


# -- writing ---------------------------------------------------------------------------------------------------------


def _atomically(final: Path, world: World, write: Callable[[Path], None]) -> None:
    """Fill a directory beside `final`, sync and seal it, then rename it. On failure `final` is what it was."""
    partial = final.with_name(final.name + PARTIAL)
    try:
        _on_main(world, lambda: _make_empty(partial))
        write(partial)
        _seal(partial, world)
        _on_main(world, lambda: _publish(partial, final))
    except BaseException as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):  # safetensors wraps the system's errors in its own
            raise
        raise DiskError(
            f"cannot write {final}: {_reason(error)}. Earlier checkpoints are intact; "
            "free some space or choose another --out, then use --resume."
        ) from error


def _make_empty(where: Path) -> None:
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)


def _publish(partial: Path, final: Path) -> None:
    """Rename. A kill in between leaves a sealed directory under the name of a partial one, which `newest` takes."""
    old = final.with_name(final.name + REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _together(world: World, work: Callable[[], T]) -> list[T]:
    """Work on files on every rank. Returns all results on all ranks, or raises the first failure on all of them, so
    that no rank waits for one that gave up."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        problem = _reason(error)
        if world.size == 1:
            raise
    found = world.gather_objects((result, problem))
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise OSError(None, f"{text} (rank {rank})")
    return [value for value, _ in found]


def _on_main(world: World, work: Callable[[], None]) -> None:
    _together(world, lambda: work() if world.is_main else None)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _write_policy(where: Path, policy: Policy, world: World, export: torch.dtype | None) -> None:
    write = export_policy(policy, export, world)
    _on_main(world, lambda: write(where))


def _write(
    where: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    world: World,
    export: torch.dtype | None,
) -> None:
    _write_policy(where, policy, world, export)
    plain = write_state(where / "state", policy.model, optimizer, world)
    _on_main(world, lambda: _write_trainer(where, state, plain, world))


def _write_trainer(where: Path, state: TrainerState, optimizer: Mapping[str, Any], world: World) -> None:
    parts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, own in state.parts.items():
        parts[name] = {k: v for k, v in own.items() if not isinstance(v, Tensor)}
        tensors |= {f"part.{name}.{k}": v.contiguous() for k, v in own.items() if isinstance(v, Tensor)}
    save_file(tensors, where / "trainer.safetensors")
    about = {"format": FORMAT, "version": __version__, "ranks": world.size}
    plain = about | {"step": state.step, "parts": parts, "optimizer": dict(optimizer), "random": _random_state()}
    (where / "trainer.json").write_text(json.dumps(plain, indent=1))


def _seal(where: Path, world: World) -> None:
    mine = f"shard-{world.rank + 1:05d}-"

    def own() -> dict[str, str]:
        files = [p for p in sorted(where.rglob("*")) if p.is_file()]
        others = [p for p in files if p.name.startswith("shard-") and not p.name.startswith(mine)]
        if not world.is_main:
            files = [p for p in files if p.name.startswith(mine)]
        for path in files:
            _sync(path)
        return {p.relative_to(where).as_posix(): _digest(p) for p in files if p not in others}

    digests = {name: digest for part in _together(world, own) for name, digest in part.items()}
    _on_main(world, lambda: _write_manifest(where, digests))


def _write_manifest(where: Path, digests: Mapping[str, str]) -> None:
    for name in digests:
        if not (where / name).is_file():
            raise OSError(None, f"rank 0 does not see {name}, which another rank wrote: put --out on a shared disk")
    (where / MANIFEST).write_text(json.dumps(dict(sorted(digests.items())), indent=1))
    _sync(where / MANIFEST)
    for folder in [p for p in where.rglob("*") if p.is_dir()] + [where]:
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- random state ----------------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """The global generators, for methods that draw from them; the trainer's own draws follow from seed and step."""
    name, keys, *rest = numpy.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # asking starts CUDA in a run that does without it
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, keys, cached = state["python"]
    random.setstate((version, tuple(keys), cached))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


# -- finding and reading ---------------------------------------------------------------------------------------------


def _directories(root: Path) -> list[Path]:
    found = [p for p in root.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def verify(where: Path, world: World = SINGLE) -> str | None:
    """None for a sound checkpoint, else the reason why it is refused. Ranks share the reading (collective)."""
    manifest: dict[str, str] = {}
    problem: str | None = None
    try:
        manifest = dict(json.loads((where / MANIFEST).read_text()))
    except FileNotFoundError:
        problem = f"{where} has no {MANIFEST}: it is not a complete checkpoint of this program"
    except (OSError, ValueError, TypeError) as error:
        problem = f"{where / MANIFEST} cannot be read: {error}"
    for name in sorted(manifest)[world.rank :: world.size]:
        problem = problem or _fault(where, name, manifest[name])
    return next((reason for reason in world.gather_objects(problem) if reason), None)


def _fault(where: Path, name: str, digest: str) -> str | None:
    path = where / name
    if not path.is_file():
        return f"{where} lacks {name}"
    if _digest(path) != digest:
        return f"{path} is truncated or was changed after it was written"
    return None


def newest(root: Path, world: World = SINGLE) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and why newer ones were passed over (collective). Unfinished ones are removed."""
    if world.is_main:
        for leftover in root.glob(f"*{PARTIAL}"):
            _finish_or_remove(leftover)
        for leftover in root.glob(f"*{REPLACED}"):
            shutil.rmtree(leftover, ignore_errors=True)
    refused: list[str] = []
    for where in world.broadcast_object(list(reversed(_directories(root)))):
        reason = verify(where, world)
        if reason is None:
            return where, refused
        refused.append(reason)
    return None, refused


def _finish_or_remove(leftover: Path) -> None:
    """A kill between sealing and renaming leaves a whole checkpoint under the name of an unfinished one."""
    final = leftover.with_name(leftover.name.removesuffix(PARTIAL))
    if not final.exists() and verify(leftover) is None:
        os.replace(leftover, final)
    else:
        shutil.rmtree(leftover, ignore_errors=True)


def restore(where: Path, policy: Policy, optimizer: torch.optim.Optimizer, world: World = SINGLE) -> TrainerState:
    """Put the weights into `policy` and the state into `optimizer`, set the global random generators, and return the
    rest (collective). Any number of ranks may read what any number wrote.

    `policy` is the run's model, loaded from `where` or from where the run started; a LoRA policy needs its base, since
    only adapters are kept. Raises UserError for another version's checkpoint or another model's.
    """
    plain = json.loads((where / "trainer.json").read_text())
    found = plain.get("format")
    if found is None:
        raise UserError(
            f"{where} was written by an older version of this program (0.1.0); start a new run from its weights "
            f"(model.path={where})"
        )
    if found != FORMAT:
        raise UserError(f"{where} has layout {found}, this version ({__version__}) reads {FORMAT}; update rlvr_lab")
    read_state(where / "state", policy.model, optimizer, plain["optimizer"], world)
    _set_random_state(plain["random"])
    return TrainerState(int(plain["step"]), read_parts(where))


def read_parts(where: Path) -> dict[str, dict[str, Any]]:
    """State of every part of a checkpoint, by name."""
    plain = json.loads((where / "trainer.json").read_text())
    parts: dict[str, dict[str, Any]] = {name: dict(own) for name, own in plain["parts"].items()}
    for name, tensor in load_file(where / "trainer.safetensors").items():
        _, owner, key = name.split(".", 2)
        parts[owner][key] = tensor
    return parts
