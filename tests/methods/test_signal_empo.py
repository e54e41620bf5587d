"""EMPO: golden values, what cluster rewards promise whatever the clusters, and training that no label can reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.entropy import semantic_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods import empo as module
from rlvr_lab.methods.empo import EMPO
from rlvr_lab.tasks.base import Verdict
from rlvr_lab.tasks.registry import CountdownTask
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

CLUSTERS = st.lists(st.integers(-1, 3), min_size=2, max_size=9)


def tensors(*groups):
    ids = torch.tensor([c for group in groups for c in group])
    return ids, torch.tensor([g for g, group in enumerate(groups) for _ in group])


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "empo.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


@settings(max_examples=80, deadline=None)
@given(CLUSTERS, CLUSTERS)
def test_entropies_are_those_of_the_definition_in_every_group(one, other):
    ids, group = tensors(one, other)
    for missing in ("leave_out", "separate"):
        found = module.semantic_entropies(ids, group, missing)
        for g, clusters in enumerate((one, other)):
            expected = semantic_entropy([c if c >= 0 else None for c in clusters], missing)
            value = float(found[group == g][0])
            # the list form calls "no answer left" nan too
            assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)
            assert found[group == g].unique().numel() == 1 or math.isnan(value)


@settings(max_examples=80, deadline=None)
@given(CLUSTERS)
def test_the_mean_reward_is_the_collision_probability(clusters):
    ids, group = tensors(clusters)
    reward = module.cluster_rewards(ids, group)
    share = [clusters.count(c) / len(clusters) for c in set(clusters) if c >= 0]
    assert float(reward.mean()) == pytest.approx(sum(p * p for p in share))


def test_rewards_by_hand():
    ids, group = tensors([0, 0, 1, -1], [0, 1, 2, -2])
    rewards = module.cluster_rewards
    assert rewards(ids, group).tolist() == [0.5, 0.5, 0.25, 0, 0.25, 0.25, 0.25, 0]
    assert rewards(ids, group, unreadable=None).tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0]
    assert rewards(ids, group, unreadable=-0.5).tolist() == [0.5, 0.5, 0.25, -0.5, 0.25, 0.25, 0.25, 0]
    assert rewards(ids, group, "voting").tolist() == [1, 1, 0, 0, 1, 1, 1, 0]
    assert rewards(ids, group, least_majority=0.3).tolist() == [0.5, 0.5, 0.25, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("clusters", [[0] * 6, [0, 1, 2, 3], [0, 0, 1, 1], [-1, -1, -1]])
@pytest.mark.parametrize("preset", list(EMPO.presets))
def test_groups_without_a_majority_have_no_advantage(clusters, preset):
    rollout = clustered(clusters, [0] * (len(clusters) - 1) + [1])
    reward = EMPO(EMPO.presets[preset]).reward(rollout)["empo"]
    advantage = group_advantage(reward, rollout.group_id)
    assert advantage[rollout.group_id == 0].tolist() == [0] * len(clusters)


def clustered(*groups, **changes):
    ids, group = tensors(*groups)
    rollout = make_rollout([3 + i % 3 for i in range(len(ids))])
    return rollout.with_(cluster_id=ids, group_id=group, **changes)


@pytest.mark.parametrize("gate", ["drop", "zero"])
def test_the_gate_is_open_between_its_thresholds_only(gate):
    unanimous, split, distinct = [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3]
    rollout = clustered(unanimous, split, distinct)
    pipeline = compose([build("empo", {"preset": "paper", "gate": gate})])
    kept = pipeline.filter(pipeline.reward(rollout))
    if gate == "drop":
        assert kept.group_id.unique().tolist() == [1]
        assert kept.reward.tolist() == [0.75, 0.75, 0.75, 0.25]
    else:
        assert kept.reward.tolist() == [0] * 4 + [0.75, 0.75, 0.75, 0.25] + [0] * 4
    assert pipeline.metrics()["empo.gated"] == pytest.approx(2 / 3)


def test_thresholds_may_be_in_nats():
    rollout = clustered([0, 0, 0, 1], [0, 0, 1, 1])
    method = build("empo", {"relative": False, "low": 0.6, "high": 2.0})
    assert method.filter(rollout).group_id.unique().tolist() == [1]


def test_a_step_without_an_open_group_learns_nothing_and_goes_on():
    rollout = clustered([0, 0, 0], [1, 1, 1])
    pipeline = compose([build("empo", {"preset": "paper"})])
    kept = pipeline.filter(pipeline.reward(rollout))
    assert len(kept) == 6
    assert not pipeline.advantage(kept).any()


def test_presets_differ_where_the_card_says():
    rollout = clustered([0, 0, 1, -1, -1], [0, 1, 2, 3, 4])
    found = {name: EMPO(config).reward(rollout)["empo"].tolist() for name, config in EMPO.presets.items()}
    assert found["paper"] == found["tiny"] == pytest.approx([0.4, 0.4, 0.2, 0, 0] + [0.2] * 5)
    assert found["released"] == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.2] + [0.2] * 5)
    assert found["trl"] == pytest.approx([0.4, 0.4, 0.2, 0, 0] + [0] * 5)
    assert found["free_form"] == pytest.approx([0.4, 0.4, 0.2, -0.5, -0.5] + [0.2] * 5)


def test_the_shuffled_control_deals_out_the_same_rewards_in_each_group():
    groups = [0, 0, 0, 1, 2, -1], [0, 1, 1, 1, 1, -1]
    rollout = clustered(*groups)
    own, method = (build("empo", {"preset": "tiny", "control": c}) for c in ("none", "shuffled"))
    plain, dealt = own.reward(rollout)["empo"], method.reward(rollout)["empo"]
    assert not torch.equal(plain, dealt)
    for g in (0, 1):
        rows = rollout.group_id == g
        assert sorted(plain[rows].tolist()) == sorted(dealt[rows].tolist())
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1))
    assert torch.equal(method.reward(rollout.rows(order))["empo"], dealt[order])
    method.observe({})
    assert not torch.equal(method.reward(rollout)["empo"], dealt)
    again = build("empo", {"preset": "tiny", "control": "shuffled"})
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.reward(rollout)["empo"], method.reward(rollout)["empo"])


def test_one_answer_everywhere_is_seen():
    rollout = clustered([0, 0, 1], [0, 0, 0], answer=("7", "7", "1", "7", "7", "7"))
    assert module.distinct_majorities(rollout) == 0.5
    assert module.distinct_majorities(rollout.with_(answer=("7", "7", "1", "8", "8", "8"))) == 1
    assert math.isnan(module.distinct_majorities(rollout.with_(answer=None)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "majority"}, "empo.rule must be one of frequency, voting"),
        ({"missing": "leaveout"}, "did you mean 'leave_out'"),
        ({"low": 0.8, "high": 0.2}, r"empo.low must lie below empo.high \(0.2\), not 0.8"),
        ({"least_majority": 1.5}, "empo.least_majority must lie in"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        build("empo", wrong)


def test_a_rollout_without_clusters_is_refused():
    with pytest.raises(UserError, match="method 'empo' needs 'cluster_id'"):
        EMPO().reward(make_rollout([3, 3]))


# ------------------------------------------------------------------------------------------- no label is read


def final_weights(out, **more):
    settings = ["steps=3", "optimizer.lr=1e-3", "optimizer.warmup=0", "rollout.max_tokens=32", "rollout.prompts=4",
                "logging.samples=0", *(f"{key}={value}" for key, value in more.items())]  # fmt: skip
    result = Trainer(load_config("empo/tiny", [*TINY_RUN, *settings]), out).run()
    return load_file(out / "model" / "model.safetensors"), result.history


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"methods.empo.preset": "paper", "data.clusters.by": "exact"}])
def test_poisoned_labels_change_nothing_but_the_accuracy(extra, tmp_path, monkeypatch):
    weights, history = final_weights(tmp_path / "true", **extra)
    honest = CountdownTask.grade

    def poisoned(self, problem, text, finished):
        verdict = honest(self, problem, text, finished)
        return replace(verdict, correct=not verdict.correct, answer=str(len(text)), reason="poisoned")

    monkeypatch.setattr(CountdownTask, "grade", poisoned)
    other, poisoned_history = final_weights(tmp_path / "poisoned", **extra)
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert [row["accuracy"] for row in history] != [row["accuracy"] for row in poisoned_history]
    for name in ("reward", "loss", "grad_norm", "empo.semantic_entropy"):
        assert [row[name] for row in history] == [row[name] for row in poisoned_history]


@pytest.mark.slow
def test_the_poison_reaches_a_method_that_reads_labels(tmp_path, monkeypatch):
    plain = {"methods": "{grpo: {preset: tiny}}"}
    weights, _ = final_weights(tmp_path / "true", **plain)
    monkeypatch.setattr(CountdownTask, "grade", lambda self, p, text, end: Verdict(len(text) % 2 == 0, "x", "poisoned"))
    other, _ = final_weights(tmp_path / "poisoned", **plain)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)
