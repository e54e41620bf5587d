import math

import numpy as np
import pytest
from builders import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.evaluate import support as s
from rlvr_lab.evaluate.passk import pass_at_k
from rlvr_lab.testing.golden import replay_file

COUNT = st.integers(0, 50)


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "invisible_leash.json")}
    assert len(problems) >= 7
    assert not any(problems.values()), problems


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_counts_partition_the_problems(seed, problems, k):
    rng = np.random.default_rng(seed)
    base, trained = rng.random((problems, k)) < 0.3, rng.random((problems, k + 1)) < 0.3
    c = s.support_counts(base, trained)
    assert c.problems == problems
    assert c.pass_base == pytest.approx(base.any(1).mean())
    assert c.pass_trained == pytest.approx(trained.any(1).mean())
    swapped = s.support_counts(trained, base)
    assert (swapped.expanded, swapped.shrunk) == (c.shrunk, c.expanded)


def test_min_hits_raises_the_bar():
    base, trained = [[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 1]]
    assert s.support_counts(base, trained) == s.SupportCounts(2, 0, 0, 0)
    assert s.support_counts(base, trained, min_hits=2) == s.SupportCounts(0, 1, 1, 0)


@given(COUNT, COUNT, COUNT, COUNT)
def test_sds_is_the_harmonic_mean_where_both_ratios_exist(p, e, sh, o):
    c = s.SupportCounts(p, e, sh, o)
    srr, ndr = c.support_retention, c.net_discovery
    assert (srr is None) == (p + sh == 0)
    assert (ndr is None) == (p + e == 0)
    assert (c.net_change is None) == (p + e + sh == 0)
    assert (c.pass_base is None) == (c.problems == 0)
    if srr is not None and ndr is not None and srr + ndr > 0:
        assert c.dynamic_score == pytest.approx(2 * srr * ndr / (srr + ndr))


def test_no_gain_is_zero_and_no_support_is_undefined():
    kept = s.SupportCounts(5, 0, 1, 2)
    assert kept.net_discovery == 0
    assert kept.dynamic_score == 0
    lost = s.SupportCounts(0, 0, 0, 4)
    assert [lost.support_retention, lost.net_discovery, lost.dynamic_score, lost.net_change] == [None] * 4


def test_data_sets_are_added_before_dividing():
    parts = [s.SupportCounts(1, 0, 1, 0), s.SupportCounts(8, 2, 0, 0)]
    both = s.total(parts)
    assert both == s.SupportCounts(9, 2, 1, 0)
    assert both.support_retention == pytest.approx(0.9)
    assert s.total([]) == s.SupportCounts(0, 0, 0, 0)


def test_the_null_of_one_model_has_equal_gains_and_losses_above_zero():
    rng = np.random.default_rng(0)
    chance = rng.beta(0.3, 3, size=200)
    correct = rng.random((200, 16)) < chance[:, None]
    null = s.base_null(correct, np.random.default_rng(1), draws=400)
    difference = np.array([c.expanded - c.shrunk for c in null])
    assert np.mean([c.expanded for c in null]) > 5
    assert abs(difference.mean()) < 4 * difference.std() / 20
    assert all(c.problems == 200 for c in null)
    assert null == s.base_null(correct, np.random.default_rng(1), draws=400)


def test_the_null_deals_every_sample_at_most_once():
    correct = np.zeros((3, 4), dtype=bool)
    correct[0, 0] = True  # one correct sample can lie in one set only
    for c in s.base_null(correct, np.random.default_rng(0), draws=20):
        assert (c.preserved, c.expanded + c.shrunk) == (0, 1)
    with pytest.raises(ValueError, match="there are 4"):
        s.base_null(correct, np.random.default_rng(0), k=3)


def test_plug_in_is_biased_low_and_goes_beyond_n():
    counts = np.arange(1, 10)
    assert (s.pass_at_k_plug_in(10, counts, 4) < pass_at_k(10, counts, 4)).all()
    assert s.pass_at_k_plug_in(10, [5], 1)[0] == 0.5
    assert s.pass_at_k_plug_in(10, [1], 1000)[0] > 0.999
    with pytest.raises(ValueError, match="counts"):
        s.pass_at_k_plug_in(3, [4], 1)


@given(st.integers(1, 10_000), st.floats(0.001, 0.5))
def test_threshold_is_the_probability_that_stays_unseen(k, zeta):
    exact = s.detection_threshold(k, zeta, exact=True)
    assert (1 - exact) ** k == pytest.approx(zeta, rel=1e-6)
    assert exact <= s.detection_threshold(k, zeta)
    assert exact < 1


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="zeta"):
        s.detection_threshold(0)
    with pytest.raises(ValueError, match="zeta"):
        s.detection_threshold(5, 1.0)
    with pytest.raises(ValueError, match="2 problems"):
        s.support_counts([[1], [0]], [[1]])
    with pytest.raises(ValueError, match="min_hits"):
        s.support_counts([[1]], [[1]], min_hits=0)
    for q, reward in (([0.5, 0.6], [0, 1]), ([0.5, 0.5], [1]), ([1.5, -0.5], [0, 1])):
        with pytest.raises(ValueError, match="distribution"):
            s.exponential_tilt(q, reward, 1.0)


@given(st.integers(0, 1000), st.floats(0, 50), st.integers(2, 8))
@settings(deadline=None, max_examples=40)
def test_the_true_entropy_identity_holds_for_every_tilt(seed, beta, answers):
    rng = np.random.default_rng(seed)
    q, reward = rng.dirichlet(np.ones(answers)), rng.integers(0, 2, answers)
    tilt = s.exponential_tilt(q, reward, beta)
    assert tilt.pi.sum() == pytest.approx(1)
    assert tilt.entropy == pytest.approx(tilt.cross_entropy - tilt.kl, abs=1e-9)
    assert tilt.inside_base
    assert tilt.expected_reward >= float(q @ reward) - 1e-12


def test_the_counterexample_to_theorem_c6():
    q, reward = [0.9, 0.05, 0.05], [0, 1, 1]
    tilts = [s.exponential_tilt(q, reward, beta) for beta in (0.0, 1.0, 3.0, math.inf)]
    assert [round(t.entropy, 3) for t in tilts] == [0.394, 0.702, 1.097, 0.693]
    assert [t.entropy_fell for t in tilts] == [True, False, False, False]
    assert tilts[-1].claimed_entropy < 0 <= tilts[-1].entropy
    right = s.exponential_tilt([0.9, 0.05, 0.05], [1, 0, 0], 3.0)
    assert right.entropy_fell


def test_an_impossible_answer_stays_impossible():
    tilt = s.exponential_tilt([0.7, 0.3, 0.0], [0, 0.5, 1], math.inf)
    assert tilt.pi.tolist() == [0, 1, 0]  # the best reward inside the support
    assert s.exponential_tilt([0.7, 0.3, 0.0], [0, 0.5, 1], 1e3).pi.tolist() == pytest.approx([0, 1, 0])


def test_support_above_a_threshold_and_perplexity():
    assert s.empirical_support([0.5, 0.001, 0.4], [1, 1, 0], 0.01).tolist() == [True, False, False]
    found = s.trace_perplexity([[-1.0, -3.0], []])
    assert found[0] == pytest.approx(math.e**2)
    assert math.isnan(found[1])
