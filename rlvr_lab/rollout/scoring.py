"""Entropies of paths whose engine records none, from one pass of the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..core.paths import Path, to_rollout
from ..policy.forward import scored
from ..policy.load import Policy


@torch.no_grad()
def fill_entropy(policy: Policy, paths: Sequence[Path], rows: int = 64) -> None:
    """Set `entropy` of every path that has None, in nats at the temperature of its first token; told tokens get 0.

    `rows`: paths per pass.
    """
    by_temperature: dict[float, list[Path]] = {}
    for path in paths:
        if path.entropy is None and len(path):
            by_temperature.setdefault(path.temperature[0], []).append(path)
    for some in by_temperature.values():
        _fill(policy, some, rows)


def _fill(policy: Policy, lacking: Sequence[Path], rows: int) -> None:
    """`lacking`: paths of one temperature."""
    apart = [replace(path, group=i) for i, path in enumerate(lacking)]  # also the copies of one path
    rollout = to_rollout(apart, pad_id=policy.pad_id, version=0, device=policy.device)
    _, entropy = scored(policy.model, rollout, rows)
    for path, row in zip(lacking, entropy.tolist(), strict=True):
        path.entropy = [value if chosen else 0.0 for value, chosen in zip(row, path.action, strict=False)]
