r"""Grade a written answer by mathematical equality, under limits that hostile text cannot escape.

Four stages, the cheap and safe ones first:

1. extract: the last `\boxed{...}`, else `#### x`, else "answer is x", else the last number, from the response's tail;
2. fast path: equal canonical text, or two numbers compared exactly as fractions; most of GSM8K and AIME ends here;
3. guard: towers of powers, huge exponents, factorials, integrals, deep nesting are refused by their text alone;
4. math-verify in a child process (`sympy_process.py`) with a wall-clock deadline and a memory limit.

`sympy_child.py` lists what can still be slow after the guard; the deadline ends it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from unicodedata import decimal

from . import sympy_process
from .base import Verdict
from .child_process import STOPPED


@dataclass(frozen=True)
class Limits:
    """Bounds on what is looked at and computed.

    response_characters  only this much of the end of a response is searched
    answer_characters    a longer answer is rejected
    depth                brackets in brackets
    sympy_characters     of an answer that sympy sees; its parser takes seconds for long juxtapositions
    digits               in one number that sympy sees
    exponent             product of all integers in exponents
    expanded             the same where a bracket with a letter is raised, as sympy may multiply it out
    amplified            any integer in an answer with a factorial, binomial or gamma function
    seconds, megabytes   for one comparison by sympy
    """

    response_characters: int = 20_000
    answer_characters: int = 500
    depth: int = 12
    sympy_characters: int = 200
    digits: int = 40
    exponent: int = 10_000
    expanded: int = 24
    amplified: int = 200
    seconds: float = 3.0
    megabytes: int = 1024


DEFAULT_LIMITS = Limits()


def grade(response: str, reference: str, *, limits: Limits = DEFAULT_LIMITS) -> Verdict:
    r"""Judge `response` against `reference`, a bare answer or a text with a `\boxed{}` or `####` answer.

    `Verdict.answer` is a canonical form: numbers as reduced fractions ("27", "1/2"), else text without layout. A
    correct answer takes the reference's form, so all correct answers are one class; wrong answers that are equal only
    by algebra (x+1 and 1+x) stay two. `None` where there is no answer or it breaks a limit of length. `refused` where a
    limit of any kind stood in the way.
    Raises UserError only where math-verify itself is missing.
    """
    answer, reason = extract(response, limits)
    if answer is None or not canonical(answer):
        return Verdict(False, None, reason or "empty answer", refused=reason.startswith(_TOO_LONG))
    gold = _bare(reference, limits)
    if len(gold) > limits.answer_characters:
        why = f"reference longer than {limits.answer_characters} characters"
        return Verdict(False, canonical(answer), why, refused=True)
    return _compare(answer, gold, limits)


def read(response: str, *, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """The answer's canonical form, or `None`; no reference is seen. Equal numbers share it, equal algebra need not."""
    answer, _ = extract(response, limits)
    return (canonical(answer) or None) if answer is not None else None


