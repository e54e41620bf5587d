from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.train import logs
from rlvr_lab.train.config import LoggingSection, load_config
from rlvr_lab.train.console import Lines
from rlvr_lab.train.logs import RunLog, append_jsonl, check_installed, drop_from, read_jsonl
from rlvr_lab.train.samples import token_texts
from rlvr_lab.train.seeds import derive_seed, numpy_generator, torch_generator

QUIET = LoggingSection(tensorboard=False)


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
    log = RunLog(tmp_path, QUIET, 0)
    for step in range(4):
        log.metrics(step, {"reward": step / 10})
        log.samples(step, [{"text": "a"}, {"text": "b"}])
    for step in (0, 2, 4):
        log.evaluation(step, {"pass@1": 0.5})
    log.close()
    RunLog(tmp_path, QUIET, 2).close()
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


# -- other loggers -----------------------------------------------------------------------------------------------------


class Broken:
    """A logger whose disk is full or whose server is away."""

    def __init__(self, out: Path, first_step: int) -> None:
        self.calls = 0

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    def page(self, step: int, path: Path) -> None:
        raise AssertionError("a sink that failed is not asked again")

    close = None  # nor closed


def test_a_logger_that_fails_is_told_once_and_the_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Broken] = []

    def broken(*arguments: Any) -> Broken:
        made.append(Broken(*arguments))
        return made[0]

    monkeypatch.setattr(logs, "TensorBoard", broken)
    warnings: list[str] = []
    log = RunLog(tmp_path, LoggingSection(tensorboard=True), 0, warn=warnings.append)
    for step in range(3):
        log.metrics(step, {"reward": 0.5})
        log.samples(step, [{"response": "a"}])
    log.close()
    assert len(warnings) == 1
    assert "TensorBoard is switched off" in warnings[0]
    assert "No space left" in warnings[0]
    assert made[0].calls == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_logger_that_does_not_start_is_told_and_the_record_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*arguments: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(logs, "TensorBoard", away)
    log = RunLog(tmp_path, LoggingSection(), 0)
    log.metrics(0, {"reward": 0.5})
    log.close()
    assert "warning: TensorBoard is switched off: ConnectionError" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_the_record_itself_is_not_optional(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        log.metrics(0, {"reward": 0.5})


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    log = RunLog(tmp_path, LoggingSection(wandb="offline"), 0, main=False)
    log.metrics(0, {"reward": 0.5})
    log.evaluation(0, {"pass@1": 0.5})
    log.samples(0, [{"response": "a"}])
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 5}\n'


@pytest.mark.parametrize(
    ("library", "settings", "remedy"),
    [("wandb", {"wandb": "online"}, "logging.wandb=off"), ("tensorboard", {}, "logging.tensorboard=false")],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    library: str, settings: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = logs.importlib.util.find_spec
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with pytest.raises(UserError, match=f"pip install {library}.*{remedy}"):
        check_installed(LoggingSection(**settings))  # type: ignore[arg-type]
    check_installed(LoggingSection(tensorboard=False, wandb="off"))


@pytest.mark.parametrize("word", ["off", "'off'", "offline", "online"])
def test_yaml_has_its_own_idea_of_off(word: str) -> None:
    assert load_config(None, [f"logging.wandb={word}"]).logging.wandb == word.strip("'")


def test_on_is_no_answer() -> None:
    with pytest.raises(UserError, match=r"logging.wandb.*'off', 'offline' or 'online'"):
        load_config(None, ["logging.wandb=on"])


# -- transcripts -------------------------------------------------------------------------------------------------------


def test_token_texts_join_to_the_text_where_characters_span_tokens() -> None:
    pieces = [b"na", "\u00ef".encode()[:1], "\u00ef".encode()[1:], b"ve ", "\U0001f600".encode()[:2],
              "\U0001f600".encode()[2:], b"!", b"\xff"]  # fmt: skip

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    texts = token_texts(range(len(pieces)), decode)
    assert texts == ["na", "", "\u00ef", "ve ", "", "\U0001f600", "!", "\ufffd"]
    assert token_texts([], decode) == []


def test_token_texts_keep_the_blank_that_a_tokenizer_drops_in_front() -> None:
    words = ["\u2581a", "\u2581b", "c"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    assert token_texts([0, 1, 2, 1], decode) == ["a", " b", "c", " b"]


def test_the_page_of_transcripts_holds_the_newest_and_survives_a_resume(tmp_path: Path) -> None:
    log = RunLog(tmp_path, QUIET, 0)
    for step in range(logs.PAGE_ROWS + 5):
        log.samples(step, [{"response": f"words{step}."}])
    page = (tmp_path / "samples.html").read_text()
    assert "words5." in page
    assert "words4." not in page
    assert page.index("words60.") < page.index("words59.")
    again = RunLog(tmp_path, QUIET, 10)
    again.samples(10, [{"response": "afresh"}])
    page = (tmp_path / "samples.html").read_text()
    assert "afresh" in page
    assert "words9." in page
    assert "words11." not in page
    assert not list(tmp_path.glob("*.partial"))


def test_drawing_transcripts_needs_no_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in [n for n in sys.modules if n.startswith(("plotly.", "rlvr_lab.show"))]:
        monkeypatch.delitem(sys.modules, name)
    warnings: list[str] = []
    log = RunLog(tmp_path, QUIET, 0, warn=warnings.append)
    log.samples(0, [{"response": "a"}])
    assert warnings == []
    assert (tmp_path / "samples.html").exists()
