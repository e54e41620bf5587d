"""Counting what an engine samples: methods are compared at equal generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.paths import Path, Piece, Start
from ..core.rollout import Rollout
from ..policy.load import Policy
from .engine import Sampling
from .factory import Continues


class Meter:
    """An engine that counts the tokens another one samples, in `tokens`: probes and discarded responses too, a prefix
    that was taken over once."""

    def __init__(self, engine: Continues) -> None:
        self.engine, self.tokens = engine, 0

    @property
    def policy(self) -> Policy:
        """What is sampled from."""
        return self.engine.policy

    @property
    def turns(self) -> Any:
        """The environment's turns; None for a plain task."""
        return self.engine.turns

    def sample(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, generator: torch.Generator,
        **further: Any,
    ) -> Rollout:  # fmt: skip
        """See `rollout.factory.Engine`."""
        rollout: Rollout = self.engine.sample(prompts, group_size, sampling, generator, **further)
        self.tokens += int(rollout.sampled.sum())
        return rollout

    def extend(
        self, starts: Sequence[Start], sampling: Sampling, generator: torch.Generator, *, stops: Sequence[str] = (),
        report: Callable[[int], None] = lambda rows: None,
    ) -> list[Piece]:  # fmt: skip
        """See `rollout.factory.Engine`."""
        pieces: list[Piece] = self.engine.extend(starts, sampling, generator, stops=stops, report=report)
        self.tokens += sum(len(piece.ids) for piece in pieces)
        return pieces

    def with_entropy(self, paths: Sequence[Path], rows: int = 64) -> None:
        """See `rollout.factory.Engine`."""
        self.engine.with_entropy(paths, rows)
