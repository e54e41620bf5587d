"""SPEAR: golden values, its loss with replayed rows, the life cycle in the loop's own order, and awkward input."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout, ready_rollout, sampled_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.groups import varied_groups
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.rows import tool_calls, with_replayed
from rlvr_lab.errors import UserError
from rlvr_lab.methods import Pipeline, build, compose
from rlvr_lab.methods.spear import Spear, SpearConfig, covariance_clip, replay_weight, tool_weight
from rlvr_lab.policy.load import Policy
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.update import Updater, UpdateTotals

LARGE = 1000
"""First token of a response, plus its number: what tells responses apart."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def episodes(rewards: list[list[float]], calls: int = 1, seed: int = 0) -> Rollout:
    """Groups of episodes of six tokens; each call is one told token. Log-probs and prompts are random."""
    size = len(rewards[0])
    count = size * len(rewards)
    rollout = make_rollout([6] * count, group_size=size, seed=seed)
    action = torch.ones(count, 6, dtype=torch.bool)
    action[:, 1 : 1 + 2 * calls : 2] = False
    ids = rollout.response_ids.clone()
    ids[:, 0] = LARGE * (seed + 1) + torch.arange(count)
    reward = torch.tensor(rewards).flatten()
    components = {"correct": reward}
    answer = tuple("x" for _ in range(count))
    return rollout.with_(
        action_mask=action, reward=reward, reward_components=components, response_ids=ids, answer=answer
    )


def spear(**own: Any) -> Spear:
    """Dr.BoT's filters off, unless asked for."""
    defaults: dict[str, Any] = {"keep_groups": 1.0, "mask_unreadable": False, "length": 6, "buffer": 2}
    return Spear(SpearConfig(**defaults | own))


def turn(method: Spear, rollout: Rollout) -> tuple[Rollout, Tensor] | None:
    """One step as the loop asks the hooks for it."""
    rollout = method.filter(rollout)
    found = method.replay(rollout, method.advantage(rollout))
    method.observe({})
    return found


def stored(method: Spear) -> list[int]:
    rollout = method.memory.buffer.rollout
    return [] if rollout is None else rollout.response_ids[:, 0].tolist()


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "spear.json")}
    assert len(problems) == 9
    assert not any(problems.values()), problems


# --------------------------------------------------------------------------------------------------- reward, filter


def test_a_call_is_counted_where_the_policy_was_told_something() -> None:
    for calls in (0, 1, 2):
        assert tool_calls(episodes([[1.0, 0.0]], calls)).tolist() == [calls, calls]
    rollout = make_rollout([6, 4])
    told_twice_in_a_row = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]]).bool()
    # an observation at the very beginning answers nothing, padding is no observation
    counted = tool_calls(rollout.with_(action_mask=told_twice_in_a_row & rollout.response_mask))
    assert counted.tolist() == [2, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.floats(0, 2))
def test_curricula_start_and_end_where_they_should(step: int, warmup: int, decay: int, coefficient: float) -> None:
    gamma, mu = replay_weight(step, warmup, coefficient), tool_weight(step, decay)
    assert 0 <= gamma <= coefficient
    assert 0 <= mu <= 1
    assert gamma <= replay_weight(step + 1, warmup, coefficient) + 1e-12
    assert mu >= tool_weight(step + 1, decay) - 1e-12
    if step >= warmup:
        assert gamma == pytest.approx(coefficient)
    if step >= decay:
        assert mu == pytest.approx(0)
    assert replay_weight(0, warmup, coefficient) == (0 if warmup else coefficient)
    assert tool_weight(0, decay) == (1 if decay else 0)


def test_the_tool_reward_is_paid_for_wrong_answers_and_fades() -> None:
    method = spear(decay=2, per_call=0.4, cap=0.5)
    pipeline, rollout = compose([method]), episodes([[1.0, 0.0]], 2)
    totals = []
    for _ in range(4):
        totals.append(pipeline.reward(rollout).require("reward", by="test").tolist())
        method.observe({})
    assert totals[0] == pytest.approx([1.5, 0.5])
    assert totals[1] == pytest.approx([1.25, 0.25])
    assert totals[2] == totals[3] == [1.0, 0.0]
    assert spear(tool_reward="constant", decay=0).reward(rollout)["tool_calls"].tolist() == pytest.approx([0.2, 0.2])
    assert spear(tool_reward="none").reward(rollout) == {}


