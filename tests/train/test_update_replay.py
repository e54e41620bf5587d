"""Earlier responses in an update: dealt beside the new ones, reduced for themselves."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from builders import sampled_rollout
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.rows import with_replayed
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import Method
from rlvr_lab.policy.load import Policy
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.update import Updater, UpdateTotals


class Again(Method):
    """Replays given rows with advantage 1 and weighs them."""

    slug: ClassVar[str] = "again"

    def __init__(self, rows: Rollout | None, gamma: float = 1.0) -> None:
        self.rows, self.gamma = rows, gamma

    def replay(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Rollout, Tensor] | None:
        return None if self.rows is None else (self.rows, self.rows.mask.float())

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        weight = torch.ones_like(advantage_BT)
        return weight if batch.replayed is None else torch.where(batch.replayed[:, None], self.gamma, weight)


@pytest.fixture(scope="module")
def rollout(tiny_s: Policy) -> Rollout:
    return sampled_rollout(tiny_s)


def gradients(model: Any, batch: Rollout, advantage: Tensor, methods: list[Method]) -> tuple[float, list[Tensor]]:
    updater = Updater(model, torch.optim.SGD(model.parameters(), 0.1), compose([build("grpo", {}), *methods]))
    model.zero_grad(set_to_none=True)
    loss = updater.accumulate(batch, advantage, UpdateTotals())
    return loss, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_the_loss_is_that_of_new_rows_plus_that_of_replayed_rows(
    tiny_s: Policy, rollout: Rollout, gamma: float
) -> None:
    model = copy.deepcopy(tiny_s.model)
    pipeline = compose([build("grpo", {})])
    own, old = pipeline.advantage(rollout), rollout.rows(torch.tensor([1, 5, 9]))
    extra = old.mask.float()
    joined, advantage = with_replayed(rollout, own, old, extra)
    both = gradients(model, joined, advantage, [Again(None, gamma)])
    new = gradients(model, rollout, own, [])
    replayed = gradients(model, old.with_(old_logprob=old.behaviour_logprob), extra, [])
    assert both[0] == pytest.approx(new[0] + gamma * replayed[0], abs=1e-6)
    for a, b, c in zip(both[1], new[1], replayed[1], strict=True):
        torch.testing.assert_close(a, b + gamma * c, rtol=1e-4, atol=1e-6)


def test_ratios_of_replayed_rows_are_against_the_stored_log_probs(rollout: Rollout) -> None:
    old = rollout.rows(torch.tensor([2, 3]))
    stored = old.behaviour_logprob - 0.5
    joined, _ = with_replayed(rollout, rollout.mask.float(), old.with_(behaviour_logprob=stored), old.mask.float())
    assert joined.replayed is not None
    assert joined.replayed.tolist() == [False] * len(rollout) + [True] * 2
    assert joined.old_logprob is not None
    found = joined.old_logprob[-2:, : stored.shape[1]][old.mask]
    assert torch.equal(found, stored[old.mask])
    assert int(joined.group_id[-1]) > int(rollout.group_id.max())


def test_every_minibatch_has_its_share_of_both(tiny_s: Policy, rollout: Rollout) -> None:
    model = copy.deepcopy(tiny_s.model)
    old = rollout.rows(torch.arange(6))
    updater = Updater(model, torch.optim.SGD(model.parameters(), 0.1), compose([build("grpo", {})]), minibatches=3)
    joined, _ = with_replayed(rollout, rollout.mask.float(), old, old.mask.float())
    dealt = updater._deal(joined, torch.Generator().manual_seed(0))
    assert joined.replayed is not None
    assert [int(joined.replayed[rows].sum()) for rows in dealt] == [2, 2, 2]
    assert sorted(torch.cat(dealt).tolist()) == list(range(len(rollout) + 6))


def test_an_update_with_replay_counts_the_rows_and_without_is_as_it_was(tiny_s: Policy, rollout: Rollout) -> None:
    def run(method: list[Method]) -> tuple[dict[str, float], list[Tensor]]:
        model = copy.deepcopy(tiny_s.model)
        pipeline = compose([build("grpo", {}), *method])
        updater = Updater(model, torch.optim.SGD(model.parameters(), 0.1), pipeline, minibatches=2)
        metrics = updater.run(rollout, torch.Generator().manual_seed(1), Clock(torch.device("cpu")))
        return metrics, [p.detach().clone() for p in model.parameters()]

    plain, nothing = run([]), run([Again(None)])
    some = run([Again(rollout.rows(torch.arange(5)))])
    assert plain[0]["replayed_rows"] == nothing[0]["replayed_rows"] == 0
    assert some[0]["replayed_rows"] == 5
    assert some[0]["covariance"] == plain[0]["covariance"]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], nothing[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain[1], some[1], strict=True))
