"""The baselines as methods: which hook each one owns, what its presets change, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import make_rollout
from torch import Tensor

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.reduce import reduce, reduction_weights
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import REGISTRY, build, compose, load_class
from rlvr_lab.methods.base import LossInputs, Method, Pipeline

D = torch.float64
SLUGS = [slug for slug, entry in REGISTRY.items() if entry.card == "baselines"]
EVERY = [(slug, preset) for slug in SLUGS for preset in load_class(slug).presets]
# dynamic sampling drops rows; its own test says which
KEEP_ROWS = [(slug, preset) for slug, preset in EVERY if slug != "dynamic_sampling"]
REGULARISERS = [(s, p) for s, p in EVERY if s in ("kl_reference", "entropy_bonus", "adaptive_entropy")]
# groups of 2, 3 and 1; a response of no tokens
LENGTHS, GROUPS = [5, 3, 4, 0, 2, 4], [0, 0, 1, 1, 1, 2]
REWARD = [1.0, 0.0, 0.5, 1.0, 0.0, 0.7]
VOCABULARY = 6


def made(slug: str, preset: str = "paper", **settings: Any) -> Any:
    return build(slug, {"preset": preset, **settings})


def make_record(seed: int = 0) -> Rollout:
    """A ragged record in double precision with everything a baseline may require."""
    base = make_rollout(LENGTHS, width=5, seed=seed)
    noise = torch.randn(4, *base.response_mask.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=D)
    old = base.behaviour_logprob.double() + 0.8 * noise[0]
    return base.with_(
        group_id=torch.tensor(GROUPS),
        reward=torch.tensor(REWARD, dtype=D),
        correct=torch.tensor(REWARD) > 0.5,
        finished=torch.tensor([True, False, True, True, True, True]),
        behaviour_logprob=base.behaviour_logprob.double(),
        old_logprob=old,
        statistics={"token_entropy": noise[1].abs(), "ref_logprob": old + noise[2]},
    )


@pytest.fixture
def record() -> Rollout:
    return make_record()


def make_logits(rollout: Rollout, seed: int = 3) -> Tensor:
    shape = (*rollout.response_mask.shape, VOCABULARY)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def inputs_of(pipeline: Pipeline, rollout: Rollout, logits: Tensor, advantage: Tensor) -> LossInputs:
    """What the updater hands to a loss, for a policy given by its logits; the first word is the sampled one."""
    log_p = torch.log_softmax(logits, -1)
    old = rollout.require("old_logprob", by="test").masked_fill(~rollout.mask, 0.0)
    lower, upper = pipeline.clip(rollout, advantage)
    return LossInputs(rollout, log_p[..., 0], old, advantage, lower, upper, -(log_p.exp() * log_p).sum(-1))


def update(pipeline: Pipeline, rollout: Rollout, logits: Tensor) -> tuple[float, Tensor]:
    """Loss of one minibatch and its gradient on the logits, as the updater computes them."""
    x = logits.detach().clone().requires_grad_()
    rollout = pipeline.filter(rollout)
    advantage = pipeline.advantage(rollout)
    inputs = inputs_of(pipeline, rollout, x, advantage)
    reduction, constant = pipeline.reduction
    token = reduction_weights(rollout.mask, reduction, constant, D)
    for weight in pipeline.weights(rollout, advantage).values():
        token = token * weight
    loss = (pipeline.surrogate(inputs).loss.masked_fill(~rollout.mask, 0.0) * token).sum()
    for term in pipeline.regularise(inputs):
        loss = loss + reduce(term.loss, rollout.mask, term.reduction or reduction, constant)
    (gradient,) = torch.autograd.grad(loss, x)
    return float(loss.detach()), gradient


def loss_of(method: Method, rollout: Rollout) -> float:
    return update(compose([method]), rollout, make_logits(rollout))[0]


# -- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "owned"),
    [
        ("dr_grpo", {"advantage", "reduction"}),
        ("rloo", {"advantage"}),
        ("reinforce_plus_plus", {"advantage"}),
        ("opo", {"advantage"}),
        ("gspo", {"clip", "surrogate", "reduction"}),
        ("cispo", {"clip", "surrogate", "reduction"}),
        ("gpg", {"surrogate", "reduction"}),
        ("sapo", {"surrogate", "reduction"}),
        ("gmpo", {"clip", "surrogate", "reduction"}),
        ("clip_higher", {"clip"}),
        ("dynamic_sampling", set()),
        ("overlong", set()),
        ("kl_reference", set()),
        ("entropy_bonus", set()),
        ("adaptive_entropy", set()),
        ("truncated_importance_sampling", set()),
    ],
)
def test_a_baseline_takes_over_its_own_hooks_and_leaves_grpo_the_rest(slug: str, owned: set[str]) -> None:
    pipeline = compose([made(slug)])
    needed = ("advantage", "clip", "surrogate", "reduction")
    for hook in needed:
        assert pipeline.owner(hook).slug == (slug if hook in owned else "grpo"), hook


@pytest.mark.parametrize(
    ("first", "second", "hook"),
    [("rloo", "opo", "advantage"), ("gspo", "clip_higher", "clip"), ("gpg", "sapo", "surrogate")],
)
def test_two_owners_of_one_hook_are_both_named(first: str, second: str, hook: str) -> None:
    with pytest.raises(UserError, match=f"'{first}' and '{second}' both own the hook '{hook}'"):
        compose([made(first), made(second)])


@pytest.mark.parametrize(("slug", "preset"), KEEP_ROWS)
def test_padding_is_inert(slug: str, preset: str, record: Rollout) -> None:
    pipeline, outside, logits = compose([made(slug, preset)]), ~record.mask, make_logits(record)
    clean = update(pipeline, record, logits)
    for garbage in (7.0, -40.0, math.nan):
        spoilt = record.with_(
            old_logprob=record.require("old_logprob", by="test").masked_fill(outside, garbage),
            behaviour_logprob=record.behaviour_logprob.masked_fill(outside, garbage),
            statistics={k: v.masked_fill(outside, garbage) for k, v in record.statistics.items()},
        )
        loss, gradient = update(pipeline, spoilt, logits + outside[..., None] * torch.arange(VOCABULARY))
        assert loss == clean[0]
        assert torch.equal(gradient, clean[1])
    assert (clean[1][outside] == 0).all()
    assert clean[1].abs().max() > 1e-6


@pytest.mark.parametrize(("slug", "preset"), KEEP_ROWS)
def test_row_order_is_inert(slug: str, preset: str, record: Rollout) -> None:
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    logits, pipeline = make_logits(record), compose([made(slug, preset)])
    loss, gradient = update(pipeline, record, logits)
    shuffled = update(pipeline, record.rows(order), logits[order])
    assert shuffled[0] == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(shuffled[1], gradient[order])


@pytest.mark.parametrize(("slug", "preset"), REGULARISERS)
def test_a_finite_difference_confirms_the_gradient_of_every_regulariser(
    slug: str, preset: str, record: Rollout
) -> None:
    settings = {"initial": 0.003, "open_at_start": True} if slug == "adaptive_entropy" else {}
    pipeline = compose([made(slug, preset, **settings)])
    advantage = pipeline.advantage(record)

    def term(logits: Tensor) -> Tensor:
        (only,) = pipeline.regularise(inputs_of(pipeline, record, logits, advantage))
        return reduce(only.loss, record.mask, only.reduction or pipeline.reduction[0])

    x = make_logits(record).requires_grad_()
    (gradient,) = torch.autograd.grad(term(x), x)
    step, scale = 1e-5, float(gradient.abs().max())
    assert scale > 1e-5
    for i, t in record.mask.nonzero().tolist()[::3]:
        for v in range(VOCABULARY):
            change = torch.zeros_like(x)
            change[i, t, v] = step
            slope = float((term(x + change) - term(x - change)).detach()) / (2 * step)
            assert float(gradient[i, t, v]) == pytest.approx(slope, rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("grpo", {"delta": 1.1}, r"methods.grpo.delta must be above 1 \+ clip_high or null, not 1.1"),
        ("grpo", {"eps": 0}, "methods.grpo.eps must be positive"),
        (
            "grpo",
            {"singleton": "row"},
            "methods.grpo.singleton must be one of zero, raw, not 'row'; did you mean 'raw'",
        ),
        ("grpo", {"reduction": "token_sum_over_constant"}, "methods.grpo.reduction_constant is needed"),
        ("dr_grpo", {"max_length": 0}, "methods.dr_grpo.max_length must be positive, not 0"),
        ("dr_grpo", {"reduction": "token_mean"}, "methods.dr_grpo.reduction must be one of sequence_mean_of_token_sum"),
        ("dr_grpo", {"singleton": "none"}, "methods.dr_grpo.singleton must be one of zero, raw"),
        ("rloo", {"singleton": "none"}, "methods.rloo.singleton must be one of zero, raw"),
        ("opo", {"singleton": "none"}, "methods.opo.singleton must be one of zero, raw"),
        ("reinforce_plus_plus", {"gamma": 1.1}, r"methods.reinforce_plus_plus.gamma must lie in \[0, 1\]"),
        ("reinforce_plus_plus", {"variant": "base"}, ".variant must be one of .*; did you mean 'baseline'"),
        ("reinforce_plus_plus", {"weigh": "tokens"}, ".weigh must be one of .*; did you mean 'token'"),
        ("reinforce_plus_plus", {"kl_penalty": -1}, "methods.reinforce_plus_plus.kl_penalty must not be negative"),
        ("reinforce_plus_plus", {"eps": 0}, "methods.reinforce_plus_plus.eps must be positive"),
        ("reinforce_plus_plus", {"singleton": "x"}, "methods.reinforce_plus_plus.singleton must be one of"),
        ("reinforce_plus_plus", {"preset": "baseline", "gamma": 0.9}, "kl_penalty and gamma act on token returns"),
        ("gspo", {"clip_low": -0.1}, r"methods.gspo.clip_low must lie in \[0, 1\]"),
        ("gspo", {"clip_high": -0.1}, "methods.gspo.clip_high must not be negative"),
        ("gspo", {"log_limit": 0}, "methods.gspo.log_limit must be positive or null"),
        ("cispo", {"clip_low": -0.1}, "methods.cispo.clip_low must not be negative, or null"),
        ("cispo", {"clip_high": -0.1}, "methods.cispo.clip_high must not be negative"),
        ("cispo", {"bound": "ratios"}, "methods.cispo.bound must be one of .*; did you mean 'ratio'"),
        ("cispo", {"bound": "ratio", "clip_low": 6}, "methods.cispo.clip_low must leave the lower bound below 5.0"),
        ("cispo", {"reduction": "token"}, "methods.cispo.reduction must be one of .*; did you mean 'token_mean'"),
        ("gpg", {"reduction": "mean"}, "methods.gpg.reduction must be one of"),
        ("sapo", {"tau_positive": 0}, "methods.sapo.tau_positive must be positive"),
        ("sapo", {"tau_negative": -1}, "methods.sapo.tau_negative must be positive"),
        ("sapo", {"reduction": "mean"}, "methods.sapo.reduction must be one of"),
        ("gmpo", {"clip_low": -0.4}, "methods.gmpo.clip_low must not be negative"),
        ("gmpo", {"clip_high": -0.4}, "methods.gmpo.clip_high must not be negative"),
        ("clip_higher", {"clip_low": 2}, r"methods.clip_higher.clip_low must lie in \[0, 1\]"),
        ("clip_higher", {"clip_high": -2}, "methods.clip_higher.clip_high must not be negative"),
        ("dynamic_sampling", {"metric": "corect"}, "dynamic_sampling.metric must be .*; did you mean 'correct'"),
        ("dynamic_sampling", {"max_batches": 0}, "methods.dynamic_sampling.max_batches must be at least 1"),
        ("overlong", {"max_length": 0}, "methods.overlong.max_length must be positive"),
        (
            "overlong",
            {"max_length": 32},
            r"methods.overlong.buffer must lie in \(0, max_length\] = \(0, 32\], not 4096",
        ),
        ("overlong", {"factor": -1}, "methods.overlong.factor must not be negative"),
        ("overlong", {"punish": False}, "methods.overlong.punish and methods.overlong.mask_truncated are both off"),
        ("kl_reference", {"beta": -1}, "methods.kl_reference.beta must not be negative"),
        ("kl_reference", {"kind": "k3+"}, "methods.kl_reference.kind must be one of .*; did you mean 'k3'"),
        ("entropy_bonus", {"reduction": "dapo"}, "methods.entropy_bonus.reduction must be one of"),
        ("entropy_bonus", {"coefficient": "low"}, "methods.entropy_bonus.coefficient must be a number"),
        ("adaptive_entropy", {"target": 0}, "methods.adaptive_entropy.target must be positive"),
        ("adaptive_entropy", {"step": 0}, "methods.adaptive_entropy.step must be positive"),
        ("adaptive_entropy", {"initial": 1}, r"methods.adaptive_entropy.initial must lie in \[0.0, 0.005\]"),
        (
            "adaptive_entropy",
            {"measure": "entropy"},
            "adaptive_entropy.measure must be .*; did you mean 'token_entropy'",
        ),
        ("truncated_importance_sampling", {"cap": 0}, "methods.truncated_importance_sampling.cap must be positive"),
    ],
)
def test_a_wrong_setting_is_named(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(slug, settings)
    assert "\n" not in str(caught.value)


# -- advantages -----------------------------------------------------------------------------------------------------


def row_advantage(slug: str, rollout: Rollout, preset: str = "paper", **settings: Any) -> list[float]:
    """The advantage of each response, read from its first token; the methods here give all of them the same."""
    value: Tensor = made(slug, preset, **settings).advantage(rollout)
    assert value.shape == rollout.response_mask.shape
    return value[:, 0].tolist()


def test_rloo_is_dr_grpo_times_g_over_g_minus_1(record: Rollout) -> None:
    dr_grpo, rloo = row_advantage("dr_grpo", record), row_advantage("rloo", record)
    for i, factor in enumerate([2, 2, 1.5, 1.5, 1.5]):
        assert rloo[i] == pytest.approx(factor * dr_grpo[i])
    assert rloo[5] == dr_grpo[5] == 0
    assert row_advantage("rloo", record, "released")[5] == 0.7


@pytest.mark.parametrize("slug", ["grpo", "dr_grpo", "rloo", "opo"])
def test_papers_and_released_code_disagree_about_a_group_of_one(slug: str, record: Rollout) -> None:
    paper, released = row_advantage(slug, record), row_advantage(slug, record, "released")
    assert paper[5] == 0
    assert released[5] == pytest.approx(0.7, abs=1e-5)
    assert released[:5] == pytest.approx(paper[:5])


def test_opo_counts_only_what_the_policy_wrote(record: Rollout) -> None:
    # of the 5 tokens of response 0 the tool wrote 2: lengths 3 and 3
    action = record.action_mask.clone()
    action[0, 1:3] = False
    assert row_advantage("opo", record)[:2] == pytest.approx([1 - 5 / 8, -5 / 8])
    assert row_advantage("opo", record.with_(action_mask=action))[:2] == pytest.approx([0.5, -0.5])


def test_a_reward_reaches_the_turns_before_a_tools_output(record: Rollout) -> None:
    action = record.action_mask.clone()
    action[0, 2:4] = False
    advantage = made("reinforce_plus_plus", "released").advantage(record.with_(action_mask=action))
    assert advantage[0, 0] == advantage[0, 4] != 0
    assert (advantage[0, 2:4] == 0).all()


def test_reinforce_plus_plus_whitens_over_the_batch_not_the_group(record: Rollout) -> None:
    lengths, reward = torch.tensor(LENGTHS, dtype=D), torch.tensor(REWARD, dtype=D)
    mean = (lengths * reward).sum() / 18
    variance = (lengths * (reward - mean).square()).sum() / 17
    assert row_advantage("reinforce_plus_plus", record, "released")[0] == pytest.approx(
        float((1 - mean) / variance.sqrt()), abs=1e-6
    )
    written = reward[lengths > 0]
    assert row_advantage("reinforce_plus_plus", record)[0] == pytest.approx(
        float((1 - written.mean()) / written.std()), abs=1e-6
    )
    baseline = row_advantage("reinforce_plus_plus", record, "baseline")
    assert baseline[5] > 0 > baseline[1]  # a raw singleton; a centred group


def test_the_kl_penalty_of_reinforce_plus_plus_lowers_returns_token_by_token(record: Rollout) -> None:
    far = record.with_statistics(ref_logprob=record.require("old_logprob", by="test") - 1.0)
    method = made("reinforce_plus_plus", "released", kl_penalty=0.1)
    assert "ref_logprob" in method.requires
    assert "ref_logprob" not in made("reinforce_plus_plus").requires
    advantage = method.advantage(far)
    # every token ahead costs 0.1, so the return rises along a response by the same step everywhere
    steps = (advantage[:, 1:] - advantage[:, :-1])[far.mask[:, 1:]]
    assert steps.min() > 0
    torch.testing.assert_close(steps, steps[0].expand_as(steps))


def test_grpo_may_scale_by_the_batch(record: Rollout) -> None:
    assert row_advantage("grpo", record, "trl", std="batch") == pytest.approx(
        group_advantage(torch.tensor(REWARD, dtype=D), torch.tensor(GROUPS), "batch", 1e-4).tolist()
    )
    assert row_advantage("grpo", record, "trl") != pytest.approx(row_advantage("grpo", record, "trl", std="batch"))


# -- losses ---------------------------------------------------------------------------------------------------------


def test_dr_grpo_divides_by_a_constant_and_verl_not_by_the_rows(record: Rollout) -> None:
    # without the group of one, where the presets differ as well
    record = record.rows(torch.arange(5))
    paper = loss_of(made("dr_grpo", max_length=100), record)
    assert loss_of(made("dr_grpo", max_length=50), record) == pytest.approx(2 * paper)
    released = loss_of(made("dr_grpo", "released", max_length=100), record)
    assert released == pytest.approx(5 * paper)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("grpo", "paper"), ("grpo", "released")),
        (("grpo", "released"), ("grpo", "trl")),
        (("dr_grpo", "paper"), ("dr_grpo", "released")),
        (("reinforce_plus_plus", "paper"), ("reinforce_plus_plus", "released")),
        (("reinforce_plus_plus", "released"), ("reinforce_plus_plus", "baseline")),
        (("cispo", "paper"), ("cispo", "released")),
        (("cispo", "paper"), ("cispo", "trl")),
        (("gmpo", "released"), ("gmpo", "verl")),
        (("clip_higher", "paper"), ("clip_higher", "symmetric")),
        (("kl_reference", "paper"), ("kl_reference", "released")),
        (("entropy_bonus", "paper"), ("entropy_bonus", "released")),
        (("truncated_importance_sampling", "paper"), ("truncated_importance_sampling", "uncapped")),
    ],
)
def test_presets_differ_visibly(first: tuple[str, str], second: tuple[str, str]) -> None:
    rollout = make_record(seed=5)
    old = rollout.require("old_logprob", by="test").clone()
    logits = make_logits(rollout)
    # one token far off with a positive advantage, one with a negative one, one between two upper bounds
    logprob = torch.log_softmax(logits, -1)[..., 0]
    for (i, t), log_ratio in {
        (0, 0): math.log(5.5),
        (1, 0): 2.0,
        (0, 1): math.log(1.25),
        (0, 2): math.log(9.0),
    }.items():
        old[i, t] = logprob[i, t] - log_ratio
    rollout = rollout.with_(old_logprob=old, behaviour_logprob=old - 1.5)
    one, other = (update(compose([made(*p)]), rollout, logits) for p in (first, second))
    assert abs(one[0] - other[0]) > 1e-5
    assert (one[1] - other[1]).abs().max() > 1e-5


def test_grpo_hands_its_dual_clip_and_delta_to_the_loss(record: Rollout) -> None:
    for settings, ratio in (({}, math.exp(5)), ({"delta": 4.0}, 4.0), ({"dual_clip": 3.0}, 3.0)):
        pipeline = compose([made("grpo", **settings)])
        advantage = torch.full((6, 5), -2.0, dtype=D)
        inputs = inputs_of(pipeline, record, make_logits(record), advantage)
        far = pipeline.surrogate(replace(inputs, old_logprob=inputs.logprob - 5))
        assert float(far.loss[0, 0]) == pytest.approx(2 * ratio)


def test_only_the_released_gspo_limits_the_ratio(record: Rollout) -> None:
    ratios = []
    for preset in ("paper", "released"):
        pipeline = compose([made("gspo", preset)])
        advantage = pipeline.advantage(record)
        inputs = inputs_of(pipeline, record, make_logits(record), advantage)
        ratios.append(float(pipeline.surrogate(replace(inputs, old_logprob=inputs.logprob - 12)).ratio[0, 0].log()))
    assert ratios == pytest.approx([12, 10])


def test_cispo_bounds_mean_different_things_in_verl_and_trl(record: Rollout) -> None:
    advantage = torch.ones(2, 2, dtype=D)
    for settings, expected in (
        ({"preset": "paper"}, (0, 6)),
        ({"preset": "trl"}, (0, 5)),
        ({"preset": "verl"}, (0.8, 1.2)),
        ({"clip_low": 3.0}, (0, 6)),
        ({"bound": "ratio", "clip_low": 0.5}, (0.5, 5)),
    ):
        lower, upper = build("cispo", settings).clip(record, advantage)  # type: ignore[attr-defined]
        assert (float(lower), float(upper)) == pytest.approx(expected)
        assert lower.dtype == upper.dtype == D


def test_gmpo_clips_the_logarithm(record: Rollout) -> None:
    pipeline = compose([made("gmpo", clip_low=0.1, clip_high=0.3)])
    advantage = torch.ones(6, 5, dtype=D)
    inputs = inputs_of(pipeline, record, make_logits(record), advantage)
    far = pipeline.surrogate(replace(inputs, old_logprob=inputs.logprob - 5))
    assert float(far.ratio[0, 0].log()) == pytest.approx(0.3)
    against = pipeline.surrogate(replace(inputs, old_logprob=inputs.logprob + 5, advantage=-advantage))
    assert float(against.ratio[0, 0].log()) == pytest.approx(-0.1)


@pytest.mark.parametrize("slug", ["clip_higher", "gspo", "cispo", "gpg", "sapo", "gmpo"])
def test_on_policy_every_loss_moves_the_policy_alike(slug: str, record: Rollout) -> None:
    logits = make_logits(record)
    on_policy = record.with_(old_logprob=torch.log_softmax(logits, -1)[..., 0])
    base = made("grpo", "paper")
    plain = update(compose([base]), on_policy, logits)[1]
    settings = {"reduction": base.reduction} if slug in ("cispo", "gpg", "sapo") else {}
    torch.testing.assert_close(update(compose([base, made(slug, **settings)]), on_policy, logits)[1], plain)


# -- data -----------------------------------------------------------------------------------------------------------


def test_dynamic_sampling_keeps_groups_with_a_signal(record: Rollout) -> None:
    # right answers per group: 1 of 2, 1 of 3, 1 of 1
    assert made("dynamic_sampling").filter(record).group_id.tolist() == GROUPS[:5]
    assert made("dynamic_sampling", "released").filter(record).group_id.tolist() == GROUPS
    solved = record.with_(correct=torch.tensor([True] * 2 + [False] * 4))
    kept = made("dynamic_sampling").filter(solved)
    assert len(kept) == 0  # possibly nothing at all
    assert made("dynamic_sampling", metric="reward").filter(solved).group_id.tolist() == GROUPS[:5]
    assert made("dynamic_sampling", metric="reward").requires == ("reward",)


def test_dynamic_sampling_asks_for_more(record: Rollout) -> None:
    assert compose([made("dynamic_sampling")]).refill == 10
    assert compose([made("dynamic_sampling", max_batches=3)]).refill == 3
    assert compose([made("rloo")]).refill == 0


def test_overlong_punishes_long_responses(record: Rollout) -> None:
    settings = {"max_length": 4, "buffer": 2, "factor": 0.5}
    (paper,) = made("overlong", **settings).reward(record).values()
    assert paper.tolist() == [-0.5, -0.25, -0.5, 0, 0, -0.5]
    (released,) = made("overlong", "released", **settings).reward(record).values()
    assert released.tolist() == [-0.75, -0.25, -0.5, 0, 0, -0.5]
    assert made("overlong").filter(record) is record
    total = compose([made("overlong", **settings)]).reward(record.with_(reward_components={"task": record.reward}))
    assert total.require("reward", by="test").tolist() == pytest.approx([0.5, -0.25, 0, 1, 0, 0.2])


def test_overlong_does_not_count_what_a_tool_said(record: Rollout) -> None:
    settings = {"max_length": 4, "buffer": 2, "factor": 0.5}
    action = record.action_mask.clone()
    action[0, :2] = False
    (plain,) = made("overlong", "released", **settings).reward(record).values()
    (told,) = made("overlong", "released", **settings).reward(record.with_(action_mask=action)).values()
    assert told[0] == plain[0] + 0.5 * 2 / 2
    assert torch.equal(told[1:], plain[1:])


def test_overlong_filtering_masks_cut_responses_and_keeps_the_baseline(record: Rollout) -> None:
    method = made("overlong", "filtering")
    assert method.reward(record) == {}
    kept = method.filter(record)
    assert kept.mask.any(1).tolist() == [True, False, True, False, True, True]
    assert len(kept) == len(record)
    # response 1 was cut; its reward still pulls the baseline of its group
    assert row_advantage("dr_grpo", kept)[0] == 0.5


# -- regularisers and weights ---------------------------------------------------------------------------------------


def term_of(method: Method, rollout: Rollout) -> Tensor:
    """The extra loss [B, T] of one method."""
    pipeline = compose([method])
    (term,) = pipeline.regularise(inputs_of(pipeline, rollout, make_logits(rollout), pipeline.advantage(rollout)))
    return term.loss


def test_the_papers_grpo_is_grpo_with_a_kl_term(record: Rollout) -> None:
    logits = make_logits(record)
    parts = [made("grpo"), made("kl_reference")]
    alone, with_kl = update(compose(parts[:1]), record, logits)[0], update(compose(parts), record, logits)[0]
    d = (torch.log_softmax(logits, -1)[..., 0] - record.require("ref_logprob", by="test"))[record.mask]
    rows = record.mask.nonzero()[:, 0]
    lengths = torch.tensor(LENGTHS)[rows]
    k3 = ((-d).exp() + d - 1) / lengths / 5  # five responses are not empty
    assert with_kl - alone == pytest.approx(0.04 * float(k3.sum()))


def test_a_bonus_may_bring_its_own_reduction(record: Rollout) -> None:
    pipeline = compose([made("grpo"), made("entropy_bonus", "trl")])
    assert pipeline.reduction[0] == "sequence_mean_of_token_mean"
    assert pipeline.regularise_reductions == ("token_mean",)
    assert compose([made("entropy_bonus")]).regularise_reductions == ()


@pytest.mark.parametrize(("preset", "coefficient"), [("paper", 0.01), ("released", 0.001), ("trl", 0.01)])
def test_a_bonus_lowers_the_loss_by_coefficient_times_entropy(preset: str, coefficient: float, record: Rollout) -> None:
    assert applied(made("entropy_bonus", preset), record) == pytest.approx(coefficient)


@pytest.mark.parametrize("slug", ["entropy_bonus", "adaptive_entropy"])
def test_a_bonus_without_entropies_is_a_programming_error(slug: str, record: Rollout) -> None:
    pipeline = compose([made(slug)])
    inputs = inputs_of(pipeline, record, make_logits(record), pipeline.advantage(record))
    assert pipeline.any("needs_entropy")
    with pytest.raises(ValueError, match=f"{slug} needs differentiable entropies"):
        pipeline.regularise(replace(inputs, entropy=None))


def applied(method: Method, rollout: Rollout) -> float:
    """The coefficient in force, read off the loss: minus term over entropy."""
    entropy = torch.distributions.Categorical(logits=make_logits(rollout)).entropy()
    ratio = (-term_of(method, rollout) / entropy)[rollout.mask]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    return float(ratio[0])


def test_skyworks_coefficient_follows_the_log_probs_of_the_step_before(record: Rollout) -> None:
    method = made("adaptive_entropy", "released", step=0.001)
    seen = []
    for mean_logprob in (-0.1, -0.1, -0.3, -0.1):
        seen.append(applied(method, record))
        # the exact entropy says the opposite, and is not asked
        method.observe({"behaviour_logprob": mean_logprob, "token_entropy": 0.4 + mean_logprob})
    assert seen == pytest.approx([0, 0.001, 0.002, 0])
    assert method.filter(record) is record
    assert applied(method, record) == pytest.approx(0.002)


def test_trls_coefficient_follows_exact_entropies_and_includes_the_target(record: Rollout) -> None:
    method = made("adaptive_entropy", "trl", initial=0.1)
    seen = []
    for entropy in (0.2, 0.3, 0.1):
        seen.append(applied(method, record))
        method.observe({"behaviour_logprob": -1.0, "token_entropy": entropy})
    assert seen == pytest.approx([0, 0.105, 0])  # the gate is closed at first
    assert applied(method, record) == pytest.approx(0.105)


def test_the_papers_gate_acts_on_the_step_that_was_measured(record: Rollout) -> None:
    method = made("adaptive_entropy", "paper", initial=0.003)
    low, high = (record.with_statistics(token_entropy=torch.full((6, 5), h, dtype=D)) for h in (0.1, 0.3))
    assert method.filter(high) is high
    assert applied(method, record) == 0
    method.filter(low)
    assert applied(method, record) == pytest.approx(0.003)
    method.observe({"token_entropy": 0.1})
    assert applied(method, record) == pytest.approx(0.0031)


def test_a_target_above_the_uniform_entropy_is_refused() -> None:
    method = made("adaptive_entropy", "paper", target=4.9)
    method.check_run(vocabulary=150, steps=10)
    with pytest.raises(UserError, match=r"adaptive_entropy\.target is 4\.9 nats, but 4\.852"):
        method.check_run(vocabulary=128, steps=10)


def test_the_applied_coefficient_is_logged(record: Rollout) -> None:
    pipeline = compose([made("adaptive_entropy", "released", initial=0.003)])
    assert pipeline.metrics() == {"adaptive_entropy.coefficient": 0.003}
    pipeline.observe({"behaviour_logprob": -0.9})  # far above the target: the gate shuts
    assert pipeline.metrics() == {"adaptive_entropy.coefficient": 0.0}


@pytest.mark.parametrize("preset", ["paper", "released", "trl"])
def test_a_checkpoint_holds_coefficient_and_gate(preset: str, record: Rollout) -> None:
    first, second = (compose([made("adaptive_entropy", preset)]) for _ in range(2))
    for entropy in (0.1, 0.1, 0.1, 0.3, 0.1):
        first.observe({"behaviour_logprob": -entropy, "token_entropy": entropy})
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert applied(second.methods[-1], record) == applied(first.methods[-1], record) != 0


def test_importance_weights_are_truncated_ratios(record: Rollout) -> None:
    pipeline = compose([made("truncated_importance_sampling")])
    (weight,) = pipeline.weights(record, pipeline.advantage(record)).values()
    exact = (record.require("old_logprob", by="test") - record.behaviour_logprob).exp()
    torch.testing.assert_close(weight[record.mask], exact.clamp_max(2.0)[record.mask])
    assert (weight[record.mask] == 2).any()
    assert (weight[~record.mask] == 0).all()
    # a sampler that is the policy needs no correction
    same = record.with_(old_logprob=record.behaviour_logprob)
    (none,) = pipeline.weights(same, pipeline.advantage(same)).values()
    assert torch.equal(none, record.mask.to(D))