def test_turns_can_be_counted_in_place_of_calls() -> None:
    rollout = episodes([[1.0, 0.0]], 1).with_(turn_id=torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]]))
    assert spear(count="turns").reward(rollout)["tool_calls"].tolist() == pytest.approx([0.3, 0.1])
    with pytest.raises(UserError, match=r"'turn_id'.* a multi-turn environment"):
        spear(count="turns").reward(rollout.with_(turn_id=None))


def test_the_history_sees_all_groups_and_the_loss_those_that_vary() -> None:
    rewards = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.5, 1.0]]
    method = spear(keep_groups=0.5)
    rollout = method.filter(episodes(rewards))
    assert rollout.prompt_id.unique().tolist() == [1, 3]  # type: ignore[no-untyped-call]
    method.replay(rollout, method.advantage(rollout))
    assert method.memory.means.steps == [[1.0, 0.5, 0.0, 0.75]]


def test_at_least_one_group_is_left() -> None:
    reward, groups = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([7, 7, 3, 3])
    assert varied_groups(reward, groups, 0.1).tolist() == [False, False, True, True]
    assert varied_groups(torch.ones(4), groups, 0.5).tolist() == [False, False, True, True]
    undefined = torch.tensor([math.nan, 1.0, 0.0, 1.0])
    assert varied_groups(undefined, groups, 0.5).tolist() == [False, False, True, True]


def test_cut_and_unreadable_responses_teach_nothing_and_count_in_the_mean() -> None:
    rollout = episodes([[1.0, 0.0, 0.0, 0.0]])
    rollout = rollout.with_(finished=torch.tensor([True, False, True, True]), answer=("a", "b", None, "c"))
    method = spear(mask_unreadable=True)
    filtered = method.filter(rollout)
    assert filtered.mask.any(1).tolist() == [True, False, False, True]
    value = compose([method]).advantage(filtered)
    assert value[:, 0].tolist() == pytest.approx([0.75, 0.0, 0.0, -0.25])


# ------------------------------------------------------------------------------------------------------- life cycle


def test_a_step_draws_before_it_drops_and_stores() -> None:
    method = spear(buffer=2, fill=1.5, tolerance=5)
    good = [[1.0, 0.0], [1.0, 0.0]]
    assert turn(method, episodes(good, seed=0)) is None
    assert turn(method, episodes(good, seed=1)) is None
    assert stored(method) == [1000, 1002, 2000, 2002]
    found = turn(method, episodes(good, seed=2))
    assert found is not None
    rows, advantage = found
    assert len(rows) == 2
    assert set(rows.response_ids[:, 0].tolist()) < {1000, 1002, 2000, 2002}
    assert torch.equal(advantage, 0.5 * rows.mask)  # 1 - P50 of six groups at a half
    assert stored(method) == [3000, 3002]  # emptied, then this step's
    figures = method.metrics()
    assert figures["buffer"] == 2
    assert 1 <= figures["replay_age"] <= figures["replay_age_max"] <= 2


def test_replayed_rows_are_those_that_were_stored() -> None:
    """Nothing is recomputed: log-probs, masks and prompts are bit by bit those of the step that stored them."""
    method, given = spear(buffer=2), [episodes([[1.0, 0.0], [1.0, 0.0]], seed=s) for s in range(3)]
    rows, _ = [turn(method, rollout) for rollout in given][-1] or pytest.fail("nothing replayed")
    for i, number in enumerate(rows.response_ids[:, 0].tolist()):
        source = given[number // LARGE - 1].rows(torch.tensor([number % LARGE]))
        one = rows.rows(torch.tensor([i]))
        for name in ("behaviour_logprob", "old_logprob", "action_mask", "response_ids", "prompt_ids", "reward"):
            assert torch.equal(getattr(one, name), getattr(source, name)), name


def test_the_order_in_which_rows_arrive_does_not_matter() -> None:
    first, second = spear(buffer=4), spear(buffer=4)
    for step in range(5):
        rollout = episodes([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]], seed=step)
        order = torch.randperm(len(rollout), generator=generator(step))
        found = [turn(first, rollout), turn(second, rollout.rows(order))]
        assert (found[0] is None) == (found[1] is None)
        if found[0] is not None and found[1] is not None:
            assert found[0][0].response_ids.tolist() == found[1][0].response_ids.tolist()
    assert stored(first) == stored(second)


