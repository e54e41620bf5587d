"""Light-IF: golden values, and what its definitions promise whatever the input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import GOLDEN, make_rollout, ready_rollout, sampled_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods import light_if as li
from rlvr_lab.methods.base import LossInputs
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.testing.invariance import check_invariance

SEEDS = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(seed, rows=4, width=6):
    """Log-probs, advantages of both signs, and a mask with an empty row."""
    g = generator(seed)
    logprob = -3 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    advantage = torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, width)
    lengths = torch.tensor([width, 1, 0, *(3 for _ in range(rows - 3))])
    return logprob, advantage, torch.arange(width)[None] < lengths[:, None]


def test_golden_file_is_reproduced():
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "light_if.json")}
    assert len(problems) == 5
    assert not any(problems.values()), problems


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(0.01, 1.0), st.floats(0, 3))
def test_the_kept_tokens_are_the_largest_and_the_loss_has_no_other_gradient(seed, ratio, weight):
    nll = torch.rand(11, generator=generator(seed), dtype=torch.float64).requires_grad_()
    entropy = torch.rand(11, generator=generator(seed + 1), dtype=torch.float64).requires_grad_()
    kept = li.entropy_sft_tokens(nll, entropy, weight, ratio)
    assert len(kept) == max(int(ratio * 11), 1)
    delta = (nll - weight * entropy).detach()
    dropped = torch.ones(11, dtype=torch.bool)
    dropped[kept] = False
    assert not dropped.any() or delta[kept].min() >= delta[dropped].max()
    li.entropy_sft_loss(nll, entropy, weight, ratio).backward()
    assert entropy.grad is None
    assert nll.grad[kept].tolist() == pytest.approx([1 / len(kept)] * len(kept))
    assert not nll.grad[dropped].any()


def test_a_global_count_divides_by_its_own_floor():
    nll, entropy = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4)
    assert li.entropy_sft_loss(nll, entropy, 0.8, 0.5) == pytest.approx(3.5)
    assert li.entropy_sft_loss(nll, entropy, 0.8, 0.5, total=9) == pytest.approx(7 / 4)


def test_nothing_to_choose_from_is_an_error():
    with pytest.raises(ValueError, match="no supervised token"):
        li.entropy_sft_tokens(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        li.entropy_sft_tokens(torch.zeros(2), torch.zeros(2), ratio=1.5)


# -- difficulty and length --------------------------------------------------------------------------------------------


def test_difficulty_names_the_ends_and_the_middle():
    assert [li.difficulty(rate) for rate in (0, 0.01, 0.99, 1)] == ["hard", "pass", "pass", "easy"]
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="lies in"):
            li.difficulty(rate)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.floats(0.21, 2))
def test_longer_pays_where_right_and_costs_where_wrong(a, b, score):
    length = torch.tensor(sorted((a, b)), dtype=torch.float64)
    right, wrong = (li.length_reward(length, torch.full((2,), s, dtype=torch.float64), 100) for s in (score, 0.1))
    assert right[1] >= right[0]
    assert wrong[1] <= wrong[0]
    assert li.length_reward(torch.tensor([100]), torch.tensor([score]), 100).tolist() == [-2.0]


# -- weights ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(0.1, 20), st.floats(0.1, 10))
def test_weights_lie_under_the_cap_and_sum_to_alpha_at_most(seed, alpha, cap):
    logprob, advantage, mask = draw(seed)
    weight = li.tea_weights(logprob, advantage, mask, alpha, cap)
    assert (weight[~mask] == 0).all()
    assert (weight <= cap).all()
    assert (weight.sum(1) <= alpha * (1 + 1e-9)).all()
    assert weight[1, 0] == pytest.approx(min(alpha, cap))
    uncapped = li.tea_weights(logprob, advantage, mask, alpha, math.inf)
    assert uncapped.sum(1)[mask.any(1)].tolist() == pytest.approx([alpha] * 3)


def test_equal_advantages_give_equal_weights():
    logprob, advantage, mask = draw(3)
    weight = li.tea_weights(logprob, torch.ones_like(advantage), mask, 10.0, 50.0)
    lengths = mask.sum(1)
    assert weight[mask].tolist() == pytest.approx((10 / lengths.clamp_min(1))[:, None].expand_as(weight)[mask].tolist())


def test_what_stands_under_the_mask_is_inert_and_an_empty_row_has_finite_gradients():
    logprob, advantage, mask = draw(5)
    logprob.requires_grad_()
    weight = li.tea_weights(logprob.masked_fill(~mask, math.nan), advantage.masked_fill(~mask, math.inf), mask)
    clean = li.tea_weights(logprob, advantage, mask)
    assert torch.equal(weight, clean)
    (gradient,) = torch.autograd.grad((clean * torch.arange(6)).sum(), logprob)
    assert gradient.isfinite().all()
    assert gradient[mask].any()
    assert not gradient[~mask].any()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_places_permute_marked_tokens_within_their_row(seed):
    mask = torch.rand(5, 7, generator=generator(seed)) < 0.6
    place = li.places(mask, generator(seed + 1))
    assert torch.equal(place.sort(1).values, torch.arange(7).expand(5, 7))
    assert torch.equal(mask.gather(1, place), mask)


# -- the method -------------------------------------------------------------------------------------------------------


def minibatch(seed=0):
    rollout = make_rollout([6, 3, 8, 1, 0, 7], seed=seed)
    signs = torch.tensor([1.0, -1.0, 0.7, -0.7, 1.0, 0.0])[:, None]
    advantage = signs.expand(rollout.response_ids.shape).masked_fill(~rollout.mask, 0.0)
    current = rollout.old_logprob + 0.3 * torch.randn(rollout.response_ids.shape, generator=generator(seed))
    return rollout.with_statistics(current_logprob=current, current_entropy=current.abs()), advantage


def term_of(method, batch, advantage, logprob=None, entropy=None):
    batch = batch.with_statistics(**method.prepare(batch, advantage, generator()))
    logprob = batch.statistics["current_logprob"] if logprob is None else logprob
    entropy = torch.ones_like(logprob) if entropy is None else entropy
    zero = torch.zeros_like(logprob)
    return method.regularise(LossInputs(batch, logprob, logprob.detach(), advantage, zero, zero, entropy))


def test_the_term_is_the_weighted_entropy():
    batch, advantage = minibatch()
    method, logprob = build("light_if", {}), batch.statistics["current_logprob"]
    entropy = torch.rand(logprob.shape, generator=generator(9))
    expected = -li.tea_weights(logprob, advantage, batch.mask) * entropy
    assert torch.allclose(term_of(method, batch, advantage, entropy=entropy)[batch.mask], expected[batch.mask])
    half = build("light_if", {"coefficient": 0.5})
    assert torch.allclose(term_of(half, batch, advantage, entropy=entropy), expected / 2, atol=1e-6)


def test_a_mean_weight_is_reached_whatever_the_length():
    batch, advantage = minibatch()
    weight = -term_of(build("light_if", {"mean_weight": 0.02, "cap": 100.0}), batch, advantage)
    means = weight.sum(1) / batch.mask.sum(1)
    assert means[batch.mask.any(1)].tolist() == pytest.approx([0.02] * 5)
    method = build("light_if", {"preset": "tiny"})
    term_of(method, batch, advantage)
    assert 0 < method.metrics()["mean_weight"] <= 0.05 + 1e-6


def test_controls_deal_out_the_same_weights():
    batch, advantage = minibatch()
    own, permuted, uniform = (
        -term_of(build("light_if", {"weighting": w}), batch, advantage) for w in ("covariance", "permuted", "uniform")
    )
    assert torch.allclose(own.sort(1).values, permuted.sort(1).values)
    assert not torch.allclose(own, permuted)
    assert torch.allclose(uniform.sum(1), own.sum(1))
    for row, mask in zip(uniform, batch.mask, strict=True):
        assert row[mask].unique().numel() <= 1


def test_only_the_covariance_form_sends_a_gradient_into_the_log_probs():
    batch, advantage = minibatch()
    for change, expected in (({}, True), ({"detach_weights": True}, False), ({"weighting": "permuted"}, False),
                             ({"weighting": "uniform"}, False)):  # fmt: skip
        logprob = batch.statistics["current_logprob"].clone().requires_grad_()
        entropy = torch.rand(logprob.shape, generator=generator(1)).requires_grad_()
        term_of(build("light_if", change), batch, advantage, logprob, entropy)[batch.mask].sum().backward()
        assert (logprob.grad is not None and bool(logprob.grad.any())) is expected, change
        assert entropy.grad[batch.mask].any()


def test_the_gradient_is_that_of_a_finite_difference():
    batch, advantage = minibatch()
    method = build("light_if", {})
    statistics = {k: v.double() for k, v in batch.statistics.items()}
    batch, advantage = batch.with_statistics(**statistics), advantage.double()
    statistics = method.prepare(batch, advantage, generator())
    batch = batch.with_statistics(**statistics)
    logprob = batch.statistics["current_logprob"]
    entropy = torch.rand(logprob.shape, generator=generator(1), dtype=torch.float64)

    def loss(value):
        # the mean of log-prob is a constant of the gradient and was recorded
        zero = torch.zeros_like(value)
        term = method.regularise(LossInputs(batch, value, value.detach(), advantage, zero, zero, entropy))
        return term[batch.mask].sum()

    leaf = logprob.clone().requires_grad_()
    loss(leaf).backward()
    for row, column in ((0, 2), (2, 5), (5, 0)):
        step = torch.zeros_like(logprob)
        step[row, column] = 1e-6
        numeric = (loss(logprob + step) - loss(logprob - step)) / 2e-6
        assert float(numeric) == pytest.approx(float(leaf.grad[row, column]), rel=1e-4, abs=1e-7)


def test_the_release_has_no_term():
    assert not build("light_if", {"preset": "released"}).has("regularise")
    assert not compose([build("light_if", {"preset": "released"})]).chains["prepare"]
    assert build("light_if", {}).has("regularise")


@pytest.mark.parametrize("weighting", ["permuted", "uniform"])
def test_controls_do_not_depend_on_the_split(weighting, tiny_s):
    pipeline = compose([build("light_if", {"weighting": weighting, "mean_weight": 0.1})])
    check_invariance(pipeline, tiny_s.model, ready_rollout(tiny_s.model, sampled_rollout(tiny_s), pipeline))


def test_the_length_reward_reads_all_components_and_stands_beside_them():
    rollout = make_rollout([6, 3, 8, 1, 0, 7])
    parts = {"correct": torch.tensor([1.0, 0, 0, 0, 0, 1]), "rule_start": torch.tensor([0.1, 0.1, 0, 0, 0, 0])}
    pipeline = compose([build("light_if", {"length_limit": 8})])
    found = pipeline.reward(rollout.with_(reward_components=parts)).reward_components
    score = parts["correct"] + parts["rule_start"]
    assert torch.equal(found["light_if.length"], li.length_reward(rollout.lengths, score, 8))
    assert found["light_if.length"][2] == -2
    assert not build("light_if", {}).has("reward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0}, "light_if.alpha must be positive"),
        ({"cap": -1}, "light_if.cap"),
        ({"coefficient": -1}, "light_if.coefficient"),
        ({"mean_weight": 0}, "light_if.mean_weight"),
        ({"weighting": "permute"}, "did you mean 'permuted'"),
        ({"length_limit": 0}, "light_if.length_limit"),
        ({"stage_steps": -1}, "light_if.stage_steps"),
        ({"prompts": 0}, "light_if.prompts"),
        ({"reduction": "mean"}, "light_if.reduction"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        build("light_if", change)


# -- prompts ----------------------------------------------------------------------------------------------------------

POOL = SimpleNamespace(prompts=[[i, i + 1] for i in range(6)])


def split(path: Path, **change) -> Path:
    data = {"pool": li.digest(POOL.prompts), "rates": [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]} | change
    path.write_text(json.dumps(data))
    return path


def test_prompts_come_in_two_stages_and_solved_ones_never(tmp_path):
    where = str(split(tmp_path / "difficulty.json"))
    method = build("light_if", {"split": where, "stage_steps": 2, "prompts": 3})
    assert method.has("select")
    first = method.select(POOL, 0)
    assert set(first) == {2, 3}
    assert len(first) == 3
    for _ in range(2):
        method.observe({})
    later = method.select(POOL, 2) + method.select(POOL, 3)
    assert set(later) == {0, 1, 5}
    assert method.select(POOL, 2) == later[:3]
    resumed = build("light_if", {"split": where, "stage_steps": 2, "prompts": 3})
    resumed.load_state_dict(method.state_dict())
    assert resumed.select(POOL, 2) == later[:3]
    assert not build("light_if", {}).has("select")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "another"}, "made for other prompts"),
        ({"rates": [1.0] * 6}, "always solved"),
        ({"rates": "x"}, "not made by rlvr-lab cold-start"),
        ({"rates": [2.0]}, "lies in"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path, change, message):
    method = build("light_if", {"split": str(split(tmp_path / "d.json", **change))})
    with pytest.raises(UserError, match=message):
        method.select(POOL, 0)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json.*make it with rlvr-lab cold-start"):
        build("light_if", {"split": str(tmp_path / "none.json")}).select(POOL, 0)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="not made by rlvr-lab cold-start"):
        build("light_if", {"split": str(tmp_path / "list.json")}).select(POOL, 0)
