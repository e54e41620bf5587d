"""A learner that regulates its rate by what it takes in, and what shifting labels do to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, elu

from rlvr_lab.core.statistics import seed_interval
from rlvr_lab.elsewhere import homeostatic_nets as hn
from rlvr_lab.elsewhere.homeostatic_nets_demo import Arm, Shift, label_maps, simulate, stream
from rlvr_lab.errors import UserError

SMALL = Shift(samples=300, epochs=2, seeds=(0, 1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int = 0, *, lead: tuple[int, ...] = ()) -> hn.Weights:
    return hn.Weights(draw(*lead, 7, 4, seed=seed), draw(*lead, 10, 7, seed=seed + 1))


def classes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(10, shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 40))
def test_gradient_by_hand_is_that_of_autograd(seed: int) -> None:
    weights, x, y = net(seed), draw(6, 4, seed=seed + 2), classes(6, seed=seed)
    leaves = [part.clone().requires_grad_() for part in weights]
    loss = cross_entropy(elu(x @ leaves[0].T) @ leaves[1].T, y, reduction="sum")
    expected = torch.autograd.grad(loss, leaves)
    found, z = hn.gradient(weights, x, y)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))
    assert torch.allclose(z, hn.logits(weights, x))


def test_learners_side_by_side_are_those_learners_alone() -> None:
    weights, x, y = net(lead=(3,)), draw(3, 6, 4, seed=5), classes(3, 6)
    grads, _ = hn.gradient(weights, x, y)
    eta = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    memory, guess, label = (draw(3, 20, 4, seed=6), classes(3, 20, seed=1)), classes(3, seed=2), classes(3, seed=3)
    together = hn.decide(weights, grads, eta, memory, guess, label, batch=6, size=0.05)
    for i in range(3):
        own = hn.Weights(*(part[i] for part in weights)), hn.Weights(*(part[i] for part in grads))
        alone = hn.decide(*own, eta[i], (memory[0][i], memory[1][i]), guess[i], label[i], batch=6, size=0.05)
        assert [float(part[i]) for part in together] == pytest.approx([float(part) for part in alone])


@given(eta=st.floats(0.0, 2.0), kind=st.integers(0, 9), size=st.floats(1e-3, 1.0))
def test_a_rate_moves_by_one_step_and_never_below_the_floor(eta: float, kind: int, size: float) -> None:
    after = float(hn.moved(torch.tensor(eta, dtype=torch.float64), torch.tensor(kind), size))
    expected = eta + size if kind >= 5 else eta - size
    assert after == pytest.approx(expected if expected >= 0 else hn.FLOOR, abs=1e-12)
    assert after >= 0


def promising(sign: float) -> tuple[hn.Weights, hn.Weights, tuple[Tensor, Tensor]]:
    """A learner that answers 0 now and 1 once its rate exceeds (sign > 0) or falls below (sign < 0) 0.1."""
    weights = hn.Weights(torch.ones(1, 1).double(), torch.zeros(10, 1).double())
    weights.second[0, 0], weights.second[1, 0] = 1.0, 1.0 - sign * 0.105
    grads = hn.Weights(torch.zeros(1, 1).double(), torch.zeros(10, 1).double())
    grads.second[1, 0] = -sign
    return weights, grads, (torch.ones(20, 1).double(), torch.ones(20).long())


def test_the_trial_follows_the_guess_and_the_consequence_the_label() -> None:
    weights, grads, memory = promising(+1)
    eta, high, low = torch.tensor(0.1).double(), torch.tensor(7), torch.tensor(2)
    told = {"batch": 1, "size": 0.01}
    right = hn.decide(weights, grads, eta, memory, high, high, **told)
    assert (float(right.leave), float(right.take), float(right.eta)) == pytest.approx((0, 1, 0.11))
    wrong = hn.decide(weights, grads, eta, memory, high, low, **told)
    assert bool(wrong.taken), "taken for what it is not"
    assert float(wrong.eta) == pytest.approx(0.09)
    safe = hn.decide(weights, grads, eta, memory, high, low, **told, consequence="guess")
    assert float(safe.eta) == pytest.approx(0.11)
    left = hn.decide(weights, grads, eta, memory, low, high, **told)
    assert not bool(left.taken)
    assert float(left.eta) == pytest.approx(0.1)


def test_a_tie_leaves_the_object() -> None:
    weights = net()
    nothing = hn.Weights(*(torch.zeros_like(part) for part in weights))
    done = hn.decide(weights, nothing, torch.tensor(0.1).double(), (draw(20, 4), classes(20)), torch.tensor(9),
                     torch.tensor(9), batch=10, size=0.01)  # fmt: skip
    assert float(done.take) == float(done.leave)
    assert not bool(done.taken)
    assert float(done.eta) == pytest.approx(0.1)


def test_no_step_at_rate_zero_and_twice_the_step_at_twice_the_rate() -> None:
    weights = net()
    grads, _ = hn.gradient(weights, draw(5, 4), classes(5))
    one, two = (hn.step(weights, grads, torch.tensor(rate).double(), 5) for rate in (0.1, 0.2))
    assert torch.equal(hn.step(weights, grads, torch.tensor(0.0).double(), 5).first, weights.first)
    assert torch.allclose(two.second - weights.second, 2 * (one.second - weights.second))


@pytest.mark.parametrize(("call", "match"), [
    (lambda: hn.logits(hn.Weights(draw(7, 4), draw(10, 6)), draw(3, 4)), "weights must be"),
    (lambda: hn.logits(net(), draw(3, 5)), "x must be"),
    (lambda: hn.logits(net(), draw(0, 4)), "x must be"),
    (lambda: hn.logits(net(), draw(3, 4) * float("nan")), "finite"),
    (lambda: hn.gradient(net(), draw(3, 4), classes(2)), "y must hold class numbers"),
    (lambda: hn.gradient(net(), draw(3, 4), draw(3)), "y must hold class numbers"),
    (lambda: hn.accuracy(net(), draw(3, 4), classes(3) + 10), "classes from 0 to 9"),
    (lambda: hn.step(net(), net(), torch.tensor(0.1), 0), "batch"),
    (lambda: hn.moved(torch.tensor(-0.1), torch.tensor(3), 0.1), "eta"),
    (lambda: hn.moved(torch.tensor(float("nan")), torch.tensor(3), 0.1), "eta"),
    (lambda: hn.moved(torch.tensor(0.1), torch.tensor(3), 0.0), "size"),
    (lambda: hn.moved(torch.tensor(0.1), torch.tensor(3), float("nan")), "size"),
    (lambda: hn.decide(net(), net(), torch.tensor(0.1), (draw(3, 4), classes(3)), torch.tensor(1), torch.tensor(1),
                       batch=3, size=0.1, consequence="fate"), "consequence"),
    (lambda: Shift(classes=1), "classes"),
    (lambda: Shift(hidden=0), "hidden"),
    (lambda: Shift(seeds=()), "seeds"),
    (lambda: Shift(memory=25), "whole numbers of batches"),
    (lambda: Shift(samples=30), "twice the memory"),
    (lambda: Shift(spread=0.0), "positive"),
    (lambda: Shift(labels_in_memory="none"), "labels_in_memory"),
    (lambda: label_maps(SMALL, 31, 0), "swaps"),
    (lambda: label_maps(SMALL, -1, 0), "swaps"),
    (lambda: simulate([]), "arms"),
    (lambda: simulate([Arm("constant", 0, 0.0)], SMALL), "arms"),
    (lambda: simulate([Arm("wise", 0, 0.1)], SMALL), "arms"),
])  # fmt: skip
def test_refusals(call: object, match: str) -> None:
    with pytest.raises(UserError, match=match):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("swaps", [0, 1, 7, 30])
def test_as_many_swaps_as_asked_each_of_two_labels(swaps: int) -> None:
    maps = label_maps(SMALL, swaps, 0)
    changed = (maps[1:] != maps[:-1]).sum(-1)
    assert set(changed.tolist()) <= {0, 2}
    assert SMALL.epochs * swaps - int((changed > 0).sum()) in (0, 1), "none before the first batch"
    assert bool((maps.sort(-1).values == torch.arange(10)).all()), "every label stays in use"


def test_a_stream_repeats_its_samples_in_each_epoch() -> None:
    seen = stream(SMALL, 3)
    half = SMALL.steps // 2
    first, second = seen.x[:half].reshape(300, -1), seen.x[half:].reshape(300, -1)
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(1).sort().values, second.sum(1).sort().values)
    assert torch.equal(seen.source, stream(SMALL, 3).source)


def test_the_same_settings_give_the_same_run_and_a_constant_rate_is_constant() -> None:
    arms = [Arm("constant", 7, 0.1), Arm("random", 7, 0.1), Arm("homeostatic", 7, 0.1)]
    one, two = simulate(arms, SMALL), simulate(arms, SMALL)
    assert torch.equal(one.accuracy, two.accuracy)
    assert torch.equal(one.eta, two.eta)
    assert bool((one.eta[:, 0] == one.eta[0, 0]).all())
    assert not bool(one.taken[0].any())
    assert not torch.equal(one.accuracy, simulate(arms, replace(SMALL, seeds=(2, 3))).accuracy)
    alone = simulate(arms[2:], SMALL)
    assert torch.equal(alone.eta[:, 0], one.eta[:, 2]), "arms do not touch each other"


def test_rates_move_by_whole_steps_of_their_own_size() -> None:
    moves = simulate([Arm("homeostatic", 20, 0.1), Arm("homeostatic", 20, 0.5)], SMALL).eta.diff(dim=0)
    steps = moves / torch.tensor([[0.01], [0.05]])
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert set(steps.round().int().unique().tolist()) == {-1, 0, 1}


def test_current_labels_in_the_memory_are_another_learner() -> None:
    arms = [Arm("homeostatic", 20, 0.3)]
    seen, current = (simulate(arms, replace(SMALL, labels_in_memory=kind)) for kind in ("seen", "current"))
    assert not torch.equal(seen.eta, current.eta)
    still = [simulate([Arm("homeostatic", 0, 0.3)], replace(SMALL, labels_in_memory=k)) for k in ("seen", "current")]
    assert torch.equal(still[0].eta, still[1].eta), "without a swap both are the same"


def test_the_advantage_is_nothing_without_shift_and_grows_with_it() -> None:
    rates = (0, 20, 60)
    arms = [Arm(kind, swaps, 0.1) for kind in ("constant", "homeostatic") for swaps in rates]
    run = simulate(arms, Shift())
    gain = dict(zip(rates, run.accuracy[3:] - run.accuracy[:3], strict=True))
    assert float(gain[0].abs().max()) < 0.003
    for swaps in (20, 60):
        mean, half = seed_interval(gain[swaps].tolist())
        assert mean - half > 0
        assert mean > 0.03
    assert float(gain[60].mean()) > float(gain[20].mean())
    rise = run.mean_eta[3:].mean(1) / 0.1
    assert float(rise[0]) < 1.15 < 1.3 < float(rise[2])
