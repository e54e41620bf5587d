import json
import math

import pytest
import torch
from builders import ragged_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core import ledger
from rlvr_lab.core.ledger import CLASSES, EntropyLedger

SIGNED = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.0]])
LOGPROB = torch.tensor([[-0.1, -3.0, -0.1, -3.0, -0.1]])
ENTROPY = torch.ones(1, 5)


def test_classes_by_sign_and_by_typicality():
    mask = torch.tensor([[True, True, True, True, True]])
    assert ledger.token_classes(SIGNED, LOGPROB, ENTROPY, mask).tolist() == [[0, 1, 2, 3, 4]]
    assert ledger.token_classes(SIGNED, -ENTROPY, ENTROPY, mask).tolist() == [[1, 1, 3, 3, 4]]  # exactly typical
    assert ledger.token_classes(SIGNED, LOGPROB, ENTROPY, ~mask).tolist() == [[-1] * 5]


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_classes_add_up_to_the_mean_over_all_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask([3, 6, 1], 6)
    advantage = torch.randint(-1, 2, (3, 6), generator=generator).double()
    logprob, entropy = -torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    change = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    classes = ledger.token_classes(advantage, logprob, -entropy, mask)
    booked = ledger.by_class(change, classes)
    assert tuple(booked) == CLASSES
    assert sum(booked.values()) == pytest.approx(float(change[mask].mean()))
    assert sum(ledger.class_shares(classes).values()) == pytest.approx(1)
    # padding is inert, and so is the order of rows
    noisy = change.masked_fill(~mask, float("nan"))
    assert ledger.by_class(noisy.flip(0), classes.flip(0)) == pytest.approx(booked)


def test_no_token_means_unknown():
    nothing = torch.full((2, 2), -1)
    assert all(math.isnan(v) for v in ledger.by_class(torch.ones(2, 2), nothing).values())
    assert all(math.isnan(v) for v in ledger.class_shares(nothing).values())
    assert math.isnan(ledger.by_method(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), {})["bare"])


def test_contributions_are_leave_one_out_and_add_up():
    mask = torch.tensor([[True, True, False]])
    change = torch.tensor([[-2.0, 4.0, 99.0]])
    weights = {"clip_cov": torch.tensor([[0.0, 1.0, 1.0]]), "steer": torch.tensor([[0.5, 0.5, 0.5]])}
    booked = ledger.by_method(change, mask, weights, {"bonus": torch.tensor([[0.3, 0.1, 7.0]])})
    # all: (0 + 2)/2 + 0.2; without clip_cov: (-1 + 2)/2 + 0.2; without steer: (0 + 4)/2 + 0.2
    assert booked["bare"] == pytest.approx(1.0)
    assert booked["clip_cov"] == pytest.approx(1.2 - 0.7)
    assert booked["steer"] == pytest.approx(1.2 - 2.2)
    assert booked["bonus"] == pytest.approx(0.2)
    assert booked["interaction"] == pytest.approx(1.2 - 1.0 - 0.5 + 1.0 - 0.2)
    assert sum(booked.values()) == pytest.approx(1.2)


def test_one_method_has_no_interaction():
    booked = ledger.by_method(torch.tensor([[-2.0, 4.0]]), torch.ones(1, 2).bool(), {"a": torch.tensor([[0.0, 1.0]])})
    assert booked == pytest.approx({"bare": 1.0, "a": 1.0, "interaction": 0.0})
    with pytest.raises(ValueError, match="'bare'"):
        ledger.by_method(torch.ones(1, 1), torch.ones(1, 1).bool(), {"bare": torch.ones(1, 1)})


def entry(book: EntropyLedger, step: int, predicted: float, own: float, **more):
    return book.record(step, {"positive_likely": predicted, "none": 0.0}, own, **more)


def test_gain_is_fitted_to_earlier_updates_only():
    book = EntropyLedger(window=2)
    first = entry(book, 1, -2.0, -0.1)
    assert math.isnan(first.gain)
    assert math.isnan(first.residual)
    second = entry(book, 2, -1.0, -0.2, measured_probe=-0.01)
    assert second.gain == pytest.approx(0.05)
    assert second.forecast == pytest.approx(-0.05)
    assert second.residual == pytest.approx(-0.15)
    assert second.probe_residual == pytest.approx(0.04)
    assert book.gain == pytest.approx((0.2 + 0.2) / 5)
    entry(book, 3, 0.0, 0.3)
    entry(book, 4, 0.0, 0.3)
    assert math.isnan(book.gain)  # the window of two holds no prediction any more


def test_the_step_size_keeps_a_schedule_out_of_the_gain():
    book = EntropyLedger()
    for step, rate in enumerate((0.1, 0.5, 1.0), start=1):
        entry(book, step, -1.0, -0.03 * rate, step_size=rate, methods={"kl_cov": 0.5})
    assert book.gain == pytest.approx(0.03)
    assert entry(book, 4, -1.0, 0.0, step_size=0.5, methods={"kl_cov": 0.5}).methods == {"kl_cov": 0.25}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_measurement_that_failed_leaves_the_gain_alone(broken):
    book = EntropyLedger()
    entry(book, 1, -1.0, -0.5)
    entry(book, 2, -1.0, broken)
    entry(book, 3, broken, -0.5)
    assert book.gain == pytest.approx(0.5)


def test_state_survives_json():
    book = EntropyLedger(window=3)
    for step in range(5):
        entry(book, step, -1.0 - step, -0.1 * step)
    other = EntropyLedger(window=3)
    other.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert other.gain == book.gain
    assert entry(other, 6, -1.0, -0.2) == entry(book, 6, -1.0, -0.2)
    shorter = EntropyLedger(window=1)
    shorter.load_state_dict(book.state_dict())
    assert shorter.gain == pytest.approx(0.2 / 1.0)


def test_metrics_are_flat_and_scaled():
    book = EntropyLedger()
    entry(book, 1, -1.0, -0.5)
    flat = entry(book, 2, -2.0, -0.9, methods={"kl_cov": 0.4}).metrics()
    assert flat["ledger/forecast"] == pytest.approx(-1.0)
    assert flat["ledger/class/positive_likely"] == pytest.approx(-1.0)
    assert flat["ledger/method/kl_cov"] == pytest.approx(0.2)
    assert flat["ledger/residual"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="window"):
        EntropyLedger(window=0)
