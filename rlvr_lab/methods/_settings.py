"""Checks of settings that several methods share: each failure names the setting and says what it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..core.reduce import OVER_CONSTANT, REDUCTIONS
from ..errors import UserError, nearest


def check(ok: bool, name: str, must: str, value: object) -> None:
    """Raise UserError "methods.<name> must <must>, not <value>" unless `ok`."""
    if not ok:
        raise UserError(f"methods.{name} must {must}, not {value!r}")


def check_reachable(target: float, vocabulary: int, name: str) -> None:
    """Raise UserError for an entropy in nats that no distribution over so many words has."""
    most = math.log(vocabulary)
    if target > most:
        raise UserError(
            f"methods.{name} is {target} nats, but {most:.3f} is the entropy of a uniform choice among this model's "
            f"{vocabulary} words; choose a lower target"
        )


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Raise UserError that lists the choices, and names the nearest one, unless the value is among them."""
    if value not in choices:
        close = nearest(str(value), choices)
        hint = f"; {close}" if close.startswith("did") else ""
        raise UserError(f"methods.{name} must be one of {', '.join(choices)}, not '{value}'{hint}")


def check_reduction(value: str | None, name: str, constant: float | None = None, optional: bool = False) -> None:
    """A reduction of core.reduce, with the constant that it needs; `optional` allows None."""
    if value is None and optional:
        return
    check_choice(value, REDUCTIONS, name)
    if value in OVER_CONSTANT and not (constant or 0) > 0:
        raise UserError(f"methods.{name}_constant is needed by that reduction: the maximal response length")


def bounds(lower: float, upper: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers as scalars of the dtype and device of `like`."""
    return like.new_tensor(lower), like.new_tensor(upper)
