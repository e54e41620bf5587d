"""Texts of the settings, such as the end of a step, as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .base import Encode

NO_WORD = "\ue000"  # of no language: one token only where a vocabulary has one for whatever it does not know


def marker_ids(texts: Sequence[str], encode: Encode, name: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of each text. Raises UserError "methods.<name> ..." for one that this vocabulary cannot write."""
    nothing = encode(NO_WORD)
    unknown = set(nothing) if len(nothing) == 1 else set()
    found = []
    for text in texts:
        ids = tuple(encode(text))
        if not ids:
            raise UserError(f"methods.{name} holds {text!r}, which has no token in this vocabulary")
        if unknown & set(ids):
            raise UserError(f"methods.{name} holds {text!r}, with a word that this vocabulary does not know")
        found.append(ids)
    return tuple(found)
