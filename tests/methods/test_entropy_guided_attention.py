from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from builders import GOLDEN, golden_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlvr_lab.errors import UserError
from rlvr_lab.methods import entropy_guided_attention as ega
from rlvr_lab.policy.load import load_policy
from rlvr_lab.testing.golden import replay_file

REDUCTIONS = get_args(ega.Reduction)
SETTINGS = settings(deadline=None, max_examples=25)


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "entropy_guided_attention.json")}
    assert len(problems) >= 4
    assert not any(problems.values()), problems


def random_scores(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def causal(scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)


@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.0, 1.0, 30.0, 1e4]), st.booleans())
@SETTINGS
def test_row_entropy_lies_between_zero_and_log_n(seed: int, keys: int, scale: float, single: bool) -> None:
    attention = random_scores(seed, 2, 3, keys, scale=scale).softmax(-1)
    found = ega.attention_entropy(attention.float() if single else attention)
    slack = 1e-6 if single else 2e-9
    assert float(found.min()) >= -slack
    assert float(found.max()) <= math.log(keys) + slack
    if scale == 0:
        torch.testing.assert_close(found.double(), torch.full_like(found, math.log(keys)).double(), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32() -> None:
    attention = random_scores(0, 1, 4, 64).softmax(-1).bfloat16()
    assert torch.equal(ega.attention_entropy(attention), ega.attention_entropy(attention.float()))


def test_a_row_without_any_key_has_no_entropy_and_gives_no_gradient() -> None:
    attention = torch.tensor([[[[math.nan, math.nan], [0.5, 0.5]]]], requires_grad=True)
    found = ega.attention_entropy(attention)
    assert found.flatten().tolist() == pytest.approx([0.0, math.log(2)])
    found.sum().backward()
    assert attention.grad is not None
    assert attention.grad[0, 0, 0].tolist() == [0.0, 0.0]
    assert bool((attention.grad[0, 0, 1] != 0).all())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("causal_max", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.15])
