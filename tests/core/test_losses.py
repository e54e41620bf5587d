from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.losses import LOG_RATIO_LIMIT, clipped_surrogate, importance_ratio

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


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_below_one_is_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        one(0.0, 0.0, 1.0, dual_clip=dual_clip)


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