def test_padding_that_an_engine_left_does_no_harm() -> None:
    """No response is as wide as the record, as where an engine pads to the limit."""
    short = torch.arange(6) < 4
    rollout = episodes([[1.0, 0.0], [1.0, 0.0]])
    padded = rollout.with_(
        response_mask=rollout.response_mask & short, action_mask=rollout.action_mask & short, finished=rollout.finished
    )
    method = spear()
    turn(method, padded)
    assert stored(method) == [1000, 1002]
    assert method.memory.buffer.advantage.shape == (2, 4)


def test_old_responses_are_dropped_relative_to_the_newest_stored() -> None:
    method = spear(buffer=LARGE, tolerance=2)
    good, bad = [[1.0, 0.0]], [[0.0, 0.0]]
    for step, rewards in enumerate([good, bad, good, good, good, bad, bad, bad]):
        turn(method, episodes(rewards, seed=step))
    # the newest is that of step 4; nothing newer has been stored since, however many steps ago that was
    assert stored(method) == [3000, 4000, 5000]
    assert spear(tolerance=99).memory.tolerance == 99
    long = spear(buffer=LARGE, tolerance=99)
    for step in range(14):
        turn(long, episodes(good, seed=step))
    assert int(long.memory.buffer.step[-2] - long.memory.buffer.step[0]) == 10


def test_stored_advantages_can_decay_in_place_of_being_judged_again() -> None:
    method = spear(buffer=2, weight_decay=0.5)
    easy = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    for step in range(4):
        turn(method, episodes(easy, seed=step))
    assert method.memory.means.median() == 1.0
    rows, advantage = turn(method, episodes(easy, seed=9)) or pytest.fail("nothing replayed")
    assert torch.equal(advantage, 0.25 * rows.mask)
    judged = spear(buffer=2)
    assert [turn(judged, episodes(easy, seed=step)) for step in range(6)] == [None] * 6  # P50 = 1: intended


def test_continuous_replay_keeps_a_queue() -> None:
    method = spear(schedule="continuous", buffer=4)
    found = [turn(method, episodes([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], seed=step)) for step in range(4)]
    assert [0 if one is None else len(one[0]) for one in found] == [0, 2, 4, 4]
    assert stored(method) == [3004, 4000, 4002, 4004]


def test_without_replay_nothing_is_stored() -> None:
    method = spear(schedule="never")
    assert [turn(method, episodes([[1.0, 0.0]], seed=step)) for step in range(9)] == [None] * 9
    assert stored(method) == []
    assert len(method.memory.means) == 9


def test_what_is_stored_is_a_setting() -> None:
    mixed = episodes([[1.0, 0.0], [1.0, 1.0]], calls=0)
    for own, expected in (({}, [1000]), ({"store_zero": True}, [1000, 1002, 1003]), ({"needs_call": True}, [])):
        method = spear(**own)
        turn(method, mixed)
        assert stored(method) == expected, own
    assert method.notices() == ["method 'spear' stores no success without a tool call (methods.spear.needs_call)"]
    turn(method, episodes([[1.0, 0.0]], calls=1, seed=1))
    assert stored(method) == [2000]
    assert method.notices() == []


