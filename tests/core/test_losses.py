from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import ragged_mask
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.losses import (
    KL_KINDS,
    LOG_RATIO_LIMIT,
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    gmpo_surrogate,
    gspo_surrogate,
    importance_ratio,
    kl_estimate,
    policy_gradient,
    sapo_surrogate,
    truncated_importance_weight,
)
from rlvr_lab.core.reduce import reduce

LOGPROB = st.floats(-8, 0, width=32)
ADVANTAGE = st.floats(-3, 3, width=32)


def one(logprob: float, old: float, advantage: float, **settings: float) -> tuple[float, float]:
    """Loss and gradient of a single token with bounds 0.8 and 1.2."""
    x = torch.tensor([[logprob]], requires_grad=True)
    bounds = {"lower": 0.8, "upper": 1.2, **settings}
    loss = clipped_surrogate(x, torch.tensor([[old]]), torch.tensor([[advantage]]), **bounds).loss  # type: ignore[arg-type]
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return float(loss.detach()), float(x.grad)


@given(LOGPROB, LOGPROB, ADVANTAGE)
def test_the_gradient_vanishes_exactly_where_the_docstring_says(logprob: float, old: float, advantage: float) -> None:
    ratio = math.exp(logprob - old)
    if min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-4 or abs(advantage) < 1e-6:
        return  # on the corner, either one-sided derivative is right
    _, gradient = one(logprob, old, advantage)
    clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert gradient == pytest.approx(0 if clipped else -advantage * ratio, rel=1e-4, abs=1e-7)


@given(LOGPROB, LOGPROB, ADVANTAGE)
def test_the_loss_is_the_pessimistic_one(logprob: float, old: float, advantage: float) -> None:
    loss, _ = one(logprob, old, advantage)
    ratio = math.exp(logprob - old)
    assert loss >= -advantage * ratio - 1e-3 * abs(loss) - 1e-6
    assert loss == pytest.approx(max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)), rel=1e-4, abs=1e-6)


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    loss, gradient = one(0.0, -3.0, -1.0, dual_clip=3.0)
    assert loss == 3
    assert gradient == 0
    loss, gradient = one(-1.0, -2.0, -1.0, dual_clip=3.0)
    assert loss == pytest.approx(math.e, rel=1e-6)
    assert gradient == pytest.approx(math.e, rel=1e-6)
    assert one(0.0, -3.0, 1.0, dual_clip=3.0) == one(0.0, -3.0, 1.0)


@pytest.mark.parametrize("name", ["dual_clip", "delta"])
@pytest.mark.parametrize("value", [1.0, 0.5, -3.0])
def test_a_dual_clip_or_delta_below_one_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 1"):
        one(0.0, 0.0, 1.0, **{name: value})


def test_delta_bounds_the_unclipped_branch() -> None:
    # r = e^3 with A < 0: without delta the loss grows with r, with it it stands still
    assert one(0.0, -3.0, -1.0)[0] == pytest.approx(math.exp(3), rel=1e-6)
    assert one(0.0, -3.0, -1.0, delta=4.0) == (4.0, 0.0)
    assert one(-1.0, -2.0, -1.0, delta=4.0) == one(-1.0, -2.0, -1.0)
    # a positive advantage is clipped at the upper bound before
    assert one(0.0, -3.0, 1.0, delta=4.0) == one(0.0, -3.0, 1.0)


def test_ratios_stay_finite() -> None:
    ratio = importance_ratio(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]))
    torch.testing.assert_close(ratio, torch.tensor([LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT]).exp())


def test_bounds_may_differ_by_token() -> None:
    old, advantage = torch.zeros(1, 2), torch.ones(1, 2)
    logprob = torch.full((1, 2), math.log(1.5))
    upper = torch.tensor([[1.2, 2.0]])
    surrogate = clipped_surrogate(logprob, old, advantage, torch.full((1, 2), 0.8), upper)
    torch.testing.assert_close(surrogate.loss, torch.tensor([[-1.2, -1.5]]))
    assert surrogate.clipped_high.tolist() == [[True, False]]
    assert not surrogate.clipped_low.any()


D = torch.float64
MASK = ragged_mask([5, 3, 0, 1], 5)
A_ROW = torch.tensor([0.7, -0.9, 0.4, 1.3], dtype=D)
ADVANTAGE_ROWS = A_ROW[:, None].expand(4, 5)


