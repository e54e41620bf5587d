"""MTARD's two controllers, and the run in which one of them closes an entropy gap."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.controllers import SignStepController
from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.elsewhere import mtard, mtard_demo
from rlvr_lab.elsewhere.mtard import Balance, temperature_step, tempered_entropy, weight_step
from rlvr_lab.errors import UserError

positive = st.floats(0.01, 5.0)


def logits(seed: int, scale: float = 2.0, shape: tuple[int, ...] = (16, 5)) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(seed=st.integers(0, 50), tau=st.floats(0.5, 8.0))
def test_entropy_rises_with_temperature_at_the_stated_slope(seed: int, tau: float) -> None:
    z, step = logits(seed), 1e-5
    slope = (tempered_entropy(z, tau + step) - tempered_entropy(z, tau - step)) / (2 * step)
    assert float(mtard.entropy_slope(z, tau)) == pytest.approx(float(slope), abs=1e-7)
    assert float(slope) > 0


def test_entropy_between_nothing_and_log_classes() -> None:
    z = logits(0)
    assert float(tempered_entropy(z, 0.01)) < 0.05
    assert float(tempered_entropy(z, 1e4)) == pytest.approx(torch.tensor(5.0).log().item(), abs=1e-6)


def test_temperatures_per_member_are_those_of_each_member_alone() -> None:
    z = logits(1, shape=(3, 16, 5))
    together = tempered_entropy(z, torch.tensor([1.0, 2.0, 5.0]))
    assert torch.allclose(together, torch.stack([tempered_entropy(z[i], t) for i, t in enumerate((1.0, 2.0, 5.0))]))


@given(one=positive, other=positive, tau=st.floats(2.0, 9.0))
def test_the_uncertain_teacher_is_cooled_and_the_sharp_one_heated_as_far(one: float, other: float, tau: float) -> None:
    moved = temperature_step(pair(one, other), pair(tau, tau)) - tau
    assert float(moved.sum()) == pytest.approx(0, abs=1e-12)
    expected = 0.0 if one == other else (-1e-3 if one > other else 1e-3)
    assert float(moved[0]) == pytest.approx(expected, abs=1e-12)


def test_exchanging_teachers_exchanges_temperatures() -> None:
    h, tau = pair(0.3, 1.2), pair(2.0, 3.0)
    assert torch.equal(temperature_step(h.flip(0), tau.flip(0)), temperature_step(h, tau).flip(0))


def test_equal_entropies_move_nothing_and_neither_do_two_certain_teachers() -> None:
    for value in (0.7, 0.0):
        assert torch.equal(temperature_step(pair(value, value), pair(2.0, 3.0)), pair(2.0, 3.0))


def test_bounds_hold() -> None:
    assert temperature_step(pair(1.0, 0.2), pair(1.0, 10.0)).tolist() == [1.0, 10.0]


def test_with_one_teacher_still_the_loop_is_the_sign_step_controller_of_the_main_parts() -> None:
    z, target = logits(3, scale=4.0), 0.9
    balance = Balance(temperature_step=0.02)
    controller = SignStepController(target, 0.02, minimum=1.0, maximum=10.0, initial=1.0)
    tau = pair(1.0, 1.0)
    for _ in range(300):
        h = tempered_entropy(z, tau[1])
        controller.update(float(h))
        tau = temperature_step(torch.stack([torch.tensor(target, dtype=torch.float64), h]), tau, balance)
        assert float(tau[1]) == pytest.approx(controller.value, abs=1e-9)
    ripple = 0.02 * float(mtard.entropy_slope(z, tau[1]))
    assert abs(float(tempered_entropy(z, tau[1])) - target) < 1.5 * ripple


def test_a_nearly_one_hot_teacher_has_negative_entropy_in_the_release_and_then_both_are_heated() -> None:
    sharp, soft = 60 * torch.eye(4, dtype=torch.float64), logits(0, 0.5, (4, 4))
    exact = torch.stack([tempered_entropy(soft), tempered_entropy(sharp)])
    released = torch.stack([tempered_entropy(soft, released=True), tempered_entropy(sharp, released=True)])
    assert float(released[1]) < 0 <= float(exact[1])
    assert (temperature_step(exact, pair(2.0, 2.0)) - 2).sign().tolist() == [-1, 1]
    assert (temperature_step(released, pair(2.0, 2.0)) - 2).sign().tolist() == [1, 1]


def test_released_estimates_are_the_exact_ones_over_the_number_of_classes() -> None:
    teacher, student = logits(1, 0.5), logits(2, 0.5)
    kl, entropy = mtard.teacher_kl(teacher, student), tempered_entropy(teacher)
    assert float(5 * mtard.teacher_kl(teacher, student, released=True)) == pytest.approx(float(kl), rel=1e-3)
    assert float(5 * tempered_entropy(teacher, released=True)) == pytest.approx(float(entropy), rel=1e-3)


def test_kl_is_zero_for_an_equal_student_only_at_temperature_one() -> None:
    z = logits(4)
    assert float(mtard.teacher_kl(z, z)) == pytest.approx(0, abs=1e-12)
    assert float(mtard.teacher_kl(z, z, 2.0)) > 0.01
    assert float(mtard.teacher_kl(z, z / 2, 2.0)) == pytest.approx(0, abs=1e-12)


@given(a=positive, b=positive, w=st.floats(0.0, 1.0))
def test_weights_stay_shares_and_move_towards_the_slower_lesson(a: float, b: float, w: float) -> None:
    moved = weight_step(pair(a, b), pair(1.0, 1.0), pair(w, 1 - w))
    assert float(moved.sum()) == pytest.approx(1)
    assert bool((moved >= 0).all())
    target = a / (a + b)
    assert abs(float(moved[0]) - target) <= abs(w - target) + 1e-12
    assert float(moved[0]) == pytest.approx(w - 0.025 * (w - target), abs=1e-9)


def test_weights_ignore_the_units_of_each_loss() -> None:
    one = weight_step(pair(0.4, 0.1), pair(1.0, 0.2), pair(0.5, 0.5))
    assert torch.allclose(one, weight_step(pair(0.4, 10.0), pair(1.0, 20.0), pair(0.5, 0.5)))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: tempered_entropy(torch.zeros(4)), "logits"),
        (lambda: tempered_entropy(torch.zeros(0, 3)), "logits"),
        (lambda: tempered_entropy(torch.tensor([[0.0, torch.nan]])), "logits"),
        (lambda: tempered_entropy(torch.zeros(2, 3), 0.0), "temperature"),
        (lambda: mtard.entropy_slope(torch.zeros(2, 3), -1.0), "temperature"),
        (lambda: mtard.teacher_kl(torch.zeros(2, 3), torch.zeros(2, 4)), "student"),
        (lambda: mtard.teacher_kl(torch.zeros(2, 3), torch.full((2, 3), torch.inf)), "student"),
        (lambda: temperature_step(pair(1.0, 1.0, 1.0), pair(1.0, 1.0)), "entropies"),
        (lambda: temperature_step(pair(1.0, torch.nan), pair(1.0, 1.0)), "entropies"),
        (lambda: temperature_step(pair(1.0, 1.0), pair(0.0, 1.0)), "temperatures"),
        (lambda: weight_step(pair(1.0, 1.0), pair(0.0, 1.0), pair(0.5, 0.5)), "first"),
        (lambda: weight_step(pair(0.0, 0.0), pair(1.0, 1.0), pair(0.5, 0.5)), "losses"),
        (lambda: weight_step(pair(1.0, 1.0), pair(1.0, 1.0), pair(-0.5, 1.5)), "weights"),
        (lambda: Balance(temperature_step=-1.0), "temperature_step"),
        (lambda: Balance(weight_rate=2.0), "weight_rate"),
        (lambda: Balance(low=0.0), "low"),
        (lambda: mtard_demo.Toy(runs=0), "runs"),
        (lambda: mtard_demo.Toy(radius=0.0), "radius"),
    ],
)
def test_refuses(call: object, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}"):
        call()  # type: ignore[operator]


def test_members_have_the_gradient_they_would_have_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    members = mtard_demo.Members(3, (4, 6, 5), generator)
    x, labels = torch.randn(3, 7, 4, generator=generator), torch.randint(5, (3, 7), generator=generator)
    together = torch.autograd.grad(mtard_demo.cross_entropy(members(x), labels), members.parameters)
    alone = torch.autograd.grad(mtard_demo.cross_entropy(members(x)[1:2], labels[1:2]), members.parameters)
    assert all(torch.allclose(a[1], b[1], atol=1e-6) for a, b in zip(together, alone, strict=True))


def test_the_attack_stays_in_the_ball_and_hurts() -> None:
    toy, generator = mtard_demo.Toy(runs=2), torch.Generator().manual_seed(0)
    members = mtard_demo.Members(2, (10, 8, 6), generator)
    x, labels = torch.randn(2, 50, 10, generator=generator), torch.randint(6, (2, 50), generator=generator)
    moved = mtard_demo.attack(members, x, labels, toy, torch.zeros_like(x))
    assert float((moved - x).abs().max()) <= toy.radius + 1e-6
    before, after = (mtard_demo.cross_entropy(members(each), labels).item() for each in (x, moved))
    assert after > before


@cache
def outcome() -> dict[str, mtard_demo.Outcome]:
    return mtard_demo.run(mtard_demo.Toy(runs=3))


def test_the_gap_closes_with_the_controller_only() -> None:
    """The card: .73 to .001 nats, control .86; only this effect is asserted."""
    gap = {arm: found.gap[-100:].mean(0) for arm, found in outcome().items()}
    assert float(gap["controller"].abs().max()) < 0.05
    assert float(gap["both at 1"].min()) > 0.3
    mean, half = seed_interval((gap["both at 1"] - gap["controller"]).tolist())
    assert mean - half > 0.2


def test_the_floor_leaves_the_work_to_the_sharper_teacher() -> None:
    final = outcome()["controller"].temperatures[-1]
    assert float(final[:, 0].max()) < 1.2
    assert float(final[:, 1].min()) > 2.0
    steps = outcome()["controller"].temperatures.diff(dim=0).abs()
    assert float(steps.max()) <= 0.01 + 1e-5


def test_controls_keep_their_temperatures_and_arms_share_the_first_step() -> None:
    found = outcome()
    assert torch.equal(found["both at 1"].temperatures, torch.ones_like(found["both at 1"].temperatures))
    assert torch.allclose(found["both at 1"].entropies[0], found["controller"].entropies[0])


def test_equal_seeds_give_equal_runs() -> None:
    toy = mtard_demo.Toy(runs=2, teacher_steps=20, student_steps=20)
    one, two = (mtard_demo.run(toy)["controller"] for _ in range(2))
    assert torch.equal(one.gap, two.gap)
    assert torch.equal(one.robust_accuracy, two.robust_accuracy)
    assert not torch.equal(one.gap, mtard_demo.run(replace(toy, seed=1))["controller"].gap)
