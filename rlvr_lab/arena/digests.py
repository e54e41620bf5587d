"""Digests of method modules, so that a recorded result says which code it came from.

Comments, docstrings and layout do not count: what runs is the same without them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..methods import REGISTRY

_ABOUT_TEXT = {"type_comment", "kind", "type_ignores"}  # fields that say how something was written


def method_digests(slugs: Iterable[str]) -> dict[str, str]:
    """sha256 of the code of each method's module, first 16 hex digits."""
    return {slug: code_digest(_source(slug)) for slug in slugs}


def changed_since(recorded: dict[str, str]) -> list[str]:
    """Slugs whose module is not the one that was recorded, or is gone."""
    return [slug for slug, digest in recorded.items() if slug not in REGISTRY or code_digest(_source(slug)) != digest]


def code_digest(source: str) -> str:
    """Digest of a module's syntax tree without docstrings.

    Empty fields are left out, and so the Python that computes it does not matter: newer ones know more fields.
    """
    return hashlib.sha256(repr(_plain(ast.parse(source))).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    if isinstance(node, list):
        return [_plain(part) for part in node if not _is_docstring(part)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _ABOUT_TEXT)
    return type(node).__name__, [(name, _plain(value)) for name, value in fields if value is not None and value != []]


def _is_docstring(node: Any) -> bool:
    """A text that stands alone: of a module, class, function or attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _source(slug: str) -> str:
    spec = find_spec(f"rlvr_lab.{REGISTRY[slug].module}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
