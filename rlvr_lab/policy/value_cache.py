"""A key-value cache whose last layer adds a differentiable change to the values at chosen positions.

    o_h = sum_s a_{h,s} (V + dV_C)_{kv(h),s}         a: the ordinary attention weights, which do not depend on dV

V [B, kv heads, S, d_h] are the cached values of the last layer, dV [B, kv heads, |C|, d_h] is a leaf tensor with one
block per row, C the controlled places of the row. Under grouped-query attention a kv head serves several query heads,
whose gradients add up. Nothing below the last layer sees dV, so every cached key and value stays valid, and `Tail`
recomputes the logits of the newest token from the last block's input alone: its backward pass touches one attention
output, the block's feed-forward part, the final norm and the head (the controller of V-Reason, arXiv 2510.17045, in
the text-only form of card papers/v_reason.md [inferred]).

It is a cache like the library's own: pass it as `past_key_values`. No module is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import UserError
from .access import Parts, parts


def usable(value: Any) -> Any:
    """`value` without its graph; a copy where it was made under inference mode and a gradient may have to pass it now.
    Tuples by their members, anything else as it is."""
    if isinstance(value, tuple):
        return tuple(usable(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    stale = value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if stale else value.detach()


class ControlledLayer(DynamicLayer):  # type: ignore[misc]
    """The library's growing cache of one layer, which hands out its values with `delta` added at `places`."""

    def __init__(self) -> None:
        super().__init__()
        self.delta: Tensor | None = None
        """[B, kv heads, |C|, d_h]; added in the dtype of the values."""
        self.places: Tensor | None = None
        """Cache slots [B, |C|]; -1 where a row has fewer."""
        self.replay = False
        """True: hand out what is there and store nothing, because the newest token is already in."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, kv heads, Q, d_h] without their graph; returns all keys, and values + delta."""
        if not self.replay:
            super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        return usable(self.keys), self.controlled()

    def controlled(self) -> Tensor:
        """V + dV_C [B, kv heads, S, d_h], with a gradient to `delta`."""
        values: Tensor = usable(self.values)
        if self.delta is None or self.places is None or not self.places.numel():
            return values
        used = (self.places >= 0)[:, None, :, None]
        change = (self.delta * used).to(values.dtype)
        index = self.places.clamp_min(0)[:, None, :, None].expand_as(change)
        return values.scatter_add(2, index, change)

    def reset(self) -> None:
        """Forget tokens and controller."""
        super().reset()
        self.delta = self.places = None


class ControlledCache(DynamicCache):  # type: ignore[misc]
    """`DynamicCache` of a model, its last layer a `ControlledLayer`. Without `control` it is the library's cache.

    Raises UserError for an unsupported architecture, or a last layer with sliding-window attention, whose cache
    forgets the positions that would be controlled.
    """

    def __init__(self, model: Any) -> None:
        parts(model)
        super().__init__(config=model.config)
        if type(self.layers[-1]) is not DynamicLayer:
            raise UserError(
                f"the last layer of this {model.config.model_type} has sliding-window attention; set sliding_window to "
                "null in its config (for contexts below the window the model stays the same)"
            )
        self.last = ControlledLayer()
        self.layers[-1] = self.last

    def control(self, positions: Sequence[Sequence[int]]) -> Tensor:
        """Begin to control the given cache slots of every row; returns the change dV, zeros [B, kv heads, |C|, d_h].

        |C| is the largest number of slots of a row. The tensor is a leaf that requires a gradient: change it in place.
        Call after the prompt went through, so that the values' shape is known.
        Raises UserError where a slot is not in the cache yet, is named twice, or the number of rows differs.
        """
        if not self.last.is_initialized:
            raise UserError("control(positions) needs values to control: run the prompt through the model first")
        values: Tensor = self.last.values
        rows, heads, length, width = values.shape
        if len(positions) != rows:
            raise UserError(f"control(positions) has {len(positions)} rows, the cache {rows}")
        for row, places in enumerate(positions):
            if wrong := [p for p in places if not 0 <= p < length]:
                raise UserError(f"position {wrong[0]} of row {row} is out of range: the cache holds 0 to {length - 1}")
            if len(set(places)) < len(places):
                raise UserError(f"positions of row {row} name a place twice")
        most = max(map(len, positions), default=0)
        padded = [[*places, *[-1] * (most - len(places))] for places in positions]
        self.last.places = torch.tensor(padded, device=values.device).long().reshape(rows, most)
        dtype = torch.promote_types(values.dtype, torch.float32)
        with torch.inference_mode(False):
            self.last.delta = torch.zeros(rows, heads, most, width, dtype=dtype, device=values.device).requires_grad_()
        return self.last.delta

    @property
    def delta(self) -> Tensor | None:
        """The change dV, None before `control`."""
        return self.last.delta

    @delta.setter
    def delta(self, value: Tensor | None) -> None:
        self.last.delta = value


class Tail:
    """The end of a model, from the last block's input on, for the newest forward pass through a `ControlledCache`."""

    def __init__(self, model_parts: Parts, cache: ControlledCache) -> None:
        self._parts, self._cache = model_parts, cache
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def _see(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = args, kwargs

    def logits(self) -> Tensor:
        """Logits [B, V] of the newest token under the cache's present dV, with a gradient to it unless the caller is
        inside `torch.no_grad`. Nothing is stored in the cache. Raises UserError before the first forward pass.
        """
        if self._call is None:
            raise UserError("tail.logits() has nothing to recompute: call the model with this cache first")
        args, kwargs = self._call
        self._cache.last.replay = True
        try:
            hidden = self._parts.layers[-1](*usable(args), **{key: usable(value) for key, value in kwargs.items()})
            logits: Tensor = self._parts.head(self._parts.final_norm(hidden[:, -1:]))
        finally:
            self._cache.last.replay = False
        return logits[:, -1]


@contextmanager
def tail_of(model: Any, cache: ControlledCache) -> Iterator[Tail]:
    """A `Tail` that follows the model's forward passes by a forward hook, removed at the end.

    Raises UserError for weights that were made under `torch.inference_mode`.
    """
    if next(model.parameters()).is_inference():
        raise UserError("the model's weights were made under torch.inference_mode: load it outside of that block")
    tail = Tail(parts(model), cache)
    handle = tail._parts.layers[-1].register_forward_pre_hook(tail._see, with_kwargs=True)
    try:
        yield tail
    finally:
        handle.remove()
