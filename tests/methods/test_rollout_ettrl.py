"""ETTRL: golden values, votes and their ties, trees, the sign of Y, what is trained on, and training without labels."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.trees import token_counts
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.ettrl import ETTRL, confidence_weight, majority, majority_ratio
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.meter import Meter
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

PROMPTS = [[5, 6, 7], [7], [8, 9]]
CLUSTERS = st.lists(st.integers(-2, 3), min_size=1, max_size=9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(**settings: Any) -> ETTRL:
    method = build("ettrl", {"preset": "tiny", **settings})
    assert isinstance(method, ETTRL)
    return method


def voted(*groups: list[int], **changes: Any) -> Rollout:
    """Responses of 3 to 5 tokens in groups, with these clusters of answers."""
    ids = torch.tensor([c for group in groups for c in group])
    group = torch.tensor([g for g, clusters in enumerate(groups) for _ in clusters])
    rollout = make_rollout([3 + i % 3 for i in range(len(ids))])
    return rollout.with_(cluster_id=ids, group_id=group, **changes)


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "ettrl.json")}
    assert len(problems) == 6
    assert not any(problems.values()), problems


# ------------------------------------------------------------------------------------------- the vote


@given(CLUSTERS, CLUSTERS)
def test_the_most_frequent_answer_wins_and_the_first_seen_of_a_tie(one: list[int], other: list[int]) -> None:
    rollout = voted(one, other)
    won = majority(rollout.require("cluster_id", "test"), rollout.group_id)
    ratio = majority_ratio(rollout.require("cluster_id", "test"), rollout.group_id)
    start = 0
    for clusters in (one, other):
        votes = Counter(c for c in clusters if c >= 0).most_common(1)  # a counter keeps the order of appearance
        label, number = votes[0] if votes else (None, 0)
        span = slice(start, start + len(clusters))
        assert won[span].tolist() == [c == label for c in clusters]
        assert ratio[span].tolist() == pytest.approx([number / len(clusters)] * len(clusters))
        start += len(clusters)


def test_ties_by_hand() -> None:
    group = torch.zeros(5, dtype=torch.long)
    assert majority(torch.tensor([1, 0, 0, 1, 2]), group).tolist() == [True, False, False, True, False]
    assert majority(torch.tensor([0, 1, 1, 0, 2]), group).tolist() == [True, False, False, True, False]
    assert majority(torch.tensor([-1, 2, 1, 0, -1]), group).tolist() == [False, True, False, False, False]


def test_without_any_answer_there_is_no_label_and_nothing_to_learn() -> None:
    method = made()
    rollout = voted([-1, -1, -1], [-1, -2, -1], correct=torch.zeros(6, dtype=torch.bool))
    pipeline = compose([method])
    rewarded = pipeline.reward(rollout)
    assert rewarded.require("reward", "test").tolist() == [0] * 6
    assert not pipeline.advantage(rewarded).any()
    found = method.metrics()
    assert (found["unlabelled"], found["majority_ratio"], found["distinct_answers"]) == (1, 0, 0)
    assert math.isnan(found["label_accuracy"])
    assert math.isnan(found["vote_entropy"])


def test_what_is_logged_of_a_vote() -> None:
    right = torch.tensor([False, True, True, False, True, True, False, False])
    rollout = voted([0, 1, 1, -1], [0, 0, 0, 1], correct=right)
    method = made()
    assert method.reward(rollout)["ettrl"].tolist() == [0, 1, 1, 0, 1, 1, 1, 0]
    found = method.metrics()
    assert found["label_accuracy"] == 1
    assert found["majority_ratio"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert found["distinct_answers"] == 2
    assert found["distinct_answers_per_kilotoken"] == pytest.approx(4000 / int(rollout.mask.sum()))
    assert found["unlabelled"] == 0
    method.reward(rollout.with_(correct=~right))
    assert method.metrics()["label_accuracy"] == 0


def test_the_reward_replaces_the_tasks() -> None:
    rollout = voted([0, 0, 1, 1], reward_components={"correct": torch.tensor([0.0, 0.0, 1.0, 1.0])})
    assert compose([made()]).reward(rollout).require("reward", "test").tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match="method 'ettrl' needs 'cluster_id'"):
        made().reward(make_rollout([3, 3]))


# ------------------------------------------------------------------------------------------- Y and the advantage


@given(st.lists(st.floats(0.01, 5.0), min_size=2, max_size=8))
def test_y_has_mean_one_and_changes_its_sign_at_twice_the_mean(entropy: list[float]) -> None:
    h = torch.tensor(entropy, dtype=torch.float64)
    y = confidence_weight(h, torch.zeros(len(h), dtype=torch.long))
    assert float(y.mean()) == pytest.approx(1)
    assert torch.equal(y < 0, h > 2 * h.mean()) or bool(((y.abs() < 1e-9) & (h - 2 * h.mean()).abs().lt(1e-9)).any())
    bounded = confidence_weight(h, torch.zeros(len(h), dtype=torch.long), 0.0)
    assert bool((bounded >= 0).all())
    assert torch.equal(bounded[y >= 0], y[y >= 0])


def test_without_entropy_or_alone_nothing_is_reshaped() -> None:
    zeros = torch.zeros(3)
    assert confidence_weight(zeros, torch.tensor([0, 0, 1])).tolist() == [1, 1, 1]
    assert confidence_weight(torch.tensor([0.7]), torch.tensor([4])).tolist() == [1]
    rollout = voted([0]).with_(reward=torch.ones(1))
    assert not compose([made(shape="res")]).advantage(rollout).any()


def rambling(**settings: Any) -> tuple[ETTRL, torch.Tensor, torch.Tensor]:
    """Four responses, three of them right by vote, the first of those rambling; plain and reshaped advantages [B]."""
    entropy = torch.tensor([[2.0], [0.2], [0.2], [0.2]]).expand(4, 5)
    rollout = voted([0, 0, 0, 1]).with_(statistics={"token_entropy": entropy})
    method = made(shape="res", **settings)
    pipeline = compose([method])
    rollout = pipeline.reward(rollout)
    plain = group_advantage(rollout.require("reward", "test"), rollout.group_id)
    return method, plain, pipeline.advantage(rollout)[:, 0]


def test_a_rambling_response_that_agrees_is_pushed_down_unless_y_is_bounded() -> None:
    method, plain, reshaped = rambling()
    assert plain[0] > 0 > reshaped[0]
    assert method.metrics()["negative_y"] == 0.25
    assert method.metrics()["y_least"] == pytest.approx(2 - 2.0 / 0.65, rel=1e-5)
    bounded, _, safe = rambling(y_min=0.0)
    assert float(safe[0]) == 0
    assert torch.equal(safe[1:], reshaped[1:])
    assert bounded.metrics()["negative_y"] == 0.25  # the hazard is counted, whether it is bounded or not


def test_no_gradient_passes_through_y() -> None:
    entropy = torch.rand(4, 5, generator=generator(), requires_grad=True)
    rollout = voted([0, 0, 0, 1]).with_(statistics={"token_entropy": entropy})
    assert not made(shape="res").weights(rollout).requires_grad


def test_adv_clip_binds_beyond_beta() -> None:
    rollout = compose([made()]).reward(voted([0, 0, *range(1, 14)]))
    plain = compose([made()]).advantage(rollout)
    clipped = compose([made(shape="clip", beta=1.5)]).advantage(rollout)
    assert float(plain.max()) > 2
    assert torch.allclose(clipped, plain.clamp(-1.5, 1.5), atol=1e-5)


def test_shuffled_weights_stay_in_their_prompt_and_follow_the_content() -> None:
    rollout = voted([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1])
    own, dealt = made(shape="res").weights(rollout), made(shape="res", shuffled=True)
    y = dealt.weights(rollout)
    assert not torch.equal(y, own)
    for rows in (slice(0, 6), slice(6, 12)):
        assert sorted(y[rows].tolist()) == sorted(own[rows].tolist())
    order = torch.randperm(12, generator=generator(1))
    assert torch.allclose(dealt.weights(rollout.rows(order)), y[order], atol=1e-6)
    dealt.observe({})
    assert not torch.equal(dealt.weights(rollout), y)
    again = made(shape="res", shuffled=True)
    again.load_state_dict(dealt.state_dict())
    assert torch.equal(again.weights(rollout), dealt.weights(rollout))


def test_random_labels_are_a_coin_that_no_answer_reaches() -> None:
    groups = [[0] * 40, [1] * 40]
    method = made(label="random")
    coin = method.reward(voted(*groups))["ettrl"]
    assert 20 < int(coin.sum()) < 60
    assert torch.equal(coin, method.reward(voted([0, 1] * 20, [-1] * 40))["ettrl"])
    method.observe({})
    assert not torch.equal(coin, method.reward(voted(*groups))["ettrl"])


# ------------------------------------------------------------------------------------------- who is trained on


def test_a_random_subset_is_trained_on_whatever_the_order_of_rows() -> None:
    rollout = voted([0] * 8, [0] * 3, [1] * 8)
    method = made(trained=5)
    kept = method.filter(rollout)
    assert kept.group_id.tolist() == [0] * 5 + [1] * 3 + [2] * 5
    order = torch.randperm(19, generator=generator(1))
    again = method.filter(rollout.rows(order))
    texts = [sorted(map(tuple, r.response_ids.tolist())) for r in (kept, again)]
    assert texts[0] == texts[1]
    first = made(trained=5, subset="first").filter(rollout)
    assert torch.equal(first.response_ids[:5], rollout.response_ids[:5])
    assert sorted(map(tuple, first.response_ids.tolist())) != texts[0]
    method.observe({})
    assert sorted(map(tuple, method.filter(rollout).response_ids.tolist())) != texts[0]


def test_the_subset_says_nothing_about_a_random_label() -> None:
    method = made(trained=8, trees=12, label="random", seed=3)
    rollout = voted([0] * 60)
    rewarded = compose([method]).reward(rollout)
    kept = method.filter(rewarded).require("reward", "test")
    assert 0 < float(kept.mean()) < 1


# ------------------------------------------------------------------------------------------- the tree


def grown(engine: ScriptedEngine | None = None, room: int = 12, first: int = 0, prompts: Any = PROMPTS,
          **settings: Any) -> Rollout:  # fmt: skip
    method = made(**settings)
    size = method.config.leaves
    return method.sample(
        engine or ScriptedEngine(shortest=2), prompts, size, Sampling(max_tokens=room, first=first), generator()
    )


def test_leaves_are_whole_responses_that_share_their_roots_prefix() -> None:
    rollout = grown()
    assert rollout.parent_id is not None
    assert rollout.prefix_length is not None
    assert rollout.branch_position is not None
    parents = rollout.parent_id.view(3, 15)
    assert parents[0].tolist() == [-1] * 3 + [0] * 4 + [1] * 4 + [2] * 4
    assert int(rollout.lengths.max()) <= 12  # prefix included
    assert bool((rollout.mask == rollout.response_mask).all())  # and learned from
    assert torch.equal(rollout.branch_position.clamp_min(0), rollout.prefix_length)
    entropy = rollout.statistics["token_entropy"]
    for group in range(3):
        for number in range(3):
            root = 15 * group + number
            n = int(rollout.lengths[root])
            ranked = sorted(range(n), key=lambda i: (-float(entropy[root, i]), i))[:2]
            own = [15 * group + 3 + 4 * number + i for i in range(4)]
            assert [int(rollout.prefix_length[i]) for i in own] == [ranked[0]] * 2 + [ranked[1]] * 2
            for i in own:
                kept = int(rollout.prefix_length[i])
                assert torch.equal(rollout.response_ids[i, :kept], rollout.response_ids[root, :kept])


def test_a_root_shorter_than_n_forks_everywhere_it_can() -> None:
    rollout = grown(ScriptedEngine(length=1))
    assert len(rollout) == 3 * (3 + 3 * 2)  # position 0 alone: two fresh samples for each root
    assert rollout.prefix_length is not None
    assert not rollout.prefix_length.any()


def test_random_forks_lie_elsewhere_and_keep_the_numbers() -> None:
    entropy, random = grown(), grown(order="random")
    assert len(entropy) == len(random) == 45
    assert not torch.equal(entropy.require("prefix_length", "t"), random.require("prefix_length", "t"))
    assert torch.equal(entropy.require("parent_id", "t"), random.require("parent_id", "t"))


def test_options_of_the_fork() -> None:
    plain, kept, masked = grown(), grown(keep_fork_token=True), grown(learn_prefix=False)
    roots = plain.require("parent_id", "t") < 0
    more = kept.require("prefix_length", "t") - plain.require("prefix_length", "t")
    assert set(more[~roots].tolist()) <= {0, 1}
    assert bool((more[~roots] == 1).any())
    assert not more[roots].any()
    place = torch.arange(masked.response_ids.shape[1])
    copied = place < masked.require("prefix_length", "t")[:, None]
    assert torch.equal(masked.mask, masked.response_mask & ~copied)


def test_entropy_of_the_leaf_or_of_its_new_tokens() -> None:
    rollout = grown()
    leaf, new = made(shape="res").weights(rollout), made(shape="res", entropy_over="new").weights(rollout)
    roots = rollout.require("parent_id", "t") < 0
    assert not torch.allclose(leaf[~roots], new[~roots])
    entropy, sampled = rollout.statistics["token_entropy"], rollout.sampled
    h = entropy.masked_fill(~sampled, 0).sum(1) / sampled.sum(1)
    expected = torch.cat([2 - part / part.mean() for part in h.view(3, 15)])
    assert torch.allclose(new, expected, atol=1e-5)


def test_a_prompts_tree_does_not_depend_on_the_prompts_beside_it() -> None:
    together = grown(order="random")
    parts = [grown(order="random", first=0, prompts=PROMPTS[:1]), grown(order="random", first=1, prompts=PROMPTS[1:])]
    apart = [row[:n] for part in parts for row, n in zip(part.response_ids.tolist(), part.lengths, strict=True)]
    assert apart == [row[:n] for row, n in zip(together.response_ids.tolist(), together.lengths, strict=True)]


def test_presets_differ_where_the_card_says() -> None:
    owners = {name: compose([build("ettrl", {"preset": name})]).owner for name in ETTRL.presets}
    samples = {name: owner("sample") is not None for name, owner in owners.items()}
    assert samples == {"paper": True, "released": False, "adv_res": False, "adv_clip": False, "tiny": True}
    rollout = voted([0, 0, 1, 1, 2, 2] * 10)
    kept = {name: build("ettrl", {"preset": name}).filter(rollout) for name in ("paper", "released")}  # type: ignore[attr-defined]
    assert len(kept["paper"]) == len(kept["released"]) == 32
    assert not torch.equal(kept["paper"].response_ids, kept["released"].response_ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trees": 0}, "methods.ettrl.trees must be at least 1"),
        ({"forks": -1}, "methods.ettrl.forks must not be negative"),
        ({"branches": 0}, "methods.ettrl.branches must be at least 1; forks: 0 grows no branch"),
        ({"trained": 16}, r"methods.ettrl.trained must not exceed M \(1 \+ BN\) = 15 leaves"),
        ({"beta": 0.0}, "methods.ettrl.beta must be positive"),
        ({"y_min": 1.5}, "methods.ettrl.y_min must be at most 1"),
        ({"shape": "rse"}, "did you mean 'res'"),
        ({"learn_prefix": False, "shape": "res"}, "methods.ettrl.entropy_over must be 'new'"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**settings)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"group_size is 16, but methods.ettrl.trees = 3, .*set rollout.group_size=15"):
        made().sample(ScriptedEngine(), PROMPTS, 16, Sampling(), generator())
    engine = ScriptedEngine()
    engine.turns = object()
    with pytest.raises(UserError, match="method 'ettrl' cannot fork inside an episode"):
        grown(engine)


# ------------------------------------------------------------------------------------------- with a policy


@pytest.mark.parametrize("learn", [True, False])
def test_a_leaf_has_the_log_probs_of_its_whole_sequence_and_tokens_are_counted_once(
    tiny_s: Policy, learn: bool
) -> None:
    engine = Meter(TransformersEngine(tiny_s))
    prompts = [list(p.prompt_ids) for p in countdown.problems(6, 0)]
    method = made(learn_prefix=learn)
    rollout = method.sample(engine, prompts, 15, Sampling(max_tokens=24, rows=37), generator(2))
    whole = rollout.with_(action_mask=rollout.response_mask)
    logprob, _ = scored(tiny_s.model, whole, 16)
    assert float((logprob - rollout.behaviour_logprob)[rollout.response_mask].abs().max()) < 1e-4
    counts = token_counts(rollout)
    prefixes = int(rollout.require("prefix_length", "t").sum())
    assert counts.generated == engine.tokens
    assert counts.independent == int(rollout.lengths.sum()) == counts.generated + prefixes
    assert counts.trained == counts.generated + prefixes * learn
    assert prefixes > 100


# ------------------------------------------------------------------------------------------- training

RUN = [*TINY_RUN, "rollout.group_size=15", "optimizer.lr=1e-3", "optimizer.warmup=0", "logging.samples=0"]


def lines(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory")
    return [{k: str(v) for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["methods.ettrl={preset: tiny, order: random, shape: res, shuffled: true, trained: 9}"]]
)
def test_a_resumed_run_is_the_uninterrupted_one(more: list[str], tmp_path: Path) -> None:
    config = load_config("ettrl/tiny", [*RUN, *more, "checkpoint.every=2", "steps=4"])
    Trainer(config, tmp_path / "straight").run()
    Trainer(config, tmp_path / "cut", stop=iter([False, True]).__next__).run()
    Trainer(config, tmp_path / "cut", resume=True).run()
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "straight")]
    assert weights[0] == weights[1]
    last = lines(tmp_path / "straight")[-1]
    assert {"ettrl.label_accuracy", "ettrl.majority_ratio", "ettrl.token_ratio"} <= set(last)
    assert float(last["ettrl.token_ratio"]) < 1


@pytest.mark.slow
def test_poisoned_labels_change_nothing_but_the_measured_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("ettrl/tiny", [*RUN, "steps=3", "rollout.prompts=4", "rollout.max_tokens=32"])
    Trainer(config, tmp_path / "true").run()
    honest = CountdownTask.grade

    def poisoned(self: Any, problem: Any, text: str, finished: bool) -> Any:
        verdict = honest(self, problem, text, finished)
        return replace(verdict, correct=not verdict.correct, answer=str(len(text)), reason="poisoned")

    monkeypatch.setattr(CountdownTask, "grade", poisoned)
    Trainer(config, tmp_path / "poisoned").run()
    true, other = (lines(tmp_path / name) for name in ("true", "poisoned"))
    differs = {name for row, wrong in zip(true, other, strict=True) for name in row if row[name] != wrong.get(name)}
    assert "ettrl.label_accuracy" in differs
    for name in ("reward", "loss", "grad_norm", "ettrl.majority_ratio", "generated_tokens"):
        assert name not in differs
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("true", "poisoned")]
    assert weights[0] == weights[1]
