"""These tests run in the environment of one engine, `nox -s verl trl vllm semantics`; elsewhere none is collected."""

from __future__ import annotations

import os

ENGINES = ("verl", "trl", "vllm", "semantics")
# under nox a missing engine is an error of collection and not a skip, so that nothing passes unseen
collect_ignore_glob = [f"test_{name}_*.py" for name in ENGINES if os.environ.get("RLVR_LAB_ENGINE") != name]