def equal(first: str, second: str, *, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether two answers, as `read` gives them, are mathematically equal; within the limits, else False."""
    return _compare(first, second, limits).correct


@lru_cache(maxsize=65536)
def _compare(answer: str, gold: str, limits: Limits) -> Verdict:
    """Cached: a group of responses repeats its answers, and one that runs into the deadline should do so once."""
    form, gold_form = canonical(answer), canonical(gold)
    if form == gold_form:
        return Verdict(True, gold_form, "correct")
    value, gold_value = number(form), number(gold_form)
    if value is not None and gold_value is not None:
        equal = _same_number(answer, value, gold, gold_value)
        return Verdict(True, gold_form, "correct") if equal else Verdict(False, form, f"not {gold_form}")
    if (words := _words(form, gold_form)) is not None:
        return Verdict(words, gold_form if words else form, "correct" if words else f"not {gold_form}")
    for what, text in (("answer", form), ("reference", gold_form)):
        if refused := guard(text, limits):
            return Verdict(False, form, f"{what} {refused}", refused=True)
    equal, reason = sympy_process.shared(limits.megabytes).equal(gold_form, form, limits.seconds)
    if equal:
        return Verdict(True, gold_form, "correct")
    return Verdict(False, form, reason or f"not {gold_form}", refused=reason.startswith(STOPPED))


def _words(answer: str, gold: str) -> bool | None:
    """Compare two texts of plain words, else `None`: sympy would read "east" and "seat" as one product."""
    if not (_IS_WORDS.fullmatch(answer) and _IS_WORDS.fullmatch(gold)):
        return None
    return answer.casefold() == gold.casefold()


# --- extraction -------------------------------------------------------------------------------------------------------

_TOO_LONG = ("more than ", "answer longer than ")
_INTEGER = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_CURRENCY = r"(?:\\?\$|[€£¥])?"
_WRITTEN_NUMBER = rf"[-+−]?{_CURRENCY}[-+−]?(?:{_INTEGER}\s?/\s?{_INTEGER}|{_DECIMAL})(?:\s?\\?%)?"
_LAST_NUMBER = re.compile(rf"(?<![\w.]){_WRITTEN_NUMBER}")
_LEADING_NUMBER = re.compile(rf"({_WRITTEN_NUMBER})(?=[,;]?\s+[A-Za-z]{{2}}|[\s.,;:!?*$)]*$)")
_HASHES = re.compile(r"####[ \t]*([^\n#]+)")
_ANSWER_IS = re.compile(r"(?i:\banswer)\**(?:\s+is\b|\s*[:=])[\s:*]*")
_MATHS = re.compile(r"\$\$?([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE = re.compile(r"(?:(?![.;!?](?:\s|\*|$))[^\n])+")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def extract(response: str, limits: Limits = DEFAULT_LIMITS) -> tuple[str | None, str]:
    r"""The answer as written, or `None` and the reason. A `\boxed{` that never closes is not passed over."""
    tail = _ascii_digits(response[-limits.response_characters :])
    start = tail.rfind("\\boxed{")
    if start >= 0:
        begin = start + len("\\boxed{")
        end = _closing(tail, begin - 1, begin + limits.answer_characters + 1)
        if end is None:
            short = len(tail) - begin <= limits.answer_characters
            why = "unbalanced brackets in" if short else f"more than {limits.answer_characters} characters in"
            return None, f"{why} \\boxed{{}}"
        answer = tail[begin:end].strip()
        return (answer, "") if answer else (None, "empty \\boxed{}")
    found = _after_hashes(tail) or _after_answer_is(tail) or _last_number(tail)
    if found is None:
        return None, "no answer found"
    if len(found) > limits.answer_characters:
        return None, f"answer longer than {limits.answer_characters} characters"
    return found, ""


def _after_hashes(text: str) -> str | None:
    """GSM8K's `#### x`; a Markdown heading such as `#### Step 2: add` is no answer."""
    lines: list[str] = [match[1].strip(" \t*") for match in _HASHES.finditer(text)]
    for line in reversed(lines):
        if leading := _LEADING_NUMBER.match(line):
            return str(leading[1])
        if line and not _PLAIN_WORD.search(line):
            return line
    return None


def _after_answer_is(text: str) -> str | None:
    matches = list(_ANSWER_IS.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :]
    if maths := _MATHS.match(rest):
        return _inside(maths) or None
    sentence = _SENTENCE.match(rest)
    chunk = sentence[0].strip(" \t*,:$") if sentence else ""
    if leading := _LEADING_NUMBER.match(chunk):
        return str(leading[1])
    # "the answer is not known yet" names no answer; "the answer is Tuesday" does
    return chunk if chunk and len(_PLAIN_WORD.findall(chunk)) <= 3 else None


def _inside(maths: re.Match[str]) -> str:
    return str(maths[1] or maths[2] or maths[3]).strip()


def _last_number(text: str) -> str | None:
    found = None
    for match in _LAST_NUMBER.finditer(text):
        found = match[0]
    return found


def _closing(text: str, opening: int, limit: int) -> int | None:
    r"""Place of the `}` that closes the `{` at `opening`, before `limit`; `\{` and `\}` are no groups."""
    depth, place, stop = 0, opening, min(limit, len(text))
    while place < stop:
        character = text[place]
        if character == "\\":
            place += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None


def _bare(reference: str, limits: Limits) -> str:
    """The answer inside a reference; one that is already bare stays as it is."""
    if "\\boxed{" in reference or "####" in reference:
        return extract(reference, limits)[0] or reference.strip()
    return reference.strip()


# --- canonical form and numbers ---------------------------------------------------------------------------------------

_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr|big|Big|limits)(?![A-Za-z])\.?"
    r"|(?<!\\)\\[!,;:> ]|\\q?quad(?![A-Za-z])|(?<!\\)~|\^\s*\{?\s*\\circ\s*\}?|°|\\degree(?![A-Za-z])"
)
_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[0-9}])\s*\\(?:text|textbf|textrm|mathrm|mbox)\s*\{[^{}0-9]*\}(?:\^\{?[23]\}?)?$")
_PLAIN_UNIT = re.compile(
    r"(?<=[0-9%])\s+(?:(?!(?:pi|or|and|mod|sqrt|sin|cos|tan|log|ln|exp|over)\b)[A-Za-z]{2,}[A-Za-z ]*"
    # a letter of a formula may stand before ^ and /, so only lengths, masses and times do here
    r"|(?:[mcdk]?m|in|ft|yd|mi|k?g|[mc]?[lL])(?:(?:\^\{?[23]\}?|[²³])|\s?/\s?(?:s|sec|min|h|hr|[mcdk]?m|k?g|[lL])(?:\^\{?[23]\}?|[²³])?))$"
)
_IS_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*")
_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_REPLACED = (
    ("−", "-"), ("–", "-"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac"),
    ("\\$", ""), ("\\%", "%"), ("π", "\\pi "), ("{,}", ","),
    ("\\varnothing", "\\emptyset"), ("∅", "\\emptyset"),
)  # fmt: skip
_CANONICAL_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)[$€£¥]?(?P<sign2>[-+]?)(?:(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?%?"
    rf"|(?:(?P<whole>[0-9]+) )?(?P<top>{_INTEGER})/(?P<bottom>{_INTEGER})"
    r"|\\frac(?:\{(?P<sign3>[-+]?)(?P<latex_top>[0-9]+)\}\{(?P<latex_bottom>[0-9]+)\}|(?P<short>[0-9][0-9])))"
)
MAX_FAST_CHARACTERS = 300


def canonical(text: str) -> str:
    """A form shared by answers that differ in layout only: `\\dfrac{1}{2}`, ` 0.50 ` and `1/2` are all "1/2"."""
    form = _ascii_digits(text).strip().strip("*").strip()
    if maths := _MATHS.fullmatch(form):
        form = _inside(maths)
    for old, new in _REPLACED:
        form = form.replace(old, new)
    form = _LAYOUT.sub("", form).strip()
    form = _UNIT.sub("", form)
    form = _without_unit(form)
    form = _FONT.sub(r"\1", form)
    form = _SPACE.sub("", " ".join(form.split())).rstrip(".,;").strip("$")
    if re.fullmatch(r"\([A-Za-z]\)", form):
        form = form[1]
    value = number(form)
    return form if value is None else str(value)


def _ascii_digits(text: str) -> str:
    """Digits of all scripts, and full-width signs, as ASCII: `４`, `٤` and `4` are one answer."""
    if text.isascii():
        return text
    return "".join(
        chr(ord(c) - 0xFEE0) if 0xFF01 <= ord(c) <= 0xFF5E else str(decimal(c, c)) if not c.isascii() else c
        for c in text
    )


def _without_unit(form: str) -> str:
    """Drop the words of "18 dollars" or "5% of all" where a number alone stands before them."""
    bare = _PLAIN_UNIT.sub("", form)
    return bare if number(bare) is not None else form


def number(form: str) -> Fraction | None:
    """The exact value of an integer, decimal or simple fraction, else `None`; a percentage counts as its number."""
    match = _CANONICAL_NUMBER.fullmatch(form) if len(form) <= MAX_FAST_CHARACTERS else None
    if match is None:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace("{,}", "").replace(",", ""))
        value *= Fraction(10) ** int(match["exponent"] or 0)
    else:
        short = match["short"] or "  "
        top = int((match["top"] or match["latex_top"] or short[0]).replace(",", ""))
        bottom = int((match["bottom"] or match["latex_bottom"] or short[1]).replace(",", ""))
        if bottom == 0:
            return None
        value = Fraction(top, bottom) + int(match["whole"] or 0)
    negative = [match["sign"], match["sign2"], match["sign3"]].count("-")
    return -value if negative % 2 else value


