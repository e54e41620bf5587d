from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlvr_lab.train.console import Lines
from rlvr_lab.train.logs import RunLog, append_jsonl, drop_from, read_jsonl
from rlvr_lab.train.seeds import derive_seed, numpy_generator, torch_generator


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": "é", "f": 3}])
    assert "NaN" not in path.read_text()
    assert read_jsonl(path) == [{"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "é", "f": 3}]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"step": i} for i in range(3)])
    path.write_text(path.read_text() + '{"step": 3, "rew')
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2]
    drop_from(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    append_jsonl(path, [{"step": 2}])
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []
    drop_from(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_text_with_unusual_line_ends_stays_one_row(tmp_path: Path) -> None:
    """U+2028 and U+0085 are line ends to str.splitlines, not to JSON lines."""
    path = tmp_path / "samples.jsonl"
    rows = [{"step": 0, "response": "a\u2028b\x85c\u2029d"}, {"step": 1, "response": "e"}]
    append_jsonl(path, rows)
    assert read_jsonl(path) == rows
    drop_from(path, 1)
    assert read_jsonl(path) == rows[:1]


def test_a_resumed_log_drops_the_steps_it_will_repeat_and_keeps_the_evaluation_it_starts_from(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False, first_step=0)
    for step in range(4):
        log.metrics(step, {"reward": step / 10})
        log.samples(step, [{"text": "a"}, {"text": "b"}])
    for step in (0, 2, 4):
        log.evaluation(step, {"pass@1": 0.5})
    log.close()
    RunLog(tmp_path, tensorboard=False, first_step=2).close()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 1, 1]
    assert [r["step"] for r in read_jsonl(tmp_path / "evaluations.jsonl")] == [0, 2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == {"step": 1, "reward": 0.1}


def test_plain_lines_come_every_tenth_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    console = Lines()
    console.begin("training", 20, 4)
    for _ in range(16):
        console.advance(1, {"reward": 0.25, "token_entropy": 0.5, "clip_low": 0.01, "clip_high": 0.02, "ratio": 9.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0] == "training 6/20  reward 0.250  entropy 0.500 nats  clipped 3.00%"
    assert lines[-1].startswith("training 20/20")


def test_undefined_figures_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = Lines()
    console.begin("training", 1)
    console.advance(1, {"reward": math.nan})
    assert capsys.readouterr().out == "training 1/1\n"


def test_seeds_differ_by_run_purpose_and_step_and_nothing_else() -> None:
    seeds = {derive_seed(s, p, i) for s in (0, 1, 2**63) for p in ("rollout", "minibatches") for i in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "rollout", 5) == derive_seed(3, "rollout", 5)
    cpu = torch.device("cpu")
    a, b = (torch.rand(3, generator=torch_generator(1, "x", 2, cpu)) for _ in range(2))
    assert torch.equal(a, b)
    assert numpy_generator(1, "x", 2).random() == numpy_generator(1, "x", 2).random()
    assert numpy_generator(1, "x", 2).random() != numpy_generator(1, "x", 3).random()


def test_a_negative_seed_is_a_seed() -> None:
    assert derive_seed(-1, "rollout", 0) != derive_seed(1, "rollout", 0)
