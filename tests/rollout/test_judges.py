"""Judges of thoughts: exact spans on a rollout, controls, and a language model that is asked once and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from builders import TINY_RUN, byte_level_qwen2, sampled_rollout

from rlvr_lab.errors import UserError
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.grading import grade
from rlvr_lab.rollout.judges import LABEL, STEP, CountdownJudge, ModelJudge, read_reply, with_thoughts
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.jsonl import MathProblem
from rlvr_lab.tasks.registry import CountdownTask
from rlvr_lab.tasks.thoughts import judge_countdown
from rlvr_lab.train.config import JudgeSection, load_config
from rlvr_lab.train.labels import make_judge
from rlvr_lab.train.loop import Trainer


@pytest.fixture(scope="module")
def graded(tiny_s):
    problems = countdown.problems(4, 0)
    return grade(sampled_rollout(tiny_s, max_tokens=32), CountdownTask(), problems, tiny_s), problems


def test_labels_are_those_of_each_row(graded, tiny_s):
    rollout, problems = graded
    found = with_thoughts(rollout, CountdownJudge(tiny_s), problems)
    for i in range(len(rollout)):
        n = int(rollout.lengths[i])
        words = [countdown.VOCABULARY[t] for t in rollout.response_ids[i, :n].tolist()]
        labels, steps = judge_countdown(words, bool(rollout.correct[i])).per_token()
        assert found.statistics[LABEL][i, :n].tolist() == labels
        assert found.statistics[STEP][i, :n].tolist() == steps
        assert not found.statistics[LABEL][i, n:].any()


def test_controls_do_not_depend_on_the_order_of_rows():
    policy, problems = load_policy("tiny/R", device="cpu"), countdown.problems(3, 0)
    prompts, generator = [list(p.prompt_ids) for p in problems], torch.Generator().manual_seed(0)
    rollout = TransformersEngine(policy).sample(prompts, 6, Sampling(max_tokens=60), generator)
    rollout = grade(rollout, CountdownTask(), problems, policy)
    judge, draw = CountdownJudge(policy), lambda problem: Random(problem)
    exact = with_thoughts(rollout, judge, problems).statistics[LABEL]
    # equal responses of a group are interchangeable, and keep their order here
    order = torch.tensor(sorted(range(len(rollout)), key=lambda i: rollout.response_ids[i].tolist()))
    for control in ({"accuracy": 0.5}, {"shuffled": True}):
        found = with_thoughts(rollout, judge, problems, draw=draw, **control).statistics[LABEL]
        again = with_thoughts(rollout.rows(order), judge, problems, draw=draw, **control).statistics[LABEL]
        assert torch.equal(found[order][:, : again.shape[1]], again)
        assert not torch.equal(found, exact)


# --------------------------------------------------------------------------------------------- a language model


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Steps [1, 2] look odd, but the answer is [3].", {3}),
        ("[]", set()),
        ("[ 2 ,2]", {2}),
        ("[1, 5]", None),  # there are four steps
        ("[0]", None),
        ("none", None),
        ("[1, x]", None),
        ("[" * 100_000, None),
        ("[9999999]", None),
    ],
)
def test_only_a_list_of_steps_is_a_reply(reply, expected):
    assert read_reply(reply, 4) == expected


class Scripted:
    """An engine that gives one reply to whatever it is asked."""

    def __init__(self, policy: Policy, reply: str) -> None:
        self.policy, self.reply, self.asked = policy, reply, []

    def sample(self, prompts, group_size, sampling, generator, **more):
        assert (group_size, sampling.temperature) == (1, 0.0)
        self.asked += [self.policy.decode(list(p)) for p in prompts]
        ids = torch.tensor([self.policy.encode(self.reply)] * len(prompts))
        return SimpleNamespace(response_ids=ids, lengths=torch.full((len(prompts),), ids.shape[1]))


@pytest.fixture(scope="module")
def bytes_policy(tmp_path_factory):
    return load_policy(str(byte_level_qwen2(tmp_path_factory.mktemp("bytes"))), device="cpu")


PROBLEM = MathProblem("What is 2 + 2?", "4", 1, "q")
TEXT = "It is 5.\n\nWait, no.\n\n2 + 2 = 4\n\n</think>4"


def asked(policy, reply, cache=None, text=TEXT, correct=True, **settings):
    engine = Scripted(policy, reply)
    judge = ModelJudge(policy, policy, engine, cache=cache, max_tokens=8, **settings)
    judge.by = SimpleNamespace(**(vars(policy) | {"model": SimpleNamespace(config=None), "device": "cpu"}),
                               encode=policy.encode, decode=policy.decode)  # fmt: skip
    ids = policy.encode(text)
    found = [judge.judge([ids], [correct], [PROBLEM])[0] for _ in range(2)]
    return found[0], engine, judge.metrics(), ids


def test_a_model_judges_steps_of_exact_tokens(bytes_policy):
    found, engine, figures, ids = asked(bytes_policy, "[1]")
    assert [bytes_policy.decode(ids[a:b]) for a, b in found.spans] == [
        "It is 5.\n\n", "Wait, no.\n\n", "2 + 2 = 4\n\n", "</think>4"
    ]  # fmt: skip
    assert found.labels == (0, 1, 1, 1)
    assert len(engine.asked) == 1  # the second time it is known
    assert "Step 2: Wait, no." in engine.asked[0]
    assert PROBLEM.question in engine.asked[0]
    assert "4" not in engine.asked[0].split("Problem:")[1].split("Step 1")[0].replace("2 + 2", "")  # no reference
    assert figures == {"judge_asked": 1, "judge_kept": 1, "judge_unread": 0}


def test_a_wrong_response_is_asked_what_its_answer_used(bytes_policy):
    found, engine, *_ = asked(bytes_policy, "I think [3]", correct=False)
    assert found.labels == (1, 1, 0, 0)
    assert "is wrong" in engine.asked[0]


@pytest.mark.parametrize("reply", ["no idea", "[7]"])
def test_a_reply_that_says_nothing_leaves_grpo(bytes_policy, reply):
    found, _, figures, _ = asked(bytes_policy, reply, correct=False)
    assert not found.judged
    assert set(found.labels) == {0}
    assert figures["judge_unread"] == 2


def test_a_response_of_one_step_is_not_asked_about(bytes_policy):
    found, engine, *_ = asked(bytes_policy, "[1]", text="just 4")
    assert not engine.asked
    assert found.labels == (1,)


def test_replies_are_kept_beyond_a_run(bytes_policy, tmp_path):
    cache = tmp_path / "deep" / "judge.jsonl"
    asked(bytes_policy, "[2]", cache)
    found, engine, *_ = asked(bytes_policy, "[3]", cache)
    assert not engine.asked
    assert found.labels == (1, 0, 1, 1)
    cache.write_text(cache.read_text() + '{"key": "cut')
    assert not asked(bytes_policy, "[3]", cache)[1].asked
    cache.write_text("something else\n")
    with pytest.raises(UserError, match=r"data\.judge\.cache: .* holds no replies"):
        asked(bytes_policy, "[3]", cache)


def test_a_real_engine_is_asked(bytes_policy):
    judge = ModelJudge(bytes_policy, bytes_policy, TransformersEngine(bytes_policy), max_tokens=4)
    found = judge.judge([bytes_policy.encode("a\n\nb")], [True], [PROBLEM])[0]
    assert found.spans == ((0, 3), (3, 4))
    assert judge.metrics()["judge_asked"] == 1


def test_without_rules_or_a_model_the_setting_is_named(tiny_s):
    with pytest.raises(UserError, match=r"task 'math' has none .*data\.judge\.by=model"):
        make_judge(JudgeSection(), "math", tiny_s, None)
    with pytest.raises(UserError, match=r"data\.judge\.model is not set"):
        make_judge(JudgeSection(by="model"), "countdown", tiny_s, None)
    own = make_judge(JudgeSection(by="model", model="policy"), "math", tiny_s, engine := object())
    assert own.engine is engine


@pytest.mark.slow
def test_a_run_is_judged_by_its_own_policy(tmp_path: Path):
    settings = [*TINY_RUN, "steps=1", "data.judge={by: model, model: policy, max_tokens: 2, separators: ['no']}",
                "model.path=tiny/S"]  # fmt: skip
    result = Trainer(load_config("tp_grpo/tiny", settings), tmp_path / "run").run()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["tp_grpo.thoughts"] >= 1
    assert result.steps_done == 1
