r"""The rule-based reward of ARPO and AEPO for answers in words: format, bag-of-words F1, a bonus for both tools.

Card: papers/agentic_aepo.md 4.5 (arXiv 2507.19849, 2510.14545; code compared: RUC-NLPIR/ARPO @ ff66660). Pure functions
of texts, for search questions in natural language; the environment of triples has exact answers and does not need F1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

BAD_FORMAT = -1.0
BONUS = 0.1
TOOLS = ("search", "python")
DECISIVE = ("yes", "no", "noanswer")


def well_formed(text: str) -> bool:
    """Thoughts paired and there, one answer with a box in it, and every call of a tool closed and answered.

    Left to right, `<search>` needs `</search>`, `<result>` and `</result>` behind it, and `<python>` likewise. A
    `<result>` that nobody asked for passes.
    """
    thoughts, tags = text.count("<think>"), [text.count(tag) for tag in ("<answer>", "</answer>")]
    if not thoughts or text.count("</think>") != thoughts or tags != [1, 1]:
        return False
    span = answer_span(text)
    return span is not None and "\\boxed{" in span and "}" in span and all(_answered(tool, text) for tool in TOOLS)


def _answered(tool: str, text: str) -> bool:
    start = text.find(f"<{tool}>")
    while start >= 0:
        closed, begun = text.find(f"</{tool}>", start), text.find("<result>", start)
        ended = text.find("</result>", begun)
        if not start < closed < begun < ended:
            return False
        start = text.find(f"<{tool}>", ended)
    return True


def answer_span(text: str) -> str | None:
    """What stands between the answer tags; None where they are missing or stand the wrong way round."""
    start, end = text.find("<answer>"), text.find("</answer>")
    return text[start + len("<answer>") : end] if 0 <= start < end else None


def boxed(span: str) -> str | None:
    """Content of the last `\\boxed{...}`, braces balanced; None where it never closes."""
    start = span.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(span)):
        depth += {"{": 1, "}": -1}.get(span[i], 0)
        if not depth:
            return span[begin:i]
    return None


def normalised(text: str) -> str:
    """Lower case, without punctuation, then without articles, blanks collapsed: in this order."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def bag_f1(answer: str, truth: str) -> float:
    """F1 of the two multisets of words. 0 without overlap, and where they differ and one is yes, no or noanswer."""
    one, other = normalised(answer), normalised(truth)
    if one != other and (one in DECISIVE or other in DECISIVE):
        return 0.0
    words, wanted = one.split(), other.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def search_reward(text: str, truths: str | Sequence[str]) -> float:
    """-1 for a bad format; else the best F1 over the accepted truths, and 0.1 more where it is above 0 and both tools
    were called."""
    span = answer_span(text)
    answer = boxed(span) if span is not None and well_formed(text) else None
    if answer is None:
        return BAD_FORMAT
    f1 = max((bag_f1(answer, truth) for truth in ([truths] if isinstance(truths, str) else truths)), default=0.0)
    return f1 + BONUS if f1 > 0 and all(f"</{tool}>" in text for tool in TOOLS) else f1
