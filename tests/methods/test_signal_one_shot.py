"""1-shot RLVR: golden values, scores and their edges, duplicates as groups, entropy alone, `rlvr-lab select`."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import run_folder, write_lines
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods import one_shot as module
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.logs import read_jsonl
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.selection import rank, read_histories
from rlvr_lab.train.update import UpdateTotals


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "one_shot.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


# ---------------------------------------------------------------------------------------------------- the scores


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8), min_size=1, max_size=6))
def test_variance_is_the_population_variance_and_ties_keep_their_order(histories):
    history = dict(enumerate(histories))
    scores = module.variance_scores(history)
    for key, values in history.items():
        assert scores[key] == pytest.approx(float(torch.tensor(values, dtype=torch.float64).var(correction=0)))
        assert module.variance_scores({0: values[::-1]})[0] == scores[key]
    ranked = module.ranking(scores)
    assert all(scores[a] > scores[b] or (scores[a] == scores[b] and a < b) for a, b in pairwise(ranked))


def test_scores_without_a_meaning_are_nan_and_come_last():
    assert all(math.isnan(v) for v in module.impact_scores({0: [1.0, 1.0], 1: [1.0]}).values())
    scores = module.variance_scores({"never": [], "twice": [0.0, 1.0], "once": [0.5]})
    assert math.isnan(scores["never"])
    assert module.ranking(scores) == ["twice", "once", "never"]
    assert module.impact_scores({}) == {}


def test_the_curve_that_is_the_mean_has_the_highest_impact():
    history = {"mean": [0.25, 0.5, 0.75], "early": [0.5, 1.0, 1.0], "late": [0.0, 0.0, 0.5, 0.9]}
    assert module.ranking(module.impact_scores(history))[0] == "mean"
    assert module.impact_scores({0: [0.0, 0.5], 1: [0.0, 0.5]}) == {0: 1.0, 1: 1.0}


def test_random_scores_are_those_of_the_seed_whatever_the_order():
    history = {3: [0.0], 1: [0.0], 2: [0.0]}
    scores = module.random_scores(history, 1)
    assert scores == module.random_scores(dict(sorted(history.items())), 1)
    assert scores != module.random_scores(history, 2)


# ---------------------------------------------------------------------------------------------------- the method


class Pool:
    prompts = ((1,),) * 5


def test_problems_are_repeated_to_fill_a_step():
    method = build("one_shot", {"preset": "tiny", "problems": [4, 2], "rows": 5})
    assert method.select(Pool(), 3) == [4, 2, 4, 2, 4]
    assert not build("one_shot", {}).has("select")  # no problem named: the whole pool
    with pytest.raises(UserError, match=r"names problem 7, but the pool has 5 \(data.pool\)"):
        build("one_shot", {"problems": [7]}).select(Pool(), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"problems": 3}, r"one_shot.problems must be a list of indices"),
        ({"problems": [-1]}, "one_shot.problems must be a list of indices"),
        ({"problems": ["3"]}, "one_shot.problems must be a list of indices"),
        ({"problems": [1, 2], "rows": 1}, "one_shot.rows must hold all 2 problems"),
        ({"pg_coefficient": -1.0}, "one_shot.pg_coefficient must not be negative"),
        ({"saturation": 0.0}, "one_shot.saturation must lie in"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        build("one_shot", wrong)


def test_presets_place_only_what_they_need():
    paper, only = build("one_shot", {}), build("one_shot", {"preset": "entropy_only"})
    assert not paper.has("weight")
    assert only.has("weight")
    batch = make_rollout([3, 2])
    assert not only.weight(batch, torch.ones(2, 3)).any()
    assert not build("one_shot", {"entropy_coefficient": 0.0}).has("regularise")


def test_saturation_is_noticed_once_and_counted():
    method = build("one_shot", {"saturation": 0.75})
    accuracies = [0.5, 1.0, 0.5, 0.75]
    seen = []
    for accuracy in accuracies:
        method.filter(make_rollout([2] * 4).with_(correct=torch.arange(4) < 4 * accuracy))
        seen.append(method.metrics())
        method.observe({})
    assert [row["saturated"] for row in seen] == [0, 1, 1, 1]
    assert [row["steps_since_saturation"] for row in seen][1:] == [0, 1, 2]
    assert math.isnan(seen[0]["steps_since_saturation"])
    again = build("one_shot", {"saturation": 0.75})
    again.load_state_dict(method.state_dict())
    assert again.metrics() == method.metrics()


def test_duplicates_are_groups_of_their_own(tmp_path):
    settings = [*TINY_RUN, "steps=1", "rollout.prompts=3", "methods.one_shot.rows=3", "methods.one_shot.problems=[7]"]
    trainer = Trainer(load_config("one_shot/tiny", settings), tmp_path / "run")
    rollout = trainer.collect(0)
    assert rollout.prompt_id.unique().tolist() == [7]
    assert rollout.group_id.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert trainer.collector.solved == {7: (int(rollout.correct.sum()), 12)}


def test_entropy_alone_does_not_feel_rewards_and_raises_entropy_to_first_order(tmp_path):
    settings = [*TINY_RUN, "steps=1", "methods.one_shot={preset: entropy_only, rows: 2, problems: [1]}"]
    trainer = Trainer(load_config("one_shot/tiny", settings), tmp_path / "run")
    rollout = trainer.collect(0)
    gradients = []
    for reward in (rollout.reward, 1 - rollout.reward):
        changed, advantage = trainer.pipeline.credit(rollout.with_(reward=reward))
        trainer.policy.model.zero_grad()
        trainer.updater.accumulate(changed, advantage, UpdateTotals(), torch.Generator().manual_seed(0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.policy.model.parameters()]).clone())
    assert torch.equal(*gradients)
    assert float(gradients[0].abs().max()) > 0


def test_the_coefficient_scales_the_surrogate_alone():
    rollout = make_rollout([3, 2]).with_(reward=torch.tensor([1.0, 0.0]))
    weights = compose([build("one_shot", {"pg_coefficient": 0.25})]).weights(rollout, torch.ones(2, 3))
    assert weights["one_shot"].tolist() == [[0.25, 0.25, 0.25], [0.25, 0.25, 0]]


# ------------------------------------------------------------------------------------------ the log and the command


def row(step, problem, right, names):
    return {"step": step, "problem": problem, "right": right, "responses": [4] * len(problem), "names": names}


@pytest.fixture
def run(tmp_path):
    out = run_folder(tmp_path / "run")
    write_lines(out / "problems.jsonl", [
        row(0, [0, 1, 2], [0, 2, 4], {"0": "hard", "1": "learnt", "2": "easy"}),
        row(1, [0, 1, 3], [0, 4, 1], {"3": "seen once"}),
        row(2, [0, 1, 2], [1, 4, 4], {}),
    ])  # fmt: skip
    return out


def test_histories_are_in_the_order_of_visits(run):
    found = read_histories(run)
    assert found[1].accuracy == (0.5, 1.0, 1.0)
    assert found[3].text == "seen once"
    assert [one.history.problem for one in rank(found)] == [1, 0, 2]
    assert [one.history.problem for one in rank(found, least=1)] == [1, 0, 2, 3]


def test_the_command_ranks_and_says_how_to_train(run):
    shown = CliRunner().invoke(app, ["select", str(run), "--top", "2"])
    assert shown.exit_code == 0
    assert "methods.one_shot.problems=[1]" in shown.output
    assert "learnt" in shown.output
    assert "easy" not in shown.output
    told = CliRunner().invoke(app, ["select", str(run), "--json", "--bottom", "--top", "1"])
    (last,) = json.loads(told.output)
    assert last == {"rank": 3, "problem": 2, "score": 0.0, "mean_accuracy": 1.0, "visits": 2, "accuracy": [1.0, 1.0],
                    "text": "easy"}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "varaince"], "--by 'varaince' does not exist; did you mean 'variance'?"),
        (["--least", "9"], "no problem was visited 9 times, the most is 3"),
    ],
)
def test_the_command_names_what_is_wrong(run, arguments, message):
    told = CliRunner().invoke(app, ["select", str(run), *arguments])
    assert told.exit_code == 2
    assert message in told.output
    assert "Traceback" not in told.output


def test_a_folder_without_a_log_is_refused(tmp_path):
    told = CliRunner().invoke(app, ["select", str(tmp_path)])
    assert told.exit_code == 2
    assert "holds no problems.jsonl" in told.output


@pytest.mark.slow
def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(tmp_path):
    config = load_config("grpo/tiny", [*TINY_RUN, "steps=5", "data.pool=5"])
    Trainer(config, tmp_path / "whole").run()
    asked = iter([False, False, True])
    Trainer(config, tmp_path / "cut", stop=lambda: next(asked)).run()
    log = tmp_path / "cut" / "problems.jsonl"
    log.write_text(log.read_text() + json.dumps(row(3, [0], [0], {"0": "to be repeated"})) + '\n{"step": 4, "prob')
    Trainer(config, tmp_path / "cut", resume=True).run()
    whole, cut = (read_jsonl(tmp_path / name / "problems.jsonl") for name in ("whole", "cut"))
    assert whole == cut
    assert [r["step"] for r in whole] == [0, 1, 2, 3, 4]
    assert sum(len(r["names"]) for r in whole) == 5
    accuracy = [r["accuracy"] for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl")]
    assert [sum(r["right"]) / sum(r["responses"]) for r in whole] == pytest.approx(accuracy)
