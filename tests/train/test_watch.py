"""Watching a run of another process: a growing log, half a line, a log that begins anew, folders that are no runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from run_folders import metrics_row, run_folder, write_lines

from rlvr_lab.errors import UserError
from rlvr_lab.train.logs import drop_from
from rlvr_lab.train.watch import Tail, Watcher, follow


def append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def test_a_growing_file_is_read_once_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.look() == ([], False)
    append(path, '{"step": 0}\n{"step": 1, "rew')
    assert tail.look() == ([{"step": 0}], False)
    assert tail.look() == ([], False)
    append(path, 'ard": 0.5}\n')
    assert tail.look() == ([{"step": 1, "reward": 0.5}], False)


def test_damage_is_counted_and_a_shorter_or_replaced_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": i} for i in range(4)])
    append(path, "broken\n[1]\n")
    tail = Tail(path)
    assert [row["step"] for row in tail.look()[0]] == [0, 1, 2, 3]
    assert tail.bad == 2
    drop_from(path, 2)  # what a resumed run does
    rows, anew = tail.look()
    assert ([row["step"] for row in rows], anew, tail.bad) == ([0, 1], True, 0)
    path.write_text('{"step": 0}\n')
    assert tail.look() == ([{"step": 0}], True)


def test_the_watcher_follows_a_run_to_its_end(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=3, planned=5)
    stamp = (run / "metrics.jsonl").stat().st_mtime
    watcher = Watcher(run, clock=lambda: stamp + 90)
    assert len(watcher.refresh()) == 3
    text = "\n".join(watcher.text(60))
    assert "step 3/5" in text
    assert "last step 1:30 ago (longer than usual" in text
    assert "no verdict" in text
    append(run / "metrics.jsonl", json.dumps(metrics_row(3)) + "\n" + json.dumps(metrics_row(4))[:20])
    assert len(watcher.refresh()) == 1
    assert not watcher.finished
    append(run / "metrics.jsonl", json.dumps(metrics_row(4))[20:] + "\n")
    (run / "summary.json").write_text("{}")
    watcher.refresh()
    assert watcher.finished
    assert max(map(len, watcher.text(40))) <= 40
    assert "the run is finished" in watcher.text(80)


def test_the_doctor_speaks_beside_the_view(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=30, planned=30)
    rows = [metrics_row(step, mismatch=1.2, mismatch_mean=0.0, reward=0.2, accuracy=0.2) for step in range(30)]
    write_lines(run / "metrics.jsonl", rows)
    watcher = Watcher(run)
    watcher.refresh()
    told = " ".join(" ".join(watcher.told).split())
    assert "- critical: Sampler and trainer disagree" in told
    assert "; try methods.truncated_importance_sampling" in told


def test_a_run_that_resumes_is_followed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=6, planned=6)
    watcher = Watcher(run)
    watcher.refresh()
    drop_from(run / "metrics.jsonl", 4)
    (run / "config.yaml").write_text("steps: 9\n")
    watcher.refresh()
    assert (watcher.state.done, watcher.state.total, len(watcher.state.rows)) == (4, 9, 4)


def test_what_is_no_run_is_refused_and_an_empty_run_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run to watch"):
        Watcher(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: [")
    watcher = Watcher(tmp_path)
    watcher.refresh()
    assert "no step is logged yet" in watcher.text(80)


def test_without_a_terminal_there_is_a_line_per_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", steps=2, planned=3)

    def finish(seconds: float) -> None:
        append(run / "metrics.jsonl", json.dumps(metrics_row(2)) + "\n")
        (run / "summary.json").write_text("{}")

    follow(Watcher(run), RichConsole(file=io.StringIO(), force_terminal=False), 0.1, finish)
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out[:3]] == ["step 1/3", "step 2/3", "step 3/3"]


def test_on_a_terminal_the_view_is_redrawn_until_the_end(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=7, planned=8)

    def finish(seconds: float) -> None:
        append(run / "metrics.jsonl", json.dumps(metrics_row(7)) + "\n")
        (run / "summary.json").write_text("{}")

    console = RichConsole(file=io.StringIO(), force_terminal=True, width=70, height=50)
    follow(Watcher(run), console, 0.1, finish)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("step 7/8", "step 8/8", "token entropy", "doctor:", "the run is finished"):
        assert part in text, part


@pytest.mark.slow
def test_the_command_watches_a_file_that_another_process_writes(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", steps=0, planned=4)
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "rlvr_lab.cli", "watch", str(run), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for step in range(4):
                append(run / "metrics.jsonl", json.dumps(metrics_row(step)) + "\n")
                time.sleep(0.2)
            (run / "summary.json").write_text("{}")
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    assert [line.split("  ")[0] for line in out.splitlines()[:4]] == [f"step {n}/4" for n in range(1, 5)]
