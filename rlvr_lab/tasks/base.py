"""What every verifiable task offers: a prompt as token ids, and a verdict on a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

ProblemT_contra = TypeVar("ProblemT_contra", contravariant=True)


@dataclass(frozen=True)
class Verdict:
    """Outcome of one response: correct or not, its answer in a form that equal answers share, and why it failed.

    `answer` is what answer entropy and distinct counts compare; `None` means that there was no answer to read.
    """

    correct: bool
    answer: str | None
    reason: str


class Task(Protocol[ProblemT_contra]):
    """A set of problems that a program can check."""

    @property
    def name(self) -> str:
        """The name that recipes use."""

    def prompt_ids(self, problem: ProblemT_contra, tokenizer: Any) -> list[int]:
        """The prompt as token ids, ready to be continued; `tokenizer` is a transformers tokenizer."""

    def grade(self, problem: ProblemT_contra, response_text: str, finished: bool) -> Verdict:
        """Judge one response; `finished` says that it ended by itself, not at the length limit."""
