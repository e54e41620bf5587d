"""Regularisers of the token-level methods inside an update, against their definitions (invariance: test_invariance)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import make_rollout, ready_rollout, sampled_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build
from rlvr_lab.methods.base import Pipeline
from rlvr_lab.methods.epo import EPO, EPOConfig
from rlvr_lab.methods.siren import Siren, SirenConfig, peak_mask, peak_weights
from rlvr_lab.policy import forward
from rlvr_lab.policy.forward import token_view
from rlvr_lab.policy.load import Policy
from rlvr_lab.train.update import Updater, UpdateTotals


@pytest.fixture(scope="module")
def moved(tiny_s: Policy) -> Any:
    """A policy some way off the one that sampled, so that ratios differ from 1 and some are clipped."""
    model = copy.deepcopy(tiny_s.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def scored_by(policy: Policy, pipeline: Pipeline) -> Rollout:
    """16 ragged responses with everything that the pipeline may ask for."""
    return ready_rollout(policy.model, sampled_rollout(policy), pipeline)


@pytest.mark.parametrize("anchor", ["square", "none", "adaptive"])
def test_the_anchored_term_has_the_gradient_of_its_definition(anchor: str, tiny_s: Policy, moved: Any) -> None:
    """Sum over micro-batches against beta (Hbar - H_0)^2 computed at once."""
    config = SirenConfig(coefficient=2.0, anchor=anchor, rate=0.5, quantile=0.5)  # type: ignore[arg-type]
    method = Siren(config)
    pipeline = Pipeline([build("grpo", {"preset": "released"}), method])
    rollout = scored_by(tiny_s, pipeline)
    assert method.anchor is not None
    method.anchor += 0.1  # a gap, so that the square has a slope

    def gradient_with(beta: float) -> torch.Tensor:
        one = Siren(SirenConfig(**{**vars(config), "coefficient": beta, "rate": beta * 0.25}))
        one.anchor = method.anchor
        both = Pipeline([build("grpo", {"preset": "released"}), one])
        updater = Updater(moved, None, both, micro_batch_rows=4)  # type: ignore[arg-type]
        moved.zero_grad()
        updater.accumulate(rollout, both.advantage(rollout), UpdateTotals())
        return torch.cat([p.grad.flatten() for p in moved.parameters()])

    ours = gradient_with(2.0) - gradient_with(0.0)
    moved.zero_grad()
    view = token_view(moved, rollout, read=Siren(config).read_logits)
    peaks = peak_mask(view.read["siren.chooser"], rollout.mask, 0.5)
    mean = (peak_weights(peaks, torch.float32) * view.read["siren.entropy"].masked_fill(~rollout.mask, 0.0)).sum()
    gap = mean - method.anchor
    coefficient = max(0.0, -0.5 * float(gap.detach()))
    definition = {"square": 2.0 * gap**2, "none": -2.0 * mean, "adaptive": -coefficient * mean}[anchor]
    definition.backward()
    theirs = torch.cat([p.grad.flatten() for p in moved.parameters()])
    assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()) + 1e-7)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_hinge_moves_parameters_and_the_released_penalty_does_not(preset: str, tiny_s: Policy, moved: Any) -> None:
    gradients = []
    for alpha in (0.0, 5.0):
        config = EPOConfig(**{**vars(EPO.presets[preset]), "alpha": alpha, "low": 0.9, "high": 1.0})
        method = EPO(config)
        method.history = [0.2]
        pipeline = Pipeline([build("grpo", {"preset": "released"}), method])
        rollout = scored_by(tiny_s, pipeline)
        moved.zero_grad()
        updater = Updater(moved, None, pipeline, micro_batch_rows=16)  # type: ignore[arg-type]
        updater.accumulate(rollout, pipeline.advantage(rollout), UpdateTotals())
        gradients.append(torch.cat([p.grad.flatten() for p in moved.parameters()]))
    assert torch.equal(*gradients) == (preset == "released")


def test_a_large_vocabulary_is_read_in_parts_with_the_same_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=5000, num_hidden_layers=1, **shape)).eval()
    rollout = make_rollout([5, 3, 4, 2])
    read = Siren(SirenConfig()).read_logits
    found = []
    for large in (forward.LARGE, 10_000):
        monkeypatch.setattr(forward, "LARGE", large)
        monkeypatch.setattr(forward, "READ_ROWS", 7)
        model.zero_grad()
        value = forward.token_view(model, rollout, read=read).read["siren.entropy"].masked_fill(~rollout.mask, 0.0)
        value.sum().backward()
        assert model.lm_head.weight.grad is not None
        found.append((value.detach(), model.lm_head.weight.grad.clone()))
    (by_head, grad_by_head), (plain, grad_plain) = found
    assert torch.allclose(by_head, plain, atol=1e-5)
    assert torch.allclose(grad_by_head, grad_plain, atol=1e-5)
