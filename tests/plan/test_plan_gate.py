"""A run that will not fit is refused before anything is loaded, and the command that plans it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.plan import gate
from rlvr_lab.plan.devices import GIB, device
from rlvr_lab.plan.gate import main_memory, processor, refuse_what_does_not_fit
from rlvr_lab.train.config import load_config


def lab(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, list(arguments))


@pytest.fixture
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_device", lambda config, ranks: device("T4"))


LARGE = ("update.micro_batch_rows=16", "model.path=Qwen/Qwen2.5-0.5B")


@pytest.mark.usefixtures("on_a_t4")
def test_what_does_not_fit_is_refused_with_the_settings_to_change() -> None:
    config = load_config("grpo/math", LARGE)
    with pytest.raises(UserError) as refusal:
        refuse_what_does_not_fit(config)
    message = str(refusal.value)
    assert "does not fit" in message
    assert "T4 has 14.2 GiB to give" in message
    assert "Change: update.micro_batch_rows=" in message
    assert "--force" in message
    assert "\n" not in message
    changes = message.partition("Change: ")[2].partition(";")[0].split()
    found = refuse_what_does_not_fit(load_config("grpo/math", [*LARGE, *changes]))
    assert found is not None
    assert found.fits


@pytest.mark.usefixtures("on_a_t4")
def test_force_announces_and_goes_on() -> None:
    said: list[str] = []
    found = refuse_what_does_not_fit(load_config("grpo/math", LARGE), force=True, say=said.append)
    assert found is not None
    assert not found.fits
    assert len(said) == 1
    assert said[0].startswith("--force: this run does not fit")


@pytest.mark.usefixtures("on_a_t4")
def test_train_refuses_before_it_loads_or_writes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused = lab("train", "grpo/math", *LARGE, "--out", str(out))
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: this run does not fit")
    assert not out.exists()


@pytest.mark.usefixtures("on_a_t4")
def test_train_goes_on_with_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(config: object, out: Path, resume: bool) -> None:
        raise UserError(f"started in {out}")

    monkeypatch.setattr(sys.modules["rlvr_lab.cli.train"], "_train", started)
    forced = lab("train", "grpo/math", *LARGE, "--force", "--out", str(tmp_path / "run"))
    lines = forced.stderr.splitlines()
    assert lines[0].startswith("--force: this run does not fit")
    assert lines[1] == f"error: started in {tmp_path / 'run'}"


def test_on_the_processor_small_models_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "main_memory", lambda: 1)
    assert refuse_what_does_not_fit(load_config("grpo/tiny")) is None
    assert (
        refuse_what_does_not_fit(load_config("grpo/math", ["model.path=Qwen/Qwen2.5-0.5B", "model.device=cpu"])) is None
    )


def test_on_the_processor_large_models_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "main_memory", lambda: 16 * GIB)
    config = load_config("grpo/math", ["model.path=Qwen/Qwen2.5-7B", "model.device=cpu"])
    with pytest.raises(UserError, match=r"main memory has 15\.2 GiB to give"):
        refuse_what_does_not_fit(config)
    # two processes on one machine have half of it each
    monkeypatch.setattr(gate, "main_memory", lambda: 40 * GIB)
    small = load_config("grpo/math", ["model.path=Qwen/Qwen2.5-1.5B", "model.device=cpu", "model.dtype=bfloat16"])
    assert refuse_what_does_not_fit(small) is not None
    with pytest.raises(UserError):
        refuse_what_does_not_fit(small, 4)


def test_a_family_that_is_not_counted_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    said: list[str] = []
    config = load_config("grpo/math", [f"model.path={tmp_path}", "model.device=cpu"])
    assert refuse_what_does_not_fit(config, say=said.append) is None
    assert said == [f"memory is not checked: {_reason(str(tmp_path))}"]


def _reason(path: str) -> str:
    return f"no plan for model type 'gpt2' of '{path}': the planner counts llama, mistral, qwen2, qwen3"


def test_a_model_that_is_not_there_is_left_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said: list[str] = []
    config = load_config("grpo/math", ["model.path=/no/such/model", "model.device=cpu"])
    assert refuse_what_does_not_fit(config, say=said.append) is None
    assert said == []


def test_main_memory_is_that_of_this_machine() -> None:
    assert GIB // 4 < main_memory() < 2**50
    assert processor(GIB).kind == "cpu"


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_parts_formulas_and_verdict() -> None:
    result = lab("plan", "grpo/math", "--gpu", "H100", "--price", "3")
    assert result.exit_code == 0, result.output
    for words in ("weights", "494,032,768 x 4 B", "fits: about", "estimate", "forward and backward", "assumed:",
                  "at 3 per GPU and hour"):  # fmt: skip
        assert words in result.output


def test_the_command_says_what_to_change_and_exits_with_1() -> None:
    result = lab("plan", "grpo/math", *LARGE, "--gpu", "T4")
    assert result.exit_code == 1
    assert "does not fit" in result.output
    assert "update.micro_batch_rows=" in result.output
    assert "unchanged, it fits on 1 x" in result.output


def test_the_command_speaks_json() -> None:
    result = lab("plan", "grpo/tiny", "--gpu", "L4", "--json")
    assert result.exit_code == 0
    tree: dict[str, Any] = json.loads(result.stdout)
    assert tree["parameters"] == 422_976
    assert tree["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grpo/maths"], "no recipe 'grpo/maths'; did you mean 'grpo/math'"),
        (["grpo/math", "fast"], "'fast' is not a setting (KEY=VALUE)"),
        (["grpo/math", "--gpu", "B9000"], "--gpu 'B9000' is not in the planner's table"),
        (["grpo/math", "rollout.group_sise=4"], "did you mean 'rollout.group_size'"),
        (["grpo/math", "--model", "tiny/X"], "no shipped policy 'tiny/X'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    result = lab("plan", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
