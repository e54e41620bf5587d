"""PEAR, CANON and UCAS: golden values, and what their definitions promise whatever the input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import GOLDEN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.advantages import dead_groups, group_advantage
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.rows import canonical_order
from rlvr_lab.methods import build, canon, compose, pear, ucas
from rlvr_lab.testing.golden import replay_file

SEEDS = st.integers(0, 10_000)
END, OTHER, WORD = 2, 3, 9


@pytest.mark.parametrize("card", ["pear", "canon", "ucas"])
def test_golden_file_is_reproduced(card):
    problems = {r.case: r.problem for r in replay_file(GOLDEN / f"{card}.json")}
    assert len(problems) >= 4
    assert not any(problems.values()), problems


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(seed: int, groups: int = 4, size: int = 4, width: int = 9) -> Rollout:
    """Ragged responses with all statistics that the three methods read; rewards of 0 and 1, group 0 all right."""
    g = generator(seed)
    lengths = torch.randint(1, width + 1, (groups * size,), generator=g).tolist()
    rollout = make_rollout(lengths, group_size=size, width=width, seed=seed)
    correct = torch.rand(groups * size, generator=g) < 0.5
    correct[:size] = True
    shape = rollout.response_ids.shape
    certainty, logit = (torch.rand(shape, generator=g) * scale + at for scale, at in ((3, 2), (8, -4)))
    return rollout.with_(correct=correct, reward=correct.float()).with_statistics(
        token_certainty=certainty, sampled_logit=logit
    )


def shuffled(rollout: Rollout, seed: int) -> tuple[Rollout, Tensor]:
    order = torch.randperm(len(rollout), generator=generator(seed + 7))
    return rollout.rows(order), order


def spoilt(rollout: Rollout) -> Rollout:
    """The same responses with nonsense under the mask."""
    outside = ~rollout.response_mask
    nonsense = {name: value.masked_fill(outside, math.nan) for name, value in rollout.statistics.items()}
    return rollout.with_(response_ids=rollout.response_ids.masked_fill(outside, END)).with_statistics(**nonsense)


# ------------------------------------------------------------------------------------------------------------ pear


def bound(**settings: Any) -> pear.PEAR:
    method = pear.PEAR(pear.PEARConfig(**settings))
    method.bind(lambda text: {"</think>": [END], "the end:": [WORD, OTHER, END]}.get(text, [0]))
    return method


def one_row(ids: list[int], entropy: list[float], correct: bool = True) -> Rollout:
    rollout = make_rollout([len(ids)], group_size=1)
    return rollout.with_(response_ids=torch.tensor([ids]), correct=torch.tensor([correct])).with_statistics(
        token_entropy=torch.tensor([entropy])
    )


CASES = {
    "between": ([9, 9, END, 9], [0.2, 0.4, 9.0, 0.1], 0.8),  # 1 - (0.3 - 0.1); the marker's own entropy plays no part
    "no marker": ([9, 9, 9, 9], [0.2, 0.4, 0.6, 0.4], 0.6),
    "marker last": ([9, 9, 9, END], [0.3, 0.3, 0.3, 9.0], 0.7),
    "empty thinking": ([END, 9, 9], [9.0, 0.5, 0.5], 1.0),
    "nothing but the marker": ([END], [9.0], 1.0),
    "several markers": ([9, END, 9, END, 9], [0.5, 9.0, 0.1, 0.2, 0.3], 1 - (0.5 - 0.2)),
    "answer more uncertain": ([9, END, 9], [0.1, 0.0, 0.9], 1.0),
    "beyond the score": ([9, 9, END, 9], [2.0, 2.0, 0.0, 0.0], -1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_right_answer_is_docked_by_the_difference_of_its_phases(name):
    ids, entropy, expected = CASES[name]
    assert float(bound().reward(one_row(ids, entropy))["pear"]) == pytest.approx(expected)
    assert float(bound(format_score=0.25).reward(one_row(ids, entropy, correct=False))["pear"]) == 0.25


def test_an_empty_response_has_no_penalty():
    rollout = make_rollout([0, 3]).with_(correct=torch.tensor([True, False]))
    assert bound().reward(rollout)["pear"].tolist() == [1.0, 0.0]


def test_a_marker_of_several_tokens_parts_the_phases_and_belongs_to_neither():
    ids, entropy = [9, 4, WORD, OTHER, END, 4, 4], [0.6, 0.4, 7.0, 7.0, 7.0, 0.1, 0.3]
    assert float(bound(marker="the end:").reward(one_row(ids, entropy))["pear"]) == pytest.approx(1 - (0.5 - 0.2))
    # a beginning of it is none; the whole response is thinking
    cut = one_row([9, WORD, OTHER, 4], [0.2, 0.4, 0.4, 0.2])
    assert float(bound(marker="the end:").reward(cut)["pear"]) == pytest.approx(0.7)


def test_of_several_forms_of_the_marker_the_first_in_the_response_counts():
    start, end = pear.find_marker(
        torch.tensor([[5, WORD, OTHER, END, 5], [5, END, WORD, OTHER, END], [5, 5, 5, 5, END]]),
        torch.tensor([[True] * 5, [True] * 5, [True] * 4 + [False]]),
        [[END], [WORD, OTHER, END]],
    )
    assert start.tolist() == [1, 1, -1]
    assert end.tolist() == [3, 1, -1]


@given(SEEDS)
def test_an_unmarked_token_is_no_marker_and_has_no_entropy(seed):
    rollout = rows(seed)
    assert torch.equal(bound().reward(rollout)["pear"], bound().reward(spoilt(rollout))["pear"])


@given(SEEDS, st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
def test_more_weight_on_the_answer_never_docks_more_and_rewards_stay_below_one(seed, alpha):
    rollout = rows(seed)
    rollout = rollout.with_(response_ids=torch.where(rollout.response_ids % 5 == 0, END, rollout.response_ids))
    less, more = (bound(alpha=a).reward(rollout)["pear"] for a in (alpha, alpha + 0.5))
    assert (more >= less - 1e-6).all()
    assert less.max() <= 1
    assert (less[~rollout.correct] == 0).all()


@given(SEEDS)
def test_the_shuffled_control_deals_the_same_penalties_to_right_answers_of_the_same_group(seed):
    rollout = rows(seed, groups=3, size=8)
    own, control = bound(), bound(penalty="shuffled", seed=seed)
    value, swapped = own.reward(rollout)["pear"], control.reward(rollout)["pear"]
    for group in range(3):
        right = (rollout.group_id == group) & rollout.correct
        assert swapped[right].sort().values.tolist() == pytest.approx(value[right].sort().values.tolist())
    assert torch.equal(swapped[~rollout.correct], value[~rollout.correct])
    again, order = shuffled(rollout, seed)
    assert torch.equal(control.reward(again)["pear"], swapped[order])  # asked again within the step, in another order


def test_the_shuffled_control_draws_anew_in_every_step_and_resumes():
    rollout = rows(3, groups=2, size=8)
    control, resumed = bound(penalty="shuffled"), bound(penalty="shuffled")
    first = control.reward(rollout)["pear"]
    assert not torch.equal(first, bound().reward(rollout)["pear"])
    control.observe({})
    resumed.load_state_dict(control.state_dict())
    second = control.reward(rollout)["pear"]
    assert not torch.equal(first, second)
    assert torch.equal(resumed.reward(rollout)["pear"], second)


def test_in_a_group_of_right_answers_the_advantage_is_the_penalty_alone_and_its_share_is_logged():
    rollout = rows(1)
    rollout = rollout.with_(correct=torch.arange(16) < 6, reward=None)
    pipeline = compose([build("grpo", {"preset": "tiny"}), method := bound()])
    graded, advantage = pipeline.credit(pipeline.reward(rollout))
    right = advantage[:4, 0]
    docked = 1 - graded.reward[:4]
    assert right.argsort().tolist() == docked.argsort(descending=True).tolist()
    assert float(right.std()) == pytest.approx(1, abs=1e-2)  # however small the differences are
    size = (advantage * graded.mask).abs().sum(1)
    assert method.metrics()["all_correct_share"] == pytest.approx(float(size[:4].sum() / size.sum()))
    without = compose([build("grpo", {}), build("dr_grpo", {}), bound()])
    assert torch.allclose(without.advantage(graded)[:4, 0], graded.reward[:4] - graded.reward[:4].mean(), atol=1e-6)


def test_figures_of_a_step():
    method = bound()
    method.reward(one_row([9, 9, END, 9], [0.2, 0.4, 9.0, 0.1]))
    assert method.metrics() == pytest.approx(
        {"thinking_entropy": 0.3, "answer_phase_entropy": 0.1, "thinking_tokens": 2, "no_marker": 0, "penalty": 0.2}
    )
    method.reward(one_row([9, 9], [0.2, 0.4], correct=False))
    assert math.isnan(method.metrics()["penalty"])  # no right answer: undefined, not 0
    assert method.metrics()["no_marker"] == 1


def test_without_a_penalty_the_reward_is_that_of_right_and_wrong():
    rollout = rows(5)
    assert torch.equal(bound(penalty="none").reward(rollout)["pear"], rollout.correct.float())


# ----------------------------------------------------------------------------------------------------------- canon


def groups_of(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(group), generator=g)
    reward = torch.rand(len(group), generator=g, dtype=torch.float64)
    return reward, torch.rand(len(group), generator=g, dtype=torch.float64), group[order]


@settings(max_examples=60)
@given(SEEDS, st.lists(st.sampled_from([2, 4, 6, 8]), min_size=1, max_size=4), st.floats(0, 1))
def test_equal_halves_are_dr_grpo_plus_a_bonus_for_the_better_half(seed, sizes, mu):
    reward, metric, group = groups_of(seed, sizes)
    high = canon.high_half(metric, group)
    low_mean, high_mean = canon.half_means(reward, high, group)
    sign = torch.where(high, 1.0, -1.0).to(reward)
    dr = group_advantage(reward, group, "none")
    identity = dr + (2 * mu - 1) * sign * (high_mean - low_mean) / 2
    assert torch.allclose(canon.canon_advantage(reward, high, group, mu), identity, atol=1e-12)
    assert torch.allclose(canon.canon_advantage(reward, high, group, 0.5), dr, atol=1e-12)


@given(SEEDS, st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_the_low_half_is_the_smaller_one_and_holds_the_smaller_values(seed, sizes):
    _, metric, group = groups_of(seed, sizes)
    high = canon.high_half(metric, group)
    for g, size in enumerate(sizes):
        own = group == g
        assert int(high[own].sum()) == size - size // 2
        if size > 1:
            assert metric[own & ~high].max() <= metric[own & high].min()


def test_an_odd_group_breaks_the_identity():
    reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    high = canon.high_half(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.long))
    value = canon.canon_advantage(reward, high, torch.zeros(3, dtype=torch.long), 0.5)
    assert value.tolist() == pytest.approx([0.5, -0.5, -0.5])  # Dr. GRPO: 2/3, -1/3, -1/3


@pytest.mark.parametrize(("half", "inter"), [("high", [-0.9, 0.1, 0.4, 0.4]), ("low", [-1.0, -0.1, 0.55, 0.55])])
def test_alpha_scales_one_half_and_beta_parts_them(half, inter):
    reward, high = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([False, False, True, True])
    group = torch.zeros(4, dtype=torch.long)
    value = canon.canon_advantage(reward, high, group, 1.0, 0.9, 0.0, half)
    assert value.tolist() == pytest.approx(inter)
    moved = canon.canon_advantage(reward, high, group, 1.0, 0.9, 0.2, half) - value
    assert moved.tolist() == pytest.approx([-0.2, -0.2, 0.2, 0.2])
    intra = canon.canon_advantage(reward, high, group, 0.0, 0.9, 0.2, half)
    assert intra.tolist() == pytest.approx([-0.5, 0.5, 0.0, 0.0])  # neither reaches the comparison within a half


def test_equal_rewards_learn_nothing_unless_one_half_is_scaled():
    rollout = rows(2).with_(reward=torch.ones(16))
    plain, scaled = (build("canon", {"preset": "inter", "metric": "length", "alpha": a}) for a in (1.0, 0.9))
    assert not plain.advantage(rollout).any()
    value = scaled.advantage(rollout)[:, 0]
    high = canon.high_half(scaled.metric(rollout), rollout.group_id, canonical_order(rollout))
    assert value.tolist() == pytest.approx(torch.where(high, -0.1, 0.1).tolist())  # shorter
    assert int(high.sum()) == 8


def test_a_group_of_one_keeps_its_reward():
    one = torch.tensor([0.7])
    high = canon.high_half(torch.tensor([3.0]), torch.tensor([5]))
    assert canon.canon_advantage(one, high, torch.tensor([5]), 0.3).tolist() == pytest.approx([0.7])
    assert canon.canon_advantage(one, high, torch.tensor([5]), 1.0, 0.5).tolist() == pytest.approx([0.35])


@pytest.mark.parametrize("metric", ["entropy", "length", "random", "behaviour_logprob", "finished"])
@given(seed=SEEDS)
def test_canon_does_not_depend_on_the_order_of_rows_or_on_padding(metric, seed):
    rollout = rows(seed, groups=3, size=6)
    method = canon.CANON(canon.CANONConfig(metric))
    value = method.advantage(rollout)[:, 0]
    again, order = shuffled(rollout, seed)
    assert torch.allclose(method.advantage(again)[:, 0], value[order], atol=1e-6)
    assert torch.equal(method.advantage(spoilt(rollout))[:, 0], value)


def test_ties_are_not_broken_by_place():
    """Six responses of one length: a stable sort alone would put the first three into the low half."""
    rollout = make_rollout([5] * 24, group_size=6)
    method = canon.CANON(canon.CANONConfig("length"))
    reward = (torch.arange(24) % 6 >= 3).float()
    gap = []
    for start in range(0, 24, 6):
        part = rollout.with_(reward=reward).rows(torch.arange(start, start + 6))
        method.advantage(part)
        gap.append(method.metrics()["high_better"])
    assert min(gap) < 0.9


def test_a_random_split_is_new_in_every_step_and_resumes():
    rollout = rows(4, groups=2, size=8)
    method, resumed = (canon.CANON(canon.CANONConfig("random")) for _ in range(2))
    first = method.metric(rollout)
    assert torch.equal(method.metric(rollout), first)
    method.observe({})
    resumed.load_state_dict(method.state_dict())
    assert not torch.equal(method.metric(rollout), first)
    assert torch.equal(resumed.metric(rollout), method.metric(rollout))


def test_schedules():
    weigh = canon.mixing_weight
    assert weigh("constant", 0.3, 0.9, 50) == 0.3
    assert weigh("accuracy_inter_first", 0.3, 0.2, 0) == 0.8
    assert weigh("accuracy_intra_first", 0.3, 0.2, 0) == 0.2
    inter, intra = ([weigh(s, 0, 0, k) for k in range(200)] for s in ("cosine_inter_first", "cosine_intra_first"))
    assert inter[29] == 1.0
    assert inter[30] == 1.0
    assert min(inter[30:]) >= 0.4
    assert inter[69] < 0.402
    assert inter[70] == 1.0  # restarts, also beyond step 150
    assert inter[150] == pytest.approx(inter[110])
    assert intra[30] == pytest.approx(0.4)
    assert intra[50] == pytest.approx(1 - 0.3)
    assert intra[0] == pytest.approx(1 - 0.6 / 30)


def test_the_step_of_a_cosine_is_counted_and_resumed():
    method = build("canon", {"schedule": "cosine_inter_first", "warmup": 2, "period": 4.0})
    rollout, seen = rows(0), []
    for _ in range(5):
        method.advantage(rollout)
        seen.append(method.metrics()["mu"])
        method.observe({})
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.4 + 0.3 * (1 + math.cos(math.pi / 4)), 0.7])
    resumed = build("canon", {"schedule": "cosine_inter_first", "warmup": 2, "period": 4.0})
    resumed.load_state_dict(method.state_dict())
    for one in (method, resumed):
        one.advantage(rollout)
    assert resumed.metrics() == method.metrics()


def test_half_is_dr_grpo_in_loss_and_reduction():
    rollout = rows(6, groups=2, size=8)
    ours = build("canon", {"preset": "inter", "mu": 0.5, "max_length": 9})
    theirs = build("dr_grpo", {"max_length": 9})
    # bit for bit, as rewards of 0 and 1 and halves of four have exact means
    assert torch.equal(ours.advantage(rollout), theirs.advantage(rollout))
    assert (ours.reduction, ours.reduction_constant) == (theirs.reduction, theirs.reduction_constant)
    doubled = build("canon", {"preset": "inter", "mu": 0.5, "scale": 2.0})
    assert torch.equal(doubled.advantage(rollout), 2 * ours.advantage(rollout))


def test_presets_of_canon_differ_in_direction():
    rollout = rows(8)
    paper, released = (build("canon", {"preset": preset}) for preset in ("paper", "released"))
    values = [m.advantage(rollout) for m in (paper, released)]
    assert paper.metrics()["mu"] == pytest.approx(1 - released.metrics()["mu"])
    assert not torch.allclose(*values)


# ------------------------------------------------------------------------------------------------------------ ucas


def made(**settings: Any) -> ucas.UCAS:
    return ucas.UCAS(ucas.UCASConfig(**settings))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_no_token_of_a_good_response_turns_negative_and_bad_ones_only_fall(seed):
    rollout = rows(seed)
    value = made().advantage(rollout)
    weighted = made(token_penalty=0.0).advantage(rollout)
    mask = rollout.mask
    good = weighted > 0
    assert (value[good & mask] >= 0).all()
    assert (value[mask] <= weighted[mask] + 1e-6).all()
    assert (value[mask] >= weighted[mask] - 0.05 - 1e-6).all()
    assert not value[~mask].any()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_stage_one_keeps_signs_and_orders_responses_by_confidence(seed):
    rollout = rows(seed, groups=2, size=8)
    value = made(token_penalty=0.0).advantage(rollout)[:, 0]
    plain = group_advantage(rollout.reward, rollout.group_id)
    assert torch.equal(value.sign(), plain.sign())
    confidence = ucas.response_certainty(rollout.statistics["token_certainty"], rollout.mask)
    for group in (0, 1):
        for right in (True, False):
            same = (rollout.group_id == group) & (rollout.correct == right)
            order = confidence[same].argsort()
            assert (value[same][order].diff() <= 1e-6).all()  # surer: less for right answers, worse for wrong ones


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_groups_of_equal_rewards_learn_from_the_penalty_alone(seed):
    rollout = rows(seed)
    dead = dead_groups(rollout.reward, rollout.group_id)[:, None] & rollout.mask
    assert dead.any()
    value, masked = made().advantage(rollout), made(degenerate="mask").advantage(rollout)
    scaled = ucas.scaled_logit(rollout.statistics["sampled_logit"], rollout.mask)
    assert torch.allclose(value[dead], -0.05 * scaled[dead], atol=1e-6)
    assert not masked[dead].any()
    assert torch.equal(masked[~dead], value[~dead])


@given(SEEDS)
def test_ucas_does_not_depend_on_the_order_of_rows_or_on_padding(seed):
    rollout = rows(seed)
    for preset in ("paper", "released"):
        value = build("ucas", {"preset": preset}).advantage(rollout)
        again, order = shuffled(rollout, seed)
        width = again.response_ids.shape[1]
        permuted = build("ucas", {"preset": preset}).advantage(again)
        assert torch.allclose(permuted, value[order][:, :width], atol=1e-5)
        assert torch.equal(build("ucas", {"preset": preset}).advantage(spoilt(rollout)), value)


@given(SEEDS, st.floats(-20, 20))
def test_a_shift_of_all_logits_cancels_and_the_scale_runs_from_zero_to_one(seed, shift):
    logit, mask = torch.randn(3, 5, generator=generator(seed), dtype=torch.float64), torch.rand(3, 5) < 0.7
    mask[0, :2] = True
    scaled = ucas.scaled_logit(logit, mask)
    assert torch.allclose(scaled, ucas.scaled_logit(logit + shift, mask), atol=1e-9)
    assert scaled[mask].min() == 0
    assert scaled[mask].max() == pytest.approx(1, abs=1e-4)
    assert not scaled[~mask].any()


def test_equal_logits_are_one_half_and_no_token_is_nothing():
    mask = torch.tensor([[True, True, False]])
    assert ucas.scaled_logit(torch.full((1, 3), 4.0), mask).tolist() == [[0.5, 0.5, 0.0]]
    assert ucas.scaled_logit(torch.full((1, 3), 4.0), ~mask & mask).tolist() == [[0.0, 0.0, 0.0]]


def test_a_sum_of_certainties_is_nearly_the_length_and_a_mean_is_not():
    rollout = rows(11, groups=8, size=8, width=40)
    found = {}
    for preset in ("paper", "released"):
        method = build("ucas", {"preset": preset})
        method.advantage(rollout)
        found[preset] = method.metrics()["certainty_length_correlation"]
    assert found["released"] > 0.97
    assert abs(found["paper"]) < 0.5


def test_without_division_both_scores_lose_it():
    certainty, group = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    assert ucas.scaled_certainty(certainty, group, "none").tolist() == [-1, 1]
    value = made(std="none", token_penalty=0.0)
    rollout = make_rollout([2, 2]).with_(reward=torch.tensor([1.0, 0.0]))
    statistics = {"token_certainty": certainty[:, None].expand(2, 2), "sampled_logit": torch.zeros(2, 2)}
    found = value.advantage(rollout.with_statistics(**statistics))[:, 0]
    assert found.tolist() == pytest.approx([0.5 * math.exp(0.25), -0.5 * math.exp(0.35)])


def test_an_empty_response_has_no_part_in_the_confidence_of_its_group():
    rollout = rows(0, groups=1, size=4)
    empty = rollout.response_mask.clone()
    empty[3] = False
    cut = rollout.with_(response_mask=empty, action_mask=empty)
    whole = ucas.response_certainty(cut.statistics["token_certainty"], cut.mask)
    assert whole[3].isnan()
    scaled = ucas.scaled_certainty(whole, cut.group_id)
    assert torch.allclose(scaled[:3], ucas.scaled_certainty(whole[:3], cut.group_id[:3]))
    assert made().advantage(cut).isfinite().all()


def test_a_group_of_one_follows_its_preset():
    rollout = rows(0, groups=3, size=1)
    for preset, sign in (("paper", 0), ("released", 1)):
        method = build("ucas", {"preset": preset, "token_penalty": 0.0})
        assert method.advantage(rollout.with_(reward=torch.ones(3)))[:, 0].sign().tolist() == [sign] * 3


def test_the_share_of_degenerate_groups_is_logged():
    rollout = rows(3)
    method = made()
    size = method.advantage(rollout).abs().sum(1)
    dead = dead_groups(rollout.reward, rollout.group_id)
    assert method.metrics()["degenerate_share"] == pytest.approx(float(size[dead].sum() / size.sum()))


def test_correlation_is_undefined_for_a_constant():
    assert math.isnan(ucas.correlation(torch.ones(3), torch.arange(3)))
    assert ucas.correlation(torch.arange(4), -2 * torch.arange(4)) == pytest.approx(-1)
