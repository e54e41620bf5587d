from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.methods.entropy_guided_attention import AttentionEntropyPenalty, head_entropies
from rlvr_lab.policy.softmax_only import SOFTMAX_ONLY, SoftmaxOnlyConfig, SoftmaxOnlyLM

SWITCHES: list[dict[str, Any]] = [
    {},
    {"activation": "relu", "norm": False},
    {"activation": "none"},
    {"activation": "none", "norm": False},
    SOFTMAX_ONLY,
]


def build(seed: int = 0, **switches: Any) -> SoftmaxOnlyLM:
    return SoftmaxOnlyLM(SoftmaxOnlyConfig(vocabulary=11, context=12, width=16, layers=2, heads=2, **switches), seed)


def text(seed: int = 0, rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def names(model: SoftmaxOnlyLM) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_matrices_are_causal_distributions_and_the_future_is_inert(switches: dict[str, Any]) -> None:
    model, ids = build(**switches), text()
    logits, matrices = model(ids)
    assert logits.shape == (3, 10, 11)
    assert [m.shape for m in matrices] == [(3, 2, 10, 10)] * 2
    for matrix in matrices:
        torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 2, 10))
        assert float(matrix.triu(1).abs().max()) == 0
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    torch.testing.assert_close(model(changed)[0][:, :6], logits[:, :6])


def test_switches_take_the_nonlinearities_away() -> None:
    assert {"LayerNorm", "GELU"} <= names(build())
    assert "ReLU" in names(build(activation="relu"))
    only = build(**SOFTMAX_ONLY)
    assert not {"LayerNorm", "GELU", "ReLU"} & names(only)
    wide, fused = (sum(p.numel() for p in m.blocks[0].ffn.body.parameters()) for m in (build(), only))
    assert fused == 16 * 16 < wide


def test_only_the_learned_scales_and_temperatures_have_a_gradient() -> None:
    for switches, learned in ((SOFTMAX_ONLY, True), ({"activation": "none", "norm": False}, False)):
        model = build(**switches)
        model(text())[0].square().mean().backward()
        block = model.blocks[0]
        for parameter in (block.attention.raw_temperature, block.ffn.alpha, block.ffn.beta):
            assert (parameter.grad is not None and float(parameter.grad.abs().max()) > 0) is learned


def test_temperature_starts_at_one_stays_positive_and_flattens_attention() -> None:
    model = build(**SOFTMAX_ONLY)
    attention = model.blocks[0].attention
    attention.qkv.weight.data.mul_(40)  # attention of a fresh model is flat already
    assert attention.temperature.tolist() == pytest.approx([1.0, 1.0])
    entropies = []
    for raw in (-20.0, 0.0, 20.0):
        attention.raw_temperature.data.fill_(raw)
        assert float(attention.temperature.min()) > 0
        entropies.append(float(head_entropies(model(text())[1][:1]).mean()))
    assert entropies[0] < entropies[1] < entropies[2] <= sum(map(math.log, range(1, 11))) / 10


def test_scales_act_as_written() -> None:
    model = build(**SOFTMAX_ONLY)
    ffn = model.blocks[0].ffn
    x = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0))
    ffn.alpha.data.fill_(4.0)
    ffn.beta.data.fill_(0.5)
    torch.testing.assert_close(ffn(x, x), 0.5 * x + x @ ffn.body.weight.T / 4)


@pytest.mark.parametrize("switches", [{}, SOFTMAX_ONLY], ids=["usual", "softmax_only"])
def test_padding_is_inert(switches: dict[str, Any]) -> None:
    model, ids = build(**switches), text()
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 7:] = False
    logits, _ = model(ids, mask)
    changed = ids.clone()
    changed[:, 7:] = 0
    again, matrices = model(changed, mask)
    torch.testing.assert_close(again[:, :7], logits[:, :7])
    torch.testing.assert_close(logits[:, :7], model(ids[:, :7])[0])
    assert float(matrices[0][:, :, :7, 7:].abs().max()) == 0
    left = mask.flip(1)
    assert all(bool(m.isfinite().all()) for m in model(ids, left)[1])  # a query without any key is flat, not nan


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    one = build(seed=3).state_dict()
    torch.manual_seed(2)
    same, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["tokens.weight"], other["tokens.weight"])


def test_it_learns_on_a_cpu_with_the_penalty_beside_the_loss() -> None:
    """A line of one repeated letter: predictable once the letter was seen."""
    model = build(**SOFTMAX_ONLY)
    penalty = AttentionEntropyPenalty(2, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *penalty.parameters()], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        ids = torch.randint(0, 11, (16, 1), generator=generator).expand(16, 12)
        logits, matrices = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + penalty(matrices)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(11), abs=0.1)
    assert losses[-1] < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "glu"}, "activation 'glu' is unknown; did you mean 'gelu'"),
        ({"layers": 0}, "must all be at least 1"),
        ({"width": 10, "heads": 4}, "width 10 must be a multiple of heads 4"),
        ({"scaled": True}, "set activation to none, not gelu"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoftmaxOnlyConfig(vocabulary=5, context=4, **settings)


def test_a_text_beyond_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="13 tokens exceed the context 12"):
        build()(text(length=13))
