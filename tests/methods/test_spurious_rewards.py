from itertools import product

import pytest
import torch
from builders import GOLDEN, golden_case, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.losses import clipped_surrogate
from rlvr_lab.errors import UserError
from rlvr_lab.methods import spurious_rewards as sr
from rlvr_lab.testing.golden import replay_file


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "spurious_rewards.json")}
    assert len(problems) >= 13
    assert not any(problems.values()), problems


def graded():
    rollout = make_rollout([4, 5, 3, 6, 2, 5], group_size=3)
    correct = torch.tensor([True, False, False, False, False, True])
    return rollout.with_(correct=correct, answer=("7", "3", None, "9", "8", "9"))


def rewards(rule, rollout=None, **more):
    method = sr.SpuriousRewards(sr.SpuriousRewardsConfig(rule=rule, **more))
    return method.reward(rollout or graded())["spurious_rewards"]


@pytest.mark.parametrize(
    ("rule", "more", "expected"),
    [
        ("ground_truth", {}, [1, 0, 0, 0, 0, 1]),
        ("incorrect", {}, [0, 1, 0, 1, 1, 0]),
        ("incorrect", {"incorrect": "complement"}, [0, 1, 1, 1, 1, 0]),
        ("format", {}, [1, 1, 0, 1, 1, 1]),
        ("majority", {}, [0, 1, 0, 1, 0, 1]),  # "3" before "7" in the alphabet
    ],
)
def test_rules(rule, more, expected):
    found = rewards(rule, **more)
    assert found.dtype == torch.float32
    assert found.tolist() == expected


@pytest.mark.parametrize("rule", ["ground_truth", "random", "incorrect", "format", "majority"])
def test_rewards_follow_their_rows(rule):
    rollout, order = graded(), torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(rewards(rule, rollout.rows(order)), rewards(rule, rollout)[order])


def test_random_rewards_are_redrawn_have_the_right_rate_and_survive_a_checkpoint():
    rollout = make_rollout([3] * 2000, group_size=8)
    method = sr.SpuriousRewards(sr.SpuriousRewardsConfig(gamma=0.3, seed=1))
    first, second = (method.reward(rollout)["spurious_rewards"] for _ in range(2))
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {0.0, 1.0}
    assert float(first.mean()) == pytest.approx(0.3, abs=0.05)
    saved = method.state_dict()
    third = method.reward(rollout)["spurious_rewards"]
    other = sr.SpuriousRewards(sr.SpuriousRewardsConfig(gamma=0.3, seed=99))
    other.load_state_dict(saved)
    assert torch.equal(other.reward(rollout)["spurious_rewards"], third)


def test_a_group_without_answers_has_no_majority():
    assert sr.group_majority([None, None, "a"], torch.tensor([0, 0, 1])) == [None, None, "a"]
    assert sr.majority_reward([None, "a"], [None, "a"]).tolist() == [0.0, 1.0]


def test_missing_fields_and_wrong_settings_are_named():
    bare = make_rollout([3, 3])
    for rule, field in (
        ("ground_truth", "correct"),
        ("incorrect", "correct"),
        ("format", "answer"),
        ("majority", "answer"),
    ):
        with pytest.raises(UserError, match=f"'spurious_rewards' needs '{field}'"):
            rewards(rule, bare)
    with pytest.raises(UserError, match=r"methods\.spurious_rewards\.rule 'randm' .*'random'"):
        sr.SpuriousRewardsConfig(rule="randm")
    with pytest.raises(UserError, match=r"methods\.spurious_rewards\.incorrect"):
        sr.SpuriousRewardsConfig(incorrect="unparsable")
    with pytest.raises(UserError, match="gamma"):
        sr.SpuriousRewardsConfig(gamma=1.5)


def test_presets_differ_on_the_golden_case():
    case = golden_case("reward_rules", "spurious_rewards")
    correct, parseable = (torch.tensor(case["inputs"][k]).bool() for k in ("correct", "parseable"))
    found = {}
    for name, preset in sr.SpuriousRewards.presets.items():
        found[name] = sr.incorrect_reward(correct, parseable if preset.incorrect == "readable" else None).tolist()
    assert found["released"] == case["outputs"]["incorrect"]
    assert found["paper"] != found["released"]


# -------------------------------------------------------------------------------------------------------- analysis


