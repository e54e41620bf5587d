"""What the log says of a sampler that is not quite the policy: exact on a small rollout."""

from __future__ import annotations

import math

import pytest
import torch

from rlvr_lab.methods import build, compose
from rlvr_lab.train.metrics import MISMATCH, sampler_metrics
from tests.builders import make_rollout


def test_weights_of_a_small_rollout() -> None:
    rollout = make_rollout([3, 1])
    ratio = torch.tensor([[1.0, 4.0, 0.5], [1.5, 9.0, 9.0]])  # the last two stand outside the mask
    assert rollout.old_logprob is not None
    rollout = rollout.with_(behaviour_logprob=rollout.old_logprob - ratio.log())
    found = sampler_metrics(rollout, 5, 128, importance_cap=2.0)
    assert found["mismatch"] == pytest.approx(math.log(4), abs=1e-5)
    assert found["mismatch_mean"] == pytest.approx(-math.log(1 * 4 * 0.5 * 1.5) / 4, abs=1e-5)
    assert found["importance_weight_mean"] == pytest.approx(7 / 4, abs=1e-5)
    assert found["importance_weight_truncated"] == pytest.approx(1 / 4)
    assert found["importance_weight_ess"] == pytest.approx(49 / (4 * (1 + 16 + 0.25 + 2.25)), abs=1e-5)
    assert found["mismatch_kl"] == pytest.approx((7 - 4 - math.log(3)) / 4, abs=1e-5)
    assert found["staleness"] == 5
    assert math.isnan(sampler_metrics(rollout, 5, 128)["importance_weight_truncated"])


def test_nothing_compared_is_nan() -> None:
    found = sampler_metrics(make_rollout([3, 2]), 0, 128, 2.0)
    assert all(math.isnan(found[name]) for name in MISMATCH)


def test_the_cap_is_the_methods() -> None:
    assert compose([build("grpo", {})]).importance_cap is None
    methods = [build("grpo", {}), build("truncated_importance_sampling", {"cap": 3.0})]
    assert compose(methods).importance_cap == 3.0