def test_gradient_is_that_of_finite_differences(reduction: ega.Reduction, causal_max: bool, gamma: float) -> None:
    scores = random_scores(3, 2, 2, 2, 5, 5).requires_grad_()
    theta = torch.tensor([[0.2, 0.9], [0.4, 0.7]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        largest = ega.largest_entropy(5, None, causal_max, mask)
        return ega.attention_entropy_loss(list(causal(s)), t, gamma, reduction, largest, mask)

    # no row stands near the edge of a dead zone, where the loss jumps
    assert torch.autograd.gradcheck(loss, (scores, theta), atol=1e-6)
    for gradient in torch.autograd.grad(loss(scores, theta), (scores, theta)):
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal_max", [False, True])
def test_padding_is_inert(reduction: ega.Reduction, side: str, causal_max: bool) -> None:
    """A padded batch gives what its sequences give by themselves, and nothing that stands in padded rows matters."""
    penalty = ega.AttentionEntropyPenalty(1, 2, ega.AttentionEntropyConfig(
        coefficient=1.0, context=8, reduction=reduction, causal_max=causal_max))  # fmt: skip
    whole, short = causal(random_scores(0, 1, 2, 6, 6)), causal(random_scores(1, 1, 2, 4, 4))
    where = slice(2, 6) if side == "left" else slice(0, 4)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    mask[1, where] = 1
    results = []
    for junk in (0.0, 1.0, math.nan):
        padded = torch.full((1, 2, 6, 6), junk, dtype=torch.float64)
        padded[..., where, :] = 0.0
        padded[..., where, where] = short
        batch = torch.cat([whole, padded]).requires_grad_()
        loss = penalty([batch], mask)
        (gradient,) = torch.autograd.grad(loss, batch)
        outside = torch.ones(6, dtype=torch.bool)
        outside[where] = False
        assert float(gradient[1, :, outside].abs().max()) == 0
        results.append(loss.item())
    alone = [float(penalty([a])) for a in (whole, short)]
    weights = {"mean": (0.6, 0.4), "official_sum": (1.0, 1.0), "query_mean": (0.5, 0.5)}[reduction]
    assert results == pytest.approx([sum(w * x for w, x in zip(weights, alone, strict=True))] * 3, rel=1e-6)


def test_padded_queries_count_in_the_released_preset() -> None:
    attention, mask = causal(random_scores(0, 2, 2, 6, 6)), torch.ones(2, 6)
    mask[1, 4:] = 0
    released = ega.AttentionEntropyPenalty(1, 2, ega.PRESETS["released"])
    assert float(released([attention], mask)) == float(released([attention]))
    without = ega.AttentionEntropyPenalty(1, 2, replace(ega.PRESETS["released"], count_padding=False))
    assert float(without([attention], mask)) < float(without([attention]))


def test_rows_of_the_batch_may_stand_in_any_order_and_the_sum_is_rows_times_the_mean() -> None:
    attentions = [causal(random_scores(seed, 3, 2, 5, 5)) for seed in (0, 1)]
    theta = torch.tensor([0.3, 0.8], dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    for reduction in REDUCTIONS:
        loss, other = (
            ega.attention_entropy_loss(a, theta, 0.1, reduction) for a in (attentions, [a[order] for a in attentions])
        )
        torch.testing.assert_close(loss, other)
    total, mean = (ega.attention_entropy_loss(attentions, theta, 0.1, r) for r in ("official_sum", "mean"))
    assert float(total) == pytest.approx(15 * float(mean))


def test_the_mean_does_not_depend_on_the_size_of_the_batch() -> None:
    attention, theta = causal(random_scores(0, 2, 2, 5, 5)), torch.tensor([0.3, 0.8], dtype=torch.float64)
    for reduction in ("mean", "query_mean"):
        once, twice = (
            ega.attention_entropy_loss([attention.repeat(n, 1, 1, 1)], theta, 0.1, reduction) for n in (1, 2)
        )
        assert float(once) == pytest.approx(float(twice))


def test_the_penalty_jumps_at_the_edge_and_squares_the_whole_deviation() -> None:
    entropy = torch.tensor([0.5, 0.75, 0.76, 1.5, 0.2], dtype=torch.float64)
    found = ega.dead_zone_penalty(entropy, torch.tensor(0.5), torch.tensor(0.25))
    assert found.tolist() == pytest.approx([0, 0, 0.26**2, 1.0, 0.3**2])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_dead_zone_that_holds_everything_gives_a_gradient_of_zero(reduction: ega.Reduction) -> None:
    scores = random_scores(0, 1, 2, 4, 4).requires_grad_()
    theta = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = ega.attention_entropy_loss([causal(scores)], theta, 1.01, reduction)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (scores, theta)):
        assert gradient.abs().sum().item() == 0  # zero, and neither nan nor missing


def test_a_single_token_has_no_entropy_and_is_penalised_only_against_a_longer_context() -> None:
    one, theta = torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    assert float(ega.attention_entropy_loss([one], theta, 0.2)) == pytest.approx(0, abs=1e-15)
    longer = ega.largest_entropy(1, context=32)
    assert float(ega.attention_entropy_loss([one], theta, 0.2, "mean", longer)) == pytest.approx(
        (math.log(32) / 2) ** 2
    )
    assert float(ega.attention_entropy_loss([one], 0.1 * theta, 0.2, "mean", longer)) == 0


def test_causal_max_measures_each_row_against_what_it_can_reach() -> None:
    flat, theta = causal(torch.zeros(1, 1, 6, 6, dtype=torch.float64)), torch.ones(1, dtype=torch.float64)
    own = ega.largest_entropy(6, causal_max=True)
    assert own.tolist() == pytest.approx([math.log(i) for i in range(1, 7)])
    assert float(ega.attention_entropy_loss([flat], theta, 0.0, "mean", own)) == pytest.approx(0, abs=1e-12)
    expected = sum((math.log(i) - math.log(6)) ** 2 for i in range(1, 7)) / 6
    assert float(ega.attention_entropy_loss([flat], theta, 0.0, "mean")) == pytest.approx(expected, rel=1e-6)


def test_presets_differ_on_a_golden_case_as_the_card_says() -> None:
    case = golden_case("ordinary", "entropy_guided_attention")
    attentions = list(causal(torch.tensor(case["inputs"]["attention_scores"], dtype=torch.float64)))
    found = {}
    for name, config in ega.PRESETS.items():
        penalty = ega.AttentionEntropyPenalty(2, 3, config).double()
        target = torch.tensor(case["inputs"]["reg_threshold_weights"], dtype=torch.float64)
        target = target if not config.constrained else target.logit()
        penalty.weight.data.copy_(target)
        found[name] = float(penalty(attentions))
    outputs = case["outputs"]
    assert found["released"] == pytest.approx(outputs["loss_official"], rel=1e-5)
    assert found["paper"] == pytest.approx(outputs["loss_query_mean_variant"], rel=1e-5)
    assert found["released"] > 10 * found["paper"]


def test_thresholds_are_shares_and_one_vector_is_shared_as_released() -> None:
    own = ega.AttentionEntropyPenalty(3, 4)
    assert own.thresholds.shape == (3, 4)
    assert own.thresholds.flatten().tolist() == pytest.approx([0.5] * 12)
    own.weight.data.fill_(-50.0)
    assert 0 <= float(own.thresholds.min()) <= float(own.thresholds.max()) <= 1
    released = ega.AttentionEntropyPenalty(3, 4, ega.PRESETS["released"])
    assert released.thresholds.shape == (4,)
    released.weight.data.fill_(1.5)
    assert released.thresholds.tolist() == [1.5] * 4  # nothing holds it in [0, 1] there


def test_the_penalty_is_off_in_eval_mode() -> None:
    penalty, attentions = ega.AttentionEntropyPenalty(1, 2), [causal(random_scores(0, 1, 2, 5, 5))]
    assert float(penalty(attentions)) > 0
    assert float(penalty.eval()(attentions)) == 0
    assert not penalty(attentions).requires_grad


def test_a_step_of_descent_moves_entropies_and_thresholds_towards_each_other() -> None:
    scores = torch.zeros(1, 1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    penalty = ega.AttentionEntropyPenalty(1, 2, ega.AttentionEntropyConfig(coefficient=1.0, causal_max=True))
    optimizer = torch.optim.SGD([scores, penalty.weight], lr=0.5)
    scores.data += 0.1 * random_scores(5, 1, 1, 2, 8, 8)
    before = float(ega.head_entropies(list(causal(scores))).mean()), float(penalty.thresholds.mean())
    for _ in range(20):
        optimizer.zero_grad()
        penalty(list(causal(scores))).backward()
        optimizer.step()
    after = float(ega.head_entropies(list(causal(scores))).mean()), float(penalty.thresholds.mean())
    assert after[0] < before[0]
    assert after[1] > before[1]


def test_band_fractions() -> None:
    values = torch.tensor([[4.0, 3.0, 2.9], [1.0, 0.99, 0.0]])
    assert ega.band_fractions(values) == pytest.approx([2 / 6, 1 / 6, 1 / 6, 2 / 6])
    for undefined in (torch.zeros(2, 2), torch.zeros(0), torch.tensor([math.nan, 1.0])):
        assert all(math.isnan(share) for share in ega.band_fractions(undefined))


def test_head_entropies_leave_out_padding() -> None:
    attention, mask = causal(random_scores(0, 2, 2, 5, 5)), torch.ones(2, 5)
    mask[1, 3:] = 0
    found = ega.head_entropies([attention], mask)
    rows = ega.attention_entropy(attention)
    expected = (rows[0].sum(-1) + rows[1, :, :3].sum(-1)) / 8
    torch.testing.assert_close(found[0], expected)
    assert bool(ega.head_entropies([attention], torch.zeros(2, 5)).isnan().all())


def test_a_transformers_model_gets_its_penalty_by_one_call() -> None:
    policy = load_policy("tiny/S", device="cpu")
    model = policy.model
    before = model.config._attn_implementation
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    penalty = ega.AttentionEntropyPenalty(model.config.num_hidden_layers, model.config.num_attention_heads)
    loss = ega.attention_penalty(model, inputs, penalty)
    loss.backward()
    queries = model.model.layers[0].self_attn.q_proj.weight
    assert loss.item() > 0
    assert float(queries.grad.abs().max()) > 0
    assert penalty.weight.grad is not None
    assert model.config._attn_implementation == before
    with torch.no_grad():  # the gradient is that of the loss: a step along it lowers it
        queries -= 0.5 * queries.grad
        assert float(ega.attention_penalty(model, inputs, penalty)) < loss.item()


def test_an_architecture_that_is_not_known_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"'gpt2'.*llama"):
        ega.attention_penalty(model, {"input_ids": torch.ones(1, 2).long()}, ega.AttentionEntropyPenalty(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": -1.0}, "entropy_guided_attention.coefficient must not be negative"),
        ({"gamma": -0.1}, "entropy_guided_attention.gamma must not be negative"),
        ({"reduction": "sums"}, "must be one of mean, official_sum, query_mean, not 'sums'"),
        ({"context": 0}, "entropy_guided_attention.context must be at least 1 token"),
        ({"init": 1.0}, "entropy_guided_attention.init must lie between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ega.AttentionEntropyConfig(**settings)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    attention = causal(random_scores(0, 1, 2, 3, 3))
    with pytest.raises(ValueError, match="thresholds must be"):
        ega.attention_entropy_loss([attention], torch.zeros(3), 0.2)
    for wrong in ([], [attention[0]]):
        with pytest.raises(ValueError, match="attentions must be a list"):
            ega.attention_entropy_loss(wrong, torch.zeros(2), 0.2)
        with pytest.raises(ValueError, match="attentions must be a list"):
            ega.AttentionEntropyPenalty(1, 2)(wrong)
    with pytest.raises(ValueError, match="every query is padding"):
        ega.AttentionEntropyPenalty(1, 2)([attention], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no key"):
        ega.largest_entropy(0)
