"""ARES: golden values, the order of operations, what its definitions promise, and a run that is resumed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core import windows
from rlvr_lab.core.entropy import window_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.methods import _ares_code as code
from rlvr_lab.methods import ares, build, compose
from rlvr_lab.methods.base import LossInputs
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

SEEDS = st.integers(0, 10_000)
TINY = {"preset": "tiny", "target_decay": 0.0}


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "ares.json")}
    assert len(problems) == 8
    assert not any(problems.values()), problems


def one_word(text):
    """A vocabulary that knows "so" and "wait" as one word, and takes everything else apart."""
    return [40] if text in ("so", "wait") else [1, 2]


def graded(seed=0, right=(8, 5, 3, 0), width=14):
    """Groups of eight ragged responses, so many of each right."""
    g = torch.Generator().manual_seed(seed)
    n = 8 * len(right)
    lengths = torch.randint(1, width + 1, (n,), generator=g).tolist()
    rollout = make_rollout(lengths, group_size=8, width=width, seed=seed)
    correct = torch.cat([torch.arange(8) < k for k in right])
    return rollout.with_(correct=correct, reward=correct.float(), reward_components={"correct": correct.float()})


def with_statistics(rollout, seed=1):
    """The same with a reference, and what the release reads from the logits."""
    g = torch.Generator().manual_seed(seed)
    shape = rollout.response_ids.shape
    reference = rollout.old_logprob + 0.3 * torch.randn(shape, generator=g)
    trigger = (torch.rand(shape, generator=g) < 0.5).float()
    head, bare = (torch.rand(shape, generator=g) for _ in range(2))
    return rollout.with_statistics(
        **{"ref_logprob": reference, ares.TRIGGER: trigger, ares.HEAD: head, ares.BARE: bare}
    )


# ------------------------------------------------------------------------------------------------- events, thresholds


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.sampled_from([0, 1]))
def test_events_are_those_of_a_plain_loop(seed, width, offset):
    rollout = graded(seed)
    entropy, mask = rollout.statistics["token_entropy"].double(), rollout.mask
    quantile = windows.row_quantiles(entropy, mask, 0.95)
    rows = [entropy[i][mask[i]].numpy() for i in range(len(rollout))]
    expected = [np.quantile(row, 0.95) for row in rows]
    assert quantile.tolist() == pytest.approx(expected)
    theta = windows.pooled_threshold(quantile, rollout.group_id)
    assert float(theta[0]) == pytest.approx(np.mean(expected))
    event = windows.window_events(window_entropy(entropy, mask, width, offset), 0.7 * theta)
    for i, row in enumerate(rows):
        starts = range(len(row) - width - offset + 1)
        count = sum(row[t + offset : t + offset + width].mean() > 0.7 * np.mean(expected) for t in starts)
        assert int(event[i].sum()) == count


def test_a_response_shorter_than_the_window_has_no_event():
    rollout = make_rollout([3, 2, 0, 9]).with_(correct=torch.tensor([True, False, False, False]))
    seen = build("ares", TINY)._look(rollout)
    assert seen.count[:3].tolist() == [0, 0, 0]
    assert torch.isfinite(seen.theta).all()


@pytest.mark.parametrize("of", ["token", "window", "filled"])
def test_a_batch_without_a_token_has_no_threshold_and_no_event(of):
    rollout = make_rollout([0, 0], width=5).with_(correct=torch.tensor([True, False]))
    method = build("ares", {**TINY, "theta_of": of})
    value = method.reward(rollout)["ares"]
    method.observe({})
    assert value.tolist() == [0.0, 0.0]
    assert method.theta is None
    assert math.isnan(method.metrics()["theta"])


def test_equal_entropies_are_no_events_unless_the_threshold_is_included():
    rollout = graded().with_statistics(token_entropy=torch.full((32, 14), 0.5))
    for of in ("token", "window"):
        assert not build("ares", {**TINY, "theta_of": of})._look(rollout).count.any()
        included = build("ares", {**TINY, "theta_of": of, "inclusive": True})._look(rollout).count
        assert torch.equal(included, (rollout.lengths - 3).clamp_min(0).double())


def test_thresholds_by_group_median_and_average_over_steps():
    quantile, group = torch.tensor([1.0, 3.0, float("nan"), 10.0]), torch.tensor([0, 0, 1, 1])
    pooled = windows.pooled_threshold
    assert pooled(quantile, group, "group").tolist() == [2, 2, 10, 10]
    assert pooled(quantile, group, "median").tolist() == [3] * 4
    assert pooled(quantile[[0, 1]], group[:2], "median").tolist() == [2, 2]
    assert float(pooled(quantile, group)[0]) == pytest.approx(14 / 3)
    rollout, method = graded(), build("ares", {**TINY, "theta_decay": 0.75})
    first = float(method._look(rollout).theta[0])
    method.reward(rollout)
    method.observe({})
    doubled = rollout.with_statistics(token_entropy=2 * rollout.statistics["token_entropy"])
    assert float(method._look(doubled).theta[0]) == pytest.approx(0.75 * first + 0.25 * 2 * first)


def test_semantic_events_are_uncertain_trigger_words():
    rollout = graded()
    method = build("ares", {"preset": "tiny", "count": "semantic", "trigger_words": ["wait"], "theta_of": "token"})
    method.bind(one_word)
    seen = method._look(rollout)
    entropy = rollout.statistics["token_entropy"]
    expected = (rollout.response_ids == 40) & (entropy >= seen.theta[:, None]) & rollout.mask
    assert torch.equal(seen.event, expected)
    assert bool(build("ares", TINY)._look(rollout).event.any())


# --------------------------------------------------------------------------------------------------------- difficulty


def test_of_eight_responses_the_buckets_are_the_papers_counts():
    for right in range(9):
        correct = torch.arange(8) < right
        found = windows.difficulty_buckets(correct, torch.zeros(8, dtype=torch.long))
        expected = windows.EASY if right >= 6 else windows.MEDIUM if right >= 3 else windows.HARD
        assert found.tolist() == [expected] * 8
    thirds = torch.tensor([1, 1, 0, 1, 0, 0, 0]).bool()
    group = torch.tensor([5, 5, 5, 2, 2, 2, 9])
    assert windows.difficulty_buckets(thirds, group).tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_an_empty_bucket_has_no_mean_and_one_value_has_no_variance():
    mean, variance = windows.bucket_moments(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 2]))
    assert mean.tolist() == pytest.approx([2, math.nan, 7], nan_ok=True)
    assert variance.tolist() == pytest.approx([1, math.nan, 0], nan_ok=True)
    weighted, _ = windows.bucket_moments(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), torch.tensor([3.0, 1.0]))
    assert float(weighted[0]) == 1.5


def test_the_slope_is_that_of_least_squares_and_undefined_without_spread():
    x, y = torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 4.0, 5.0, 7.0])
    assert windows.slope(x, y) == pytest.approx(np.polyfit(x.numpy(), y.numpy(), 1)[0])
    assert math.isnan(windows.slope(torch.ones(4), y))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_permuted_control_deals_the_same_labels_to_other_prompts(seed):
    rollout = graded(seed, (8, 0, 4, 7, 1))
    own, control = build("ares", TINY), build("ares", {**TINY, "control": "permuted", "seed": seed})
    label, dealt = (m._look(rollout).bucket for m in (own, control))
    assert label.sort().values.tolist() == dealt.sort().values.tolist()
    for group in range(5):
        assert len(dealt[rollout.group_id == group].unique()) == 1
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(control._look(rollout.rows(order)).bucket, dealt[order])
    draws = set()
    for _ in range(8):
        draws.add(tuple(control._look(rollout).bucket.tolist()))
        control.observe({})
    assert len(draws) > 1


# ------------------------------------------------------------------------------------------------------------- reward


def steps(method, *rollouts):
    """Rewards of several steps in turn."""
    found = []
    for rollout in rollouts:
        found.append(method.reward(rollout)["ares"])
        method.observe({})
    return found


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(["token", "window"]))
def test_with_the_batchs_own_mean_as_target_nothing_is_ever_shaped(seed, of):
    method = build("ares", {**TINY, "target": "batch", "largest": None, "theta_of": of})
    for value in steps(method, *(graded(seed + i) for i in range(3))):
        assert not value.any()
    assert [method.metrics()[f"strength_{kind}"] for kind in windows.BUCKETS] == [0.0] * 3


def test_the_target_is_the_last_steps_mean_and_moves_after_its_use():
    method = build("ares", {**TINY, "largest": None})
    first, second = graded(0), graded(7)
    (nothing,) = steps(method, first)
    assert not nothing.any()
    before = build("ares", TINY)._look(first)
    assert method.targets == pytest.approx(before.mean)
    seen = method._look(second)
    (value,) = steps(method, second)
    assert value.any()
    for i in range(len(second)):
        kind, n = int(seen.bucket[i]), float(seen.count[i])
        target, variance = before.mean[kind], seen.variance[kind]
        strength = max(0.0, (seen.mean[kind] - target) / (variance + 1e-6))
        gap = (max(0, n - target), abs(n - target), max(0, target - n))[kind]
        expected = 0.0 if second.correct[i] else -strength * gap
        assert float(value[i]) == pytest.approx(expected, abs=1e-6)
    assert method.targets == pytest.approx(seen.mean)


def test_an_average_target_keeps_what_an_absent_bucket_had():
    method = build("ares", {**TINY, "target_decay": 0.5})
    steps(method, graded(0, (8, 4)), graded(1, (8, 8)))
    means = [build("ares", TINY)._look(graded(0, (8, 4))).mean, build("ares", TINY)._look(graded(1, (8, 8))).mean]
    assert method.targets[0] == pytest.approx((means[0][0] + means[1][0]) / 2)
    assert method.targets[1] == pytest.approx(means[0][1])
    assert method.targets[2] is None


def test_a_bucket_of_equal_counts_is_bounded():
    assert ares.multiplier(3.0, 1.0, 0.0) == pytest.approx(2e6)
    assert ares.multiplier(3.0, 1.0, 0.0, largest=1.0) == 1.0
    assert ares.multiplier(1.0, 3.0, 2.0) == 0.0
    assert ares.multiplier(math.nan, 1.0, math.nan) == ares.multiplier(1.0, math.nan, 1.0) == 0.0


def test_refills_of_a_step_count_together_and_asking_twice_changes_nothing():
    once, twice = build("ares", TINY), build("ares", TINY)
    steps(once, graded(0))
    twice.reward(graded(0))
    steps(twice, graded(0))
    assert once.targets == pytest.approx(twice.targets)
    both = build("ares", TINY)
    both.reward(graded(0, (8,)))
    steps(both, graded(1, (8,)))
    alone = [build("ares", TINY)._look(graded(i, (8,))).mean[0] for i in (0, 1)]
    assert both.targets[0] == pytest.approx(sum(alone) / 2)


def test_right_answers_are_never_shaped_and_wrong_ones_never_gain():
    method = build("ares", TINY)
    for seed, value in enumerate(steps(method, *(graded(i) for i in range(6)))):
        correct = graded(seed).correct
        assert not value[correct].any()
        assert (value[~correct] <= 0).all()


def test_the_release_gives_every_wrong_answer_a_bonus_and_can_prefer_it():
    bucket = torch.tensor([0, 1, 2])
    nothing, half = torch.zeros(3), torch.full((3,), 0.5)
    wrong = code.grid_reward(nothing, nothing, half, torch.zeros(3, dtype=torch.bool), bucket)
    assert wrong.tolist() == pytest.approx([0.15, 0.2, 0.3])
    many, strong = torch.full((3,), 40.0), torch.full((3,), 2.0)
    right, false = (1.0 * flag + code.grid_reward(many, nothing, strong, torch.tensor([flag] * 3), bucket)
                    for flag in (True, False))  # fmt: skip
    assert float(false[0]) > float(right[0])


def released(**changes):
    method = build("ares", {"preset": "released", "trigger_words": ["so"], "filter": "none", **changes})
    method.bind(one_word)
    return method


def test_the_releases_order_treats_every_prompt_as_easy():
    rollout = with_statistics(graded())
    as_run, meant = released(), released(order="difficulty_first")
    seen = as_run._look(rollout)
    value = as_run.reward(rollout)["ares"]
    easy = torch.zeros(len(rollout), dtype=torch.long)
    half, none = torch.full_like(seen.count, 0.5), torch.zeros_like(seen.count)
    expected = code.grid_reward(seen.count, none, half, rollout.correct, easy)
    torch.testing.assert_close(value, expected.float())
    assert value[~rollout.correct].min() >= 0.15 - 1e-6
    assert not torch.allclose(meant.reward(rollout)["ares"], value)


def test_the_releases_strengths_drift_by_the_rounding_error():
    method, rollout = released(order="difficulty_first"), with_statistics(graded())
    steps(method, rollout)
    mean = method._look(rollout).mean
    signs = (1, 1, -1)
    expected = [0.5 + s * 0.05 * (m - round(m)) for s, m in zip(signs, mean, strict=True)]
    assert method.alpha == pytest.approx(expected)


def test_likeliest_tokens_and_head_entropies_are_read_from_the_distribution():
    method, g = released(), torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 60, generator=g)
    logits[0, 1, 40] = 9.0
    found = method.read_old_logits(logits.log_softmax(-1), torch.zeros(2, 3, dtype=torch.long))
    assert found[ares.TRIGGER].nonzero().tolist() == [[0, 1]]
    assert (found[ares.HEAD] > found[ares.BARE]).all()
    small = torch.randn(1, 4, generator=g).log_softmax(-1)
    head, bare = code.head_entropies(small)
    assert float(head) == pytest.approx(float(bare), abs=1e-5) == pytest.approx(float(-(small.exp() * small).sum()))


# -------------------------------------------------------------------------------------------- filter, KL, composition


def test_the_filter_records_difficulty_and_keeps_prompts_solved_sometimes():
    pipeline = compose([build("ares", {"preset": "paper", "theta_of": "window", "kl": "none"})])
    rollout = pipeline.reward(graded())
    kept = pipeline.filter(rollout)
    assert kept.group_id.unique().tolist() == [1, 2]
    assert kept.difficulty.tolist() == [1] * 16
    assert torch.equal(kept.statistics[ares.EVENT].sum(1).double(), build("ares", TINY)._look(graded()).count[8:24])
    assert pipeline.refill == 20
    everything = compose([build("ares", TINY)])
    assert everything.filter(everything.reward(graded())).difficulty.tolist() == [0] * 8 + [1] * 16 + [2] * 8
    assert everything.refill == 0


def test_the_releases_filter_lets_groups_pass_that_are_all_wrong():
    pipeline = compose([released(filter="reward")])
    rollout = pipeline.reward(with_statistics(graded()))
    assert 3 in pipeline.filter(rollout).group_id.tolist()


def test_a_group_that_is_all_wrong_may_have_an_advantage_from_its_shape():
    pipeline = compose([build("grpo", {"preset": "tiny"}), build("ares", TINY)])
    seen = False
    for seed in range(8):
        rollout = pipeline.filter(pipeline.reward(graded(seed)))
        seen |= bool(pipeline.advantage(rollout)[24:].any())
        pipeline.observe({})
    assert seen


def inputs_of(pipeline, rollout, logprob):
    rollout = pipeline.filter(pipeline.reward(rollout))
    rollout, advantage = pipeline.credit(rollout)
    lower, upper = pipeline.clip(rollout, advantage)
    return LossInputs(rollout, logprob, rollout.old_logprob, advantage, lower, upper)


def kl_pipeline(**changes):
    return compose([build("ares", {**TINY, "kl": "windows", "beta_medium": 2.0, "beta_hard": 0.25, **changes})])


def test_the_kl_gives_way_where_a_window_of_high_entropy_begins():
    pipeline, rollout = kl_pipeline(rho=0.5), with_statistics(graded())
    logprob = rollout.old_logprob.double().requires_grad_()
    found = inputs_of(pipeline, rollout, logprob)
    (term,) = pipeline.regularise(found)
    event = found.rollout.statistics[ares.EVENT].bool()
    assert event.any()
    beta = torch.tensor([1.0, 2.0, 0.25])[found.rollout.difficulty][:, None] * torch.where(event, 0.5, 1.0)
    distance = rollout.statistics["ref_logprob"].double() - logprob
    expected = 0.01 * beta * (distance.exp() - 1 - distance)
    mask = rollout.mask
    torch.testing.assert_close(term.loss[mask], expected[mask])
    (own,) = torch.autograd.grad(term.loss[mask].sum(), logprob)
    torch.testing.assert_close(own[mask], (0.01 * beta * (1 - distance.exp()))[mask])


def test_the_kls_gradient_is_a_finite_difference():
    pipeline, rollout = kl_pipeline(), with_statistics(graded())
    logprob = rollout.old_logprob.double().requires_grad_()
    found, mask = inputs_of(pipeline, rollout, logprob), rollout.mask

    def value(at):
        (term,) = pipeline.regularise(LossInputs(found.rollout, at, *([None] * 4)))
        return term.loss.masked_fill(~mask, 0.0).sum()

    (own,) = torch.autograd.grad(value(logprob), logprob)
    step = torch.zeros_like(logprob)
    for place in mask.nonzero()[::40].tolist():
        step[tuple(place)] = 1e-5
        difference = (value(logprob.detach() + step) - value(logprob.detach() - step)) / 2e-5
        assert float(own[tuple(place)]) == pytest.approx(float(difference), abs=1e-8)
        step[tuple(place)] = 0.0


def test_what_stands_under_the_mask_plays_no_part():
    rollout = with_statistics(graded())
    outside = ~rollout.mask
    spoilt = rollout.with_statistics(**{k: v.masked_fill(outside, math.nan) for k, v in rollout.statistics.items()})
    for make in (kl_pipeline, lambda: kl_pipeline(theta_of="token"), lambda: compose([released()])):
        rewards, terms = [], []
        for some in (rollout, spoilt):
            pipeline = make()
            pipeline.reward(rollout)
            pipeline.observe({})
            found = inputs_of(pipeline, some, rollout.old_logprob)
            rewards.append(found.rollout.reward)
            terms.append(pipeline.regularise(found)[0].loss.masked_fill(~found.rollout.mask, 0.0))
        assert torch.equal(*rewards)
        assert torch.equal(*terms)


def test_the_releases_weights_move_once_in_a_step_and_after_it():
    method = released(kl_interval=1, kl_target=1e-3, order="difficulty_first")
    pipeline, rollout = compose([method]), with_statistics(graded())
    found = inputs_of(pipeline, rollout, rollout.old_logprob)
    assert set(found.rollout.statistics[ares.BETA][found.rollout.mask].tolist()) == {1.0}
    inputs_of(pipeline, rollout, rollout.old_logprob)
    assert method.controller.beta == [1.0] * 3
    pipeline.observe({})
    assert method.controller.calls == 1
    assert all(beta > 1 for beta in method.controller.beta)
    assert pipeline.metrics()["ares.beta_hard"] == method.controller.beta[2]


def test_presets_differ_where_the_card_says():
    rollout = with_statistics(graded())
    paper, tiny = (build("ares", {"preset": name}) for name in ("paper", "tiny"))
    counts = [m._look(rollout).count.sum() for m in (paper, tiny)]
    assert float(counts[0]) < float(counts[1])  # windows seldom exceed the quantile of single tokens
    assert paper.has("regularise")
    assert not tiny.has("regularise")
    value = released().reward(rollout)["ares"]
    assert not torch.equal(value, paper.reward(rollout)["ares"])


def test_the_appendix_is_there_as_far_as_it_is_defined():
    advantage = ares.appendix_advantage(torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3).long(), torch.tensor([4, 2, 0]))
    assert advantage.tolist() == [0.125, -0.25, 0.0]
    assert ares.moved_kappa(1.0, 0.03, 0.01, 0.1, 0.1, 5.0) == pytest.approx(1.2)
    assert ares.moved_kappa(1.0, 0.9, 0.01, 0.1, 0.1, 5.0) == 5.0
    with pytest.raises(UserError, match="does not state S_d, phi, b and Z"):
        build("ares", {"reward": "appendix"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "ares.window must be at least 1, not 0"),
        ({"quantile": 1.0}, "ares.quantile must lie between 0 and 1"),
        ({"rho": 0.0}, r"ares.rho must lie in \(0, 1\]"),
        ({"count": "windows"}, "did you mean 'window'"),
        ({"theta_of": "tokens"}, "did you mean 'token'"),
        ({"kl": "window"}, "did you mean 'windows'"),
        ({"target_decay": 1.0}, r"ares.target_decay must lie in \[0, 1\)"),
        ({"theta_over": "group", "theta_decay": 0.5}, "ares.theta_decay must be 0 where theta_over is group"),
        ({"largest": -1.0}, "ares.largest must not be negative, or null"),
        ({"trigger_words": "wait"}, "ares.trigger_words must be a list of texts"),
        ({"coefficient": -0.1}, "ares.coefficient must not be negative"),
    ],
)
def test_wrong_settings_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        build("ares", wrong)
    assert "\n" not in str(caught.value)


def test_words_are_asked_for_where_the_count_needs_them():
    for count in ("semantic", "trigger"):
        with pytest.raises(UserError, match=r"needs methods\.ares\.trigger_words: the paper does not print its list"):
            build("ares", {"count": count}).bind(one_word)
    method = build("ares", {"count": "semantic", "trigger_words": ["of course"]})
    with pytest.raises(UserError, match="must hold words of one token each, not 'of course'"):
        method.bind(one_word)
    with pytest.raises(UserError, match=r"update\.recompute_old_logprob"):
        load_config("ares/tiny", ["methods.ares.count=trigger", "methods.ares.trigger_words=[wait]"])


# -------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("make", [lambda: build("ares", {**TINY, "control": "permuted", "theta_decay": 0.5}), released])
def test_a_restored_method_goes_on_as_the_original(make):
    one, other = make(), make()
    rollouts = [with_statistics(graded(i)) for i in range(4)]
    for rollout in rollouts[:2]:
        inputs_of(compose([one]), rollout, rollout.old_logprob)
        one.observe({})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for rollout in rollouts[2:]:
        assert torch.equal(*(m.reward(rollout)["ares"] for m in (one, other)))
        for method in (one, other):
            inputs_of(compose([method]), rollout, rollout.old_logprob)
            method.observe({})
    assert one.state_dict() == other.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["methods.ares.control=permuted"], ["methods.ares.kl=buckets"]])
def test_a_resumed_run_is_the_uninterrupted_one(extra, tmp_path):
    def config(steps):
        return load_config("ares/tiny", [*TINY_RUN, *extra, "checkpoint.every=2", f"steps={steps}"])

    Trainer(config(4), tmp_path / "straight").run()
    Trainer(config(4), tmp_path / "cut", stop=iter([False, True]).__next__).run()
    Trainer(config(4), tmp_path / "cut", resume=True).run()
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "cut")]
    assert weights[0] == weights[1]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "cut")]
    kept = [[{k: v for k, v in json.loads(x).items() if k.startswith("ares.")} for x in rows] for rows in logs]
    assert str(kept[0]) == str(kept[1])
    assert kept[0][-1]["ares.events"] >= 0


@pytest.mark.slow
def test_the_releases_events_are_recorded_by_the_pass_that_scores(tmp_path):
    more = ["methods.ares={preset: released, trigger_words: ['no', '='], filter: none}", "steps=2",
            "update.recompute_old_logprob=true"]  # fmt: skip
    rows = Trainer(load_config("ares/tiny", [*TINY_RUN, *more]), tmp_path / "run").run().history
    assert all(row["ares.shaping"] > 0 for row in rows)
    assert rows[-1]["ares.beta_easy"] == 1.0
