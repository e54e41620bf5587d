import math

import numpy as np
import pytest
import torch
from builders import golden_case, ragged_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core import dynamics
from rlvr_lab.core.losses import clipped_surrogate


def logits_and_ids(seed: int, rows: int = 3, tokens: int = 5, vocabulary: int = 7, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, tokens, vocabulary, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    ids = drawn.reshape(rows, tokens)
    log_p = torch.log_softmax(logits, -1)
    return logits, ids, log_p.gather(-1, ids[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(0.1, 5))
@settings(deadline=None, max_examples=40)
def test_entropy_gradient_is_the_derivative_of_entropy(seed, vocabulary, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    torch.distributions.Categorical(logits=leaf).entropy().backward()
    torch.testing.assert_close(dynamics.entropy_gradient(logits), leaf.grad, atol=1e-12, rtol=1e-9)
    step = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    by_lemma = -dynamics.policy_covariance(logits, torch.log_softmax(logits, -1), step)
    torch.testing.assert_close(dynamics.first_order_change(logits, step), by_lemma)


def test_forbidden_tokens_have_no_entropy_gradient():
    gradient = dynamics.entropy_gradient(torch.tensor([0.3, -0.2, float("-inf")], dtype=torch.float64))
    expected = dynamics.entropy_gradient(torch.tensor([0.3, -0.2], dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


def test_at_a_uniform_policy_the_first_order_sees_nothing_and_the_exact_change_is_negative():
    logits, step = torch.zeros(5, dtype=torch.float64), torch.tensor([0.4, 0, 0, 0, -0.1], dtype=torch.float64)
    assert abs(float(dynamics.first_order_change(logits, step))) < 1e-15
    assert float(dynamics.exact_change(logits, step)) < -1e-3


@pytest.mark.parametrize("step", [dynamics.policy_gradient_step, dynamics.natural_gradient_step])
def test_theory_steps_are_first_order(step):
    logits, _, _, _ = logits_and_ids(3)
    q = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    errors = []
    for eta in (1e-2, 1e-3):
        dz = step(logits, q, eta)
        errors.append((dynamics.exact_change(logits, dz) - dynamics.first_order_change(logits, dz)).abs().max())
    assert errors[1] < errors[0] / 50  # the remainder is quadratic


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_full_prediction_is_the_limit_of_the_exact_change(seed):
    """One ascent step on c log p(a) at every state of its own, small, against the entropy that follows."""
    logits, ids, logprob, entropy = logits_and_ids(seed)
    coefficient = torch.randn(ids.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    eta = 1e-5
    one_hot = torch.nn.functional.one_hot(ids, logits.shape[-1])
    dz = eta * coefficient[..., None] * (one_hot - logits.softmax(-1))
    measured = dynamics.exact_change(logits, dz) / eta
    predicted = dynamics.change_full(coefficient, logprob, entropy, *dynamics.second_moments(logits))
    torch.testing.assert_close(predicted, measured, atol=1e-4, rtol=1e-4)


def test_full_beats_the_theorem_and_the_covariance_on_tabular_policies():
    logits, ids, logprob, entropy = logits_and_ids(7, rows=40, tokens=20)
    advantage = torch.randn(ids.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(ids, logits.shape[-1])
    measured = dynamics.exact_change(logits, 0.05 * advantage[..., None] * (one_hot - logits.softmax(-1)))
    mask = torch.ones_like(ids, dtype=torch.bool)
    predictions = {
        "full": dynamics.change_full(advantage, logprob, entropy, *dynamics.second_moments(logits)),
        "theorem": dynamics.change_theorem(advantage, logprob, entropy),
        "covariance": dynamics.change_covariance(logprob, advantage, mask),
    }
    r = {k: float(torch.corrcoef(torch.stack([v.flatten(), measured.flatten()]))[0, 1]) for k, v in predictions.items()}
    assert r["full"] > 0.99
    assert r["full"] > r["theorem"] + 0.02
    assert r["full"] > r["covariance"] + 0.02


def test_coefficient_of_the_surrogate_is_the_gradient_of_its_loss():
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    logprob = (old + torch.randn(4, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for dual in (None, 1.5):
        loss = clipped_surrogate(logprob, old, advantage, 0.8, 1.2, dual).loss
        by_hand = dynamics.surrogate_coefficient(logprob, old, advantage, 0.8, 1.2, dual)
        assert (by_hand == 0).any()
        assert (by_hand != 0).any()
        torch.testing.assert_close(by_hand, dynamics.coefficient_of_loss(loss, logprob))


def test_coefficient_of_a_loss_without_log_probabilities_is_zero():
    logprob = torch.zeros(2, 3, requires_grad=True)
    assert not dynamics.coefficient_of_loss(torch.ones(2, 3), logprob).any()
    assert not dynamics.coefficient_of_loss(torch.ones(2, 3, requires_grad=True) * 2, logprob).any()


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_token_covariance_is_centred_masked_and_order_free(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (4,), generator=generator).tolist()
    mask = ragged_mask(lengths, 6)
    logprob, advantage = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    product = dynamics.token_covariance(logprob, advantage, mask)
    assert product.dtype == torch.float64
    assert not product[~mask].any()
    if mask.any():
        expected = np.cov(logprob[mask].numpy(), advantage[mask].numpy(), bias=True)[0, 1] if mask.sum() > 1 else 0.0
        assert float(product[mask].mean()) == pytest.approx(expected, abs=1e-12)
    noisy = logprob.masked_fill(~mask, float("nan"))
    torch.testing.assert_close(dynamics.token_covariance(noisy, advantage, mask), product)
    flip = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(dynamics.token_covariance(logprob[flip], advantage[flip], mask[flip]), product[flip])


def test_token_covariance_matches_the_official_code():
    case = golden_case("clip_cov_ratio_0.2", "entropy_mechanism")
    logprob, advantage = (torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("log_prob", "advantages"))
    product = dynamics.token_covariance(logprob, advantage, torch.tensor(case["inputs"]["response_mask"]).bool())
    recorded = torch.tensor(case["outputs"]["covariance"], dtype=torch.float64)
    torch.testing.assert_close(product, recorded, atol=1e-7, rtol=0)


def test_clipped_tokens_change_nothing_in_the_covariance_estimate():
    logprob, advantage = torch.tensor([[-1.0, -2.0, -0.1]]), torch.tensor([[1.0, -1.0, 1.0]])
    active = torch.tensor([[True, False, True]])
    change = dynamics.change_covariance(logprob, advantage, torch.ones(1, 3, dtype=torch.bool), active)
    assert change[0, 1] == 0
    assert change[0, 0] != 0


def test_bandit_covariance_leaves_out_responses_without_tokens():
    logprob = -torch.arange(12, dtype=torch.float64).reshape(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).bool()
    found = dynamics.bandit_covariance(logprob, mask, torch.tensor([1.0, 0, 1, 0]).double(), torch.tensor([5, 5, 5, 2]))
    assert found.group_id.tolist() == [2, 5]
    assert math.isnan(float(found.mean_logprob[0]))
    assert float(found.mean_logprob[1]) == pytest.approx((-1.0 - 3.0) / 2)
    assert float(found.cov_logprob_advantage[1]) > 0


@given(st.floats(0.05, 3), st.floats(-2, 4), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_a_law_without_noise_is_recovered(a, b, seed):
    entropy = np.random.default_rng(seed).uniform(0, 2, 12)
    fit = dynamics.fit_law(entropy, b - a * np.exp(entropy), np.random.default_rng(0), draws=50)
    assert fit.a == pytest.approx(a, rel=1e-6)
    assert fit.ceiling == pytest.approx(b - a, rel=1e-6, abs=1e-6)
    assert fit.r2 == pytest.approx(1)
    assert fit.slope(0.5) == pytest.approx(-a * math.exp(0.5), rel=1e-6)
    assert fit.predict(0.0) == pytest.approx(fit.ceiling)
    assert fit.a_interval[0] == pytest.approx(a, rel=1e-5)


def test_intervals_of_the_law_cover_and_are_unknown_without_a_generator():
    rng = np.random.default_rng(2)
    entropy = rng.uniform(0, 1, 60)
    performance = 0.7 - 0.2 * np.exp(entropy) + rng.normal(0, 0.02, 60)
    fit = dynamics.fit_law(entropy, performance, np.random.default_rng(1))
    assert fit.a_interval[0] < 0.2 < fit.a_interval[1]
    assert fit.b_interval[0] < fit.b < fit.b_interval[1]
    assert 0.5 < fit.r2 < 1
    assert fit == dynamics.fit_law(entropy, performance, np.random.default_rng(1))
    assert all(math.isnan(x) for x in dynamics.fit_law(entropy, performance).ceiling_interval)


def test_a_law_that_cannot_be_fitted_is_unknown_not_zero():
    flat = dynamics.fit_law([0.5, 0.5], [0.1, 0.2], np.random.default_rng(0))
    assert math.isnan(flat.a)
    assert math.isnan(flat.a_interval[0])
    assert math.isnan(dynamics.fit_law([0.1, 0.5], [0.2, 0.2]).r2)
    for entropy, performance in (([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])):
        with pytest.raises(ValueError, match="entropy and performance"):
            dynamics.fit_law(entropy, performance)
