"""Evaluations that are written down as they go: what is in the files, and that a continued run equals a whole one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.evaluate.evaluation import summarise
from rlvr_lab.evaluate.suite import Job, Settings, kept_rows, open_folder, run_job, weights_digest
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import TransformersEngine
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask

SETTINGS = Settings(
    "tiny/S", "digest", "transformers", "cpu", "float32", samples=4, temperature=1.0, max_tokens=32, rows=9, seed=0,
    texts=False,
)  # fmt: skip


def make_job(problems: int = 7, name: str = "countdown") -> Job:
    found = list(countdown.problems(7, 0, evaluation=True))[:problems]
    return Job(name, CountdownTask(), found, [list(p.prompt_ids) for p in found], "Countdown", {})


@pytest.fixture(scope="module")
def whole(tiny_s: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "countdown.jsonl"
    run_job(make_job(), tiny_s, TransformersEngine(tiny_s), SETTINGS, path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_the_problem_and_every_response(whole: Path) -> None:
    problems = make_job().problems
    for i, row in enumerate(lines(whole)):
        assert (row["index"], row["problem"], row["samples"]) == (i, str(problems[i]), 4)
        assert len(row["responses"]) == 4
        correct = [r["correct"] for r in row["responses"]]
        assert row["correct"] == sum(correct)
        assert row["mean_tokens"] == sum(r["tokens"] for r in row["responses"]) / 4
        assert row["finished"] == sum(r["finished"] for r in row["responses"]) / 4
        answers = [r["answer"] for r in row["responses"] if r["answer"] is not None]
        assert sum(n for n, _ in row["votes"]) == len(answers)
        for r in row["responses"]:
            assert (r["reason"] == "correct") is r["correct"]
            assert "text" not in r


def test_texts_are_kept_where_asked_for_and_are_what_was_graded(tiny_s: Policy, tmp_path: Path) -> None:
    path, job = tmp_path / "x.jsonl", make_job(2)
    run_job(job, tiny_s, TransformersEngine(tiny_s), replace(SETTINGS, texts=True), path)
    for problem, row in zip(job.problems, lines(path), strict=True):
        for r in row["responses"]:
            assert countdown.verify(problem, r["text"], r["finished"]).answer == r["answer"]


class Interrupted(TransformersEngine):
    """Stops at batch `after`, as Ctrl-C would."""

    after = 2

    def sample(self, *arguments: Any, **settings: Any) -> Rollout:
        if not self.after:
            raise KeyboardInterrupt
        self.after -= 1
        return super().sample(*arguments, **settings)


def test_a_continued_run_gives_the_same_file_byte_for_byte(tiny_s: Policy, whole: Path, tmp_path: Path) -> None:
    path, job = tmp_path / "countdown.jsonl", make_job()
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tiny_s, Interrupted(tiny_s), SETTINGS, path)
    assert len(lines(path)) == 4  # two batches of two problems
    told: list[int] = []
    results = run_job(job, tiny_s, TransformersEngine(tiny_s), SETTINGS, path, told.append)
    assert path.read_bytes() == whole.read_bytes()
    assert sum(told) == 7 * 4
    assert summarise(results, 1.0) == summarise(run_job(job, tiny_s, Interrupted(tiny_s), SETTINGS, whole), 1.0)


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_file_cut_anywhere_is_completed(tiny_s: Policy, whole: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "countdown.jsonl"
    path.write_bytes(whole.read_bytes()[:-cut])
    run_job(make_job(), tiny_s, TransformersEngine(tiny_s), SETTINGS, path)
    assert path.read_bytes() == whole.read_bytes()


def test_half_a_batch_is_sampled_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "countdown.jsonl"
    for kept, complete in ((7, 7), (6, 6), (5, 4), (1, 0)):
        path.write_text("".join(json.dumps(row) + "\n" for row in lines(whole)[:kept]))
        assert len(kept_rows(path, make_job(), SETTINGS)) == complete == len(lines(path))


def test_a_problem_draws_the_same_whatever_is_beside_it(tiny_s: Policy, whole: Path, tmp_path: Path) -> None:
    """A stream per problem: other batches and fewer problems leave its responses as they are."""
    path = tmp_path / "x.jsonl"
    run_job(make_job(3), tiny_s, TransformersEngine(tiny_s), replace(SETTINGS, rows=100), path)
    assert [row["responses"] for row in lines(path)] == [row["responses"] for row in lines(whole)[:3]]


def test_seed_and_name_choose_the_draws(tiny_s: Policy, whole: Path, tmp_path: Path) -> None:
    def responses(job: Job, settings: Settings) -> list[Any]:
        path = tmp_path / f"{job.name}{settings.seed}.jsonl"
        run_job(job, tiny_s, TransformersEngine(tiny_s), settings, path)
        return [row["responses"] for row in lines(path)]

    known = [row["responses"] for row in lines(whole)[:3]]
    assert responses(make_job(3), replace(SETTINGS, seed=1)) != known
    assert responses(make_job(3, "other"), SETTINGS) != known


def test_a_file_of_something_else_is_refused(tiny_s: Policy, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "countdown.jsonl"
    path.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"countdown.jsonl:1: not the result of problem 0"):
        run_job(make_job(), tiny_s, TransformersEngine(tiny_s), SETTINGS, path)
    path.write_bytes(whole.read_bytes())
    with pytest.raises(UserError, match="not the result of problem 3"):
        kept_rows(path, make_job(3), SETTINGS)


def test_a_folder_is_continued_with_the_same_settings_only(tmp_path: Path) -> None:
    out, job = tmp_path / "eval", make_job()
    with pytest.raises(UserError, match=r"holds no evaluation to resume \(no settings.json\)"):
        open_folder(out, SETTINGS, [job], resume=True)
    open_folder(out, SETTINGS, [job], resume=False)
    with pytest.raises(UserError, match="already exists; choose another --out"):
        open_folder(out, SETTINGS, [job], resume=False)
    open_folder(out, SETTINGS, [job], resume=True)
    for name, value, option in (
        ("samples", 8, "--samples 4"), ("temperature", 0.6, "--temperature 1.0"), ("max_tokens", 64, "--max-tokens 32"),
        ("rows", 64, "--rows 9"), ("seed", 1, "--seed 0"), ("engine", "vllm", "--engine transformers"),
        ("dtype", "bfloat16", "--dtype float32"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"was made with {option}, not {value}: resume with {option}"):
            open_folder(out, replace(SETTINGS, **{name: value}), [job], resume=True)
    with pytest.raises(UserError, match=r"other weights \(--model tiny/S\)"):
        open_folder(out, replace(SETTINGS, weights="others"), [job], resume=True)
    with pytest.raises(UserError, match=r"7 problems of countdown, not 5.*--problems"):
        open_folder(out, SETTINGS, [make_job(5)], resume=True)
    other = replace(job, prompts=[[*p[:-1], 1] for p in job.prompts])
    with pytest.raises(UserError, match=r"other prompts or problems of countdown.*--template"):
        open_folder(out, SETTINGS, [other], resume=True)
    open_folder(out, SETTINGS, [make_job(3, "more")], resume=True)  # another set may join
    assert set(json.loads((out / "settings.json").read_text())["jobs"]) == {"countdown", "more"}
    (out / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json cannot be read"):
        open_folder(out, SETTINGS, [job], resume=True)


def test_the_digest_of_weights_sees_training_and_nothing_else(tiny_s: Policy, fresh_s: Any) -> None:
    other = fresh_s()
    assert weights_digest(other) == weights_digest(tiny_s)
    next(iter(other.model.parameters())).data.mul_(1.001)
    assert weights_digest(other) != weights_digest(tiny_s)


class Mute(TransformersEngine):
    """An engine without token entropies, as vLLM is."""

    def sample(self, *arguments: Any, **settings: Any) -> Rollout:
        return replace(super().sample(*arguments, **settings), statistics={})


def test_entropies_that_are_not_recorded_are_undefined_not_zero(tiny_s: Policy, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    results = run_job(make_job(2), tiny_s, Mute(tiny_s), SETTINGS, path)
    assert [row["token_entropy"] for row in lines(path)] == [None, None]
    summary = summarise(results, 1.0)
    assert summary["token_entropy"] is None
    assert summary["sequence_entropy"] is None