def rows(seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """Log-probs of a policy and of the one before it [4, 5]."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 5, generator=generator, dtype=D) * 3
    return old + spread * torch.randn(4, 5, generator=generator, dtype=D), old


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Surrogate]] = {
    "clip": lambda x, old, a: clipped_surrogate(x, old, a, 0.8, 1.28),
    "dual": lambda x, old, a: clipped_surrogate(x, old, a, 0.8, 1.28, dual_clip=1.4),
    "delta": lambda x, old, a: clipped_surrogate(x, old, a, 0.8, 1.28, delta=1.5),
    "gspo": lambda x, old, a: gspo_surrogate(x, old, a, MASK, 0.95, 1.05),
    "cispo": lambda x, old, a: cispo_surrogate(x, old, a, 0.0, 1.5),
    "gpg": lambda x, old, a: policy_gradient(x, a),
    "sapo": lambda x, old, a: sapo_surrogate(x, old, a),
    "gmpo": lambda x, old, a: gmpo_surrogate(x, old, a, MASK, 0.4, 0.4),
}


def value_and_gradient(name: str, x: Tensor, old: Tensor, advantage: Tensor = ADVANTAGE_ROWS) -> tuple[float, Tensor]:
    """The loss under the mean over responses of token means, and its gradient."""
    x = x.detach().clone().requires_grad_()
    loss = reduce(LOSSES[name](x, old, advantage).loss, MASK, "sequence_mean_of_token_mean")
    (gradient,) = torch.autograd.grad(loss, x)
    return float(loss.detach()), gradient


def frozen(name: str, x: Tensor, old: Tensor) -> Callable[[Tensor], float]:
    """The function whose slope at `x` is the gradient: a stop-gradient is a constant made at `x`."""
    if name == "cispo":
        weight = importance_ratio(x, old).clamp(0.0, 1.5)
        return lambda y: float(reduce(-weight * ADVANTAGE_ROWS * y, MASK, "sequence_mean_of_token_mean"))
    if name == "gspo":

        def sequence_loss(y: Tensor) -> float:
            ratio = ((y - old).masked_fill(~MASK, 0.0).sum(1) / MASK.sum(1).clamp_min(1)).exp()
            loss = torch.maximum(-A_ROW * ratio, -A_ROW * ratio.clamp(0.95, 1.05))
            return float(loss[MASK.any(1)].mean())

        return sequence_loss
    return lambda y: value_and_gradient(name, y, old)[0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spread", [0.01, 0.4, 2.0])
def test_a_finite_difference_confirms_every_gradient(name: str, spread: float) -> None:
    x, old = rows(1, spread)
    f = frozen(name, x, old)
    _, gradient = value_and_gradient(name, x, old)
    step = 1e-6
    for i, t in MASK.nonzero().tolist():
        change = torch.zeros_like(x)
        change[i, t] = step
        slope = (f(x + change) - f(x - change)) / (2 * step)
        assert float(gradient[i, t]) == pytest.approx(slope, rel=1e-5, abs=1e-8), (i, t)
    assert (gradient[~MASK] == 0).all()
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_inert_for_every_loss(name: str) -> None:
    x, old = rows()
    clean = value_and_gradient(name, x, old)
    for garbage in (-50.0, 3.0, 1e4):
        spoilt = value_and_gradient(
            name, x.masked_fill(~MASK, garbage), old.masked_fill(~MASK, 0.5), ADVANTAGE_ROWS.masked_fill(~MASK, garbage)
        )
        assert spoilt[0] == clean[0]
        assert torch.equal(spoilt[1], clean[1])


@pytest.mark.parametrize("name", LOSSES)
def test_row_order_is_inert_for_every_loss(name: str) -> None:
    x, old = rows()
    order = torch.tensor([3, 0, 2, 1])
    loss = LOSSES[name](x, old, ADVANTAGE_ROWS).loss
    mask = MASK[order]
    shuffled = {
        "gspo": lambda: gspo_surrogate(x[order], old[order], ADVANTAGE_ROWS[order], mask, 0.95, 1.05),
        "gmpo": lambda: gmpo_surrogate(x[order], old[order], ADVANTAGE_ROWS[order], mask, 0.4, 0.4),
    }.get(name, lambda: LOSSES[name](x[order], old[order], ADVANTAGE_ROWS[order]))()
    torch.testing.assert_close(shuffled.loss, loss[order])


@pytest.mark.parametrize("name", LOSSES)
def test_the_precision_of_the_input_is_kept(name: str) -> None:
    x, old = rows()
    exact = LOSSES[name](x, old, ADVANTAGE_ROWS)
    single = LOSSES[name](x.float(), old.float(), ADVANTAGE_ROWS.float())
    assert exact.loss.dtype == exact.ratio.dtype == D
    assert single.loss.dtype == single.ratio.dtype == torch.float32
    torch.testing.assert_close(single.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    assert exact.loss.shape == exact.ratio.shape == exact.clipped_low.shape == exact.clipped_high.shape == x.shape


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "clip"])
def test_on_policy_every_loss_has_the_gradient_of_the_policy_gradient(name: str) -> None:
    _, old = rows()
    plain = value_and_gradient("clip", old, old)[1]
    torch.testing.assert_close(value_and_gradient(name, old, old)[1], plain)
    # off-policy they are different losses
    x, old = rows(spread=2.0)
    assert (value_and_gradient(name, x, old)[1] - value_and_gradient("clip", x, old)[1]).abs().max() > 1e-3


def test_gspo_by_hand() -> None:
    old = torch.zeros(2, 2, dtype=D)
    x = torch.tensor([[0.3, -0.1], [0.2, 9.0]], dtype=D, requires_grad=True)
    mask, advantage = ragged_mask([2, 1]), torch.tensor([[1.0, 1.0], [-2.0, -2.0]], dtype=D)
    surrogate = gspo_surrogate(x, old, advantage, mask, 0.9, 1.2)
    ratio = [math.exp(0.1), math.exp(0.2)]
    assert surrogate.ratio[0].tolist() == pytest.approx([ratio[0]] * 2)
    assert surrogate.ratio[1, :1].tolist() == pytest.approx(ratio[1:])
    reduce(surrogate.loss, mask, "sequence_mean_of_token_mean").backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    # -A s / |y| over two sequences; a negative advantage is not clipped from above
    expected = torch.tensor([[-ratio[0] / 4] * 2, [2 * ratio[1] / 2, 0.0]], dtype=D)
    torch.testing.assert_close(x.grad, expected)
    clipped = gspo_surrogate(x.detach(), old, advantage, mask, 0.9, 1.1)
    assert clipped.clipped_high.tolist() == [[True, True], [False, False]]


def test_gspo_limits_the_sequence_ratio_from_above_unless_told_otherwise() -> None:
    x, old, mask = torch.full((1, 1), 30.0, dtype=D), torch.zeros(1, 1, dtype=D), ragged_mask([1])
    for limit, log_ratio in ((10.0, 10.0), (None, 30.0)):
        ratio = gspo_surrogate(x, old, torch.ones(1, 1, dtype=D), mask, 0.8, 1.2, limit).ratio
        assert float(ratio.log()) == pytest.approx(log_ratio)
    assert float(gspo_surrogate(-x, old, torch.ones(1, 1, dtype=D), mask, 0.8, 1.2).ratio.log()) == pytest.approx(-30)


def test_every_token_of_a_sequence_has_exactly_its_ratio() -> None:
    # adding the log-ratio to log pi before taking log pi away again would round it differently on every token
    old = torch.tensor([[-20.0, -0.3, -3.0, -7.0]])
    x = old + torch.tensor([[1e-4, 2e-4, 4e-4, 9e-4]])
    ratio = gspo_surrogate(x, old, torch.ones(1, 4), ragged_mask([4]), 0.9, 1.1).ratio
    assert torch.equal(ratio, ratio[:, :1].expand(1, 4))
    assert float(ratio[0, 0]) == pytest.approx(float((x - old).mean().double().exp()), abs=1e-7)


@pytest.mark.parametrize("name", ["clip", "gspo", "cispo", "gmpo"])
def test_bounds_are_not_rounded_to_single_precision(name: str) -> None:
    x, old = torch.full((4, 5), -1.0, dtype=D), torch.full((4, 5), -6.0, dtype=D)
    loss = LOSSES[name](x, old, torch.ones(4, 5, dtype=D)).loss[0, 0]
    bound = {"clip": 1.28, "gspo": 1.05, "cispo": -1.5, "gmpo": math.exp(0.4)}[name]
    assert float(loss) == pytest.approx(-bound, abs=1e-14)


def test_cispo_keeps_the_gradient_of_truncated_tokens() -> None:
    x = torch.tensor([[0.0, 0.0]], dtype=D, requires_grad=True)
    old = torch.tensor([[-3.0, 3.0]], dtype=D)
    surrogate = cispo_surrogate(x, old, torch.tensor([[2.0, -1.0]], dtype=D), 0.5, 1.5)
    surrogate.loss.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [[-1.5 * 2, 0.5]]
    assert surrogate.clipped_high.tolist() == [[True, False]]
    assert surrogate.clipped_low.tolist() == [[False, True]]


@pytest.mark.parametrize("lower", [0.0, -math.inf])
def test_cispo_without_a_lower_bound_truncates_from_above_only(lower: float) -> None:
    x, old = rows(spread=2.0)
    surrogate = cispo_surrogate(x, old, ADVANTAGE_ROWS, lower, 5.0)
    torch.testing.assert_close(surrogate.loss, -(x - old).exp().clamp_max(5.0) * ADVANTAGE_ROWS * x)
    assert not surrogate.clipped_low.any()


def test_the_policy_gradient_has_no_ratio() -> None:
    surrogate = policy_gradient(torch.tensor([[-2.0, -1.0]]), torch.tensor([[1.0, -3.0]]))
    assert surrogate.loss.tolist() == [[2.0, -3.0]]
    assert surrogate.ratio.tolist() == [[1.0, 1.0]]
    assert not (surrogate.clipped_low | surrogate.clipped_high).any()


def test_sapo_uses_one_temperature_per_sign() -> None:
    x, old = torch.tensor([[math.log(1.5)] * 3], dtype=D), torch.zeros(1, 3, dtype=D)
    loss = sapo_surrogate(x, old, torch.tensor([[2.0, -2.0, 0.0]], dtype=D), 1.0, 2.0).loss[0].tolist()
    sigmoid = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.0))]
    assert loss == pytest.approx([-2 * 4 * sigmoid[0], 2 * 2 * sigmoid[1], 0])


@pytest.mark.parametrize("tau", [(0.0, 1.0), (1.0, -1.0)])
def test_a_temperature_must_be_positive(tau: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        sapo_surrogate(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), *tau)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gmpo_clips_the_runaway_side_of_each_token(sign: float) -> None:
    x = torch.tensor([[1.0, -1.0, 0.1, 7.0]], dtype=D)
    mask, advantage = ragged_mask([3], 4), torch.full((1, 4), sign, dtype=D)
    surrogate = gmpo_surrogate(x, torch.zeros_like(x), advantage, mask, 0.3, 0.5)
    mean = (0.5 - 1.0 + 0.1) / 3 if sign > 0 else (1.0 - 0.3 + 0.1) / 3
    assert surrogate.loss[0].tolist() == pytest.approx([-sign * math.exp(mean)] * 4)
    assert surrogate.clipped_high[0, :3].tolist() == [sign > 0, False, False]
    assert surrogate.clipped_low[0, :3].tolist() == [False, sign < 0, False]


@given(LOGPROB, LOGPROB)
def test_kl_estimates_by_hand(logprob: float, reference: float) -> None:
    x, ref = torch.tensor([logprob], dtype=D), torch.tensor([reference], dtype=D)
    d = logprob - reference
    k3 = math.exp(-d) + d - 1
    for kind, expected in (("k1", d), ("abs", abs(d)), ("k2", d * d / 2)):
        assert float(kl_estimate(x, ref, kind)) == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]
    assert float(kl_estimate(x, ref, "k3", limit=False)) == pytest.approx(k3, rel=1e-9, abs=1e-12)
    assert float(kl_estimate(x, ref, "k3")) == pytest.approx(min(k3, 10.0), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("limit", [True, False])
@pytest.mark.parametrize("kind", KL_KINDS)
def test_a_finite_difference_confirms_every_kl_gradient(kind: Any, limit: bool) -> None:
    x, ref = rows(4, 1.0)
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_estimate(x, ref, kind, limit).sum(), x)
    step = 1e-6
    slope = (kl_estimate(x.detach() + step, ref, kind, limit) - kl_estimate(x.detach() - step, ref, kind, limit)) / (
        2 * step
    )
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-8)
    assert gradient.abs().min() > 1e-6


def test_verls_limits_remove_the_gradient_of_k3_far_away() -> None:
    for logprob, value, slope in ((-8.0, 10.0, 0.0), (-1.0, math.e - 2, 1 - math.e)):
        x = torch.tensor([logprob], dtype=D, requires_grad=True)
        estimate = kl_estimate(x, torch.zeros(1, dtype=D), "k3")
        (gradient,) = torch.autograd.grad(estimate.sum(), x)
        assert (float(estimate.detach()), float(gradient)) == pytest.approx((value, slope))
    assert torch.isfinite(kl_estimate(torch.tensor([-1e4]), torch.zeros(1), "k3")).all()


def test_an_unknown_kl_estimate_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="unknown KL estimate 'k3\\+'; there are k1, abs, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k3+")  # type: ignore[arg-type]


def test_importance_weights_are_truncated_from_above_and_carry_no_gradient() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=D, requires_grad=True)
    weight = truncated_importance_weight(old, torch.tensor([-1.0, -3.0, 0.0], dtype=D), cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])
    assert not weight.requires_grad
    with pytest.raises(ValueError, match="cap must be positive"):
        truncated_importance_weight(old, old, 0.0)
