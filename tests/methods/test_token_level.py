"""The nine token-level methods: golden values, and what their definitions promise whatever the input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from builders import GOLDEN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.dynamics import exact_change
from rlvr_lab.core.entropy import nucleus_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.methods import arbitrary_entropy as ae
from rlvr_lab.methods import bapo, epo, hapo, lp_reg, siren, steer
from rlvr_lab.methods import high_entropy_tokens as het
from rlvr_lab.methods import negative_reinforcement as nr
from rlvr_lab.testing.golden import replay_file

CARDS = ("steer", "high_entropy_tokens", "negative_reinforcement", "bapo", "hapo", "siren", "epo", "arbitrary_entropy",
         "lp_reg")  # fmt: skip
SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize("card", CARDS)
def test_golden_file_is_reproduced(card):
    problems = {r.case: r.problem for r in replay_file(GOLDEN / f"{card}.json")}
    assert len(problems) >= 4
    assert not any(problems.values()), problems


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(seed, vocabulary=6, spread=2.0):
    return spread * torch.randn(vocabulary, generator=generator(seed), dtype=torch.float64)


def minibatch(seed=0, lengths=(6, 3, 8, 1, 0, 7), gap=0.3):
    """A record with statistics of a policy some way off the old one, and advantages of both signs."""
    rollout = make_rollout(list(lengths), seed=seed)
    noise = torch.randn(rollout.response_ids.shape, generator=generator(seed + 1))
    scored = rollout.with_statistics(
        current_logprob=rollout.old_logprob + gap * noise,
        current_entropy=torch.rand(rollout.response_ids.shape, generator=generator(seed + 2)) + 0.01,
        current_collision=torch.full(rollout.response_ids.shape, 0.3),
        current_cross=torch.full(rollout.response_ids.shape, -0.4),
        clip_lower=torch.full(rollout.response_ids.shape, 0.8),
        clip_upper=torch.full(rollout.response_ids.shape, 1.2),
    )
    signs = torch.tensor([1.0, -1.0, 0.7, -0.7, 1.0, 0.0])[:, None]
    return scored, signs.expand(rollout.response_ids.shape).masked_fill(~rollout.mask, 0.0)


# ----------------------------------------------------------------------------------------------------------- steer


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.05, 0.95))
def test_the_largest_change_gets_the_least_weight_and_nothing_less(seed, least):
    change = torch.randn(4, 5, generator=generator(seed), dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator(seed + 1)) < 0.7
    mask[0, 0] = True
    weight = steer.exponential_weights(change, mask, least)
    inside = weight[mask]
    assert inside.min() == pytest.approx(least)
    assert inside.max() <= 1
    assert (weight[~mask] == 0).all()
    assert (inside.argsort(descending=True) == change[mask].abs().argsort()).all()


def test_a_floor_keeps_small_changes_near_one():
    change, mask = torch.full((1, 2), 1e-3), torch.ones(1, 2, dtype=torch.bool)
    assert steer.exponential_weights(change, mask, 0.7).max() == pytest.approx(0.7)
    assert steer.exponential_weights(change, mask, 0.7, floor=0.02).min() > 0.98


def test_nothing_to_change_is_weight_one_or_halfway():
    change, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    assert steer.exponential_weights(change, mask, 0.5).tolist() == [[1, 1, 0]]
    assert steer.linear_weights(change, mask, 0.8, 1.2).tolist() == [[1, 1, 0]]


def test_a_clipped_token_does_not_set_the_scale_except_in_the_release():
    batch, advantage = minibatch()
    far, old = batch.statistics["current_logprob"].clone(), batch.old_logprob.clone()
    old[0, 0], far[0, 0] = -4.0, -1.0  # A > 0 and r = e^3: the clip has stopped it
    batch = batch.with_(old_logprob=old).with_statistics(current_logprob=far)
    theorem = steer.Steer(steer.SteerConfig()).weight(batch, advantage)
    assert theorem[0, 0] == 1
    released = steer.Steer(steer.Steer.presets["released"]).weight(batch, advantage)
    assert released[0, 0] < 1


@pytest.mark.parametrize("form", ["theorem", "full", "released"])
def test_controls_deal_out_the_same_weights(form):
    batch, advantage = minibatch()

    def weights(control):
        method = steer.Steer(steer.SteerConfig(form, least=0.1, control=control))
        return method.weight(batch.with_statistics(**method.prepare(batch, advantage, generator())), advantage)

    own, constant, shuffled = (weights(c)[batch.mask] for c in ("none", "constant", "shuffled"))
    assert constant.unique().numel() == 1
    assert constant[0] == pytest.approx(float(own.mean()))
    assert shuffled.sort().values.tolist() == pytest.approx(own.sort().values.tolist())
    assert not torch.equal(shuffled, own)


# --------------------------------------------------------------------------------------------- high-entropy tokens


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_the_count_is_a_ceiling_and_the_selection_is_the_top(seed, ratio):
    values = torch.rand(3, 7, generator=generator(seed))
    mask = torch.rand(3, 7, generator=generator(seed + 1)) < 0.6
    selected, n = het.top_mask(values, mask, ratio), int(mask.sum())
    assert not (selected & ~mask).any()
    assert int(selected.sum()) == het.top_count(n, ratio)
    assert n == 0 or max(1, math.ceil(n * ratio - 1e-3)) <= int(selected.sum()) <= math.ceil(n * ratio) + (ratio == 0)
    if 0 < int(selected.sum()) < n:
        assert values[selected].min() >= values[mask & ~selected].max()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.05, 0.95))
def test_the_threshold_is_the_interpolated_quantile(seed, ratio):
    values = torch.rand(2, 9, generator=generator(seed), dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    selected, threshold = het.quantile_mask(values, mask, ratio)
    assert threshold == pytest.approx(float(values.flatten().quantile(1 - ratio)))
    assert torch.equal(selected, values >= threshold)


@pytest.mark.parametrize("selection", ["highest", "lowest", "random"])
def test_dividing_by_the_selected_tokens_is_dividing_by_all_times_their_number(selection):
    batch, advantage = minibatch()
    weights = []
    for denominator in ("selected", "all"):
        method = het.HighEntropyTokens(het.HighEntropyTokensConfig(0.3, denominator, selection=selection))
        prepared = batch.with_statistics(**method.prepare(batch, advantage, generator()))
        weights.append(method.weight(prepared, advantage))
    n, k = int(batch.mask.sum()), int((weights[1] > 0).sum())
    assert k == het.top_count(n, 0.3)
    assert torch.allclose(weights[0], weights[1] * n / k)


def test_no_token_selects_nothing_without_an_error():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not het.top_mask(torch.rand(2, 3), mask, 0.2).any()
    selected, threshold = het.quantile_mask(torch.rand(2, 3), mask, 0.2)
    assert not selected.any()
    assert threshold.isnan()


# ------------------------------------------------------------------------------------------ negative reinforcement


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5))
def test_the_three_exact_gradients_are_one_direction(seed, right_answers):
    """E[grad] over all actions, unnormalised and on-policy: PSR, NSR and REINFORCE differ by a factor only."""
    logits = logits_of(seed)
    p = torch.softmax(logits, -1)
    correct = torch.arange(6) < right_answers
    exact = {}
    for mode in ("psr", "nsr", "reinforce"):
        weight = nr.sign_advantage(correct, mode, dtype=torch.float64)
        exact[mode] = sum(p[a] * nr.logit_gradient(logits, a, float(weight[a]), "logprob") for a in range(len(p)))
    psr, nsr, both = exact.values()
    assert torch.allclose(both, psr + nsr)
    assert torch.allclose(psr, nsr, atol=1e-12)


def test_only_the_rows_of_a_mode_are_kept():
    correct = torch.tensor([True, False, False, True])
    kept = {mode: nr.kept_rows(correct, mode).tolist() for mode in ("psr", "nsr", "weighted", "reinforce")}
    assert kept == {"psr": [0, 3], "nsr": [1, 2], "weighted": [0, 1, 2, 3], "reinforce": [0, 1, 2, 3]}


def test_a_rollout_with_nothing_to_keep_stays_and_has_no_advantage():
    rollout = make_rollout([3, 2, 4, 1]).with_(correct=torch.ones(4, dtype=torch.bool))
    method = nr.NegativeReinforcement(nr.NegativeReinforcement.presets["nsr"])
    left = method.filter(rollout)
    assert len(left) == 4
    assert not method.advantage(left).any()


# ------------------------------------------------------------------------------------------------------------ bapo


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_raising_the_lower_bound_never_raises_either_criterion(seed):
    ratio = torch.randn(5, 6, generator=generator(seed), dtype=torch.float64).exp()
    advantage = torch.randn(5, 1, generator=generator(seed + 1), dtype=torch.float64).expand(5, 6)
    mask = torch.rand(5, 6, generator=generator(seed + 2)) < 0.8
    weight = torch.rand(5, 6, generator=generator(seed + 3), dtype=torch.float64) * mask
    lows = [0.2, 0.5, 0.8, 0.99]
    shares = [bapo.positive_share(ratio, advantage, weight, low, 1.2) for low in lows]
    ratios = [bapo.positive_ratio(ratio, advantage, mask, low, 1.2) for low in lows]
    for values in (shares, ratios):
        assert all(b <= a + 1e-12 for a, b in pairwise(values) if a == a)


def test_a_search_stops_at_the_target_or_at_both_ends():
    met = bapo.search(lambda low, high: high, 1.5, (0.6, 0.9, 0.1), (1.2, 3.0, 0.1))
    assert (met.lower, met.upper, met.steps) == (0.6, pytest.approx(1.5), 3)
    ends = bapo.search(lambda low, high: 0.0, 1.0, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05))
    assert (ends.lower, ends.upper, ends.steps) == (pytest.approx(0.9), pytest.approx(3.0), 51)
    first = bapo.search(lambda low, high: low, 0.7, (0.6, 0.9, 0.1), (1.2, 3.0, 0.1), lower_first=True)
    assert (first.upper, first.steps) == (1.2, 1)
    nothing = bapo.search(lambda low, high: math.nan, 1.0, (0.6, 0.9, 0.1), (1.2, 3.0, 0.1))
    assert nothing.steps == 0


@pytest.mark.parametrize("preset", list(bapo.BAPO.presets))
def test_without_negatives_the_bounds_stay(preset):
    batch, advantage = minibatch()
    method = bapo.BAPO(bapo.BAPO.presets[preset])
    lower, upper = method.clip(batch, advantage.abs())
    assert (float(lower), float(upper)) == pytest.approx((method.config.lower, method.config.upper))
    assert method.found.steps == 0


def test_only_gradient_mass_responds_to_the_lower_bound():
    ratio, mask = torch.tensor([[0.7, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantage = torch.tensor([[-1.0, -1.0, 1.0]])
    before, after = (bapo.gradient_share(ratio, advantage, mask, low, 1.2) for low in (0.6, 0.8))
    assert after > before


# ------------------------------------------------------------------------------------------------------------ hapo


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_scaled_entropies_are_signed_and_bounded_and_the_release_loses_the_sign(seed):
    entropy = torch.rand(4, 6, generator=generator(seed), dtype=torch.float64) * 2
    mask = torch.rand(4, 6, generator=generator(seed + 1)) < 0.8
    mask[0, :2] = True
    signed, released = (hapo.scaled_entropy(entropy, mask, sign=s)[mask] for s in ("signed", "released"))
    assert signed.abs().max() <= 1 + 1e-12
    assert (released >= 0).all()
    assert torch.allclose(signed.abs(), released)
    order = entropy[mask].argsort()
    assert (signed[order].diff() >= -1e-12).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_token_advantages_of_a_group_add_up_to_zero(seed):
    reward = (torch.rand(8, generator=generator(seed)) < 0.5).double()
    lengths = torch.randint(1, 7, (8,), generator=generator(seed + 1))
    mask = torch.arange(6)[None] < lengths[:, None]
    group = torch.arange(8) // 4
    value = hapo.token_group_advantage(reward, group, mask, limit=math.inf) * mask
    for g in (0, 1):
        assert float(value[group == g].sum()) == pytest.approx(0, abs=1e-9)


def test_a_rare_success_falls_back_to_the_advantage_of_responses():
    reward, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    mask = torch.arange(40)[None] < torch.tensor([[1], [40]])
    value = hapo.token_group_advantage(reward, group, mask)
    assert value[0, 0] == pytest.approx(math.sqrt(0.5), abs=1e-5)
    assert value[1, 0] == pytest.approx(-math.sqrt(0.5), abs=1e-5)


def test_switched_off_it_is_a_plain_clip():
    batch, advantage = minibatch()
    method = hapo.HAPO(hapo.HAPOConfig(tau=0.0, token_advantage=False, alpha=0.0, beta=0.0))
    batch = batch.with_statistics(**method.prepare(batch, advantage, generator()))
    lower, upper = method.clip(batch, advantage)
    assert lower[batch.mask].unique().tolist() == pytest.approx([0.8])
    assert upper[batch.mask].unique().tolist() == pytest.approx([1.28])
    assert method.weight(batch, advantage).unique().tolist() == [1]
    assert not method.has("advantage")
    method.filter(batch)
    assert method.temper() is None
    assert not method.has("temper")


def test_the_sampler_is_cooled_below_the_pivot_and_warmed_above():
    method = hapo.HAPO()
    assert method.temper() is None  # the first step has no statistics
    method.filter(make_rollout([5, 5, 5, 5]))
    low, high = math.exp(method.scale.pivot) / 2, math.exp(method.scale.pivot) * 1.01
    temperature = method.temper().factors(torch.tensor([low, high]))
    assert temperature[0] < 1 < temperature[1]
    restored = hapo.HAPO()
    restored.load_state_dict(method.state_dict())
    assert restored.temper() == method.temper()


@pytest.mark.parametrize("sign", ["signed", "released"])
@given(SEEDS, st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_the_rule_of_the_sampler_is_the_formula(sign, seed, quantile):
    method = hapo.HAPO(hapo.HAPOConfig(sign=sign, quantile=quantile))
    rollout = make_rollout([5, 3, 8, 2], seed=seed)
    method.filter(rollout)
    entropy = torch.cat([torch.rand(200, generator=generator(seed)) * 1.5, torch.tensor([0.0, 1e-12, 1e-8])])
    # the exact ends of the old range are among what is asked
    entropy = torch.cat([entropy, rollout.statistics["token_entropy"][rollout.mask]])
    expected = hapo.adaptive_temperature(method.scale.apply(entropy, sign), 1.0, method.config.tau)
    assert torch.allclose(method.temper().factors(entropy), expected, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------- siren


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_no_gradient_leaves_the_nucleus(seed):
    logits = logits_of(seed, 8, 1.0).requires_grad_()
    value = nucleus_entropy(logits, 0.8)
    (gradient,) = torch.autograd.grad(value, logits)
    p = torch.softmax(logits.detach(), -1)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[p.argsort(descending=True)[: int((p.sort(descending=True).values.cumsum(0) < 0.8).sum())]] = True
    assert (gradient[~inside].abs() < 1e-12).all()


def test_a_row_of_one_or_of_equals_has_no_peak():
    values = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.3, 0.3], [0.1, 0.2, 0.3]])
    mask = torch.tensor([[True, False, False], [True] * 3, [True] * 3])
    assert siren.peak_mask(values, mask, 0.8).tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    assert torch.equal(siren.peak_mask(values, mask, None), mask)


# ------------------------------------------------------------------------------------------------------------- epo


def test_the_hinge_has_a_gradient_and_the_released_penalty_has_none():
    entropy = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(epo.corridor_hinge(entropy, 0.5, 0.5, 1.2).sum(), entropy)
    assert gradient.tolist() == [-1, 0, 1]
    assert not epo.corridor_indicator(entropy, 0.5, 0.5, 1.2).requires_grad
    assert epo.corridor_indicator(entropy, 0.5, 0.5, 1.2).tolist() == [1, 0, 1]


def test_the_phase_weight_falls_from_two_to_one():
    values = [epo.phase_weight(k, 150) for k in range(0, 151, 10)]
    assert values[0] == 2
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1, abs=0.01)


def test_history_is_kept_and_undefined_steps_are_left_out():
    method = epo.EPO()
    assert method.weight_of_penalty == 0
    for value in (0.4, math.nan, 0.2):
        method.observe({"token_entropy": value})
    assert method.history == [0.4, 0.2]
    restored = epo.EPO()
    restored.load_state_dict(method.state_dict())
    assert restored.weight_of_penalty == method.weight_of_penalty == epo.phase_weight(2, 150)


# ----------------------------------------------------------------------------------------------- arbitrary entropy


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([0.99, 1.01]))
def test_imitating_a_flatter_self_raises_entropy_and_a_sharper_one_lowers_it(seed, temperature):
    logits = logits_of(seed)
    exact, first = ae.entropy_drift(logits, temperature)
    step = 1e-4 * ae.reinforce_direction(logits, temperature)
    assert float(exact_change(logits, step)) / 1e-4 == pytest.approx(float(exact), rel=0.02, abs=1e-7)
    assert float(exact) == pytest.approx(float(first), rel=0.1, abs=1e-6)
    assert (float(exact) > 0) == (temperature > 1) or abs(float(exact)) < 1e-6


def test_the_controller_and_the_number_of_rows():
    assert ae.control_temperature(0.5, 0.5, 1.2, 0.8) == 1.2
    assert ae.control_temperature(0.51, 0.5, 1.2, 0.8) == 0.8
    assert ae.replacement_number(7, 5, 0.4, 0.5) == 5
    assert ae.replacement_number(1, 5, 0.6, 0.5) == 0


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 40))
def test_the_same_prompts_are_sampled_again_however_a_step_is_divided(number, share, cut):
    cut = min(cut, number)
    whole = ae.again_places(share, 0, number)
    parts = ae.again_places(share, 0, cut) + [cut + i for i in ae.again_places(share, cut, number - cut)]
    assert parts == whole
    assert len(whole) == ae.again_count(share, number) == math.ceil(round(share * number, 9)) >= 1
    assert len(ae.again_places(share, 0, cut)) == ae.again_count(share, cut)


def test_a_quarter_is_every_fourth_prompt():
    assert ae.again_places(0.25, 0, 16) == [0, 4, 8, 12]
    assert ae.again_places(0.1, 0, 30) == [0, 10, 20]
    assert ae.again_places(1.0, 5, 3) == [0, 1, 2]


def test_mixing_without_a_success_leaves_the_advantages():
    advantage = torch.randn(3, 2, generator=generator())
    old = torch.zeros(3, 2)
    share, mixed = ae.dcpo_advantage(advantage, torch.zeros(3, dtype=torch.bool), old, old, 0.1, 0.5)
    assert share == 0
    assert torch.equal(mixed, advantage)


# ---------------------------------------------------------------------------------------------------------- lp-reg


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_sampled_form_has_the_expected_gradient_of_the_forward_divergence(seed):
    logits = logits_of(seed).requires_grad_()
    proxy, _ = lp_reg.proxy_log_p(logits + logits_of(seed + 1, spread=0.3), 0.0, "none")
    log_p = torch.log_softmax(logits, -1)
    (forward,) = torch.autograd.grad(lp_reg.forward_kl(log_p, proxy), logits, retain_graph=True)
    p = log_p.detach().exp()
    sampled = torch.zeros_like(logits)
    for action in range(len(p)):
        (one,) = torch.autograd.grad(
            lp_reg.k3_to_proxy(log_p[action], proxy[action], clamp=None), logits, retain_graph=True
        )
        sampled = sampled + p[action] * one
    assert torch.allclose(sampled, forward, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 0.5))
def test_on_policy_the_pull_is_the_filtered_mass(seed, kappa):
    log_p = torch.log_softmax(logits_of(seed), -1)
    proxy, keep = lp_reg.proxy_log_p(log_p, kappa)
    z = float(log_p.exp()[keep].sum())
    assert torch.allclose((proxy - log_p)[keep], torch.full_like(log_p[keep], -math.log(z)))
    own = log_p[keep].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lp_reg.k3_to_proxy(own, proxy[keep]).sum(), own)
    assert gradient.tolist() == pytest.approx([1 - 1 / z] * len(own))


def test_few_negative_tokens_are_not_regularised():
    logprob, mask = -torch.rand(2, 8, generator=generator()), torch.ones(2, 8, dtype=torch.bool)
    advantage = torch.tensor([[-1.0], [1.0]]).expand(2, 8)
    assert not lp_reg.protected_tokens(logprob, advantage, mask, 0.1).any()
    chosen = lp_reg.protected_tokens(logprob, advantage, mask, 0.5)
    assert int(chosen.sum()) == 4
    assert not chosen[1].any()
    assert logprob[0][chosen[0]].max() <= logprob[0][~chosen[0]].min()


# -------------------------------------------------------------------------------------------------------- settings


WRONG = [
    (steer.SteerConfig, {"least": 0.0}, "steer.least"),
    (steer.SteerConfig, {"form": "exact"}, "steer.form"),
    (het.HighEntropyTokensConfig, {"ratio": 20}, "0.2"),
    (nr.NegativeReinforcementConfig, {"mode": "nrs"}, "nsr"),
    (bapo.BAPOConfig, {"target": 1.5}, "bapo.target"),
    (bapo.BAPOConfig, {"lower": 0.95}, "bapo.lower"),
    (hapo.HAPOConfig, {"clip_low": 0.8}, "hapo.clip_low"),
    (siren.SirenConfig, {"quantile": 1.0}, "siren.quantile"),
    (epo.EPOConfig, {"low": 3.0}, "epo.low"),
    (ae.ArbitraryEntropyConfig, {"target": -0.1}, "arbitrary_entropy.target"),
    (lp_reg.LpRegConfig, {"divergence": "forward"}, "proxy: current"),
]


@pytest.mark.parametrize(("config", "settings", "names"), WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_a_wrong_setting_is_named(config, settings, names):
    with pytest.raises(UserError, match=names):
        config(**settings)
