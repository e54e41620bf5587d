"""What the demonstrations ask of their arguments; each refusal names the argument."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import UserError


def positive(**values: float) -> None:
    """Raises UserError that names the first value which is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} must be a positive number, not {value}")


def finite(name: str, value: Tensor, ndim: int | None = None) -> Tensor:
    """The tensor. Raises UserError where it is empty, has another number of axes, or holds nan or infinity."""
    if not value.numel() or (ndim is not None and value.ndim != ndim):
        axes = "" if ndim is None else f"have {ndim} axes and "
        raise UserError(f"{name} must {axes}not be empty; its shape is {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise UserError(f"{name} must be finite everywhere; it holds nan or infinity")
    return value
