"""One module per published method. `REGISTRY` lists them; `build` makes one from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

from ..errors import UserError, nearest
from .base import EXCLUSIVE, HOOKS, Method, Pipeline, compose

__all__ = ["REGISTRY", "Entry", "Method", "Pipeline", "build", "compose", "hooks_of", "load_class"]


@dataclass(frozen=True)
class Entry:
    """Where a method lives and where it comes from. `chapter` and `recipe` are paths without ending."""

    slug: str
    title: str
    arxiv: str
    cls: str
    chapter: str
    recipe: str
    status: str


REGISTRY: dict[str, Entry] = {
    entry.slug: entry
    for entry in (
        Entry(
            slug="grpo",
            title="Group Relative Policy Optimization",
            arxiv="2402.03300",
            cls="GRPO",
            chapter="1_foundations/rlvr_from_scratch",
            recipe="grpo/tiny",
            status="golden values and gradients, tiny experiment, chapter; no full-scale run yet",
        ),
    )
}


def load_class(slug: str) -> Any:
    """The class of a registered method. Raises UserError that suggests the nearest slug."""
    if slug not in REGISTRY:
        raise UserError(f"no method '{slug}' in methods; {nearest(slug, REGISTRY)}")
    return getattr(import_module(f"{__name__}.{slug}"), REGISTRY[slug].cls)


def hooks_of(cls: Any) -> list[str]:
    """Hooks that a method implements, exclusive ones marked with *."""
    return [f"{hook}*" if hook in EXCLUSIVE else hook for hook in HOOKS if callable(getattr(cls, hook, None))]


def build(slug: str, settings: Mapping[str, Any]) -> Method:
    """A method from `{preset: NAME, setting: value, ...}`; settings override the preset.

    Raises UserError for an unknown slug, preset or setting, with the nearest valid name.
    """
    cls = load_class(slug)
    own = dict(settings)
    preset = own.pop("preset", "paper")
    if preset not in cls.presets:
        raise UserError(f"methods.{slug}.preset '{preset}' does not exist; {nearest(str(preset), cls.presets)}")
    valid = [f.name for f in fields(cls.config_class)]
    for key, value in own.items():
        if key not in valid:
            raise UserError(f"unknown setting methods.{slug}.{key}; {nearest(key, [*valid, 'preset'])}")
        own[key] = _number(value, getattr(cls.presets[preset], key), f"methods.{slug}.{key}")
    try:
        method: Method = cls(replace(cls.presets[preset], **own))
    except TypeError as error:
        raise UserError(f"methods.{slug}: {error}") from error
    return method


def _number(value: Any, default: Any, name: str) -> Any:
    """Numbers may be written as integers or, in YAML 1.1, as strings such as 1e-4; words are not numbers."""
    if isinstance(default, float) and value is not None and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name} must be a number, not '{value}'") from None
    return value
