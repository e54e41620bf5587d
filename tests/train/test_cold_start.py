"""A cold start from the shipped base I: sorting, keeping, resuming, and what is said where nothing can be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train import cold_start as module
from rlvr_lab.train.cold_start import ColdStart, cold_start, kept_rows, rates_of
from rlvr_lab.train.config import TrainConfig, load_config
from rlvr_lab.train.data import load_problems
from rlvr_lab.train.sft import SFTSettings

SETTINGS, SFT = ColdStart(samples=4), SFTSettings(epochs=2, batch=8, lr=1e-4)


def config(*changes: str) -> TrainConfig:
    return load_config("light_if/tiny", ["data.pool=40", "data.settings.sizes=[1,2]", *changes])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 16)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cold") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROMPTS_AT_ONCE", 16)
        cold_start(config(), out, SETTINGS, SFT)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_stage_leaves_its_file(straight: Path) -> None:
    assert sorted(p.name for p in straight.iterdir()) == [
        "cold_start.json", "difficulty.json", "model", "responses.jsonl", "summary.json"]  # fmt: skip
    summary, sorted_ = read(straight / "summary.json"), read(straight / "difficulty.json")
    rows = [json.loads(line) for line in (straight / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 40 * 4
    assert sorted_["rates"] == rates_of(rows, 40, 4)
    assert sum(summary["prompts"].values()) == 40
    assert summary["prompts"]["pass"] == sorted_["kinds"].count("pass") > 0
    assert summary["kept"] == len(kept_rows(rows, sorted_["rates"], SETTINGS))
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2]
    assert summary["epochs"][-1]["nll"] != summary["before"]["nll"]
    assert load_policy(str(straight / "model"), device="cpu").eos_ids == (2,)


def test_the_split_is_read_by_the_method_on_the_same_pool_only(straight: Path) -> None:
    method = build("light_if", {"split": str(straight / "difficulty.json"), "prompts": 4, "stage_steps": 0})
    policy = load_policy("tiny/I", device="cpu")
    rates = read(straight / "difficulty.json")["rates"]
    chosen = method.select(load_problems(config(), policy, print), 0)
    assert len(chosen) == 4
    assert all(rates[i] < 0.5 for i in chosen)
    other = build("light_if", {"split": str(straight / "difficulty.json")})
    with pytest.raises(UserError, match="made for other prompts"):
        other.select(load_problems(config("seed=1"), policy, print), 0)


@pytest.mark.parametrize("where", ["sampling", "fine-tuning"])
def test_an_interrupted_cold_start_goes_on(
    straight: Path, tmp_path: Path, where: str, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    grade, tune, calls = module.grade, module.fine_tune, []

    def stops(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if where == "fine-tuning" or len(calls) == 3:
            raise KeyboardInterrupt
        return grade(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, "grade" if where == "sampling" else "fine_tune", stops)
        with pytest.raises(KeyboardInterrupt):
            cold_start(config(), out, SETTINGS, SFT)
    assert not (out / "summary.json").exists()
    with (out / "responses.jsonl").open("a") as stream:
        stream.write('{"problem": 32, "ids": [')  # killed while it wrote
    again: list[int] = []
    monkeypatch.setattr(module, "grade", lambda *a, **n: (again.append(1), grade(*a, **n))[1])
    assert module.fine_tune is tune
    cold_start(config(), out, SETTINGS, SFT)
    assert len(again) == (1 if where == "sampling" else 0)
    assert (out / "responses.jsonl").read_text() == (straight / "responses.jsonl").read_text()
    assert (out / "model" / "model.safetensors").read_bytes() == (straight / "model" / "model.safetensors").read_bytes()


def test_only_different_right_responses_to_pass_prompts_are_kept() -> None:
    rows = [
        {"problem": 0, "ids": [1, 2, 3], "correct": True},
        {"problem": 0, "ids": [1, 2, 3], "correct": True},
        {"problem": 0, "ids": [4], "correct": True},
        {"problem": 0, "ids": [1, 2, 4], "correct": False},
        {"problem": 0, "ids": [1, 2, 5], "correct": True},
        {"problem": 0, "ids": [1, 2, 6], "correct": True},
        {"problem": 1, "ids": [1, 2, 3], "correct": True},
    ]
    kept = kept_rows(rows, [0.5, 1.0], ColdStart(samples=6, per_prompt=2, least_tokens=2))
    assert [row["ids"] for row in kept] == [[1, 2, 3], [1, 2, 5]]


def test_other_settings_and_other_folders_are_refused(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a finished cold start"):
        cold_start(config(), straight, SETTINGS, SFT)
    (tmp_path / "cold_start.json").write_text((straight / "cold_start.json").read_text())
    with pytest.raises(UserError, match=r"other settings \(sft\)"):
        cold_start(config(), tmp_path, SETTINGS, SFTSettings())
    with pytest.raises(UserError, match=r"other settings \(run\)"):
        cold_start(config("seed=3"), tmp_path, SETTINGS, SFT)
    (tmp_path / "cold_start.json").unlink()
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no cold start"):
        cold_start(config(), tmp_path, SETTINGS, SFT)


def test_what_cannot_be_kept_says_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompt is solved only sometimes .*easier data or raise --samples"):
        cold_start(config("data.pool=3", "data.settings.sizes=[4]", "rollout.max_tokens=2"), tmp_path / "a", SETTINGS,
                   SFT)  # fmt: skip
    with pytest.raises(UserError, match="lower --least-tokens"):
        cold_start(config(), tmp_path / "b", ColdStart(samples=4, least_tokens=40), SFT)
    for change in ({"samples": 1}, {"per_prompt": 0}, {"least_tokens": -1}):
        with pytest.raises(UserError, match=f"--{next(iter(change)).replace('_', '-')} must be at least"):
            ColdStart(**change)


def test_the_command_says_what_it_made_and_refuses_in_one_line(tmp_path: Path) -> None:
    words = ["cold-start", "light_if/tiny", "data.pool=24", "data.settings.sizes=[1,2]", "logging.view=quiet",
             "--samples", "4", "--epochs", "1", "--lr", "1e-4", "--objective", "plain"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "warm")])
    assert done.exit_code == 0, done.output
    assert "responses kept; held-out nll" in done.output
    assert read(tmp_path / "warm" / "summary.json")["settings"]["objective"] == "plain"
    for extra, message in ((["--out", str(tmp_path / "x"), "--objective", "rnadom"], "did you mean 'random'"),
                           ([], "--out is missing")):  # fmt: skip
        refused = CliRunner().invoke(app, [*words, *extra])
        assert refused.exit_code == 2
        assert message in refused.output
        assert len(refused.output.strip().splitlines()) == 1