def test_state_goes_on_where_it_stood() -> None:
    rewards = [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    straight = spear(buffer=4)
    for step in range(2):
        turn(straight, episodes(rewards, seed=step))
    resumed = spear(buffer=4)
    resumed.load_state_dict(straight.state_dict())
    assert (resumed.gamma, resumed.mu) == (straight.gamma, straight.mu) != (0.0, 1.0)
    for step in range(2, 9):
        one, other = (turn(method, episodes(rewards, seed=step)) for method in (straight, resumed))
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one[0].response_ids.tolist() == other[0].response_ids.tolist()
            assert torch.equal(one[1], other[1])
    assert stored(straight) == stored(resumed)


# -------------------------------------------------------------------------------------------------------- awkward


def test_a_buffer_smaller_than_a_batch_gives_what_it_holds() -> None:
    method = spear(buffer=3)
    rewards = [[1.0] * 6 + [0.0] * 6] * 3  # 18 successes a step
    sizes = [0 if (one := turn(method, episodes(rewards, seed=step))) is None else len(one[0]) for step in range(3)]
    assert sizes == [0, 3, 3]
    assert len(method.memory.buffer) == 18


def test_no_success_stores_nothing_and_no_history_takes_the_mean_of_the_stored() -> None:
    method = spear()
    assert turn(method, episodes([[0.0, 0.0], [0.0, 0.0]])) is None
    assert stored(method) == []
    assert method.memory.draw(generator()) is None
    figures = method.metrics()
    assert figures["buffer"] == 0
    assert math.isnan(figures["replay_age"])
    assert math.isnan(figures["replay_clip_fraction"])
    turn(method, episodes([[1.0, 0.0], [0.5, 0.0]], seed=1))
    method.memory.means.steps = []
    assert method.memory.baseline() == pytest.approx(0.75)


def test_a_single_candidate_is_not_replayed_and_the_buffer_is_emptied_all_the_same() -> None:
    method = spear(buffer=1, fill=0.5)
    turn(method, episodes([[1.0, 0.0]]))
    assert stored(method) == [1000]
    assert turn(method, episodes([[0.0, 0.0]], seed=1)) is None
    assert stored(method) == []


def test_equal_advantages_leave_nothing_to_clip() -> None:
    logprob = -torch.rand(3, 5, generator=generator())
    mask = torch.ones(3, 5, dtype=torch.bool)
    found = covariance_clip(logprob, logprob, torch.ones(3, 5), mask, (0.2, 0.28), (0.0, 5.0), 0.5, generator())
    assert not found.covariance.any()
    assert len(found.places) == 0
    varied = torch.rand(3, 5, generator=generator(1))
    one = covariance_clip(logprob, logprob, varied, mask, (0.2, 0.28), (0.0, 5.0), 1e-9, generator())
    assert len(one.places) == 1  # at least one, however small the share
    none = covariance_clip(logprob, logprob, varied, mask, (0.2, 0.28), (0.0, 5.0), 0.0, generator())
    assert len(none.places) == 0


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"schedule": "sequential"}, r"methods.spear.schedule 'sequential' .* is not carried: .*use when_full"),
        ({"schedule": "when_fall"}, "must be one of when_full, .*did you mean 'when_full'"),
        ({"tool_reward": "linear"}, "methods.spear.tool_reward must be one of"),
        ({"count": "tokens"}, "methods.spear.count must be one of"),
        ({"buffer": 0}, "methods.spear.buffer must be at least 1, not 0"),
        ({"length": 0}, "methods.spear.length must be at least 1"),
        ({"keep_groups": 0.0}, r"methods.spear.keep_groups must lie in \(0, 1\]"),
        ({"weight_decay": 0.0}, r"methods.spear.weight_decay must lie in \(0, 1\] or be null"),
        ({"tolerance": -1}, "methods.spear.tolerance must not be negative"),
        ({"replay_ratio": 2.0}, "methods.spear.replay_ratio must be a fraction"),
        ({"low": 6.0}, r"methods.spear.low must not exceed high \(5.0\)"),
        ({"dual_clip": 1.0}, "methods.spear.dual_clip must be above 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(own: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build("spear", own)
    assert "\n" not in str(caught.value)


def test_a_curriculum_longer_than_the_run_is_said() -> None:
    method = Spear(SpearConfig(warmup=30, decay=10))
    method.check_run(100, 20)
    assert [text.split(",")[0] for text in method.notices()] == ["methods.spear.warmup is 30"]
    assert method.notices() == []


# ------------------------------------------------------------------------------------------------------- the update


@pytest.fixture(scope="module")
def old_and_new(tiny_s: Policy) -> tuple[Rollout, Rollout]:
    """Two rollouts of a model, scored, with ratios on both sides of 1."""
    pipeline = compose([spear()])
    first, second = (ready_rollout(tiny_s.model, sampled_rollout(tiny_s, seed=seed), pipeline) for seed in (0, 1))
    # what the lab calls behaviour is what a replayed ratio is taken against
    return first, second.with_(behaviour_logprob=second.require("old_logprob", by="test"))


def joined(pipeline: Pipeline, old_and_new: tuple[Rollout, Rollout]) -> tuple[Rollout, Tensor]:
    new, old = old_and_new
    good = (old.require("reward", by="test") > 0).nonzero().squeeze(1)[:5]
    rows = old.rows(good)
    return with_replayed(new, pipeline.advantage(new), rows, 0.5 * rows.mask)


def gradient(method: Spear, model: Any, batch: Rollout, advantage: Tensor, rows: int = 50) -> tuple[float, Tensor]:
    updater = Updater(model, torch.optim.SGD(model.parameters()), compose([method]), micro_batch_rows=rows)
    model.zero_grad(set_to_none=True)
    loss = updater.accumulate(batch, advantage, UpdateTotals(), generator())
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    model.zero_grad(set_to_none=True)
    return loss, found


def at(step: int, **own: Any) -> Spear:
    method = spear(**{"length": 20, "warmup": 8, **own})
    method.draws.step = step
    return method


def test_the_loss_is_the_new_one_plus_gamma_times_the_replayed_one(tiny_s: Policy, old_and_new: Any) -> None:
    off = {"ratio": 0.0, "replay_ratio": 0.0}
    batch, advantage = joined(compose([spear()]), old_and_new)
    kinds = [(batch.replayed == kind).nonzero().squeeze(1) for kind in (False, True)]
    parts = []
    for rows in kinds:
        some = batch.rows(rows).with_(replayed=None)
        parts.append(gradient(at(0, **off), tiny_s.model, some, advantage[rows, : some.response_ids.shape[1]]))
    for step, gamma in ((0, 0.0), (4, 0.5), (8, 1.0), (99, 1.0)):
        loss, found = gradient(at(step, **off), tiny_s.model, batch, advantage)
        expected = parts[0][1] + gamma * parts[1][1]
        assert loss == pytest.approx(parts[0][0] + gamma * parts[1][0], abs=1e-6)
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float(parts[1][1].abs().max()) > 1e-4


def test_an_update_with_replayed_rows_is_the_same_however_it_is_split(tiny_s: Policy, old_and_new: Any) -> None:
    method = at(5, ratio=0.1, replay_ratio=0.1, low=-9.0, replay_low=-9.0, high=9.0, replay_high=9.0)
    batch, advantage = joined(compose([method]), old_and_new)
    whole = gradient(method, tiny_s.model, batch, advantage)
    order = torch.randperm(len(batch), generator=generator(3))
    shuffled = batch.rows(order)
    other = advantage[order][:, : shuffled.response_ids.shape[1]]
    for found in (
        *(gradient(method, tiny_s.model, batch, advantage, rows) for rows in (1, 3)),
        gradient(method, tiny_s.model, shuffled, other),
    ):
        assert found[0] == pytest.approx(whole[0], abs=1e-5)
        assert float((found[1] - whole[1]).abs().max()) < 1e-4 * float(whole[1].abs().max())


def test_tokens_are_dropped_among_each_kind_by_its_own_setting(tiny_s: Policy, old_and_new: Any) -> None:
    wide = {"low": -9.0, "high": 9.0, "replay_low": -9.0, "replay_high": 9.0}

    def dropped(**own: Any) -> list[int]:
        method = at(99, **{**wide, **own})
        batch, advantage = joined(compose([method]), old_and_new)
        updater = Updater(tiny_s.model, torch.optim.SGD(tiny_s.model.parameters()), compose([method]))
        ready = updater.prepare(batch, advantage, generator())
        weight, mask = ready.weights["spear"], ready.rollout.mask
        assert batch.replayed is not None
        tokens = [int((mask & (weight == 0))[batch.replayed == kind].sum()) for kind in (False, True)]
        # they stay in the denominator
        for kind, reduced in ((False, 1.0), (True, 1.0)):
            rows = batch.replayed == kind
            share = mask[rows] / (rows.sum() * 20.0)
            assert torch.allclose(ready.reductions[None][rows], reduced * share)
        return tokens

    batch, _ = joined(compose([spear()]), old_and_new)
    assert batch.replayed is not None
    counts = [int(batch.mask[batch.replayed == kind].sum()) for kind in (False, True)]
    assert dropped(ratio=0.1, replay_ratio=0.0) == [int(0.1 * counts[0]), 0]
    assert dropped(ratio=0.0, replay_ratio=0.2) == [0, int(0.2 * counts[1])]
    assert dropped(ratio=1e-9, replay_ratio=1e-9) == [1, 1]


def test_the_dual_clip_acts_only_without_a_covariance_clip(tiny_s: Policy, old_and_new: Any) -> None:
    new = old_and_new[0]
    far = new.with_(old_logprob=new.require("old_logprob", by="test") - 5.0)
    advantage = -torch.ones(far.response_ids.shape).masked_fill(~far.mask, 0.0)
    capped, free = (
        gradient(at(0, ratio=0.0, dual_clip=dual), tiny_s.model, far, advantage)[0] for dual in (10.0, None)
    )
    chosen = [gradient(at(0, ratio=0.5, dual_clip=dual), tiny_s.model, far, advantage)[0] for dual in (10.0, None)]
    assert capped < free / 5
    assert chosen[0] == chosen[1]


def test_the_loop_replays_and_says_how_much_the_clip_stopped(tiny_s: Policy, old_and_new: Any) -> None:
    model = copy.deepcopy(tiny_s.model)
    method = spear(buffer=2, length=20, warmup=0, keep_groups=1.0, tolerance=9)
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=1e-3), compose([method]), minibatches=2)
    seen = []
    for step in range(3):
        figures = updater.run(old_and_new[step % 2], generator(step), Clock(torch.device("cpu")), step)
        seen.append((figures["replayed_rows"], method.metrics()["replay_clip_fraction"]))
        method.observe({})
    assert seen[0][0] == 0
    assert math.isnan(seen[0][1])
    assert seen[1][0] == 2
    assert 0 <= seen[1][1] < 1


