r"""Graders of the benchmarks whose answers need more than one equality: numeric tolerance, several answers, units.

Both start with `math_answer.grade` and keep its limits; what they add is arithmetic on text. Where they leave the
official graders, and why:

**Minerva** (272 questions of MIT OpenCourseWare, arXiv 2206.14858; the rule as ported by Llemma's evaluation code):
two numbers are equal when |a - b| <= 1e-8 + 1e-5 |b|, and, where a, b or their difference lies within 1e-8 of 0, when
|a - b| < 0.01 |a + b| / 2. The original compares with (a + b) / 2, by which no two negative numbers are near, and 0 is
not equal to 0; we take the absolute value and accept equality first. `4.5e33` and `4.5 \times 10^{33}` are one number.
The original runs `eval` on the answer; we never do.

**OlympiadBench** (arXiv 2402.14008, OpenBMB/OlympiadBench, `auto_scoring_judge.py`): several answers are paired one to
one in any order, `\pm` counts as two answers, a number may be off by the problem's tolerance times 1.01, `x = 5`
answers 5, a unit of the data set may follow the answer. Kept apart from the original:

- all boxes of the sentence "So the final answer is ..." are read for a problem with several answers, else the last box;
  the original joins all boxes of the whole response where that sentence is missing;
- x, x/100 and 100x are equal only where one side is written with a percent sign; the original always allows them;
- a tolerance applies to integers, decimals, fractions and powers of ten. Numbers such as $2\pi$ are compared by
  math-verify, to six decimals; the original evaluates both and applies the tolerance;
- at most `MAX_ITEMS` answers, of which at most `MAX_ALGEBRA` go to algebra one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from . import math_answer
from .base import Verdict
from .math_answer import Limits

MAX_ITEMS = 16
MAX_ALGEBRA = 3
MAX_EXPONENT = 400

_SCIENTIFIC = re.compile(
    r"(?P<mantissa>[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))?"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,4})|(?P<times>\\times|\\cdot|\*|×)?10(?:\^|\*\*)(?P<power>\{[-+]?[0-9]{1,4}\}|[-+]?[0-9]{1,4}))"
)
_FINAL = "So the final answer is"
_LEFT_SIDE = re.compile(r"[^=<>]*(?<![<>])=(?!=)")
_APPROXIMATE = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])")


def number_of(text: str) -> Fraction | None:
    r"""The value of an integer, decimal, fraction or power of ten (`4.5e33`, `4.5 \times 10^{33}`), else None."""
    form = math_answer.canonical(text)
    value = math_answer.number(form)
    if value is not None or len(form) > math_answer.MAX_FAST_CHARACTERS:
        return value
    match = _SCIENTIFIC.fullmatch(form.replace(" ", ""))
    if match is None or (match["e"] and not match["mantissa"]) or (match["times"] and not match["mantissa"]):
        return None
    if match["power"] and match["mantissa"] and not match["times"]:
        return None  # "210^3" is a power of 210
    exponent = int(match["e"] or match["power"].strip("{}"))
    if abs(exponent) > MAX_EXPONENT:
        return None
    return Fraction(match["mantissa"] or "1") * Fraction(10) ** exponent


# -- Minerva ----------------------------------------------------------------------------------------------------------

_NEAR_ZERO = Fraction(1, 10**8)


def minerva_close(a: Fraction, b: Fraction) -> bool:
    """Minerva's `numeric_equality`, made symmetric in sign; see the module."""
    if a == b:
        return True
    if min(abs(a), abs(b), abs(a - b)) <= _NEAR_ZERO:
        return abs(a - b) < Fraction(1, 100) * abs(a + b) / 2
    return abs(a - b) <= _NEAR_ZERO + abs(b) / 10**5


def grade_minerva(response: str, reference: str, limits: Limits) -> Verdict:
    """Judge a response to a question of Minerva's: equality, or numbers within Minerva's tolerance."""
    verdict = math_answer.grade(response, reference, limits=limits)
    if verdict.correct or verdict.answer is None:
        return verdict
    answer, _ = math_answer.extract(response, limits)
    a, b = number_of(answer or ""), number_of(reference)
    if a is None or b is None or not minerva_close(a, b):
        return verdict
    return Verdict(True, math_answer.canonical(reference), "correct within Minerva's tolerance")


# -- OlympiadBench ----------------------------------------------------------------------------------------------------