def _same_number(answer: str, value: Fraction, gold: str, gold_value: Fraction) -> bool:
    """Exact equality; a written decimal may be rounded (0.333333 for 1/3), a percentage may be its fraction.

    The tolerance is that of math-verify, six decimals, narrowed below 1 so that small values are not all equal.
    """
    candidates = [(value, gold_value)]
    if "%" in answer:
        candidates.append((value / 100, gold_value))
    if "%" in gold:
        candidates.append((value, gold_value / 100))
    if any(a == b for a, b in candidates):
        return True
    if "." not in answer and "." not in gold:
        return False
    return any(abs(a - b) <= Fraction(5, 10**6) * min(Fraction(1), abs(b)) for a, b in candidates)


# --- static guard -----------------------------------------------------------------------------------------------------

_OPENING, _CLOSING = "([{", ")]}"
_DIGITS = re.compile(r"[0-9]+")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])(?:[\s,]|\{,\}|\{\})+(?=[0-9])")
_EVALUATED = re.compile(r"\\(?:i{1,3}nt|oint|idotsint|sum|prod|coprod|lim|limsup|liminf)(?![a-zA-Z])|[∫∑∏]")
_AMPLIFIER = re.compile(r"!|\\[dt]?binom|\\choose|\\Gamma|\\zeta|factorial|gamma|binom", re.IGNORECASE)
_POWER = re.compile(r"\^|\*\*|\\sqrt\s*(?=\[)")
_SCIENTIFIC = re.compile(r"[0-9][eE][-+]?([0-9]+)")
_RAISED_SUM = re.compile(r"[A-Za-z][^()\[\]]*[)\]](?:\})?\s*(?:\^|\*\*)")
_NUMERIC_BASE = re.compile(r"[0-9)\]}]\s*(?:\^|\*\*)")