def test_presets_differ_where_text_and_code_do() -> None:
    """The covariance settings of replayed rows, the size of the loss, and what is stored without a tool call."""
    paper, released = (build("spear", {"preset": name}) for name in ("paper", "released"))
    assert isinstance(paper, Spear)
    assert isinstance(released, Spear)
    assert paper.reduction != released.reduction
    for method, count in ((paper, 2), (released, 0)):
        rollout = episodes([[1.0, 0.0], [1.0, 0.0]], calls=0)
        method.replay(rollout, method.advantage(rollout))
        assert len(stored(method)) == count
    assert (paper.config.replay_ratio, released.config.replay_ratio) == (0.02, 0.0002)


def weights_and_metrics(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory")
    kept = [{k: str(v) for k, v in row.items() if not k.startswith(timed)} for row in rows]
    return (out / "model" / "model.safetensors").read_bytes(), kept


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Episodes with tools; replay before and after the kill, from a buffer that a checkpoint brought."""

    def config(steps: int) -> Any:
        own = "methods.spear={preset: tiny, buffer: 2, fill: 0.5, warmup: 2, keep_groups: 1.0}"
        lab = ["rollout.prompts=4", "rollout.group_size=8", "rollout.max_tokens=96", f"steps={steps}"]
        return load_config("spear/tiny", [*TINY_RUN, own, *lab])

    Trainer(config(6), tmp_path / "straight").run()
    Trainer(config(6), tmp_path / "cut", stop=iter([False, False, True]).__next__).run()
    Trainer(config(6), tmp_path / "cut", resume=True).run()
    straight, cut = (weights_and_metrics(tmp_path / name) for name in ("straight", "cut"))
    assert cut == straight
    replayed = [float(row["replayed_rows"]) > 0 for row in straight[1]]
    assert any(replayed[:3])
    assert any(replayed[3:])
    assert replayed[3]  # from what the checkpoint held
    assert float(straight[1][2]["spear.buffer"]) > 0
