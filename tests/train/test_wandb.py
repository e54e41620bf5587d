"""Weights & Biases: what is asked of its API, and, where it is installed, a real offline run."""

from __future__ import annotations

import inspect
import json
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from builders import TINY_RUN

from rlvr_lab.errors import UserError
from rlvr_lab.train import logs
from rlvr_lab.train.config import LoggingSection, load_config
from rlvr_lab.train.logs import RunLog
from rlvr_lab.train.loop import Trainer

OFFLINE = LoggingSection(tensorboard=False, wandb="offline", wandb_project="lab", wandb_group="seeds")
INIT_ARGUMENTS = {"mode", "dir", "project", "name", "group", "id", "resume", "reinit", "config", "settings"}
USED_SETTINGS = {"silent", "console", "init_timeout"}


class FakeRun:
    """Keeps what it was told. With `stuck` it never finishes."""

    def __init__(self, asked: dict[str, Any], stuck: bool) -> None:
        self.asked, self.stuck = asked, stuck
        self.id, self.dir = asked["id"], "files"
        self.rows: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        if self.stuck:
            threading.Event().wait(30)
        self.exit_code = exit_code


class UsageError(Exception):
    """As W&B's."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the module; `error` is raised at the start, `stuck` makes runs that do not finish."""
    module = types.SimpleNamespace(runs=[], error=None, stuck=False)

    def init(**asked: Any) -> FakeRun:
        assert set(asked) == INIT_ARGUMENTS
        if module.error:
            raise module.error
        module.runs.append(FakeRun(asked, module.stuck))
        return module.runs[-1]

    def settings(**values: Any) -> dict[str, Any]:
        assert set(values) == USED_SETTINGS
        return values

    module.init, module.Settings = init, settings
    module.Html = lambda text, inject: ("html", len(text), inject)
    module.errors = types.SimpleNamespace(UsageError=UsageError)
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    return module


def test_what_a_run_sends(fake: types.SimpleNamespace, tmp_path: Path) -> None:
    log = RunLog(tmp_path / ".", OFFLINE, 0, run_settings={"optimizer": {"lr": 1e-4}})
    log.metrics(0, {"reward": 0.5, "mismatch": float("nan")})
    log.evaluation(1, {"pass@1": 0.25, "held_out": True})
    log.samples(1, [{"response": "a"}])
    log.close()
    (run,) = fake.runs
    assert run.asked["config"] == {"optimizer": {"lr": 1e-4}}
    assert (run.asked["project"], run.asked["name"], run.asked["group"]) == ("lab", tmp_path.name, "seeds")
    assert (run.asked["mode"], run.asked["resume"]) == ("offline", "allow")
    assert run.axes == {"train/*": "step", "evaluation/*": "step"}
    assert run.rows[0] == {"step": 0, "train/reward": 0.5}
    assert run.rows[1] == {"step": 1, "evaluation/pass@1": 0.25}
    assert run.rows[2]["transcripts"][0] == "html"
    assert run.exit_code == 0


def test_a_resumed_run_goes_on_under_its_id_and_another_project_begins_anew(
    fake: types.SimpleNamespace, tmp_path: Path
) -> None:
    for settings in (OFFLINE, OFFLINE, OFFLINE.model_copy(update={"wandb_project": "other"})):
        RunLog(tmp_path, settings, 0).close()
    first, second, other = (run.id for run in fake.runs)
    assert first == second != other
    (tmp_path / "wandb.json").write_text("{broken")
    RunLog(tmp_path, OFFLINE, 0).close()
    assert fake.runs[-1].id not in {first, other}


def test_a_run_that_breaks_off_is_marked_as_failed(fake: types.SimpleNamespace, tmp_path: Path) -> None:
    log = RunLog(tmp_path, OFFLINE, 0)

    def broken() -> None:
        try:
            raise RuntimeError
        finally:
            log.close()

    with pytest.raises(RuntimeError):
        broken()
    assert fake.runs[0].exit_code == 1


def test_a_missing_login_is_said_before_training_and_an_absent_server_stops_nothing(
    fake: types.SimpleNamespace, tmp_path: Path
) -> None:
    online = OFFLINE.model_copy(update={"wandb": "online"})
    fake.error = UsageError("No API key configured. Use `wandb login` to log in.\nmore")
    with pytest.raises(UserError, match=r"No API key configured.*logging.wandb=offline"):
        RunLog(tmp_path, online, 0)
    fake.error = ConnectionError("Timed out while retrying")
    warnings: list[str] = []
    log = RunLog(tmp_path, online, 0, warn=warnings.append)
    log.metrics(0, {"reward": 0.5})
    log.close()
    assert len(warnings) == 1
    assert "W&B is switched off: Timed out while retrying" in warnings[0]
    assert len(logs.read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_sending_the_rest_does_not_hold_up_the_end_for_ever(
    fake: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FINISH_S", 0.05)
    fake.stuck = True
    warnings: list[str] = []
    RunLog(tmp_path, OFFLINE, 0, warn=warnings.append).close()
    assert len(warnings) == 1
    assert "wandb sync" in warnings[0]


# -- the real library --------------------------------------------------------------------------------------------------


def test_the_library_takes_what_is_asked_of_it() -> None:
    wandb = pytest.importorskip("wandb")
    assert set(inspect.signature(wandb.init).parameters) >= INIT_ARGUMENTS
    wandb.Settings(silent=True, console="off", init_timeout=1.0)
    assert issubclass(wandb.errors.UsageError, Exception)
    assert "exit_code" in inspect.signature(wandb.Run.finish).parameters


@pytest.mark.slow
def test_a_real_run_offline_with_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    settings = [*TINY_RUN, "logging.wandb=offline", "logging.wandb_project=lab", "logging.wandb_group=g"]
    for steps, resume in ((2, False), (4, True)):
        Trainer(load_config("grpo/tiny", [*settings, f"steps={steps}"]), out, resume=resume).run()
    kept = json.loads((out / "wandb.json").read_text())
    files = sorted((out / "wandb").glob(f"offline-run-*-{kept['id']}/run-{kept['id']}.wandb"))
    assert len(files) == 2, "both parts continue one run"
    steps, names = [], set[str]()
    for file in files:
        for row in _history(file):
            steps += [row["step"]] if "train/reward" in row else []
            names |= set(row)
    assert steps == [0, 1, 2, 3]
    assert {"train/token_entropy", "train/seconds", "transcripts"} <= names


def _history(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
    return rows


def _records(data: bytes) -> list[bytes]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB with pieces (checksum, length, kind, bytes)."""
    records, parts, at = [], b"", 7  # seven bytes name the format
    while at + 7 <= len(data):
        if (room := -at % 32768) < 7 and room:
            at += room  # the end of a block that holds no further header
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            at += room or 32768
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(parts)
            parts = b""
    return records
