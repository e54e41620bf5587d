"""A widget's JavaScript under node: its arithmetic is compared with Python's, not read."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

widgets = pytest.importorskip("rlvr_lab.show.widgets", reason="anywidget is not installed")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(module: str, expressions: list[str], tmp_path: Path) -> list[Any]:
    """Values of JavaScript expressions in which ``w`` is the widget's module."""
    path = tmp_path / f"{module}.mjs"
    path.write_text(widgets.javascript(module), encoding="utf-8")
    script = (
        f"import * as w from {json.dumps(path.as_uri())};\nconsole.log(JSON.stringify([{', '.join(expressions)}]));"
    )
    command = ["node", "--input-type=module"]
    result = subprocess.run(command, input=script, capture_output=True, text=True, check=True, timeout=60)
    values: list[Any] = json.loads(result.stdout)
    return values
