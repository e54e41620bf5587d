"""TP-GRPO: golden values, the closed form against the return, all-right groups that still teach, controls."""

from __future__ import annotations

import math

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout, step_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods import tp_grpo as tp
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

SEEDS = st.integers(0, 10_000)


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "tp_grpo.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


def judged(seed=0, lengths=(9, 4, 7, 8, 3, 9, 6, 1), right=(1, 0, 1, 0, 1, 1, 1, 1)):
    """Two groups of four, the second all right."""
    rollout = make_rollout(list(lengths), group_size=4, seed=seed)
    correct = torch.tensor(right).bool()
    rollout = rollout.with_(correct=correct, reward=correct.float(), reward_components={"correct": correct.float()})
    return rollout.with_statistics(**step_labels(rollout, correct))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0, 3))
def test_the_return_is_the_closed_form(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(6, generator=generator) < 0.5
    lengths = torch.randint(1, 12, (6,), generator=generator)
    mask = torch.arange(12)[None] < lengths[:, None]
    label = (torch.rand(6, 12, generator=generator) < 0.5).double()
    label.scatter_(1, (lengths - 1)[:, None], correct[:, None].double())  # the answer's own label
    group = torch.arange(6) // 3
    outcome = tp.outcome_advantage(correct, group, dtype=torch.float64)
    scale = tp.ability_scale(correct, group, alpha, torch.float64)
    closed = tp.thought_advantage(label, correct, outcome, scale).masked_fill(~mask, 0)
    returns = tp.returns_to_go(label, label, mask, correct, outcome, scale)
    assert torch.allclose(closed, returns, atol=1e-12)


def test_labels_of_the_answer_alone_are_grpo():
    rollout = judged()
    plain = rollout.with_statistics(thought_label=rollout.correct[:, None].float().expand(rollout.mask.shape))
    found = build("tp_grpo", {}).advantage(plain)
    expected = group_advantage(2 * rollout.correct.float() - 1, rollout.group_id)[:, None]
    assert torch.allclose(found, expected.expand(found.shape))


def test_a_solved_group_still_teaches_and_a_hopeless_one_does_not():
    rollout = judged(right=(0, 0, 0, 0, 1, 1, 1, 1))
    found = build("tp_grpo", {"alpha": 0.5}).advantage(rollout).masked_fill(~rollout.mask, 0.0)
    good = rollout.statistics["thought_label"] > 0.5
    assert not found[:4].any()
    assert found[4:][good[4:] & rollout.mask[4:]].abs().max() == 0
    assert found[4:][~good[4:] & rollout.mask[4:]].unique().tolist() == [-0.5]


def test_a_group_of_one_has_no_outcome():
    correct = torch.tensor([True, False])
    assert tp.outcome_advantage(correct, torch.tensor([0, 1])).tolist() == [0, 0]


def test_mismatched_thoughts_of_a_wrong_response_are_left_alone():
    rollout = judged()
    found = build("tp_grpo", {}).advantage(rollout)
    wrong = ~rollout.correct[:, None] & rollout.mask
    label = rollout.statistics["thought_label"] > 0.5
    assert found[wrong & label].unique().tolist() == [0]
    assert (found[wrong & ~label] < 0).all()


def test_the_scale_follows_the_pass_rate_or_not():
    rollout = judged()
    incorrect = rollout.correct[:, None] & (rollout.statistics["thought_label"] < 0.5) & rollout.mask
    own, constant = (build("tp_grpo", {"adaptive": a}).advantage(rollout) for a in (True, False))
    gap = (own - constant)[incorrect]
    assert gap[:1].tolist() == pytest.approx([0.5])  # r_c is 0.5 in a group that is half right, against 1
    assert torch.equal(own[~incorrect], constant[~incorrect])


def test_rewards_of_steps_swamp_the_outcome_of_a_long_trace():
    rollout = judged(lengths=(9, 9, 9, 9, 9, 9, 9, 9), right=(1, 0, 0, 0, 1, 1, 0, 0))
    label = torch.ones(8, 9)
    step = torch.arange(9).expand(8, 9).float()
    rollout = rollout.with_statistics(thought_label=label, thought_step=step)
    thoughts, steps = (build("tp_grpo", {"level": level}).advantage(rollout) for level in ("thought", "step"))
    assert thoughts[0].unique().numel() == 1
    assert float(steps[0, 0]) > 2 * float(thoughts[0, 0])


def test_other_rewards_are_said_to_be_unused():
    rollout = judged()
    method = build("tp_grpo", {})
    method.advantage(rollout)
    assert method.notices() == []
    more = rollout.with_(reward_components={**rollout.reward_components, "length": rollout.reward})
    assert torch.equal(method.advantage(more), method.advantage(rollout))
    (said,) = [text for _ in range(2) for text in method.notices()]
    assert "the reward components length are logged and do not train" in said


def test_figures_are_shares_of_tokens():
    method = build("tp_grpo", {})
    method.advantage(judged(right=(1,) * 8))
    found = method.metrics()
    assert 0 < found["incorrect_tokens"] < 1
    assert math.isnan(found["mismatched_tokens"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": -1.0}, "tp_grpo.alpha must not be negative"),
        ({"level": "token"}, "tp_grpo.level must be one of thought, step"),
        ({"std": "samples"}, "did you mean 'sample'"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        build("tp_grpo", wrong)


def test_an_unjudged_rollout_is_refused_and_the_setting_named():
    pipeline = compose([build("tp_grpo", {})])
    with pytest.raises(UserError, match=r"method 'tp_grpo' needs 'thought_label'.*data\.judge"):
        pipeline.check(make_rollout([3, 3]).with_(correct=torch.tensor([True, False])))


@pytest.mark.slow
def test_a_control_resumes_as_if_it_had_not_stopped(tmp_path):
    settings = [*TINY_RUN, "steps=4", "rollout.max_tokens=48", "data.judge={accuracy: 0.7, shuffled: true}"]
    config = load_config("tp_grpo/tiny", settings)
    whole = Trainer(config, tmp_path / "whole").run().history
    asked = iter([False, True])
    Trainer(config, tmp_path / "cut", stop=lambda: next(asked)).run()
    resumed = Trainer(config, tmp_path / "cut", resume=True).run().history
    assert len(whole) == len(resumed) == 4
    for name in ("loss", "grad_norm", "tp_grpo.incorrect_tokens", "tp_grpo.mismatched_tokens"):
        assert [row[name] for row in whole] == [row[name] for row in resumed]
