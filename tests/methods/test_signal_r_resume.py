"""RiskPO, COPO and EMPG train from their tiny recipes, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN

from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

CONTROLS = {
    "riskpo": "methods.riskpo.bundle_size=2",
    "copo": "methods.copo.shuffled=true",
    "empg": "methods.empg.shuffled=true",
}


def weights_and_metrics(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory")
    kept = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    return (out / "model" / "model.safetensors").read_bytes(), kept


@pytest.mark.slow
@pytest.mark.parametrize("slug", list(CONTROLS))
def test_a_resumed_run_is_the_uninterrupted_one(slug: str, tmp_path: Path) -> None:
    def config(steps: int) -> Any:
        return load_config(f"{slug}/tiny", [*TINY_RUN, CONTROLS[slug], "checkpoint.every=2", f"steps={steps}"])

    Trainer(config(4), tmp_path / "straight").run()
    Trainer(config(4), tmp_path / "cut", stop=iter([False, True]).__next__).run()
    Trainer(config(4), tmp_path / "cut", resume=True).run()
    straight, cut = (weights_and_metrics(tmp_path / name) for name in ("straight", "cut"))
    assert [{k: str(v) for k, v in row.items()} for row in cut[1]] == [
        {k: str(v) for k, v in row.items()} for row in straight[1]
    ]
    assert cut[0] == straight[0]
    assert {name for name in straight[1][-1] if name.startswith(f"{slug}.")}
