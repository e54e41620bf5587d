"""SPO: how much a signal can tell, exactly; copies with content removed; and the demonstration, whose sign is free."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr_lab.core.entropy import entropy_of_log
from rlvr_lab.elsewhere.spo import (
    binary_channel,
    binomial_quality,
    graded_channel,
    pair_information,
    remove_content,
    signal_information,
)
from rlvr_lab.elsewhere.spo_demo import GradeSettings, arms, keys_of, pretrained, response, tune
from rlvr_lab.errors import UserError

seeds = st.integers(0, 500)
LN2 = math.log(2)


def law(seed: int, *shape: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=draws, dtype=torch.float64)).softmax(-1)


@given(seeds, st.integers(2, 9))
def test_a_signal_of_two_values_is_at_most_one_bit_and_any_signal_ln_of_its_values(seed: int, levels: int) -> None:
    quality = law(seed, levels)
    assert 0 <= signal_information(quality, law(seed + 1, levels, 2)) <= LN2
    assert signal_information(quality, law(seed + 1, levels, 3)) <= math.log(3)
    entropy = float(entropy_of_log(quality.log()))
    assert signal_information(quality, graded_channel(levels)) == pytest.approx(entropy)


@given(seeds, st.floats(0.0, 1.0))
def test_information_is_the_divergence_of_joint_and_product_and_noise_only_loses(seed: int, error: float) -> None:
    quality, channel = law(seed, 5), law(seed + 1, 5, 3)
    joint = quality[:, None] * channel
    direct = (joint * (joint / (quality[:, None] * joint.sum(0))).log()).sum()
    found = signal_information(quality, channel)
    assert found == pytest.approx(float(direct))
    assert signal_information(quality, channel @ graded_channel(3, error)) <= found + 1e-12


def test_binary_verifiers_at_their_limits() -> None:
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert signal_information(uniform, binary_channel(4, 2)) == pytest.approx(LN2)
    assert signal_information(uniform, binary_channel(4, 2, flip=1.0)) == pytest.approx(LN2)
    assert signal_information(uniform, binary_channel(4, 2, flip=0.5)) == pytest.approx(0, abs=1e-12)
    sure = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert signal_information(sure, graded_channel(4)) == 0.0
    flip = 0.1
    expected = LN2 + flip * math.log(flip) + (1 - flip) * math.log(1 - flip)
    assert signal_information(uniform, binary_channel(4, 2, flip)) == pytest.approx(expected)


@given(seeds)
def test_a_pair_tells_its_closed_form_and_less_than_one_bit(seed: int) -> None:
    quality = law(seed, 4)
    first, second = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    better = (first > second).double() + 0.5 * (first == second)
    channel = torch.stack([better, 1 - better], -1).flatten(0, 1)
    direct = signal_information((quality[:, None] * quality).flatten(), channel)
    assert pair_information(quality) == pytest.approx(direct)
    assert direct < LN2


def test_binomial_quality() -> None:
    torch.testing.assert_close(binomial_quality(2, 0.3), torch.tensor([0.49, 0.42, 0.09]).double(), rtol=1e-6, atol=0)
    assert binomial_quality(4, 0.0).tolist() == [1, 0, 0, 0, 0]


@given(st.integers(0, 4), st.integers(2, 6), seeds)
def test_copies_are_nested_start_whole_and_end_without_keys(quality: int, degrees: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    tokens, keys = response(2, quality, draw), keys_of(2)
    assert sum(token in keys for token in tokens) == quality
    found = remove_content(tokens, keys, degrees, draw)
    assert found.has_content == (quality > 0)
    assert found.copies[0] == tokens
    assert found.copies[-1] == [token for token in tokens if token not in keys]
    for more, less in zip(found.copies, found.copies[1:], strict=False):
        rest = iter(more)
        assert all(token in rest for token in less)
    left = [len(copy) for copy in found.copies]
    assert left == [len(tokens) - math.floor(quality * d / (degrees - 1) + 0.5) for d in range(degrees)]


SMALL = GradeSettings(gammas=(0.0, 0.5), shuffled=(0.5,), pretrain=100, steps=40, held_out=100)


def test_demonstration_learns_from_pairs_and_grades_and_comes_again_by_seed() -> None:
    """What gamma does to the rank correlation is shown in the book and asserted nowhere."""
    found = arms(SMALL, [0])
    plain, graded, shuffled = (found[name][0] for name in ("0.0", "0.5", "0.5 shuffled"))
    assert plain.spearman > 0.4
    assert plain.degree > 0.9 * math.log(3)
    assert graded.degree < 0.7 * math.log(3)
    assert graded.fresh < 0.8 * math.log(3)
    assert shuffled.fresh > 0.95 * math.log(3)
    again = tune(pretrained(SMALL, 0), SMALL, 0.5, 0)
    assert again == graded
    assert tune(pretrained(SMALL, 1), SMALL, 0.5, 1) != graded


Q, DRAW = torch.tensor([0.5, 0.5]).double(), np.random.default_rng(0)
REFUSED = {
    "quality must": lambda: signal_information(2 * Q, graded_channel(2)),
    "quality must hold": lambda: signal_information(math.nan * Q, graded_channel(2)),
    "channel must": lambda: signal_information(Q, -graded_channel(2)),
    "one row": lambda: signal_information(Q, graded_channel(3)),
    "threshold": lambda: binary_channel(4, 4),
    "flip": lambda: binary_channel(4, 2, 1.5),
    "levels": lambda: graded_channel(1),
    "error": lambda: graded_channel(3, math.nan),
    "rate": lambda: binomial_quality(3, -0.1),
    "keys must": lambda: binomial_quality(0, 0.5),
    "over the last axis": lambda: pair_information(Q * 0.9),
    "degrees must": lambda: remove_content([1], frozenset({1}), 1, DRAW),
    "tokens": lambda: remove_content([], frozenset({1}), 2, DRAW),
    "quality must lie": lambda: response(0, 5, DRAW),
    "pairs": lambda: pretrained(replace(SMALL, pairs=0), 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_by_name(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
