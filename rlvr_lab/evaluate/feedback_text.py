"""Text of the feedback loop: hiding the answer in feedback, and reading why a judge thinks a problem stayed unsolved.

Card: papers/feedback_friction.md (arXiv 2506.11930, JHU-CLSP/Feedback-Friction). Masking is textual and leaks: `-3` has
no word boundary in front and `3` is hidden behind its sign, `42.5` loses its `42`, and the option `A` is also an
English word. These are the released functions' results, kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ..errors import UserError, nearest

MASK = "[masked]"
VERDICT = "the error is:"
UNKNOWN = "unknown"
CATEGORIES = (
    "impossible to solve",
    "too complicated",
    "feedback is wrong",
    "model is not following the feedback",
    "style or formalization issue",
    UNKNOWN,
)
"""What the judge may call the error of a problem that stayed unsolved."""


def mask_option(text: str, letter: str) -> str:
    """Hide the option of a multiple choice: `(C)`, `\\boxed{C}`, `"C"`, `**C**` and a `C` of its own, capitals only.

    A letter in lower case hides nothing.
    """
    if not letter.isupper():
        return text
    own = re.escape(letter)
    # the longest forms first, so that no bracket or quotation mark is left around a mask
    for form in (rf"\(\s*{own}\s*\)", rf"\\boxed\s*\{{\s*{own}\s*\}}", f'"{own}"', rf"\*\*{own}\*\*", rf"\b{own}\b"):
        text = re.sub(form, MASK, text)
    return text


def mask_answer(text: str, answer: str) -> str:
    """Hide a mathematical answer: `\\boxed{answer}`, then the answer between word boundaries."""
    own = re.escape(answer)
    return re.sub(rf"\b{own}\b", MASK, re.sub(rf"\\boxed\s*\{{\s*{own}\s*\}}", MASK, text))


def mask_hexadecimal(text: str, answer: str) -> str:
    """Hide a hexadecimal number in any case, where neither letter nor digit touches it; so `0xAB` stays."""
    own = re.escape(answer)
    boxed = re.sub(rf"\\boxed\s*\{{\s*{own}\s*\}}", MASK, text, flags=re.IGNORECASE)
    return re.sub(rf"(?<![A-Za-z0-9]){own}(?![A-Za-z0-9])", MASK, boxed, flags=re.IGNORECASE)


def mask_numbers(text: str, answer: str | int, intermediate: Sequence[str | int] = ()) -> str:
    """Hide whole numbers equal to an intermediate result or the answer, commas ignored, as `[Mask1]`, `[Mask2]`, ...:
    numbered as `intermediate` lists them, the answer last. Of equal values the last number counts."""
    names = {str(value).replace(",", ""): f"[Mask{i}]" for i, value in enumerate([*intermediate, answer], 1)}
    return re.sub(r"\b[\d,]+\b", lambda found: names.get(found[0].replace(",", ""), found[0]), text)


MASKS: Mapping[str, Callable[..., str]] = {
    "mcq": mask_option,
    "math": mask_answer,
    "hex": mask_hexadecimal,
    "arith": mask_numbers,
}
"""How answers of a kind are hidden."""


def mask(kind: str, text: str, *answer: str | int | Sequence[str | int]) -> str:
    """Feedback without the answer. Raises UserError for a kind that is none of `MASKS`."""
    if kind not in MASKS:
        raise UserError(f"there is no mask for answers of kind '{kind}'; {nearest(kind, MASKS)}")
    return MASKS[kind](text, *answer)


def error_category(text: str, categories: Sequence[str] = CATEGORIES) -> str:
    """The category that a judge names after "The error is:"; `unknown` where it names none."""
    _, found, said = text.lower().rpartition(VERDICT)
    named = [category for category in categories if found and category.lower() in said]
    return max(named, key=len) if named else UNKNOWN


def category_fractions(texts: Sequence[str], categories: Sequence[str] = CATEGORIES) -> dict[str, float]:
    """Share of the texts in every category. Raises ValueError for no text at all."""
    if not texts:
        raise ValueError("no judgement to count")
    found = [error_category(text, categories) for text in texts]
    return {category: found.count(category) / len(found) for category in (*categories, UNKNOWN)}