@given(st.integers(1, 7), st.floats(0, 1), st.sampled_from(["sample", "population", "none"]))
@settings(deadline=None, max_examples=25)
def test_moments_agree_with_all_patterns(group_size, gamma, std):
    mu = mean = second = equal = 0.0
    for pattern in product((0.0, 1.0), repeat=group_size):
        ones = int(sum(pattern))
        chance = gamma**ones * (1 - gamma) ** (group_size - ones)
        flat = ones in (0, group_size)
        a = group_advantage(torch.tensor(pattern).double(), torch.zeros(group_size, dtype=torch.long), std, 0.0)
        first = 0.0 if flat else float(a[0])
        mu, mean = mu + chance * max(first, 0.0), mean + chance * first
        second, equal = second + chance * first**2, equal + chance * flat
    found = sr.bernoulli_moments(group_size, gamma, std)
    assert (found.mu, found.mean, found.second_moment, found.all_equal) == pytest.approx(
        (mu, mean, second, equal), abs=1e-12
    )


@given(st.integers(0, 500), st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=25)
def test_clipping_bias_is_the_mean_gradient_over_both_signs(seed, mu):
    """Autograd of the clipped loss, averaged over A = +mu/p and A = -mu/(1-p), which have mean zero."""
    g, p = torch.Generator().manual_seed(seed), 0.3
    old = -torch.rand(20, generator=g, dtype=torch.float64)
    logprob = (old + 0.5 * torch.randn(20, generator=g, dtype=torch.float64)).requires_grad_()
    total = 0
    for chance, advantage in ((p, mu / p), (1 - p, -mu / (1 - p))):
        total = total - chance * clipped_surrogate(logprob, old, torch.full_like(old, advantage), 0.8, 1.2).loss.sum()
    (gradient,) = torch.autograd.grad(total, logprob)
    ratio = (logprob - old).exp().detach()
    torch.testing.assert_close(sr.clipping_bias(ratio, mu, 0.8, 1.2) * ratio, gradient, atol=1e-12, rtol=1e-9)
    assert not sr.clipping_bias(ratio, mu, 0.0, float("inf")).any()


def test_likely_tokens_cannot_leave_the_range_above():
    ratio = sr.largest_ratio(torch.tensor([0.84, 0.1]).log())
    assert ratio[0] < 1.2 < ratio[1]


@given(st.integers(0, 500), st.integers(2, 7))
@settings(deadline=None, max_examples=20)
def test_second_order_is_the_limit_of_the_exact_change(seed, actions):
    logits = 2 * torch.randn(actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probs, eta = logits.softmax(-1), 1e-2
    predicted = eta**2 / 2 * float(sr.second_order_coefficient(probs))
    assert sr.expected_entropy_change(probs, eta) == pytest.approx(predicted, abs=5e-8)


def test_unclipped_random_rewards_lower_a_flat_entropy_and_raise_a_skewed_one():
    flat = torch.full((4,), 0.25, dtype=torch.float64)
    skewed = torch.tensor([0.91, 0.05, 0.03, 0.01], dtype=torch.float64)
    assert sr.expected_entropy_change(flat, 0.2) < 0 < sr.expected_entropy_change(skewed, 0.2)
    assert float(sr.second_order_coefficient(flat)) == pytest.approx(-0.75)
    padded = torch.cat([skewed, torch.zeros(1, dtype=torch.float64)])
    assert float(sr.second_order_coefficient(padded)) == pytest.approx(float(sr.second_order_coefficient(skewed)))
    with pytest.raises(ValueError, match="at most 18"):
        sr.expected_entropy_change(torch.full((19,), 1 / 19), 0.1)


@given(st.integers(1, 9), st.floats(0, 1), st.data())
@settings(deadline=None, max_examples=25)
def test_misalignment_closed_forms(group_size, gamma, data):
    correct = data.draw(st.integers(0, group_size))
    found = sr.misalignment(group_size, correct, gamma)
    assert found.expected_loss == pytest.approx(found.oracle_mass, abs=1e-12)
    assert found.variance_loss == pytest.approx(found.closed_form_variance, abs=1e-12)
    if correct == group_size:
        assert found.chance_of_positive_mass == 0  # nothing stands out in a group that is all right


def test_impossible_groups_are_refused():
    for call in (lambda: sr.misalignment(4, 5), lambda: sr.bernoulli_moments(0), lambda: sr.bernoulli_moments(4, 1.2)):
        with pytest.raises(ValueError, match="gamma"):
            call()
