"""CLASSP outside a run: its bound on the way of a weight, reading a curve, and two tasks in a row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.elsewhere import classp
from rlvr_lab.elsewhere.classp import Classp, path_bound, read_at, trajectory
from rlvr_lab.elsewhere.classp_demo import ARMS, RELEASED, Arm, TwoTasks, run, tasks
from rlvr_lab.errors import UserError

SMALL = TwoTasks(runs=3, width=48, test=600)


def gradients(steps: int, seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, *shape, generator=generator, dtype=torch.float64))


@given(seed=st.integers(0, 99), threshold=st.floats(0, 1), lr=st.floats(0.01, 1), steps=st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_no_weight_goes_farther_than_its_history_allows(seed: int, threshold: float, lr: float, steps: int) -> None:
    start = torch.zeros(6, dtype=torch.float64)
    grads = gradients(2 * steps, seed, 6)
    path, history = trajectory(start, grads, lr=lr, threshold=threshold)
    _, before = trajectory(start, grads[:steps], lr=lr, threshold=threshold)
    whole = torch.cat([start[None], path]).diff(dim=0).abs()
    assert bool((whole.sum(0) <= path_bound(torch.zeros(6, dtype=torch.float64), history, lr) + 1e-12).all())
    assert bool((whole[steps:].sum(0) <= path_bound(before, history, lr) + 1e-12).all())


def test_the_bound_is_nearly_reached_by_many_small_steps() -> None:
    grads = [torch.full((1,), 1e-3, dtype=torch.float64)] * 4000
    start = torch.zeros(1, dtype=torch.float64)
    path, history = trajectory(start, grads, lr=0.1, threshold=0.0, eps=1.0)
    assert float(path[-1].abs()) == pytest.approx(float(path_bound(start, history, 0.1, 1.0)), rel=2e-3)


def test_equal_gradients_move_a_used_weight_less() -> None:
    """The second thousandfold of a history costs as much as the first."""
    start = torch.zeros(2, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Classp([weight], 0.1, threshold=0.0)
    optimizer.state[weight]["history"] = torch.tensor([0.0, 10.0], dtype=torch.float64)
    weight.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.1, -0.1 / 11], rel=1e-4)


def test_a_curve_is_read_between_its_points() -> None:
    learned, kept = [0.5, 0.9, 0.95, 0.99], [1.0, 0.8, 0.7, 0.2]
    assert read_at(0.92, learned, kept) == pytest.approx(0.76)
    assert read_at(0.95, learned, kept) == pytest.approx(0.7)
    assert read_at(0.4, learned, kept) == 1.0
    assert math.isnan(read_at(0.995, learned, kept))
    dipping = [0.5, 0.4, 0.9]
    assert read_at(0.65, dipping, [1.0, 0.9, 0.4]) == pytest.approx(0.65), "the first crossing counts"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (read_at, (0.9, [0.5], [0.5]), "one length of at least 2"),
        (read_at, (0.9, [0.5, 0.6], [0.5]), "one length"),
        (read_at, (0.9, [0.5, math.nan], [0.5, 0.4]), "not nan"),
        (trajectory, (torch.zeros(2), []), "grads must hold at least one"),
        (trajectory, (torch.zeros(2), [torch.zeros(3)]), r"finite and of shape \(2,\)"),
        (trajectory, (torch.zeros(2), [torch.full((2,), math.inf)]), "finite"),
        (path_bound, (torch.zeros(2), torch.zeros(3), 0.1), "after must have the shape of before"),
        (path_bound, (torch.ones(2), torch.zeros(2), 0.1), "a history only grows"),
        (path_bound, (torch.zeros(2), torch.ones(2), 0.0), "lr must be positive"),
        (path_bound, (torch.zeros(2), torch.ones(2), 0.1, 0.0), "eps must be positive"),
    ],
)
def test_wrong_arguments_are_refused(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "runs must be at least 1"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"first_rate": -1.0}, "first_rate must be positive"),
        ({"arms": {}}, "arms must name at least one arm"),
        ({"arms": {"x": Arm((0.0,), {})}}, "positive rates"),
    ],
)
def test_wrong_settings_of_the_demonstration_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


def test_the_tasks_conflict_and_are_equally_hard() -> None:
    a, b = tasks(replace(SMALL, runs=200), torch.Generator().manual_seed(0))
    assert float(a.centres.std()) == pytest.approx(float(b.centres.std()), rel=0.02)
    both = a.centres.roll(1, dims=1).flatten(), b.centres.flatten()
    assert float(torch.corrcoef(torch.stack(both))[0, 1]) == pytest.approx(0.5, abs=0.02)


def test_history_keeps_more_of_the_first_task_at_equal_second_and_the_released_gate_is_none() -> None:
    found = run(replace(SMALL, arms={name: ARMS[name] for name in ("descent", "no gate")} | RELEASED))
    for name in ("learned", "kept"):
        assert torch.equal(getattr(found["released gate"], name), getattr(found["no gate"], name))
    assert torch.equal(found["descent"].first, found["no gate"].first), "both start B from the same weights"
    level = 0.95
    rows = {name: zip(c.learned.tolist(), c.kept.tolist(), strict=True) for name, c in found.items()}
    kept = {name: [read_at(level, *row) for row in pairs] for name, pairs in rows.items()}
    assert seed_interval(kept["no gate"])[0] > seed_interval(kept["descent"])[0] + 0.02


def test_the_history_of_the_first_task_is_what_the_control_forgets() -> None:
    """One step without a history is alpha in every weight whatever its gradient is."""
    arms = {name: replace(ARMS[name], rates=(0.1,)) for name in ("no gate", "forgotten")}
    found = run(replace(SMALL, second_steps=1, arms=arms))
    assert torch.equal(found["no gate"].first, found["forgotten"].first)
    assert float(found["no gate"].kept.mean()) > float(found["forgotten"].kept.mean()) + 0.2


def test_a_seed_says_everything_and_the_gate_leaves_most_weights_alone() -> None:
    arms = {f"theta {t:g}": Arm((0.01, 0.03), {"threshold": t}) for t in (0.0, 1e-3)}
    toy = replace(SMALL, runs=2, first_steps=60, second_steps=40, arms=arms)
    one, two, other = run(toy)["theta 0"], run(toy)["theta 0"], run(replace(toy, seed=1))["theta 0"]
    assert torch.equal(one.kept, two.kept)
    assert not torch.equal(one.kept, other.kept)
    assert 0 < float(run(toy)["theta 0.001"].moved) < 0.6 * float(one.moved)


def test_the_optimizer_is_that_of_training_runs() -> None:
    from rlvr_lab.core.classp import Classp as Core

    assert classp.Classp is Core
