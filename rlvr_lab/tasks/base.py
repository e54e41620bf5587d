"""What every verifiable task offers: a prompt as token ids, and a verdict on a response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar

ProblemT_contra = TypeVar("ProblemT_contra", contravariant=True)


class Outcome(StrEnum):
    """What a verifier can find."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    """There was no answer to read."""
    REFUSED = "refused"
    """Checking it would break a limit on time, depth or size."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one response: correct or not, its answer in a form that equal answers share, and why it failed.

    `answer` is what answer entropy and distinct counts compare; `None` means that there was no answer to read.
    """

    correct: bool
    answer: str | None
    reason: str
    refused: bool = False
    points: Mapping[str, float] = field(default_factory=dict)
    """Partial credits by name, which become reward components beside `correct`."""

    @property
    def outcome(self) -> Outcome:
        """The verdict as one word."""
        if self.correct:
            return Outcome.CORRECT
        if self.refused:
            return Outcome.REFUSED
        return Outcome.UNPARSABLE if self.answer is None else Outcome.WRONG


class Task(Protocol[ProblemT_contra]):
    """A set of problems that a program can check."""

    @property
    def name(self) -> str:
        """The name that recipes use."""

    def prompt_ids(self, problem: ProblemT_contra, tokenizer: Any) -> list[int]:
        """The prompt as token ids, ready to be continued; `tokenizer` is a transformers tokenizer."""

    def grade(self, problem: ProblemT_contra, response_text: str, finished: bool) -> Verdict:
        """Judge one response; `finished` says that it ended by itself, not at the length limit.

        A name in `Verdict.points` that one response has and another lacks counts as 0 there. A task whose responses
        may all lack one declares `point_names: tuple[str, ...]`, so that every batch has the same reward components.
        """

    def read(self, response_text: str, finished: bool) -> str | None:
        """The answer in a form that equal answers share, read without any reference; `None` where there is none.

        `Verdict.answer` is not that: a correct answer takes the reference's form there, which would tell the label.
        """
