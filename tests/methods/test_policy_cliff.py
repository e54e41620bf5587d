import math

import pytest
import torch
from builders import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.methods import policy_cliff as pc
from rlvr_lab.testing.golden import replay_file


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "policy_cliff.json")}
    assert len(problems) >= 4
    assert not any(problems.values()), problems


def random_mdp(seed, states=5, actions=3, gamma=0.9):
    g = torch.Generator().manual_seed(seed)
    terminal = torch.zeros(states, dtype=torch.bool)
    terminal[-1] = True
    reward = torch.randn(states, actions, generator=g, dtype=torch.float64)
    return pc.TabularMDP(torch.randint(0, states, (states, actions), generator=g), reward, terminal, gamma)


SETTINGS = settings(deadline=None, max_examples=20)
BASE = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)


@given(st.integers(0, 1000), st.floats(0, 0.95), st.sampled_from([0.0, 0.05, 1.0]))
@SETTINGS
def test_value_iteration_finds_the_fixed_point(seed, gamma, alpha):
    mdp = random_mdp(seed, gamma=gamma)
    q = pc.value_iteration(mdp, alpha)
    value = pc.state_values(q, alpha).masked_fill(mdp.terminal, 0.0)
    torch.testing.assert_close(q, mdp.reward + gamma * value[mdp.next_state], atol=1e-10, rtol=1e-10)


@given(st.integers(0, 1000), st.sampled_from([0.02, 0.2, 2.0]), st.booleans())
@SETTINGS
def test_values_and_soft_policies_are_lipschitz(seed, alpha, with_base):
    one, other = random_mdp(seed), random_mdp(seed + 1)
    other = one.with_reward(one.reward + 0.01 * other.reward)
    change = float((one.reward - other.reward).abs().max())
    base = BASE if with_base else None
    hard = (pc.value_iteration(one) - pc.value_iteration(other)).abs().max()
    assert float(hard) <= change / (1 - one.gamma) + 1e-9
    policies = [pc.soft_policy(pc.value_iteration(m, alpha, base), alpha, base) for m in (one, other)]
    assert float(pc.total_variation(*policies).max()) <= pc.lipschitz_bound(change, alpha, one.gamma) + 1e-9


@given(st.integers(0, 1000))
@SETTINGS
def test_inverting_the_bellman_equation_gives_back_the_values(seed):
    """Proposition 2.4: bump one action of a tie and find the reward, close to the old one, that makes it optimal."""
    mdp = random_mdp(seed)
    q = pc.value_iteration(mdp)
    torch.testing.assert_close(pc.invert_bellman(mdp, q), mdp.reward, atol=1e-9, rtol=0)
    q[0, 1] = q[0].max() + 1e-3
    bumped = mdp.with_reward(pc.invert_bellman(mdp, q))
    torch.testing.assert_close(pc.value_iteration(bumped), q, atol=1e-9, rtol=0)


@given(st.integers(0, 1000), st.floats(0.01, 1))
@SETTINGS
def test_regularisation_costs_at_most_its_bound(seed, alpha):
    mdp = random_mdp(seed)
    best = pc.expected_return(mdp, pc.hard_policy(pc.value_iteration(mdp)))
    soft = pc.expected_return(mdp, pc.soft_policy(pc.value_iteration(mdp, alpha), alpha))
    assert -1e-8 <= best - soft <= pc.regularisation_cost(3, alpha, mdp.gamma) + 1e-8


@given(st.integers(0, 1000))
@SETTINGS
def test_the_return_of_the_optimal_policy_is_its_value(seed):
    mdp = random_mdp(seed)
    q = pc.value_iteration(mdp)
    assert pc.expected_return(mdp, pc.hard_policy(q), start=1) == pytest.approx(float(q[1].max()), abs=1e-8)


def test_a_tie_jumps_by_half_whatever_the_size_of_the_change():
    mdp, missing = pc.honest_or_shortcut()
    tie = pc.hard_policy(pc.value_iteration(mdp))[0]
    assert tie.tolist() == [0.5, 0.5, 0.0]
    truth = mdp.with_reward(mdp.reward + missing)
    returns = []
    for eps in (-1e-7, 1e-7):
        policy = pc.hard_policy(pc.value_iteration(mdp.perturbed(2, 0, eps)))
        assert float(pc.total_variation(policy[0], tie)) == pytest.approx(0.5)
        returns.append(pc.expected_return(truth, policy))
    assert returns == pytest.approx([1.35, 0.45])


def test_rules_on_ties():
    q = torch.tensor([[1.0, 1.0, 0.3], [0.0, 2.0, 2.0 - 1e-13]], dtype=torch.float64)
    assert pc.hard_policy(q).tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert pc.hard_policy(q, "first").tolist() == [[1, 0, 0], [0, 1, 0]]
    assert pc.hard_policy(q, base=BASE)[0].tolist() == pytest.approx([7 / 9, 2 / 9, 0])
    assert pc.hard_policy(q, tolerance=0.0)[1].tolist() == [0, 1, 0]


def test_the_kl_policy_tends_to_the_base_on_the_argmax():
    mdp, _ = pc.honest_or_shortcut()
    policy = pc.soft_policy(pc.value_iteration(mdp, 1e-3, BASE), 1e-3, BASE)[0]
    assert policy.tolist() == pytest.approx([7 / 9, 2 / 9, 0], abs=1e-6)
    assert torch.isfinite(policy).all()


def test_the_bound_is_attained_by_small_antisymmetric_changes():
    alpha, delta = 0.1, 1e-3
    tie, moved = (pc.soft_policy(pc.value_iteration(pc.two_armed(-d, d), alpha), alpha)[0] for d in (0.0, delta))
    change = float(pc.total_variation(moved, tie))
    assert change == pytest.approx(0.5 * math.tanh(delta / alpha))
    assert change / pc.lipschitz_bound(delta, alpha, 0.0) > 0.9999


def test_impossible_tables_are_refused():
    mdp = random_mdp(0)
    for broken in ({"gamma": 1.0}, {"terminal": mdp.terminal[:2]}, {"next_state": mdp.next_state + 3},
                   {"reward": mdp.reward[:, :2]}):  # fmt: skip
        parts = {"next_state": mdp.next_state, "reward": mdp.reward, "terminal": mdp.terminal, "gamma": 0.9} | broken
        with pytest.raises(ValueError, match="must"):
            pc.TabularMDP(**parts)
    with pytest.raises(ValueError, match="alpha"):
        pc.value_iteration(mdp, -1.0)
    with pytest.raises(ValueError, match="alpha"):
        pc.value_iteration(mdp, 0.0, BASE)
