"""The entropy switch and its step: what the card's formulas say, at their edges too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr_lab.core.entropy import softmax_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.inference.entropy_switch import OneLayer, Settings, Switch, schedule, steer
from rlvr_lab.inference.temperature_match import final_entropy, match_temperature, pooled_entropy
from rlvr_lab.testing.golden import Case, read_cases, replay_file

GOLDEN = Path(__file__).parents[1] / "golden" / "v_reason.json"
WAVE = [0.5, 0.9, 0.7, 1.2, 1.0, 1.5, 1.1, 0.9, 0.6, 0.5, 0.4, 0.8]


def test_the_golden_file_replays() -> None:
    results = replay_file(GOLDEN)
    assert len(results) == 6
    assert [r.problem for r in results] == [None] * 6


def pseudocode(entropy: list[float], beta: float, patience: int, rule: str) -> list[int]:
    """Section 5 of the card, word for word."""
    ema, peak, down, phase, out = 0.0, -math.inf, 0, "explore", []
    for t, h in enumerate(entropy):
        previous, ema = ema, (h if t == 0 else beta * ema + (1 - beta) * h)
        if phase == "explore":
            peak, down = (ema, 0) if ema > peak else (peak, down + 1)
            phase = "exploit" if down >= patience else phase
        up = h < ema if rule == "mean_revert" else t == 0 or ema >= previous
        out.append(1 if up and phase == "explore" else -1)
    return out


@pytest.mark.parametrize("rule", ["mean_revert", "trend"])
@pytest.mark.parametrize(("beta", "patience"), [(0.9, 3), (0.5, 1), (0.0, 2), (0.7, 5)])
def test_signs_follow_the_pseudocode_on_random_entropies(rule: Any, beta: float, patience: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        entropy = torch.rand(25, generator=generator, dtype=torch.float64).tolist()
        found = schedule(entropy, Settings(ema_decay=beta, patience=patience, rule=rule))
        assert found.alpha == pseudocode(entropy, beta, patience, rule)


def test_rows_switch_apart() -> None:
    rows = [WAVE, WAVE[::-1], [0.3] * 12]
    switch = Switch(Settings(ema_decay=0.6), 3, torch.float64)
    together = torch.stack([switch.update(torch.tensor(h, dtype=torch.float64)) for h in zip(*rows, strict=True)], 1)
    for row, signs in zip(rows, together.tolist(), strict=True):
        assert schedule(row, Settings(ema_decay=0.6)).alpha == signs


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 1e-9, 3.3])
@pytest.mark.parametrize("patience", [1, 3])
def test_constant_entropy_has_one_maximum(value: float, patience: int) -> None:
    found = schedule([value] * 200, Settings(patience=patience))
    assert found.peak_index == 0
    assert found.first_exploit_index == patience
    assert set(found.alpha) == {-1.0}
    trend = schedule([value] * 200, Settings(patience=patience, rule="trend"))
    assert trend.alpha == [1.0] * patience + [-1.0] * (200 - patience)


def test_the_first_token_lowers_and_the_phase_never_returns() -> None:
    found = schedule([*WAVE, 50.0, 60.0, 1.0], Settings())
    assert found.alpha[0] == -1.0
    assert found.first_exploit_index == 10
    assert all(found.exploit[10:]), "a later, higher maximum does not bring exploration back"
    assert found.peak_index == 7


def test_without_patience_the_macro_phase_never_begins() -> None:
    found = schedule(WAVE, Settings(patience=None))
    assert found.first_exploit_index is None
    assert found.alpha[-2] == 1.0


def test_control_rules() -> None:
    assert set(schedule(WAVE, Settings(rule="exploit", patience=None)).alpha) == {-1.0}
    switch = Switch(Settings(rule="random", patience=None), 4)
    signs = switch.update(torch.ones(4), torch.tensor([0.1, 0.49, 0.5, 0.9]))
    assert signs.tolist() == [1.0, 1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="uniform numbers"):
        switch.update(torch.ones(4))


# -- the step ---------------------------------------------------------------------------------------------------------


def layers() -> list[tuple[Case, OneLayer]]:
    names = ("query", "key_cache", "value_cache", "output_proj", "residual_before_attention", "final_norm_weight",
             "unembedding")  # fmt: skip
    cases = [case for case in read_cases(GOLDEN) if "query" in case.inputs]
    return [(case, OneLayer(*(case.tensor(name) for name in names))) for case in cases]


def stepped(case: Case, layer: OneLayer, alpha: float, lr: float, optimizer: Any = "gradient", steps: int = 1) -> Any:
    places = case.params["controlled_positions"]
    delta = torch.zeros(len(layer.values), len(places), 3, dtype=torch.float64, requires_grad=True)
    chosen = Settings(lr=lr, optimizer=optimizer).optimizer_of(delta)
    sign = torch.tensor([alpha], dtype=torch.float64)
    _, trace = steer(lambda: layer.logits(delta, places)[None], delta, sign, chosen, steps)
    return trace[:, 0], delta


@pytest.mark.parametrize("alpha", [1.0, -1.0])
@pytest.mark.parametrize("optimizer", ["gradient", "adam"])
def test_a_small_step_moves_entropy_as_its_sign_says(alpha: float, optimizer: str) -> None:
    for case, layer in layers():
        trace, _ = stepped(case, layer, alpha, 1e-3, optimizer)
        assert alpha * float(trace[1] - trace[0]) > 1e-6


def test_a_large_step_overshoots() -> None:
    case, layer = layers()[1]
    trace, _ = stepped(case, layer, 1.0, 0.5)
    assert trace[1] < 0.5 * trace[0], "an explore step that lowers entropy"


def test_the_change_of_entropy_is_first_order_in_the_rate() -> None:
    """H after - H before = alpha eta |grad|^2 + O(eta^2)."""
    case, layer = layers()[2]
    gaps = []
    for lr in (1e-3, 1e-4):
        trace, delta = stepped(case, layer, 1.0, lr)
        predicted = float(delta.detach().square().sum()) / lr
        gaps.append(abs(float(trace[1] - trace[0]) / predicted - 1))
    assert gaps[1] < 0.02
    assert gaps[1] < gaps[0] / 5


def test_alpha_zero_and_rate_zero_do_nothing() -> None:
    for optimizer in ("gradient", "adam"):
        for alpha, lr in ((0.0, 0.5), (1.0, 0.0)):
            trace, delta = stepped(*layers()[0], alpha, lr, optimizer, steps=3)
            assert bool((delta == 0).all())
            assert float(trace.max() - trace.min()) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_steps_inside_no_grad_and_inference_mode(mode: Any) -> None:
    case, layer = layers()[0]
    outside, _ = stepped(case, layer, 1.0, 0.05)
    delta = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    optimizer, sign = Settings(lr=0.05).optimizer_of(delta), torch.ones(1, dtype=torch.float64)
    with mode():
        logits, trace = steer(lambda: layer.logits(delta, [1, 2, 3])[None], delta, sign, optimizer, 1)
    assert torch.equal(trace[:, 0], outside)
    assert torch.equal(softmax_entropy(logits), trace[-1])
    assert delta.grad is None


def test_query_heads_of_a_group_share_their_change() -> None:
    """One kv head for two query heads: the change reaches both heads' outputs."""
    case, layer = layers()[0]
    delta = torch.zeros(1, 3, 3, dtype=torch.float64)
    delta[0, 0] = torch.tensor([1.0, 0.0, 0.0])
    moved = layer.logits(delta, case.params["controlled_positions"])
    heads = [float(layer.attention[h, 1]) for h in range(2)]
    stream = layer.residual + layer.output_proj @ (layer.attention @ layer.values[0]).flatten()
    stream = stream + layer.output_proj[:, 0] * heads[0] + layer.output_proj[:, 3] * heads[1]
    norm = stream / (stream.square().mean() + 1e-6).sqrt() * layer.norm_weight
    assert torch.allclose(moved, layer.unembedding @ norm, atol=1e-12)


