"""Training a part of a model's parameters: everything else keeps its value and gets no gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import UserError, nearest


def train_only(model: Any, names: Iterable[str]) -> None:
    """Let exactly the parameters of these names train (`named_parameters`, tied ones under their first name).

    Call it before the optimizer is made. Raises UserError for a name that the model does not have, and for no name.
    """
    wanted = set(names)
    own = dict(model.named_parameters())
    if unknown := sorted(wanted - own.keys()):
        raise UserError(f"the model has no parameter '{unknown[0]}'; {nearest(unknown[0], own)}")
    if not wanted:
        raise UserError("no parameter would train, and an optimizer needs one: choose at least one")
    for name, parameter in own.items():
        parameter.requires_grad_(name in wanted)
