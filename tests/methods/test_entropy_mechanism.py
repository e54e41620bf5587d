import math

import pytest
import torch
from builders import GOLDEN, golden_case, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.dynamics import token_covariance
from rlvr_lab.core.losses import clipped_surrogate
from rlvr_lab.core.reduce import reduce
from rlvr_lab.errors import UserError
from rlvr_lab.methods import entropy_mechanism as em
from rlvr_lab.methods.base import LossInputs
from rlvr_lab.testing.golden import replay_file


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "entropy_mechanism.json")}
    assert len(problems) >= 10
    assert not any(problems.values()), problems


def minibatch(lengths=(6, 3, 8, 1, 0, 7), seed=0, gap=0.3):
    """A record with scored statistics of a policy some way off the old one, and advantages of both signs."""
    rollout = make_rollout(list(lengths), seed=seed)
    noise = torch.randn(rollout.response_ids.shape, generator=torch.Generator().manual_seed(seed + 1))
    scored = rollout.with_statistics(current_logprob=rollout.old_logprob + gap * noise)
    signs = torch.tensor([1.0, -1.0, 0.7, -0.7, 1.0, 0.0])[:, None]
    return scored, signs.expand(rollout.response_ids.shape).masked_fill(~rollout.mask, 0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


WIDE = {"ratio": 0.2, "low": -10.0, "high": 10.0}


# ------------------------------------------------------------------------------------------------------- selection


def test_the_interval_is_open_in_code_and_closed_in_the_paper():
    covariance, mask = torch.tensor([[1.0, 1.5, 5.0, 3.0]]), torch.tensor([[True, True, True, False]])
    assert em.clip_cov_candidates(covariance, mask, 1, 5).tolist() == [[False, True, False, False]]
    assert em.clip_cov_candidates(covariance, mask, 1, 5, closed=True).tolist() == [[True, True, True, False]]
    clipped = torch.tensor([[False, True, False, False]])
    assert not em.clip_cov_candidates(covariance, mask, 1, 5, clipped).any()


@given(st.integers(0, 500), st.integers(0, 30))
@settings(deadline=None, max_examples=40)
def test_clip_cov_draws_distinct_candidates(seed, number):
    candidates = torch.rand(4, 5, generator=generator(seed)) < 0.5
    places = em.select_clip_cov(candidates, number, generator(seed))
    assert len(places) == min(number, int(candidates.sum()))
    chosen = em.place_mask(places, candidates)
    assert int(chosen.sum()) == len(places)
    assert not (chosen & ~candidates).any()


def test_every_candidate_can_be_drawn():
    candidates = torch.ones(2, 3, dtype=torch.bool)
    rng = generator()
    seen = {tuple(em.select_clip_cov(candidates, 1, rng)[0].tolist()) for _ in range(100)}
    assert len(seen) == 6


def test_a_recorded_permutation_is_replayed_and_checked():
    candidates = torch.tensor([[True, False, True], [False, True, False]])
    assert em.select_clip_cov(candidates, 2, permutation=torch.tensor([2, 0, 1])).tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match="3 candidates"):
        em.select_clip_cov(candidates, 2, permutation=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="generator"):
        em.select_clip_cov(candidates, 2)


@pytest.mark.parametrize(
    ("tokens", "k", "percent", "expected"),
    [
        (1000, 0.002, False, 2),
        (10, 0.002, False, 1),
        (19, 0.25, False, 4),
        (19, 25.0, True, 3),  # capped: 19 % of 19
        (1000, 25.0, True, 250),
        (10, 0.0, False, 0),
        (0, 0.5, False, 0),
    ],
)
def test_number_of_kl_cov_tokens(tokens, k, percent, expected):
    assert em.kl_cov_number(tokens, k, percent) == expected


@given(st.integers(0, 500))
@settings(deadline=None, max_examples=30)
def test_kl_cov_takes_the_largest(seed):
    covariance = torch.randn(3, 6, generator=generator(seed))
    mask = torch.rand(3, 6, generator=generator(seed + 1)) < 0.7
    chosen = em.place_mask(em.select_kl_cov(covariance, mask, 4), mask)
    assert int(chosen.sum()) == min(4, int(mask.sum()))
    assert not (chosen & ~mask).any()
    if 0 < int(chosen.sum()) < int(mask.sum()):
        assert covariance[chosen].min() >= covariance[mask & ~chosen].max()