def guard(text: str, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Why sympy must not see `text`, or `None`. Reads the text only and computes nothing larger than a product of ints.

    Deliberately strict: an answer refused here was already compared as text, so only a rewritten form is lost.
    """
    joined = _BETWEEN_DIGITS.sub("", text)
    long = len(text) > limits.sympy_characters
    return (
        _refused_brackets(text, limits)
        or (f"has a number of more than {limits.digits} digits" if _longest(text) > limits.digits else None)
        or (f"longer than {limits.sympy_characters} characters, too long for algebra" if long else None)
        or (f"holds an operator that would be evaluated: {m[0]}" if (m := _EVALUATED.search(text)) else None)
        or _refused_amplifier(joined, limits)
        or _refused_powers(joined, limits)
    )


def _longest(text: str) -> int:
    return max((len(digits) for digits in _DIGITS.findall(text)), default=0)


def _refused_brackets(text: str, limits: Limits) -> str | None:
    """Braces must match; round and square ones only in number, for half-open intervals."""
    depth = braces = 0
    for place, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character in "{}" and (place == 0 or text[place - 1] != "\\"):
            braces += 1 if character == "{" else -1
        if depth > limits.depth:
            return f"nests brackets more than {limits.depth} deep"
        if depth < 0 or braces < 0:
            return "has unbalanced brackets"
    return "has unbalanced brackets" if depth or braces else None


def _refused_amplifier(text: str, limits: Limits) -> str | None:
    if _AMPLIFIER.search(text) is None:
        return None
    if "!!" in text or _NUMERIC_BASE.search(text) or _scientific(text):
        return "combines a factorial or binomial with powers"
    if any(len(digits) > 9 or int(digits) > limits.amplified for digits in _DIGITS.findall(text)):
        return f"has a factorial or binomial of more than {limits.amplified}"
    return None


def _scientific(text: str) -> list[str]:
    """Exponents of 1e9 and the like."""
    return _SCIENTIFIC.findall(text)


def _refused_powers(text: str, limits: Limits) -> str | None:
    """No tower of numbers, and a bounded product of all integers in exponents (an upper bound on nested powers)."""
    if text.count("\\exp") > 2:
        return "holds a tower of powers"
    product, limit = 1, limits.expanded if _RAISED_SUM.search(text) else limits.exponent
    groups = _scientific(text)
    for match in _POWER.finditer(text):
        end = _group_end(text, match.end())
        group = text[match.end() : end]
        if _POWER.match(text, end) or _is_tower(group):
            return "holds a tower of powers"
        groups.append(group)
    for digits in _DIGITS.findall(" ".join(groups)):
        product *= max(1, int(digits))
        if product > limit:
            return f"has exponents beyond {limit}"
    return None


def _is_tower(exponent: str) -> bool:
    """An exponent may hold one power: of a letter (e^{x^2}) or to a letter (2^{2^n})."""
    inner = list(_POWER.finditer(exponent))
    if len(inner) > 1:
        return True
    return any(
        exponent[: m.start()].rstrip()[-1:] not in _LETTERS and exponent[m.end() :].strip(" {(")[:1] not in _LETTERS
        for m in inner
    )


_WORD = re.compile(r"[0-9.]+|\\[A-Za-z]+|.", re.DOTALL)
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _group_end(text: str, place: int) -> int:
    """End of the argument that starts at `place`: a group, a number, a command with its groups, a character."""
    while place < len(text) and text[place] in " -+":
        place += 1
    if place < len(text) and text[place] in _OPENING:
        return _bracket_end(text, place)
    word = _WORD.match(text, place)
    if word is None:
        return place
    place = word.end()
    while word[0].startswith("\\") and text[place : place + 1] in ("{", "["):
        place = _bracket_end(text, place)
    return place


def _bracket_end(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] in _OPENING) - (text[place] in _CLOSING)
        if depth == 0:
            return place + 1
    return len(text)
