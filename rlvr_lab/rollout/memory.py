"""Keys and values that a transformers engine keeps while a tree or an episode grows, so that no context is read twice.

A context is found again by its tokens alone. What is kept is valid for one set of weights, so a memory lives for one
call of a sampler (`TransformersEngine.remembering`) and never over an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_BYTES = 256 << 20
"""What a memory holds at most unless told otherwise (`rollout.prefix_memory`); contexts beyond it are read again."""
_FACTOR = 0x9E3779B97F4A7C15 | 1


@dataclass(frozen=True)
class _Block:
    """Rows that left a batch together: keys and values of every layer [n, H, W, D], and which columns count [n, W]."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    tokens: list[list[int]]


class Place(NamedTuple):
    """Where the first `length` tokens of a context lie."""

    block: int
    row: int
    length: int


class Memory:
    """Contexts with their keys and values, up to `most_bytes`."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.blocks: list[_Block] = []
        self._index: dict[tuple[int, int], tuple[int, int]] = {}

    def keep(self, tokens: list[list[int]], cache: Any, mask: Tensor, rows: Tensor) -> None:
        """Keep the rows `rows` of a cache, whose columns marked in `mask` [rows, W] hold `tokens`; nothing where they
        do not fit any more, or where a sliding window has forgotten their beginnings."""
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            return
        # a batch that leaves whole is not copied: nothing writes into tensors of a cache, it only makes longer ones
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        layers = [(k, v) if len(rows) == len(k) else (k[rows], v[rows]) for k, v in pairs]
        size = sum(keys.nbytes + values.nbytes for keys, values in layers)
        if self.bytes + size > self.most_bytes:
            return
        self.bytes += size
        for row, ids in enumerate(tokens):
            for length, code in enumerate(_codes(ids), 1):
                self._index[length, code] = len(self.blocks), row
        self.blocks.append(_Block(layers, mask, tokens))

    def find(self, ids: Sequence[int]) -> Place | None:
        """Where the longest known beginning of `ids` lies, without its last token, which has to be read for what
        follows; None where no token is known."""
        codes = _codes(ids[:-1])
        for length in range(len(codes), 0, -1):
            found = self._index.get((length, codes[length - 1]))
            if found is not None and self.blocks[found[0]].tokens[found[1]][:length] == list(ids[:length]):
                return Place(*found, length)
        return None

    def cache(self, places: Sequence[Place], config: Any) -> tuple[Any, Tensor]:
        """A cache of these beginnings, padded on the left, and its mask [B, C]."""
        from transformers import DynamicCache

        longest = max(place.length for place in places)
        device = self.blocks[places[0].block].mask.device
        lengths = torch.tensor([place.length for place in places], device=device)
        mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
        parts = [self._part(number, places, longest) for number in sorted({place.block for place in places})]
        made = DynamicCache(config=config)
        for number in range(len(self.blocks[0].layers)):
            keys, values = (
                _taken([(block.layers[number][which], to, rows, columns) for to, block, rows, columns in parts])
                for which in (0, 1)
            )
            made.update(keys[:, :, :0], values[:, :, :0], number)  # makes the layer; all of it would be copied again
            made.layers[number].keys, made.layers[number].values = keys, values
        return made, mask

    def _part(self, number: int, places: Sequence[Place], longest: int) -> tuple[list[int], _Block, Tensor, Tensor]:
        """Of the places in one block: their numbers, the block, its rows, and the columns to take [n, longest]."""
        block = self.blocks[number]
        to = [i for i, place in enumerate(places) if place.block == number]
        device = block.mask.device
        rows = torch.tensor([places[i].row for i in to], device=device)
        lengths = torch.tensor([places[i].length for i in to], device=device)
        # the columns that count, in their order, before all others; those in front of a shorter context are masked
        order = block.mask[rows].long().argsort(dim=1, descending=True, stable=True)
        wanted = (torch.arange(longest, device=device)[None] - (longest - lengths[:, None])).clamp_min(0)
        return to, block, rows, order.gather(1, wanted)


def _taken(parts: Sequence[tuple[Tensor, list[int], Tensor, Tensor]]) -> Tensor:
    """Keys or values [B, H, longest, D] out of blocks [N, H, W, D], of each the places in B, its rows and columns."""
    found = [_picked(own, rows, columns) for own, _, rows, columns in parts]
    if len(found) == 1:
        return found[0]
    whole = found[0].new_empty(sum(map(len, found)), *found[0].shape[1:])
    for one, (_, to, _, _) in zip(found, parts, strict=True):
        whole[to] = one
    return whole


def _picked(own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Columns [n, C] of rows [n] of [N, H, W, D], as whole vectors of D: several times faster than indexing."""
    _, heads, width, size = own.shape
    head = torch.arange(heads, device=own.device)[None, :, None]
    at = (rows[:, None, None] * heads + head) * width + columns[:, None, :]
    return own.reshape(-1, size).index_select(0, at.flatten()).view(*at.shape, size)


def _codes(ids: Sequence[int]) -> list[int]:
    """A number for every beginning of `ids`; equal beginnings have equal ones."""
    with np.errstate(over="ignore"):
        factors = np.cumprod(np.full(len(ids), _FACTOR, dtype=np.uint64))
        codes: list[int] = np.cumsum((np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * factors).tolist()
    return codes
