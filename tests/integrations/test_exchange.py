"""What the adapters to other engines share, against our own Updater; no engine is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.integrations.exchange import (
    Parts,
    deal,
    load_methods,
    micro_batches,
    pipeline_of,
    problem_numbers,
    save_methods,
    shown_metrics,
    unsupported,
)
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import CURRENT, Method
from rlvr_lab.policy.forward import response_statistics, scored
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.parallel import World
from rlvr_lab.train.update import Updater, UpdateTotals
from tests.builders import make_rollout

LENGTHS = [9, 4, 1, 7, 5, 9, 6, 3, 8, 2, 7, 7]
METHODS: list[dict[str, dict[str, Any]]] = [
    {"grpo": {"preset": "paper"}},
    {"clip_cov": {"preset": "released", "ratio": 0.2}, "entropy_bonus": {}},
    {"gspo": {"preset": "paper", "clip_low": 0.2, "clip_high": 0.2}},
]


def graded(model: Any, dead: bool = False) -> Rollout:
    """A rollout of the builder with an old policy near the model and rewards that vary, or vary in one group only."""
    rollout = make_rollout(LENGTHS, group_size=4)
    logprob, entropy = scored(model, rollout, 4)
    shift = ((rollout.response_ids % 5 - 2) * 0.15).masked_fill(~rollout.response_mask, 0.0)
    reward = torch.arange(len(rollout)).remainder(3).float()
    if dead:
        reward[4:] = 1.0
    return rollout.with_(old_logprob=logprob + shift, reward=reward).with_statistics(token_entropy=entropy)


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_parts(model: Any, methods: Any, rollout: Rollout, size: int, ranks: int) -> tuple[float, Tensor]:
    """Loss and gradient of the whole rollout as one minibatch, summed over micro-batches and ranks."""
    pipeline = pipeline_of(methods)
    parts = Parts(model, pipeline, lambda batch, names: dict(zip(CURRENT, scored(model, batch, 3), strict=True)))
    whole = parts.prepare(rollout, pipeline.advantage(rollout), torch.Generator().manual_seed(0))
    model.zero_grad()
    totals = UpdateTotals()
    for rank in range(ranks):
        for rows in micro_batches(whole, not pipeline.keeps_every_row, size, 12, World(rank, ranks)):
            if len(rows):
                micro = whole.rollout.rows(rows)
                parts.loss(whole, rows, micro, *response_statistics(model, micro), totals).backward()
    return totals.loss, gradient(model)


@pytest.mark.parametrize("methods", METHODS, ids=lambda m: "+".join(m))
@pytest.mark.parametrize(("size", "ranks"), [(12, 1), (2, 3), (5, 2)])
def test_sum_of_parts_is_the_updaters_minibatch(methods: Any, size: int, ranks: int) -> None:
    model = load_policy("tiny/S", device="cpu").model
    rollout = graded(model)
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=0.0), pipeline_of(methods), micro_batch_rows=5)
    model.zero_grad()
    expected = updater.accumulate(rollout, updater.pipeline.advantage(rollout), UpdateTotals())
    mine = gradient(model)
    loss, theirs = by_parts(model, methods, rollout, size, ranks)
    assert mine.abs().max() > 1e-3
    assert loss == pytest.approx(expected, abs=2e-6)
    scale = mine.abs().max()  # random tokens are improbable, and their gradients large
    torch.testing.assert_close(theirs / scale, mine / scale, rtol=0, atol=5e-6)


def test_rows_without_gradient_are_left_out_and_the_rest_is_shared() -> None:
    model = load_policy("tiny/S", device="cpu").model
    pipeline = pipeline_of(["grpo"])
    rollout = graded(model, dead=True)
    parts = Parts(model, pipeline, lambda batch, names: {})
    whole = parts.prepare(rollout, pipeline.advantage(rollout), torch.Generator())
    shares = [micro_batches(whole, True, 1, 3, World(rank, 2)) for rank in range(2)]
    assert [len(s) for s in shares] == [3, 3]
    lengths = [[int(rollout.lengths[rows]) for rows in share if len(rows)] for share in shares]
    live = whole.live_rows().nonzero().squeeze(1)
    assert sorted(row for share in shares for rows in share for row in rows.tolist()) == live.tolist()
    assert all(own == sorted(own, reverse=True) for own in lengths)
    assert len(shares[1][0]) == 0  # what is empty comes first, so that the last pass of every rank has rows
    with pytest.raises(ValueError, match="do not fit into 1 micro-batches of 1"):
        micro_batches(whole, True, 1, 1, World(0, 2))


def test_minibatches_are_dealt_as_by_the_updater() -> None:
    model = load_policy("tiny/S", device="cpu").model
    rollout = graded(model)
    seen: list[list[int]] = []

    class Watched(Updater):
        def accumulate(self, batch: Rollout, *rest: Any) -> float:
            seen.append(batch.prompt_id.tolist())
            return super().accumulate(batch, *rest)

    pipeline = pipeline_of(["grpo"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rollout = rollout.with_(prompt_id=torch.arange(len(rollout)))
    updater = Watched(model, optimizer, pipeline, epochs=2, minibatches=5)
    updater.run(rollout, torch.Generator().manual_seed(7), Clock(torch.device("cpu")))
    advantage = pipeline.advantage(rollout)
    dealt = [part for part in deal(rollout, advantage, torch.Generator().manual_seed(7), 5, 2) if part is not None]
    assert [batch.prompt_id.tolist() for batch, _ in dealt] == seen
    late = [part for part in deal(rollout, advantage, torch.Generator().manual_seed(7), 5, 2, skip=4) if part]
    assert [batch.prompt_id.tolist() for batch, _ in late] == seen[4:]
    for batch, part in dealt:
        torch.testing.assert_close(part, advantage[batch.prompt_id][:, : part.shape[1]])
    few = list(deal(rollout.rows(torch.tensor([0, 1])), advantage[:2], torch.Generator(), 5, 1))
    assert [part is None for part in few] == [False, False, True, True, True]


def test_problems_are_numbered_by_column_or_by_tokens() -> None:
    ids = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 5, 6], [9, 5, 6]])
    output = {"prompt_ids": ids, "prompt_mask": torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]])}
    hashed = problem_numbers([{}] * 4, output).tolist()
    assert hashed[0] == hashed[1] == hashed[3] != hashed[2]
    assert problem_numbers([{"problem_id": i} for i in (4, 4, 2, 9)], output).tolist() == [4, 4, 2, 9]


def test_figures_that_need_verdicts_are_left_out_without_them() -> None:
    rollout = graded(load_policy("tiny/S", device="cpu").model)
    assert {"accuracy", "answer_entropy", "distinct_correct", "no_answer"}.isdisjoint(shown_metrics(rollout))
    named = shown_metrics(rollout.with_(correct=rollout.reward > 0, answer=("1",) * len(rollout)))
    assert named["accuracy"] == pytest.approx(8 / 12)
    assert named["answer_entropy"] == 0.0


def test_methods_are_taken_as_objects_slugs_and_settings() -> None:
    mixed = pipeline_of([build("grpo", {"preset": "trl"}), "entropy_bonus", {"clip_higher": None}])
    assert [m.slug for m in mixed.methods] == ["grpo", "entropy_bonus", "clip_higher"]
    assert [m.slug for m in pipeline_of({"gspo": {"preset": "paper"}}).methods] == ["grpo", "gspo"]


class Chooses(Method):
    slug = "chooses"

    def select(self) -> None: ...


class Replays(Method):
    slug = "replays"

    def replay(self) -> None: ...


class Bundles(Method):
    slug = "bundles"
    requires = ("bundle_id",)


@pytest.mark.parametrize(
    ("method", "reason"), [(Chooses(), "hook 'select'"), (Replays(), "hook 'replay'"), (Bundles(), "needs 'bundle_id'")]
)
def test_what_trl_lacks_is_said_with_the_method(method: Method, reason: str) -> None:
    found = unsupported(compose([build("grpo", {}), method]))
    assert found is not None
    assert f"'{method.slug}'" in found
    assert reason in found
    assert unsupported(pipeline_of(["grpo"])) is None


class Remembers(Method):
    """State of numbers, words and a tensor."""

    slug = "remembers"

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"count": 3, "word": "a", "table": torch.arange(4.0)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = dict(state)


def test_state_is_written_and_read_back(tmp_path: Path) -> None:
    save_methods(tmp_path, compose([build("grpo", {}), Remembers()]))
    fresh = Remembers()
    fresh.state = {}
    load_methods(tmp_path, compose([build("grpo", {}), fresh]))
    assert {k: v for k, v in fresh.state.items() if k != "table"} == {"count": 3, "word": "a"}
    assert torch.equal(fresh.state["table"], torch.arange(4.0))
    with pytest.raises(UserError, match="this run"):
        load_methods(tmp_path, pipeline_of(["grpo"]))
    (tmp_path / "rlvr_methods.json").write_text("{")
    with pytest.raises(UserError, match="holds no state of methods"):
        load_methods(tmp_path, pipeline_of(["grpo"]))


def test_a_method_that_reads_the_whole_distribution_is_refused_with_its_name() -> None:
    from rlvr_lab.integrations.verl_support import obstacles
    from rlvr_lab.methods.siren import Siren

    assert "'siren'" in (unsupported(pipeline_of([Siren()])) or "")
    assert "whole distribution" in obstacles([Siren()], "b")[0]
