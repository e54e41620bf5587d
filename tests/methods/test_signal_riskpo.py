"""RiskPO: golden values, what its definition promises whatever the input, and input that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import GOLDEN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, riskpo
from rlvr_lab.methods._bundles import Bundles, consecutive_bundles, form_bundles, slots
from rlvr_lab.methods.riskpo import RiskPO, RiskPOConfig
from rlvr_lab.testing.golden import replay_file

SEEDS = st.integers(0, 10_000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollout_of(reward: list[float], group_size: int, seed: int = 0, **fields: Any) -> Rollout:
    record = make_rollout([3 + i % 4 for i in range(len(reward))], group_size=group_size, seed=seed)
    return record.with_(reward=torch.tensor(reward), **fields)


def first(method: RiskPO, rollout: Rollout) -> torch.Tensor:
    return method.advantage(rollout)[:, 0]


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "riskpo.json")}
    assert len(problems) == 7
    assert not any(problems.values()), problems


# ---------------------------------------------------------------------------------------------------- the functional


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0, 6))
def test_the_averse_advantage_is_never_positive_and_rises_to_zero_with_the_score(seed: int, omega: float) -> None:
    low, high = (4 * torch.rand(2, generator=generator(seed), dtype=torch.float64)).sort().values
    score = torch.linspace(-1, 6, 141, dtype=torch.float64)
    value = riskpo.mixed_value_at_risk(score, low, high, omega)
    assert (value <= 1e-12).all()
    assert (value[score >= high].abs() < 1e-12).all()
    assert (value.diff() >= -1e-12).all()
    tail = value[score <= low].diff()
    assert torch.allclose(tail, torch.full_like(tail, (1 + omega) * 0.05))  # the slope in the tail


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.05, 0.45), st.floats(0.55, 0.95), st.floats(0.0, 4.0))
def test_the_release_mixes_the_papers_functional_up_to_a_factor(seed: int, down: float, up: float, w: float) -> None:
    score = 5 * torch.rand(12, generator=generator(seed), dtype=torch.float64)
    low, high = score.quantile(torch.tensor([down, up], dtype=torch.float64))
    paper = riskpo.mixed_value_at_risk(score, low, high, w * (up - down) / down - 1)
    plain = riskpo.risk_advantage(score, low, high, (down, up), "averse", "plain", w)
    released = riskpo.risk_advantage(score, low, high, (down, up), "averse", "levels", w, eps=0.0)
    assert torch.allclose(plain, paper)
    assert torch.allclose(released * (up - down) * (w + 1), paper)


def test_the_weight_of_the_tail_is_the_cards() -> None:
    config = RiskPOConfig()
    omega = config.tail_weight * (config.high - config.low) / config.low - 1
    assert omega == pytest.approx(3.5)
    value = riskpo.mixed_value_at_risk(torch.tensor([0.0, 1.0, 2.0, 3.0]), 1.0, 3.0, 3.5)
    assert value.tolist() == [-6.5, -2.0, -1.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_averse_advantage_ascends_the_objective(seed: int) -> None:
    """A is the derivative of J = (1 + omega) E[R; R <= q_a] + E[R; q_a < R <= q_b] in the share of each score, up to a
    constant: moving mass from one score to another changes J by the difference of their A."""
    omega, a, b = 2.0, 0.3, 0.7
    score = torch.arange(40, dtype=torch.float64) + 0.01 * torch.rand(40, generator=generator(seed)).double()
    share = torch.rand(40, generator=generator(seed + 1)).double() + 0.2
    share = share / share.sum()

    def objective(p: torch.Tensor) -> float:
        edge = torch.cat([torch.zeros(1, dtype=p.dtype), p.cumsum(0)])
        tail = edge.clamp(max=a).diff()
        body = edge.clamp(a, b).diff()
        return float(((1 + omega) * tail * score + body * score).sum())

    cumulative = share.cumsum(0)
    low, high = (float(score[int((cumulative < level).sum())]) for level in (a, b))
    value = riskpo.mixed_value_at_risk(score, low, high, omega)
    i, j = (int(x) for x in torch.randperm(40, generator=generator(seed + 2))[:2])
    step = torch.zeros(40, dtype=torch.float64)
    step[i], step[j] = 1e-7, -1e-7
    change = (objective(share + step) - objective(share - step)) / 2e-7
    if min(abs(float(cumulative[k]) - level) for k in range(40) for level in (a, b)) > 1e-6:
        assert change == pytest.approx(float(value[i] - value[j]), abs=1e-5)


def test_the_seeking_control_favours_the_upper_tail() -> None:
    score = torch.tensor([0.0, 1.0, 3.0, 5.0])
    low, high = torch.tensor(1.0), torch.tensor(3.0)
    value = riskpo.risk_advantage(score, low, high, (0.2, 0.8), "seeking")
    assert value.tolist() == pytest.approx([-2.0, -2.0, 0.0, 9.0])  # nothing below q_a is told apart
    body = riskpo.risk_advantage(score, low, high, (0.2, 0.8), "body")
    assert body.tolist() == [-2.0, -2.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------------------- bundles


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_every_response_is_in_one_slot_and_none_is_lost(seed: int, groups: int, each: int, size: int) -> None:
    group = torch.arange(groups).repeat_interleave(each)[torch.randperm(groups * each, generator=generator(seed))]
    reward = torch.rand(groups * each, generator=generator(seed + 1), dtype=torch.float64)
    slot = slots(torch.rand(groups * each, generator=generator(seed + 2)), group)
    for g in group.unique():
        assert slot[group == g].sort().values.tolist() == list(range(each))
    found = form_bundles(reward, consecutive_bundles(group, size), slot)
    assert float(found.score.sum()) == pytest.approx(float(reward.sum()))
    assert len(found.score) == each * math.ceil(groups / size)
    assert int(found.members.sum()) == groups * each


def test_a_bundle_rescues_a_question_that_nobody_solved() -> None:
    reward = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    alone = first(RiskPO(RiskPOConfig(bundle_size=1, quantile_source="bundle")), rollout_of(reward, 4))
    together = first(RiskPO(RiskPOConfig(bundle_size=2, quantile_source="bundle")), rollout_of(reward, 4))
    assert alone[:4].tolist() == [0.0] * 4
    assert together[:4].unique().numel() > 1


def test_the_last_bundle_may_be_smaller_and_is_measured_on_the_scale_of_a_whole_one() -> None:
    method = RiskPO(RiskPOConfig(bundle_size=2))
    method.quantiles = [0.5, 1.5]
    value = first(method, rollout_of([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 2))
    assert value[4:].tolist() == [0.0, pytest.approx(-4.5 * 0.5 - 1.0)]  # a score of 1 of 1 counts as 2 of 2
    assert set(RiskPO(RiskPOConfig(bundle_size=2, quantile_source="bundle")).advantage(
        rollout_of([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 2)).flatten().isfinite().tolist()) == {True}  # fmt: skip


def test_bundles_that_a_selector_made_are_used() -> None:
    reward = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    method = RiskPO(RiskPOConfig(quantile_source="bundle"))  # of five, were they made here
    given = rollout_of(reward, 2, bundle_id=torch.tensor([7, 7, 3, 3, 7, 7, 3, 3]))
    assert first(method, given).tolist() == [0.0] * 8  # scores 0, 0 and 2, 2
    mixed = rollout_of(
        reward, 2, bundle_id=torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])[torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])]
    )
    assert method.advantage(mixed).shape == mixed.response_ids.shape


def test_unequal_groups_in_a_bundle_are_refused_by_name() -> None:
    rollout = rollout_of([0.0, 1.0, 1.0, 0.0], 2).rows(torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match=r"unequal numbers of responses.*methods\.riskpo\.bundle_size=1") as caught:
        RiskPO(RiskPOConfig(bundle_size=2)).advantage(rollout)
    assert "\n" not in str(caught.value)
    assert first(RiskPO(RiskPOConfig(bundle_size=1)), rollout).shape == (3,)


def test_a_bundle_larger_than_the_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"bundle_size is 5, but this rollout has 2 groups; lower it, or raise rollout"):
        RiskPO().advantage(rollout_of([0.0, 1.0, 1.0, 0.0], 2))


def test_a_filter_may_take_every_response() -> None:
    nothing = rollout_of([0.0, 1.0], 2).rows(torch.tensor([], dtype=torch.long))
    with pytest.raises(UserError, match="this rollout has 0 groups"):
        RiskPO().advantage(nothing)


@pytest.mark.parametrize("preset", list(RiskPO.presets))
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_rows_and_what_lies_under_the_mask_do_not_matter(preset: str, seed: int) -> None:
    reward = (torch.rand(24, generator=generator(seed)) < 0.5).float().tolist()
    rollout = rollout_of(reward, 4, seed)
    method = build("riskpo", {"preset": preset, "bundle_size": 2})
    assert isinstance(method, RiskPO)
    plain = first(method, rollout)
    order = torch.randperm(24, generator=generator(seed + 1))
    assert torch.equal(first(method, rollout.rows(order)), plain[order])
    ids = torch.where(rollout.response_mask, rollout.response_ids, 5)
    assert torch.equal(first(method, rollout.with_(response_ids=ids)), plain)


def test_permutations_differ_from_step_to_step_and_from_seed_to_seed() -> None:
    rollout = rollout_of((torch.rand(40, generator=generator(3)) < 0.5).float().tolist(), 8)
    method = RiskPO(RiskPOConfig(quantile_source="bundle"))
    one = first(method, rollout)
    assert torch.equal(first(method, rollout), one)
    method.observe({})
    assert not torch.equal(first(method, rollout), one)
    other = RiskPO(RiskPOConfig(quantile_source="bundle", seed=1))
    assert not torch.equal(first(other, rollout), one)


# ------------------------------------------------------------------------------------------------ quantiles and state


def test_quantiles_start_from_the_first_batch_and_move_after_they_were_used() -> None:
    method = RiskPO(RiskPOConfig(bundle_size=1, low=0.25, high=0.75))
    batch = rollout_of([0.0, 1.0, 2.0, 3.0], 4)
    first(method, batch)
    assert method.quantiles is None
    method.observe({})
    assert method.quantiles == pytest.approx([0.75, 2.25])
    used = first(method, rollout_of([4.0, 4.0, 4.0, 0.0], 4))
    assert used[0] == 0  # above the old upper quantile
    method.observe({})
    assert method.quantiles == pytest.approx([0.75 + 0.1 * (0.25 - 0.25), 2.25 + 0.1 * (0.75 - 0.25)])
    method.observe({})  # a step without a rollout moves nothing
    assert method.quantiles == pytest.approx([0.75, 2.3])


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_tracked_quantiles_come_to_the_quantiles_of_a_steady_stream(seed: int) -> None:
    levels = torch.tensor([0.2, 0.8], dtype=torch.float64)
    q, draws = torch.tensor([3.0, 3.0], dtype=torch.float64), generator(seed)
    late = []
    for step in range(4000):
        q = riskpo.track(q, levels, torch.rand(20, generator=draws, dtype=torch.float64), 0.01)
        late += [q] if step >= 2000 else []
    assert torch.stack(late).mean(0).tolist() == pytest.approx([0.2, 0.8], abs=0.03)


def test_a_checkpoint_carries_quantiles_and_permutations_on() -> None:
    method, restored = RiskPO(), RiskPO()
    for step in range(3):
        method.advantage(rollout_of((torch.rand(40, generator=generator(step)) < 0.5).float().tolist(), 8))
        method.observe({})
    assert method.state_dict()["step"] == 3
    restored.load_state_dict(method.state_dict())
    again = rollout_of((torch.rand(40, generator=generator(9)) < 0.5).float().tolist(), 8)
    assert torch.equal(restored.advantage(again), method.advantage(again))
    assert not torch.equal(RiskPO().advantage(again), method.advantage(again))
    fresh = RiskPO()
    fresh.load_state_dict(RiskPO().state_dict())
    assert fresh.quantiles is None


def test_a_bundle_of_equal_scores_is_not_blown_up() -> None:
    """Empirical quantiles give 0; tracked ones do not, and the release would divide by 1e-6."""
    equal = rollout_of([1.0, 1.0, 1.0, 1.0], 2)
    empirical = RiskPO(RiskPOConfig(bundle_size=2, divide_by_std=True, quantile_source="bundle"))
    assert not empirical.advantage(equal).any()
    tracked = RiskPO(RiskPOConfig(bundle_size=2, divide_by_std=True))
    tracked.quantiles = [3.0, 5.0]
    assert first(tracked, equal).tolist() == pytest.approx([-6.5] * 4)
    bundles = Bundles(torch.tensor([2.0, 2.0]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    raw = riskpo.divide_by_bundle_std(torch.tensor([-6.5, -6.5]), bundles, floor=-1.0)
    assert float(raw[0]) < -1e6


# ------------------------------------------------------------------------------------------------------------ credit


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_credit_modes_deal_out_what_they_say(seed: int) -> None:
    reward = (torch.rand(12, generator=generator(seed)) < 0.5).double()
    group = torch.arange(3).repeat_interleave(4)
    bundles = form_bundles(reward, torch.zeros(12, dtype=torch.long), slots(torch.arange(12), group))
    value = riskpo.mixed_value_at_risk(bundles.score, 1.0, 2.0, 3.5)
    uniform = riskpo.assign_credit(value, bundles, reward, group, "uniform")
    assert torch.equal(uniform, value[bundles.index])
    scored = riskpo.assign_credit(value, bundles, reward, group, "score")
    assert torch.allclose(scored, uniform * torch.where(reward > 0, 0.5, 1.5))
    shared = riskpo.assign_credit(value, bundles, reward, group, "sum-mean")
    totals = torch.zeros_like(value).index_add_(0, bundles.index, shared)
    assert torch.allclose(totals, value, atol=1e-9)  # a slot's advantage is divided, not changed


def test_sum_mean_credit_can_reward_wrong_and_punish_right_responses() -> None:
    """The card's remark on the hard-mathematics script: a slot above its questions' means may have A < 0."""
    wrong_rewarded = right_punished = 0
    for seed in range(20):
        solved = torch.rand(10, generator=generator(seed)).repeat_interleave(10)
        reward = (torch.rand(100, generator=generator(seed + 100)) < solved).float()
        value = first(RiskPO(RiskPO.presets["released"]), rollout_of(reward.tolist(), 10, seed))
        wrong_rewarded += int((value[reward == 0] > 0).sum())
        right_punished += int((value[reward == 1] < 0).sum())
        uniform = first(RiskPO(), rollout_of(reward.tolist(), 10, seed))
        assert (uniform <= 0).all()
    assert wrong_rewarded > 0
    assert right_punished > 0


def test_the_sign_control_is_the_negative_part_of_grpo() -> None:
    method = RiskPO(RiskPOConfig(functional="negative_only"))
    value = first(method, rollout_of([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 4))  # no bundle is needed
    assert value.tolist() == pytest.approx([0.0, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0], abs=1e-5)
    method.observe({})
    assert method.quantiles is None
    assert method.metrics()["negative"] == pytest.approx(3 / 8)
    assert math.isnan(method.metrics()["quantile_low"])


# --------------------------------------------------------------------------------------------------- settings, presets


def test_presets_differ_where_the_card_lists_a_difference() -> None:
    rollout = rollout_of((torch.rand(50, generator=generator(1)) < 0.4).float().tolist(), 10)
    found = {name: first(RiskPO(config), rollout) for name, config in RiskPO.presets.items() if name != "tiny"}
    assert not torch.allclose(found["paper"], found["released"])
    assert not torch.allclose(found["released"], found["released_easy"])
    assert RiskPO(RiskPO.presets["paper"]).has("surrogate")
    assert RiskPO(RiskPO.presets["paper"]).reduction == "sequence_mean_of_token_mean"
    token = RiskPO(RiskPO.presets["released"])
    assert not any(token.has(hook) for hook in ("surrogate", "clip", "reduction"))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"bundle_size": 0}, "bundle_size"),
        ({"bundle_size": 2.5}, "bundle_size"),
        ({"low": 0.9}, "low"),
        ({"high": 1.0}, "low"),
        ({"rate": 0.0}, "rate"),
        ({"tail_weight": -1.0}, "tail_weight"),
        ({"functional": "risk"}, "functional"),
        ({"credit": "summean"}, "credit"),
        ({"quantile_source": "track"}, "quantile_source"),
        ({"std_floor": -1.0}, "std_floor"),
        ({"surrogate": "gspo"}, "surrogate"),
        ({"clip": 0.0}, "clip"),
        ({"scale": "paper"}, "scale"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError, match=rf"methods\.riskpo\.{setting} must") as caught:
        build("riskpo", changes)
    assert "\n" not in str(caught.value)
