"""Checkpoints that survive a kill, a full disk and a truncated file.

A checkpoint is a directory that transformers opens (weights, configuration, tokenizer) plus the optimizer's state and
`trainer.json`. It is written beside its final place, synced, given a manifest with the digest of every file, and only
then renamed. A directory without a complete manifest is no checkpoint. No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..policy.load import Policy

PARTIAL = ".partial"
MANIFEST = "manifest.json"


class DiskError(UserError):
    """The checkpoint could not be written; earlier ones are untouched."""


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run needs besides weights and optimizer: the next step, and the state of every part by name
    (method slugs, and the entropy ledger)."""

    step: int
    parts: Mapping[str, Any]


def save(root: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainerState, keep: int) -> Path:
    """Write `root/step_NNNNNN` atomically and drop all but the newest `keep`. Raises DiskError on a failed write."""
    final = root / f"step_{state.step:06d}"
    _atomically(final, lambda where: _write(where, policy, optimizer, state))
    for old in _directories(root)[:-keep]:
        shutil.rmtree(old)
    return final


def save_policy(final: Path, policy: Policy) -> Path:
    """Write a transformers directory atomically, in place of an older one. Raises DiskError on a failed write."""
    _atomically(final, lambda where: _write_policy(where, policy))
    return final


def _atomically(final: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory beside `final`, sync and seal it, then rename it. On failure `final` is what it was."""
    partial = final.with_name(final.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _seal(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise DiskError(
            f"cannot write {final}: {reason}. Earlier checkpoints are intact; "
            "free some space or choose another --out, then use --resume."
        ) from error


def _write_policy(where: Path, policy: Policy) -> None:
    policy.model.save_pretrained(where)
    policy.tokenizer.save_pretrained(where)


def _write(where: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainerState) -> None:
    _write_policy(where, policy)
    tensors: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in values.items()}
    plain: dict[str, Any] = {}
    for name, own in state.parts.items():
        plain[name] = {k: v for k, v in own.items() if not isinstance(v, Tensor)}
        tensors |= {f"part.{name}.{k}": v.contiguous() for k, v in own.items() if isinstance(v, Tensor)}
    save_file(tensors, where / "trainer.safetensors")
    (where / "trainer.json").write_text(json.dumps({"step": state.step, "parts": plain}, indent=1))


def _seal(where: Path) -> None:
    digests = {p.relative_to(where).as_posix(): _digest(p) for p in sorted(where.rglob("*")) if p.is_file()}
    for path in where.rglob("*"):
        _sync(path)
    (where / MANIFEST).write_text(json.dumps(digests, indent=1))
    _sync(where / MANIFEST)
    _sync(where)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _directories(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step_*") if p.is_dir() and not p.name.endswith(PARTIAL))


def verify(where: Path) -> str | None:
    """None for a sound checkpoint, else the reason why it is refused."""
    try:
        manifest = json.loads((where / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{where} has no {MANIFEST}: it is not a complete checkpoint of this program"
    except (OSError, ValueError) as error:
        return f"{where / MANIFEST} cannot be read: {error}"
    for name, digest in manifest.items():
        path = where / name
        if not path.is_file():
            return f"{where} lacks {name}"
        if _digest(path) != digest:
            return f"{path} is truncated or was changed after it was written"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and why newer ones were passed over. Unfinished ones are removed."""
    for leftover in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    refused: list[str] = []
    for where in reversed(_directories(root)):
        reason = verify(where)
        if reason is None:
            return where, refused
        refused.append(reason)
    return None, refused


def restore(where: Path, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Load optimizer state into `optimizer` and return the trainer's. Weights are loaded with `load_policy(where)`."""
    plain = json.loads((where / "trainer.json").read_text())
    if "parts" not in plain:
        raise UserError(f"{where} was written by an older version of this program; start a new run from its weights")
    parts: dict[str, dict[str, Any]] = {name: dict(own) for name, own in plain["parts"].items()}
    per_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(where / "trainer.safetensors").items():
        kind, owner, key = name.split(".", 2)
        if kind == "optimizer":
            per_parameter.setdefault(int(owner), {})[key] = tensor
        else:
            parts.setdefault(owner, {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": per_parameter, "param_groups": groups})
    return TrainerState(int(plain["step"]), parts)
