"""The terminal view: it fits, says what was measured and nothing else, and needs neither colour nor a terminal."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole
from run_folders import metrics_row

from rlvr_lab.train.console import Bar, Lines, Live, Quiet, Silent, for_terminal
from rlvr_lab.train.view import BLOCKS, RunState, clock_text, lines, sparkline


def state(rows: int = 30, **values: Any) -> RunState:
    made = RunState(name="runs/first", total=40, done=rows)
    for step in range(rows):
        made.add(metrics_row(step, **values))
    return made


@pytest.mark.parametrize("width", [200, 80, 40, 24])
@pytest.mark.parametrize("unicode", [True, False])
def test_every_line_fits_and_the_figures_are_there(width: int, unicode: bool) -> None:
    made = state()
    made.warning = "W&B is switched off: " + 30 * "no network "
    shown = lines(made, width, unicode=unicode)
    assert max(map(len, shown)) <= width
    text = " ".join(" ".join(shown).split())
    for part in ("step 30/40", "0.490", "49.0%", "25%", "0.10%", "0.20%", "1,234", "-0.0030", "-0.0040", "rollout 50%",
                 "loss 38%", "optimizer 12%", "0.50 GiB", "warning: W&B is"):  # fmt: skip
        assert part in text, part
    assert unicode or text.isascii()


def test_time_left_is_steps_left_times_a_recent_step() -> None:
    made = state(4)
    made.total = 10
    for step in range(4, 8):
        made.add(metrics_row(step, seconds=10.0))
    made.done = 8
    assert made.seconds_left() == pytest.approx(2 * (4 * 2.0 + 4 * 10.0) / 8)
    assert "left 0:12" in lines(made, 80)[0]


def test_what_was_not_measured_is_no_zero() -> None:
    empty = RunState(name="x", total=5)
    shown = lines(empty, 60)
    assert "left -" in shown[0]
    assert len(shown) == 2
    partly = lines(state(dead_groups=None, ledger_forecast=None, seconds=None, memory_process_gib=None), 80)
    text = "\n".join(partly)
    assert "dead groups" not in text
    assert "no forecast yet, measured -0.0040" in text
    assert "left -" in text
    assert "memory" not in text


def test_a_gap_is_a_gap_and_the_last_measured_value_is_shown() -> None:
    made = state(4)
    made.add(metrics_row(4, reward=math.nan))
    (line,) = [line for line in lines(made, 80) if line.startswith("reward")]
    assert "0.230" in line
    assert sparkline([1.0, math.nan, 2.0], 3) == f"{BLOCKS[0]} {BLOCKS[-1]}"


def test_the_curve_has_its_lowest_and_highest_value_and_shrinks_by_means() -> None:
    assert sparkline([0.0, 1.0, 7.0], 10) == f"{BLOCKS[0]}{BLOCKS[1]}{BLOCKS[7]}"
    assert sparkline([0.0, 2.0, 8.0, 10.0], 2) == f"{BLOCKS[0]}{BLOCKS[-1]}"
    assert len(set(sparkline([3.0] * 9, 4))) == 1
    assert sparkline([math.nan], 4) == sparkline([], 4) == sparkline([1.0], 0) == ""


@given(st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), max_size=60), st.integers(0, 30))
def test_a_curve_never_exceeds_its_room(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) <= width
    assert set(drawn) <= {*BLOCKS, " "}


def test_clock() -> None:
    assert [clock_text(s) for s in (0, 61, 3723, math.nan)] == ["0:00", "1:01", "1:02:03", "-"]


def screen(width: int, **options: Any) -> RichConsole:
    return RichConsole(file=io.StringIO(), force_terminal=True, width=width, height=40, **options)


def drawn(console: RichConsole) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("width", [80, 40])
def test_the_live_view_draws_trains_evaluates_and_leaves_one_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = screen(width)
    live = Live("runs/first", console)
    live.say("methods: grpo")
    live.begin("evaluating after step 0", 4)
    live.advance(4)
    live.end()
    live.begin("training", 3)
    for step in range(3):
        live.advance(1, metrics_row(step))
    live.warn("TensorBoard is switched off: disk [full]")
    live.advance(0, metrics_row(3))
    live.end()
    text = drawn(console)
    for part in ("methods: grpo", "token entropy", "dead groups", "step 3/3", "warning: TensorBoard is switched off"):
        assert part in text, part
    assert "disk [full]" in " ".join(text.split())
    assert "training 3/3  reward 0.230" in text
    colours = re.findall(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", text)
    assert not colours, "NO_COLOR"
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in text.replace("\r", "\n").split("\n")]
    assert max(map(len, plain)) <= max(width, len("training 3/3  reward 0.230  entropy 0.194 nats  ") + width)


def test_colour_is_used_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = screen(80, color_system="standard")
    live = Live("x", console)
    live.begin("training", 2)
    live.advance(1, metrics_row(0))
    live.end()
    assert re.search(r"\x1b\[36m", drawn(console))


def test_the_view_is_chosen_by_setting_and_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    kinds = {view: type(for_terminal(view)) for view in ("auto", "live", "plain", "quiet")}
    assert kinds == {"auto": Lines, "live": Live, "plain": Lines, "quiet": Quiet}


def test_every_console_can_warn(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Lines(), Quiet()):
        console.warn("careful")
    assert capsys.readouterr().err == "warning: careful\n" * 2
    Silent().warn("careful")
    Bar().warn("careful")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.strip() == "warning: careful"
