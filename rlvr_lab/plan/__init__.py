"""Whether a recipe fits, and what a step will cost, before anything is loaded: `plan(config, gpu, n)`."""

from __future__ import annotations

from .planner import Plan, plan

__all__ = ["Plan", "plan"]
