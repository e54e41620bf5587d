"""Texts that end a piece of sampling, found in token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..policy.load import Policy


class Stops:
    """Looks for `texts` at the end of rows of sampled ids. A tokenizer may write a text as one token, as several, or as
    a part of a longer one, so ids are decoded; but only where the newest token holds the last character of some text.
    """

    def __init__(self, policy: Policy, texts: Sequence[str]) -> None:
        if not all(texts):
            raise ValueError("an empty text would stop everything")
        self.policy, self.texts = policy, tuple(texts)
        # a policy may write a text in smaller pieces than its tokenizer would, down to single bytes
        self.tail = max(len(text.encode()) for text in texts) + 2

    @cached_property
    def _closers(self) -> Tensor:
        """True for words of the vocabulary [V] that hold the last character of some text."""
        size = max(len(self.policy.tokenizer), self.policy.model.config.vocab_size)
        last = {text[-1] for text in self.texts}
        held = [bool(last & set(self.policy.decode([i]))) for i in range(len(self.policy.tokenizer))]
        held += [False] * (size - len(held))
        return torch.tensor(held, device=self.policy.device)

    def met(self, ids_BT: Tensor, among_B: Tensor) -> Tensor:
        """Rows [B] of `among_B` whose newest token completes a text."""
        found = torch.zeros_like(among_B)
        for row in (among_B & self._closers[ids_BT[:, -1]]).nonzero().squeeze(1).tolist():
            found[row] = self.completes(ids_BT[row, -self.tail :].tolist())
        return found

    def completes(self, ids: Sequence[int]) -> bool:
        """Whether the last of `ids` brings a text that was not there before it."""
        now, before = self.policy.decode(list(ids)), self.policy.decode(list(ids[:-1]))
        return any(now.count(text) > before.count(text) for text in self.texts)
