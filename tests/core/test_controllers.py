"""The sign-step controller: gate, lag, strictness, bounds, state."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.controllers import SignStepController

MEASURED = st.lists(st.floats(0, 1), max_size=20)


def skywork(**changes: float) -> SignStepController:
    return SignStepController(**{"target": 0.2, "step": 0.1, "maximum": 0.25, **changes})


def trl() -> SignStepController:
    return SignStepController(0.2, 0.1, maximum=0.25, strict=False, open_at_start=False)


def test_the_coefficient_of_a_step_comes_from_the_measurement_before_it() -> None:
    controller = skywork()
    applied = []
    for measured in (0.1, 0.1, 0.1, 0.5, 0.5, 0.1):
        applied.append(controller.coefficient)
        controller.update(measured)
    # up, up, up against the maximum; down twice behind a closed gate; up again
    assert applied == pytest.approx([0.0, 0.1, 0.2, 0.25, 0.0, 0.0])
    assert controller.value == pytest.approx(0.15)
    assert controller.coefficient == controller.value


def test_a_value_exactly_at_the_target_is_low_for_trl_and_not_for_skywork() -> None:
    one, other = skywork(), trl()
    one.update(0.2)
    other.update(0.2)
    assert (one.enabled, one.value) == (False, 0.0)
    assert (other.enabled, other.value) == (True, 0.1)


def test_the_gate_starts_open_for_skywork_and_closed_for_trl() -> None:
    assert skywork(initial=0.1).coefficient == 0.1
    assert SignStepController(0.2, 0.1, initial=0.1, strict=False, open_at_start=False).coefficient == 0.0


def test_gate_alone_acts_at_once_and_moves_nothing() -> None:
    controller = skywork(initial=0.1)
    controller.gate(0.5)
    assert (controller.coefficient, controller.value) == (0.0, 0.1)
    controller.gate(0.1)
    assert controller.coefficient == 0.1


def test_an_undefined_measurement_changes_nothing() -> None:
    controller = skywork(initial=0.1)
    controller.update(math.nan)
    controller.gate(math.nan)
    assert (controller.value, controller.enabled) == (0.1, True)


@given(MEASURED, st.booleans())
def test_the_value_stays_within_its_bounds_and_the_gate_follows_the_last_measurement(
    measured: list[float], strict: bool
) -> None:
    controller = SignStepController(0.4, 0.3, minimum=-0.1, maximum=0.7, strict=strict)
    for m in measured:
        before = controller.value
        controller.update(m)
        assert -0.1 <= controller.value <= 0.7
        assert abs(controller.value - before) <= 0.3 + 1e-12
        assert controller.enabled == (m < 0.4 if strict else m <= 0.4)


@given(MEASURED, MEASURED)
def test_a_restored_controller_goes_on_as_if_nothing_had_happened(before: list[float], after: list[float]) -> None:
    first, second = skywork(), skywork(initial=0.2)
    for m in before:
        first.update(m)
    second.load_state_dict(first.state_dict())
    for m in after:
        first.update(m)
        second.update(m)
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("wrong", [{"step": -0.1}, {"minimum": 1.0, "maximum": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="step >= 0 and minimum <= maximum"):
        skywork(**wrong)
