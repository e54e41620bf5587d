"""The ledger of a run: what is booked adds up, what is measured is measured, and a resumed run books the same."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN, sampled_rollout
from sample_methods import PlainBonus
from torch import Tensor

from rlvr_lab.core.reduce import masked_mean
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import Method, build, compose
from rlvr_lab.policy import forward
from rlvr_lab.policy.forward import scored, token_view
from rlvr_lab.policy.load import Policy
from rlvr_lab.train.bookkeeper import Booking, Bookkeeper
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.update import Updater, UpdateTotals


class EarlyTokens(Method):
    """Learns from the first four tokens of a response, and half as much from the others."""

    slug = "early_tokens"

    def weight(self, rollout: Rollout, advantage_BT: Tensor) -> Tensor:
        return torch.where(torch.arange(advantage_BT.shape[1]) < 4, 1.0, 0.5).expand_as(advantage_BT)


def booked(policy: Policy, rollout: Rollout, methods: list[Method], micro: int = 5) -> Booking:
    model = copy.deepcopy(policy.model)
    updater = Updater(model, torch.optim.SGD(model.parameters()), compose(methods), micro_batch_rows=micro)
    updater.booking = Booking(minibatches=1)
    updater.accumulate(rollout, updater.pipeline.advantage(rollout), UpdateTotals())
    return updater.booking


@pytest.fixture(scope="module")
def rollout(tiny_s: Policy) -> Rollout:
    return sampled_rollout(tiny_s)


def test_classes_add_up_to_the_change_that_a_unit_logit_step_makes(tiny_s: Policy, rollout: Rollout) -> None:
    """Against the definition: the logits of every state move by minus the loss's gradient, to first order."""
    grpo = build("grpo", {"preset": "tiny"})
    classes, _ = booked(tiny_s, rollout, [grpo]).mean()
    advantage = compose([grpo]).advantage(rollout)
    inputs = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    t = rollout.response_ids.shape[1]
    with torch.no_grad():
        logits = tiny_s.model(input_ids=inputs, logits_to_keep=t + 1).logits[:, :-1].double()
    log_p = logits.log_softmax(-1)
    p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(-1)
    slope = -p * (log_p + entropy[..., None])
    step = torch.nn.functional.one_hot(rollout.response_ids, p.shape[-1]) - p
    expected = float(masked_mean((slope * step).sum(-1) * advantage, rollout.mask))
    assert sum(classes.values()) == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 1e-5


@pytest.mark.parametrize("methods", [[], [PlainBonus(0.1)], [EarlyTokens()], [EarlyTokens(), PlainBonus(0.1)]])
def test_methods_and_classes_are_two_ways_to_split_one_sum(
    tiny_s: Policy, rollout: Rollout, methods: list[Method]
) -> None:
    grpo = build("grpo", {"preset": "tiny"})
    classes, parts = booked(tiny_s, rollout, [grpo, *methods]).mean()
    assert sum(parts.values()) == pytest.approx(sum(classes.values()), abs=1e-9)
    for method in methods:
        assert abs(parts[method.slug]) > 1e-7
    one_by_one, _ = booked(tiny_s, rollout, [grpo, *methods], micro=1).mean()
    assert one_by_one == pytest.approx(classes, abs=1e-8)


def test_a_bonus_is_booked_as_a_rise(tiny_s: Policy, rollout: Rollout) -> None:
    _, parts = booked(tiny_s, rollout, [build("grpo", {"preset": "tiny"}), PlainBonus(0.1)]).mean()
    view = token_view(tiny_s.model, rollout, want_moments=True)
    assert view.moments is not None
    expected = 0.1 * float(masked_mean(view.moments.slope_square, rollout.mask))
    assert parts["plain_bonus"] == pytest.approx(expected, rel=1e-3)


def test_measured_changes_are_those_of_a_second_pass(tiny_s: Policy, rollout: Rollout) -> None:
    model = copy.deepcopy(tiny_s.model)
    keeper = Bookkeeper(model, rollout.rows(torch.arange(4)), rows=16)
    keeper.begin(rollout, torch.Generator().manual_seed(0))

    def mean(part: Rollout) -> float:
        return float(masked_mean(scored(model, part, 16)[1], part.mask))

    whole, probe = mean(rollout), mean(rollout.rows(torch.arange(4)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.97)
    measured = keeper.end(0, 1.0)
    assert measured["ledger_measured"] == pytest.approx(mean(rollout) - whole, abs=2e-5)
    assert measured["ledger_probe"] == pytest.approx(mean(rollout.rows(torch.arange(4))) - probe, abs=2e-5)
    assert abs(measured["ledger_measured"]) > 1e-3
    assert math.isnan(measured["ledger_gain"])  # nothing was predicted before


def lab(tmp_path: Path, name: str, *settings: str, resume: bool = False) -> list[dict[str, Any]]:
    bonus = "methods={grpo: {preset: tiny}, entropy_bonus: {coefficient: 0.05}}"  # no step without a prediction
    config = load_config("grpo/tiny", [*TINY_RUN, "evaluation.problems=4", "evaluation.samples=1", bonus, *settings])
    return Trainer(config, tmp_path / name, resume=resume).run().history


def test_a_resumed_run_books_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = lab(tmp_path, "whole", "steps=4")
    lab(tmp_path, "parts", "steps=2")
    resumed = lab(tmp_path, "parts", "steps=4", resume=True)
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("ledger")} == {
            k: v for k, v in b.items() if k.startswith("ledger")
        }
    assert whole[-1]["ledger_gain"] is not None
    assert whole[-1]["ledger_probe"] not in (None, 0.0)


def test_without_rows_there_is_no_ledger_and_the_run_is_the_same(tmp_path: Path) -> None:
    plain, kept = lab(tmp_path, "plain", "steps=2", "ledger.rows=0"), lab(tmp_path, "kept", "steps=2")
    assert not [k for k in plain[0] if k.startswith("ledger")]
    for name in ("loss", "reward", "token_entropy", "grad_norm"):
        assert [row[name] for row in plain] == [row[name] for row in kept]


def test_what_the_tiled_head_cannot_predict_is_undefined_not_zero(
    tiny_s: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "LARGE", 1)
    grpo = build("grpo", {"preset": "tiny"})
    plain, _ = booked(tiny_s, rollout, [grpo]).mean()
    assert all(math.isfinite(value) for value in plain.values())
    _, parts = booked(tiny_s, rollout, [grpo, PlainBonus(0.1)]).mean()
    assert math.isnan(parts["plain_bonus"])
