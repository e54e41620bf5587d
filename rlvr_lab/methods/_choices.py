"""Choices of tokens that come out empty: nothing is chosen, it is said once and counted, and training goes on."""

from __future__ import annotations


class EmptyChoices:
    """Counts the minibatches of a step in which a method chose no token. `remedy`: what the user may change."""

    def __init__(self, slug: str, remedy: str) -> None:
        self.slug, self.remedy = slug, remedy
        self._empty = 0
        self._said = False
        self._pending: list[str] = []

    def count(self, chosen: int, candidates: int) -> None:
        """One minibatch: tokens chosen of those that could have been. Where there were none, nothing was missed."""
        if chosen or not candidates:
            return
        self._empty += 1
        if not self._said:
            self._said = True
            self._pending.append(
                f"method '{self.slug}' chose none of the {candidates} tokens of a minibatch, which then trains without "
                f"it: {self.remedy}. Further ones are counted in {self.slug}.empty_choices"
            )

    def metrics(self) -> dict[str, float]:
        """`empty_choices`: minibatches since the last call."""
        found, self._empty = {"empty_choices": float(self._empty)}, 0
        return found

    def notices(self) -> list[str]:
        """The message, once."""
        found, self._pending = self._pending, []
        return found