def grade_olympiad(
    response: str,
    reference: str,
    limits: Limits,
    *,
    multiple: bool = False,
    tolerances: Sequence[float] = (),
    unit: str = "",
) -> Verdict:
    """Judge a response to a problem of OlympiadBench. `tolerances`: none, one for all answers, or one for each."""
    answer, reason = _answers(response, limits) if multiple else math_answer.extract(response, limits)
    if answer is None:
        return Verdict(False, None, reason)
    answer, gold = _plain(answer, unit), _plain(reference, unit)
    if not math_answer.canonical(answer):
        return Verdict(False, None, "empty answer")
    answer, gold = _same_side(answer, gold)
    whole = math_answer.grade(f"\\boxed{{{answer}}}", gold, limits=limits)
    if whole.correct or whole.answer is None:
        return whole
    items, gold_items = (_items(answer), _items(gold)) if multiple else ([answer], [gold])
    if len(items) != len(gold_items) or len(items) > MAX_ITEMS:
        return Verdict(False, whole.answer, f"{len(items)} answers where there are {len(gold_items)}")
    if _paired(items, gold_items, tolerances, limits):
        return Verdict(True, math_answer.canonical(gold), "correct")
    return Verdict(False, ", ".join(sorted(map(math_answer.canonical, items))), whole.reason)


def _answers(response: str, limits: Limits) -> tuple[str | None, str]:
    """All boxes of the sentence that gives the final answer, joined by commas; else the last box."""
    tail = response[-limits.response_characters :]
    _, found, sentence = tail.rpartition(_FINAL)
    starts = [m.start() for m in re.finditer(r"\\boxed\{", sentence)] if found else []
    if not 2 <= len(starts) <= MAX_ITEMS:
        return math_answer.extract(response, limits)
    boxes = [
        math_answer.extract(sentence[a:b], limits) for a, b in zip(starts, [*starts[1:], len(sentence)], strict=True)
    ]
    if bad := next((reason for answer, reason in boxes if answer is None), None):
        return None, bad
    joined = ", ".join(str(answer) for answer, _ in boxes)
    return (joined, "") if len(joined) <= limits.answer_characters else (None, "more answers than are read")


def _plain(text: str, unit: str) -> str:
    r"""Without dollars, the set before `\in`, the unit; approximately equal becomes equal."""
    form = _APPROXIMATE.sub("=", text.replace("$", "").strip())
    form = form.rpartition("\\in ")[2].strip()
    bare = unit.replace("$", "").strip()
    return form.removesuffix(bare).strip() if bare and form != bare else form


def _same_side(answer: str, gold: str) -> tuple[str, str]:
    """`x = 5` against 5: what stands left of a single equality sign is dropped where only one of both has one."""
    signs = answer.count("="), gold.count("=")
    if signs == (1, 0):
        return _LEFT_SIDE.sub("", answer, count=1).strip(), gold
    if signs == (0, 1):
        return answer, _LEFT_SIDE.sub("", gold, count=1).strip()
    return answer, gold


def _items(text: str) -> list[str]:
    r"""Split at commas outside brackets; `\pm` gives two."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append(text[start:place])
            start = place + 1
    parts = [part.strip() for part in (*parts, text[start:]) if part.strip()]
    signs = [(part.replace("\\pm", "+"), part.replace("\\pm", "-")) if "\\pm" in part else (part,) for part in parts]
    return [item for pair in signs for item in pair]


def _paired(items: Sequence[str], gold: Sequence[str], tolerances: Sequence[float], limits: Limits) -> bool:
    """Whether answers and references can be paired: by text and number first, what is left by algebra."""
    widths = list(tolerances) if len(tolerances) == len(gold) else [tolerances[0] if tolerances else 0.0] * len(gold)
    left, open_gold = list(items), []
    for reference, width in zip(gold, widths, strict=True):
        match = next((item for item in left if _near(item, reference, width)), None)
        if match is None:
            open_gold.append(reference)
        else:
            left.remove(match)
    if len(open_gold) > MAX_ALGEBRA:
        return False
    for reference in open_gold:
        match = next((i for i in left if math_answer.grade(f"\\boxed{{{i}}}", reference, limits=limits).correct), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _near(item: str, reference: str, width: float) -> bool:
    if math_answer.canonical(item) == math_answer.canonical(reference):
        return True
    a, b = number_of(item), number_of(reference)
    return a is not None and b is not None and abs(a - b) <= Fraction(width) * Fraction(101, 100)