# -- settings and the control -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rule": "mean_rever"}, "rule 'mean_rever' is unknown; did you mean 'mean_revert'"),
        ({"optimizer": "adamw"}, "did you mean 'adam'"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), not 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must lie"),
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"every": 0}, "every must be at least 1, not 0"),
        ({"inner_steps": -1}, "inner_steps must be at least 0, not -1"),
        ({"lr": -0.1}, "lr must be finite and not negative"),
        ({"lr": math.inf}, "lr must be finite"),
    ],
)
def test_settings_that_make_no_sense(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**setting)


def test_rates_of_the_card() -> None:
    delta = torch.zeros(1, requires_grad=True)
    assert Settings().optimizer_of(delta).param_groups[0]["lr"] == 0.05
    assert Settings(optimizer="adam").optimizer_of(delta).param_groups[0]["lr"] == 0.01


def test_the_matched_temperature_is_found() -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def entropy_at(temperature: float) -> float:
        return float(softmax_entropy(logits, temperature).mean())

    for wanted in (0.3, 0.77, 1.0, 2.5):
        found = match_temperature(entropy_at, entropy_at(wanted), tolerance=1e-6)
        assert found == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="no temperature up to 5"):
        match_temperature(entropy_at, math.log(12))
    with pytest.raises(UserError, match=r"no temperature down to 0\.05"):
        match_temperature(entropy_at, 0.0)


def test_means_of_entropies() -> None:
    assert pooled_entropy([[1.0, 2.0, 3.0], [6.0]]) == 3.0
    assert math.isnan(pooled_entropy([[], []]))
    assert final_entropy([9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 3.0]) == 2.0
    assert final_entropy([4.0]) == 4.0
    assert math.isnan(final_entropy([]))
