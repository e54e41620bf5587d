"""A text that a causal language model reads once while it grows, and that can be cut back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CUTTABLE = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose memory is keys and values, from which the last tokens can be removed again."""


class Reader:
    """Token ids, and the model's logits at their end; what was read before stays in a key-value cache.

    `rewind` removes tokens from text and cache, so that something can be looked at and forgotten. Where a model cannot
    do that (linear attention, or no `past_key_values`), and with `cached=False`, everything is read anew each time: the
    same logits up to rounding, at a higher price. One sequence, without padding.
    """

    def __init__(self, model: Any, ids: Sequence[int] = (), *, cached: bool = True) -> None:
        self.model, self.ids = model, list(ids)
        accepted = inspect.signature(model.forward).parameters
        self.cached = cached and "past_key_values" in accepted and _cuttable(model.config)
        self._keeps = "logits_to_keep" in accepted
        self._cache: Any = None
        self._known = 0  # how many of `ids` the cache holds

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Let the text go on; it is read when logits are next asked for."""
        self.ids += ids

    def rewind(self, length: int) -> None:
        """Cut the text back to its first `length` tokens."""
        del self.ids[length:]
        self._forget(length)

    def logits(self, last: int = 1) -> Tensor:
        """Logits [last, V] at the last positions, float32 (float64 where the model is). Raises ValueError where the
        text has fewer."""
        if not 1 <= last <= len(self.ids):
            raise ValueError(f"logits at the last {last} of {len(self.ids)} tokens")
        self._forget(len(self.ids) - last)
        new = torch.tensor([self.ids[self._known :]], device=self.model.device)
        settings: dict[str, Any] = {"use_cache": self.cached}
        if self.cached:
            settings["past_key_values"] = self._cache = self._cache if self._cache is not None else _empty()
        if self._keeps:
            settings["logits_to_keep"] = last
        out: Tensor = self.model(input_ids=new, **settings).logits[0, -last:]
        self._known = len(self.ids) if self.cached else 0
        return out if out.dtype == torch.float64 else out.float()

    def peek(self, ids: Sequence[int], last: int = 1) -> Tensor:
        """Logits [last, V] at the last positions of text and `ids`; the text stays as it was."""
        length = len(self)
        self.append(ids)
        found = self.logits(last)
        self.rewind(length)
        return found

    def _forget(self, length: int) -> None:
        if self._known > length:
            self._cache.crop(length - self._known)  # a negative number: so many tokens less
            self._known = length


def _cuttable(config: Any) -> bool:
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return set(kinds or CUTTABLE) <= CUTTABLE


def _empty() -> Any:
    from transformers import DynamicCache  # slow to import

    # without the model's configuration every layer keeps all tokens, those outside a sliding window too: what was cut
    # off there could not come back
    return DynamicCache()
