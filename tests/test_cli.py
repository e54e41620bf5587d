"""The command line: quick to import, examples everywhere, one clear line for what the user can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from builders import TINY_RUN
from typer.testing import CliRunner, Result

from rlvr_lab.cli import app
from rlvr_lab.methods import ELSEWHERE, REGISTRY
from rlvr_lab.policy import pretrain
from rlvr_lab.train import loop
from rlvr_lab.train.checkpoint import DiskError
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.update import TrainingStopped

HEAVY = ("torch", "transformers", "pydantic", "numpy", "yaml", "safetensors", "math_verify")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def lab(*arguments: object, width: int = 160) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(app, [str(a) for a in arguments])


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import rlvr_lab.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_served_without_anything_heavy_either() -> None:
    own = tuple(name for name in HEAVY if name != "pydantic")  # typer itself imports pydantic to describe arguments
    code = (
        "import sys, rlvr_lab.cli as c\n"
        "try: c.app(['train', '--help'])\n"
        f"except SystemExit: print([m for m in {own} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip().endswith("[]")


def test_help_names_every_command() -> None:
    result = lab("--help")
    assert result.exit_code == 0
    assert (
        sorted(
            [
                "arena",
                "train",
                "plan",
                "export",
                "evaluate",
                "pretrain",
                "cold-start",
                "methods",
                "doctor",
                "select",
                "watch",
                "report",
                "serve",
            ]
        )
        == COMMANDS
    )
    for name in COMMANDS:
        assert name in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_that_exist(command: str) -> None:
    result = lab(command, "--help")
    assert result.exit_code == 0
    examples = [line.strip(" │") for line in result.output.splitlines() if f"rlvr-lab {command}" in line]
    assert len(examples) >= 2
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    options = {option for parameter in known.params for option in parameter.opts} | {"--help"}
    for example in examples:
        used = {word for word in example.split() if word.startswith("-")}
        assert used <= options, example


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--out is missing: name a folder for the run"),
        (["train", "grpo/tinny", "--out", "RUN"], "no recipe 'grpo/tinny'; did you mean 'grpo/tiny'"),
        (["train", "grpo/tiny", "optimiser.lr=1", "--out", "RUN"], "did you mean 'optimizer'"),
        (["train", "grpo/tiny", "lr=1e-3", "--out", "RUN"], "did you mean 'optimizer.lr'"),
        (["train", "grpo/tiny", "rollout.group_sise=4", "--out", "RUN"], "did you mean 'rollout.group_size'"),
        (["train", "grpo/tiny", "quickly", "--out", "RUN"], "'quickly' is neither a setting"),
        (["train", "steps=3", "grpo/tiny", "--out", "RUN"], "'grpo/tiny' is neither a setting"),
        (["train", "grpo/tiny", "rollout.group_size=1", "--out", "RUN"], "a group of one has no baseline"),
        (["train", "--resume", "--out", "RUN"], "holds no run to resume"),
        (["train", "--out", "RUN", "--model", "/no/model"], "model directory '/no/model' does not exist"),
        (["train", "--out", "RUN", "--model", "tiny/X"], "no shipped policy 'tiny/X'"),
        (["train", "--out", "RUN", "--data", "/no.jsonl", "--model", "tiny/S"], "/no.jsonl: cannot be read"),
        (["train", "--out", "FILE/run"], "cannot write to"),
        (["train", "--out", "FILE"], "already exists"),
        (["evaluate", "--model", "/no/model"], "model directory '/no/model' does not exist"),
        (["evaluate", "--model", "tiny/S", "--out", "FILE"], "already exists; choose another --out"),
        (["evaluate", "--model", "tiny/S", "--data", "/no.jsonl"], "/no.jsonl: cannot be read"),
        (["evaluate", "--model", "tiny/S", "--max-tokens", "200"], "no problem fits"),
        (["evaluate", "--model", "tiny/S", "--device", "gpu"], "'gpu' is not a device"),
        (
            ["evaluate", "--model", "tiny/A"],
            "not those of task 'countdown': take tiny/S; the policy has the words of triples",
        ),
        (["evaluate", "--model", "tiny/S", "--task", "maze"], "not those of task 'maze': take tiny/A; the policy has"),
        (["evaluate", "--model", "tiny/S", "--task", "maths"], "unknown task 'maths': did you mean 'math'"),
        (["evaluate", "--model", "tiny/S", "--task", "math"], "--task math has no problems of its own"),
        (["evaluate", "--model", "tiny/S", "--task", "maze", "--data", "x.jsonl"], "--task has problems of its own"),
        (["evaluate", "--model", "tiny/S", "--problems", "2", "--samples", "1", "--out", "NO/x.jsonl"], "NO/x.jsonl"),
        (["pretrain", "--base", "Q", "--out", "RUN"], "no base 'Q'; there are S, R"),
        (["pretrain"], "--out is missing"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("x")
    names = {"RUN": str(tmp_path / "run"), "FILE": str(tmp_path / "file"), "NO": str(tmp_path / "no")}

    def fill(text: str) -> str:
        for name, path in names.items():
            text = path + text[len(name) :] if text == name or text.startswith(f"{name}/") else text
        return text

    result = lab(*map(fill, arguments))
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert fill(message) in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--model", "tiny/S", "--max-tokens", "0"],
        ["evaluate", "--model", "tiny/S", "--rows", "-3"],
        ["evaluate", "--model", "tiny/S", "--samples", "0"],
        ["evaluate", "--model", "tiny/S", "--problems", "0"],
        ["evaluate", "--model", "tiny/S", "--temperature", "-1"],
        ["evaluate", "--model", "tiny/S", "--samples", "many"],
        ["pretrain", "--steps", "0", "--out", "nowhere"],
        ["evaluate"],
        ["evaluate", "--mode", "tiny/S"],
        ["trian"],
    ],
)
def test_an_argument_out_of_range_is_named_before_anything_is_loaded(arguments: list[str]) -> None:
    result = lab(*arguments)
    assert result.exit_code == 2
    named = next((word for word in arguments if word.startswith("--") and word != "--model"), None)
    assert (named or {"evaluate": "--model", "trian": "trian"}.get(arguments[0], "")) in result.stderr
    assert "Traceback" not in result.output


def test_a_mistake_is_the_same_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlvr_lab.cli", "train", "grpo/tinny", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no recipe 'grpo/tinny'; did you mean 'grpo/tiny'?\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainingStopped("step 3: loss is nan"), 3, "stopped: step 3: loss is nan"),
        (DiskError("cannot write checkpoint x"), 2, "error: cannot write checkpoint x"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_how_a_run_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def run(self: object) -> None:
        raise error

    monkeypatch.setattr(loop.Trainer, "run", run)
    result = lab("train", "grpo/tiny", *TINY_RUN, "--out", tmp_path / "run")
    assert result.exit_code == code
    assert result.stderr.strip().splitlines() == [line]


def test_a_pre_training_that_diverges_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "_batches", lambda config, first: iter([[]]))  # a shipped shard takes seconds to make
    monkeypatch.setattr(pretrain, "_step", lambda *arguments: float("nan"))
    result = lab("pretrain", "--steps", 1, "--out", tmp_path / "base")
    assert result.exit_code == 3
    assert result.stderr.strip().splitlines() == [
        "stopped: pre-training loss is nan at step 0; lower muon_lr or adamw_lr"
    ]


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop.Trainer, "run", run)
    result = lab("train", "grpo/tiny", *TINY_RUN, "--out", tmp_path / "run")
    assert isinstance(result.exception, RuntimeError)


def test_train_then_evaluate_then_resume(tmp_path: Path) -> None:
    out, results = tmp_path / "run", tmp_path / "results.jsonl"
    settings = [*TINY_RUN, "evaluation.problems=2", "evaluation.samples=2"]
    done = lab("train", "grpo/tiny", *settings, "steps=1", "--out", out)
    assert done.exit_code == 0, done.output
    for expected in ("held-out problems", "pass@1", "before", "after", "distinct_correct", str(out / "model")):
        assert expected in done.output.replace("\n", "")
    again = lab("train", "grpo/tiny", *settings, "steps=1", "--out", out)
    assert again.exit_code == 2
    assert "use --resume" in again.stderr
    more = lab("train", "--resume", "--out", out, "steps=2")
    assert more.exit_code == 0, more.output
    assert "resuming after step 1" in more.output
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [0, 1]
    measured = lab("evaluate", "-m", out / "model", "--problems", 3, "--samples", 2, "--max-tokens", 16, "-o", results)
    assert measured.exit_code == 0, measured.output
    assert "95 % interval" in measured.output
    assert [row["samples"] for row in read_jsonl(results)] == [2, 2, 2]


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 1\nmodel: {path: tiny/S, device: cpu}\n")
    done = lab("train", recipe, *TINY_RUN, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_methods_as_table_and_as_json() -> None:
    rows = json.loads(lab("methods", "--json").output)
    assert [row["slug"] for row in rows] == list(REGISTRY)
    assert rows[0]["hooks"] == "advantage*, clip*, surrogate*"
    assert {"paper", "released", "tiny"} <= set(rows[0]["presets"].split(", "))
    table = lab("methods", width=300).output
    assert all(slug in table for slug in REGISTRY)
    assert "not shown" not in table
    narrow = lab("methods", width=80).output
    assert all(slug in narrow for slug in REGISTRY)
    assert "2510.10150" in narrow  # whole, not folded into two characters a line
    assert "not shown in this width: title, hooks, presets, chapter, recipe, step time" in narrow


def test_all_methods_include_the_works_of_other_fields() -> None:
    rows = json.loads(lab("methods", "--all", "--json").output)
    groups = {row["slug"]: row["group"] for row in rows}
    assert groups == dict.fromkeys(REGISTRY, "RLVR") | dict.fromkeys(ELSEWHERE, "elsewhere")
    assert len(ELSEWHERE) == 21
    narrow = lab("methods", "--all", width=80).output
    assert all(slug in narrow for slug in ELSEWHERE)
    assert "elsewhere" in narrow
    one = lab("methods", "granet").output
    assert "2106.10404" in one
    assert "group    elsewhere" in one
    unknown = lab("methods", "granett")
    assert unknown.exit_code != 0
    assert "granet" in unknown.output


def test_one_method_with_its_settings() -> None:
    shown = json.loads(lab("methods", "kl_cov", "--json").output)
    assert shown["settings"]["beta"] == {"paper": 1.0, "released": 1.0, "verl": 0.1, "tiny": 1.0}
    assert "methods.kl_cov.ratio" in lab("methods", "kl_cov").output
    assert "policy_cliff" in lab("methods", "policy_cliff").output  # an analysis has no settings
    failed = lab("methods", "klcov")
    assert failed.exit_code != 0
    assert "did you mean 'kl_cov'" in failed.output


def test_settings_are_listed_with_defaults_and_recipes() -> None:
    output = lab("train", "--settings").output
    for expected in ("optimizer.lr", "rollout.group_size", "methods.grpo.*", "grpo/tiny", "grpo/math"):
        assert expected in output
