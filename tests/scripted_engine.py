"""An engine without a model: what follows a context depends on the start's key alone, so that trees can be checked by
hand and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from rlvr_lab.core.paths import Path, Piece, Start

WORDS = ["<pad>", "<eos>", "a", "So", "Wait", "12", "+", "then", " ", "hence"]


def policy(words: Sequence[str] = WORDS) -> Any:
    """Ids 0 and 1 are padding and end; the others are the words."""
    return SimpleNamespace(
        pad_id=0,
        eos_ids=(1,),
        device=torch.device("cpu"),
        tokenizer=SimpleNamespace(all_special_ids=[0, 1]),
        decode=lambda ids: "".join(words[i] for i in ids),
    )


class ScriptedEngine:
    """`length`: tokens of every piece, or None for any from `shortest` up to its limit. `asked` holds
    every start, `tokens` the count of what was sampled, `batches` the number of calls."""

    turns: Any = None

    def __init__(
        self, length: int | None = None, words: Sequence[str] = WORDS, entropies: bool = True, shortest: int = 1
    ) -> None:
        self.length, self.policy, self.entropies, self.shortest = length, policy(words), entropies, shortest
        self.asked: list[Start] = []
        self.tokens, self.batches, self.words = 0, 0, len(words)

    def extend(self, starts: Sequence[Start], sampling: Any, generator: torch.Generator, **further: Any) -> list[Piece]:
        self.batches += bool(starts)
        return [self._piece(start, sampling.temperature) for start in starts]

    def _piece(self, start: Start, temperature: float) -> Piece:
        self.asked.append(start)
        assert len(start.ids)
        assert start.max_tokens >= 1
        random = Random(start.key)
        n = min(start.max_tokens, self.length or random.randint(min(self.shortest, start.max_tokens), start.max_tokens))
        ends = n < start.max_tokens or random.random() < 0.5
        ids = [random.randrange(2, self.words) for _ in range(n - ends)] + [1] * ends
        self.tokens += n
        logprob = [-random.random() for _ in range(n)]
        entropy = [random.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(n)]
        return Piece(ids, logprob, [temperature] * n, entropy if self.entropies else None, list(logprob), bool(ends))

    def with_entropy(self, paths: Sequence[Path], rows: int = 64) -> None:
        for path in paths:
            if path.entropy is None:
                path.entropy = [float(i % 3) for i in range(len(path))]
