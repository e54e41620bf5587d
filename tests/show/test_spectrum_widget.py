"""The counts of directions in the widget's JavaScript, run under node and compared with the library's."""

from __future__ import annotations

from pathlib import Path

import pytest
from under_node import needs_node, node, widgets


@needs_node
def test_counts_of_directions_are_those_of_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.evaluate.representation_geometry import participation_ratio, rankme

    for decay, massive in ((0.0, 1), (1.0, 1), (2.0, 1), (1.3, 40)):
        law = f"w.powerLaw(64, {decay}, {massive})"
        got = node(
            "spectrum_rank",
            [f"w.rankMe({law})", f"w.rankMe({law}.map(Math.sqrt))", f"w.participation({law})"],
            tmp_path,
        )
        lam = torch.arange(1, 65, dtype=torch.float64) ** -decay
        lam[0] *= massive
        assert got == pytest.approx([rankme(lam, 0.0), rankme(lam.sqrt(), 0.0), participation_ratio(lam)])


@needs_node
def test_the_mean_is_one_more_direction_of_uncentred_states(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.evaluate.representation_geometry import rankme, singular_values

    law, offset, generator = "w.powerLaw(12, 1)", 7.0, torch.Generator().manual_seed(0)
    shares = torch.arange(1, 13, dtype=torch.float64) ** -1.0
    drawn = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(drawn - drawn.mean(0))[0] * shares.sqrt()  # centred, with exactly these eigenvalues
    mean = (offset * shares.sum() / 50).sqrt()
    states = torch.cat([rows, mean.expand(50, 1)], 1)
    got = node("spectrum_rank", [f"w.rankMe(w.uncentred({law}, {offset}))", f"w.uncentred({law}, 0).length"], tmp_path)
    assert got[0] == pytest.approx(rankme(singular_values(states, centred=False), 0.0))
    assert got[1] == 13
    assert node("spectrum_rank", [f"w.rankMe(w.uncentred({law}, 0))", f"w.rankMe({law}.map(Math.sqrt))"], tmp_path) == (
        pytest.approx([rankme(shares.sqrt(), 0.0)] * 2)
    )


def test_settings_of_the_spectrum_are_refused() -> None:
    for wrong in ({"width": 4}, {"decay": 4.0}, {"massive": 0.5}, {"offset": -1.0}):
        with pytest.raises(ValueError, match="width must be at least 12"):
            widgets.SpectrumRank(**wrong)