# --------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [em.ClipCov(em.ClipCovConfig(**WIDE)), em.KLCov(em.KLCovConfig(ratio=0.2))])
def test_selection_follows_the_rows_and_ignores_padding(method):
    batch, advantage = minibatch()
    (name, selected) = next(iter(method.prepare(batch, advantage, generator(3)).items()))
    assert name == f"{method.slug}.selected"
    assert 0 < int(selected.sum()) < int(batch.mask.sum())
    assert not (selected & ~batch.mask).any()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = method.prepare(batch.rows(order), advantage[order], generator(3))[name]
    assert torch.equal(shuffled, selected[order])
    noisy = batch.statistics["current_logprob"].masked_fill(~batch.mask, float("nan"))
    wild = batch.with_statistics(current_logprob=noisy)
    assert torch.equal(method.prepare(wild, advantage, generator(3))[name], selected)


def test_clip_cov_depends_on_its_generator_only():
    batch, advantage = minibatch()
    method = em.ClipCov(em.ClipCovConfig(**WIDE))
    draws = [method.prepare(batch, advantage, generator(s))["clip_cov.selected"] for s in (0, 0, 1, 2, 3)]
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_clip_cov_never_selects_what_the_clip_has_stopped():
    batch, advantage = minibatch(gap=0.8)
    method = em.ClipCov(em.ClipCovConfig(**{**WIDE, "ratio": 1.0}, clip_low=0.1, clip_high=0.1))
    selected = method.prepare(batch, advantage, generator())["clip_cov.selected"]
    s = clipped_surrogate(batch.statistics["current_logprob"], batch.old_logprob, advantage, 0.9, 1.1)
    stopped = (s.clipped_low | s.clipped_high) & batch.mask
    assert stopped.any()
    assert torch.equal(selected, batch.mask & ~stopped)


def test_selected_tokens_leave_value_and_gradient_and_keep_the_denominator():
    batch, advantage = minibatch()
    method = em.ClipCov(em.ClipCovConfig(**WIDE))
    batch = batch.with_statistics(**method.prepare(batch, advantage, generator()))
    selected = batch.statistics["clip_cov.selected"]
    logprob = batch.statistics["current_logprob"].clone().requires_grad_()
    lower, upper = method.clip(batch, advantage)
    inputs = LossInputs(batch, logprob, batch.old_logprob, advantage, lower, upper)
    per_token = method.surrogate(inputs).loss * method.weight(batch, advantage)
    loss = reduce(per_token, batch.mask, "token_mean")
    loss.backward()
    assert not logprob.grad[selected].any()
    others = batch.mask & ~selected & (advantage != 0)
    assert (logprob.grad[others] != 0).all()
    expected = (method.surrogate(inputs).loss * ~selected).masked_fill(~batch.mask, 0.0).sum() / batch.mask.sum()
    torch.testing.assert_close(loss, expected)


def test_zero_advantages_select_nothing_in_clip_cov_and_something_in_kl_cov():
    batch, advantage = minibatch()
    nothing = torch.zeros_like(advantage)
    assert not em.ClipCov().prepare(batch, nothing, generator())["clip_cov.selected"].any()
    assert em.KLCov().prepare(batch, nothing, generator())["kl_cov.selected"].sum() == 1


def test_an_empty_minibatch_selects_nothing():
    batch = make_rollout([0, 0], width=3)
    batch = batch.with_statistics(current_logprob=batch.behaviour_logprob)
    advantage = torch.zeros_like(batch.behaviour_logprob)
    for preset in em.ClipCov.presets.values():
        assert not em.ClipCov(preset).prepare(batch, advantage, generator())["clip_cov.selected"].any()
    assert not em.KLCov().prepare(batch, advantage, generator())["kl_cov.selected"].any()


