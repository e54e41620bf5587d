"""Digests of method modules, so that a recorded result says which code it came from.

Comments, docstrings and layout do not count: what runs is the same without them.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ..methods import REGISTRY

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
           tokenize.ENDMARKER}  # fmt: skip


def method_digests(slugs: Iterable[str]) -> dict[str, str]:
    """sha256 of the code of each method's module, first 16 hex digits."""
    return {slug: code_digest(_source(slug)) for slug in slugs}


def changed_since(recorded: dict[str, str]) -> list[str]:
    """Slugs whose module is not the one that was recorded, or is gone."""
    return [slug for slug, digest in recorded.items() if slug not in REGISTRY or code_digest(_source(slug)) != digest]


def code_digest(source: str) -> str:
    """Digest of a module's code without comments, docstrings and layout.

    Indentation is replaced by the column of each line's first token, so that a moved line counts. The text between
    tokens is not looked at, and so the Python that computes it does not matter.
    """
    documented = _docstring_lines(source)
    lines = source.splitlines(keepends=True)
    kept: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT and token.start[0] not in documented:
            first = not lines[token.start[0] - 1][: token.start[1]].strip()
            kept.append(f"{token.start[1] if first else ''} {token.string}")
    # f-strings are one token before Python 3.12 and several after it: the joined text is the same
    text = "".join("".join(part.split()) for part in kept)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _docstring_lines(source: str) -> set[int]:
    """Lines of texts that stand alone: docstrings of modules, classes, functions and attributes."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def _source(slug: str) -> str:
    spec = find_spec(f"rlvr_lab.{REGISTRY[slug].module}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
