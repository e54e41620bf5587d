"""Exact integer arithmetic by recursive descent: the only way that text becomes a number in this package.

Grammar (tokens are integers, the four signs and round brackets; white space is free):

    sum     := product (('+' | '-') product)*
    product := factor (('*' | '/') factor)*
    factor  := INTEGER | '(' sum ')'

There is no power, no name and no call, so `9**9**9**9` is a syntax error found after three characters. Division must
be exact. Length, depth and size are bounded before anything is computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARACTERS = 400
MAX_DEPTH = 16
MAX_INTEGER = 10**9

_TOKEN = re.compile(r"\s*(?:(\d+)|([-+*/()]))")


class ExpressionError(ValueError):
    """The text is no expression of the grammar; the message says where."""


class TooLarge(ExpressionError):
    """The text breaks a limit on length, depth or size; the message says which."""


@dataclass(frozen=True, slots=True)
class Expression:
    """Value, leaves in reading order, and a form that is equal for commuted operands of + and *."""

    value: int
    leaves: tuple[int, ...]
    canonical: str


def parse(text: str) -> Expression:
    """Parse and evaluate `text` exactly.

    Raises ExpressionError for anything outside the grammar, an inexact division or a division by zero, and TooLarge for
    more than MAX_CHARACTERS characters, more than MAX_DEPTH brackets, or a number beyond MAX_INTEGER.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLarge(f"longer than {MAX_CHARACTERS} characters")
    parser = _Parser(_tokens(text))
    result = parser.sum(0)
    if parser.position != len(parser.tokens):
        raise ExpressionError(f"unexpected '{parser.tokens[parser.position]}'")
    return result


def _tokens(text: str) -> list[str]:
    found, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected '{text[position:].lstrip()[:1]}'")
        found.append(match[1] or match[2])
        position = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def sum(self, depth: int) -> Expression:
        left = self.product(depth)
        while self.peek() in ("+", "-"):
            left = _combine(self.take(), left, self.product(depth))
        return left

    def product(self, depth: int) -> Expression:
        left = self.factor(depth)
        while self.peek() in ("*", "/"):
            left = _combine(self.take(), left, self.factor(depth))
        return left

    def factor(self, depth: int) -> Expression:
        token = self.take()
        if token == "(":
            if depth >= MAX_DEPTH:
                raise TooLarge(f"more than {MAX_DEPTH} brackets deep")
            inner = self.sum(depth + 1)
            if self.take() != ")":
                raise ExpressionError("unbalanced brackets")
            return inner
        if not token.isdecimal():
            raise ExpressionError(f"expected a number, found '{token or 'the end'}'")
        if len(token) > 10 or int(token) > MAX_INTEGER:
            raise TooLarge(f"a number beyond {MAX_INTEGER}")
        return Expression(int(token), (int(token),), str(int(token)))


def _combine(sign: str, a: Expression, b: Expression) -> Expression:
    first, second = a.canonical, b.canonical
    if sign in "+*" and second < first:
        first, second = second, first
    return Expression(_apply(sign, a.value, b.value), a.leaves + b.leaves, f"({first}{sign}{second})")


def _apply(sign: str, a: int, b: int) -> int:
    if sign == "/":
        if b == 0 or a % b:
            raise ExpressionError("a division that is not exact")
        return a // b
    value = a + b if sign == "+" else a - b if sign == "-" else a * b
    if abs(value) > MAX_INTEGER:
        raise TooLarge(f"a number beyond {MAX_INTEGER}")
    return value