def kl_cov_gradient(gap, config):
    batch, advantage = minibatch(gap=gap)
    method = em.KLCov(config)
    batch = batch.with_statistics(**method.prepare(batch, advantage, generator()))
    logprob = batch.statistics["current_logprob"].clone().requires_grad_()
    one = torch.ones(())
    s = method.surrogate(LossInputs(batch, logprob, batch.old_logprob, advantage, one, one))
    (s.loss * batch.mask).sum().backward()
    return batch, advantage, s, logprob.grad


def test_strictly_on_policy_kl_cov_is_plain_policy_gradient():
    batch, advantage, s, gradient = kl_cov_gradient(0.0, em.KLCovConfig(ratio=0.5, beta=10.0))
    assert batch.statistics["kl_cov.selected"].any()
    torch.testing.assert_close(gradient, -advantage)
    torch.testing.assert_close(s.loss, -advantage)


def test_off_policy_the_penalty_pulls_back_toward_the_old_policy():
    batch, advantage, s, gradient = kl_cov_gradient(0.4, em.KLCovConfig(ratio=0.5, beta=2.0))
    selected = batch.statistics["kl_cov.selected"]
    pull = gradient + advantage * s.ratio.detach()
    sign = (batch.statistics["current_logprob"] - batch.old_logprob).sign()
    torch.testing.assert_close(pull[selected], 2.0 * sign[selected])
    assert pull[batch.mask & ~selected].abs().max() < 1e-6
    assert not (s.clipped_low | s.clipped_high).any()


def test_quantiles_of_the_minibatch_stand_in_for_the_interval():
    batch, advantage = minibatch()
    method = em.ClipCov(em.ClipCov.presets["tiny"])
    selected = method.prepare(batch, advantage, generator())["clip_cov.selected"]
    covariance = token_covariance(batch.statistics["current_logprob"], advantage, batch.mask)
    assert selected.any()
    assert covariance[selected].min() >= covariance[batch.mask].quantile(0.9) - 1e-6


def test_presets_differ_on_golden_cases():
    def clip_loss(preset):
        case = golden_case("clip_cov_with_ppo_clip", "entropy_mechanism")["inputs"]
        logprob, old, advantage = (torch.tensor(case[k]) for k in ("log_prob", "old_log_prob", "advantages"))
        config = em.ClipCov.presets[preset]
        return float(
            clipped_surrogate(logprob, old, 3 * advantage, 1 - config.clip_low, 1 + config.clip_high).loss.sum()
        )

    assert clip_loss("released") != clip_loss("verl")
    # the case has no ratio above 2, the bound of the release; the paper has no bound at all
    case = golden_case("clip_cov_with_ppo_clip", "entropy_mechanism")["inputs"]
    batch = minibatch(gap=2.0)
    bounds = [em.ClipCov(em.ClipCov.presets[p]).clip(batch[0], batch[1])[1] for p in ("paper", "released")]
    assert [float(b) for b in bounds] == [math.inf, 2.0]
    tokens = int(
        torch.tensor(
            golden_case("kl_cov_25pct_beta_0.1_seq_mean", "entropy_mechanism")["inputs"]["response_mask"]
        ).sum()
    )
    assert [em.kl_cov_number(tokens, 0.25), em.kl_cov_number(tokens, 25.0, percent=True)] == [4, 3]
    assert em.KLCov.presets["paper"] != em.KLCov.presets["released"]
    assert len(case) == 4


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        (em.ClipCovConfig, "ratio", 2.0),
        (em.ClipCovConfig, "low", 9.0),
        (em.ClipCovConfig, "low_quantile", 1.5),
        (em.ClipCovConfig, "clip_low", 1.5),
        (em.ClipCovConfig, "clip_high", -0.1),
        (em.ClipCovConfig, "clip_high", float("nan")),
        (em.KLCovConfig, "ratio", 20.0),
        (em.KLCovConfig, "beta", -1.0),
        (em.KLCovConfig, "beta", math.inf),
    ],
)
def test_impossible_settings_are_named(config, setting, value):
    with pytest.raises(UserError, match=rf"methods\.(clip|kl)_cov\.{setting} must"):
        config(**{setting: value})
