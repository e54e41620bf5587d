from __future__ import annotations

import copy

import pytest
import torch

from rlvr_lab.policy.muon import Muon, orthogonalise

SHAPES = [(96, 96), (96, 96), (288, 96), (96, 288)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]


def test_several_steps_equal_torch_muon_up_to_its_bfloat16() -> None:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    settings = {"lr": 3e-3, "momentum": 0.95, "weight_decay": 0.01}
    mine = Muon(ours, **settings)
    reference = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        moved, expected = (a - s).detach(), (b - s).detach()
        assert float((moved - expected).norm() / expected.norm()) < 0.02
        assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("shape", [(5, 24, 96), (5, 96, 24)])
def test_orthogonalise_brings_singular_values_near_1_and_keeps_directions(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.65
    assert float(values.max()) < 1.25
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    polar = u @ v
    cosine = (polar * result).sum((1, 2)) / polar.norm(dim=(1, 2)) / result.norm(dim=(1, 2))
    assert float(cosine.min()) > 0.98


def test_a_stack_is_its_matrices_one_by_one_at_any_scale() -> None:
    matrices = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(0))
    together = orthogonalise(matrices)
    for one, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalise(one[None])[0], result, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(orthogonalise(one[None] * 1e3)[0], result, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(orthogonalise(torch.zeros(1, 3, 4))).all()


def test_parameters_without_gradient_stay() -> None:
    moved, still = parameters()[:2]
    before = still.detach().clone()
    moved.grad = torch.ones_like(moved)
    Muon([moved, still], lr=0.1).step()
    assert torch.equal(still, before)


def test_no_closure() -> None:
    with pytest.raises(ValueError, match="takes no closure"):
        Muon(parameters(), lr=0.1).step(lambda: 0.0)
