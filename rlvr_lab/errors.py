"""Errors that are the user's to mend: one clear line each, no traceback at the command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A wrong setting, file or argument. The message names it and says what to change."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A clause that suggests the nearest valid name, or lists the few there are."""
    options = sorted(choices)
    close = get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "choose one of: " + ", ".join(options) if len(options) <= 16 else "no valid name is close"
