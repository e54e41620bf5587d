"""The Triton kernels against the torch ones and float64 autograd: in Triton's interpreter, or on the GPU.

`benchmarks/head.py --check` runs the same comparison at full size on a GPU.
"""

import os
from dataclasses import fields

import pytest
import torch

from rlvr_lab.core import head
from rlvr_lab.core.head import HeadStatistics, head_statistics

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAMES = [f.name for f in fields(HeadStatistics)]

# kernels are interpreted only if the variable is set when Triton and the kernels are first imported
_before = os.environ.get("TRITON_INTERPRET")
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed: `pip install triton` (Linux)")
from rlvr_lab.core.head_triton import BLOCK, TritonEngine  # noqa: E402

if _before is None:
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def problem(n, h, v, kind="random", seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=g) for s in ((n, h), (v, h), (v,)))
    hidden *= {"random": 1.0, "flat": 1e-4, "peaked": 12.0}[kind]
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, torch.randint(v, (n,), generator=g).to(DEVICE)


def run(inputs, ids, names, **settings):
    stats = head_statistics(inputs[0], inputs[1], ids, bias=inputs[2], **settings)
    g = torch.Generator().manual_seed(1)
    total = sum((getattr(stats, k).double().cpu() * torch.randn(len(ids), generator=g).double()).sum() for k in names)
    return stats, torch.autograd.grad(total, inputs)


def close(a, b, tolerance):
    assert float((a.double() - b.double()).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("kind", ["random", "flat", "peaked"])
@pytest.mark.parametrize("v", [7, 300, 1024, BLOCK + 5])
def test_statistics_and_gradients_match_float64_autograd(v, kind):
    inputs, ids = problem(5, 6, v, kind)
    double = [x.detach().double().requires_grad_() for x in inputs]
    got, a = run(inputs, ids, NAMES, temperature=0.7, implementation="triton", chunk=5000)
    want, b = run(double, ids, NAMES, temperature=0.7, implementation="reference")
    for k in NAMES:
        torch.testing.assert_close(getattr(got, k).double(), getattr(want, k), rtol=5e-5, atol=5e-5)
    for x, y in zip(a, b, strict=True):
        close(x, y, 2e-4)


@pytest.mark.parametrize("names", [["logprob"], ["entropy"], ["logprob", "entropy"], ["max_prob"], ["sampled_logit"]])
def test_some_statistics_on_some_rows(names):
    inputs, ids = problem(7, 4, 90)
    live = torch.tensor([True, False, True, True, False, False, True], device=DEVICE)
    double = [x.detach().double().requires_grad_() for x in inputs]
    _, a = run(inputs, ids, names, live=live, implementation="triton", chunk=40, keep_bytes=500)
    _, b = run(double, ids, names, live=live, implementation="reference")
    for x, y in zip(a, b, strict=True):
        close(x, y, 1e-5)


def test_forbidden_tokens_and_whole_forbidden_blocks():
    inputs, ids = problem(4, 4, 60)
    with torch.no_grad():
        inputs[2][:32] = float("-inf")
    names = [k for k in NAMES if k != "self_certainty"]
    double = [x.detach().double().requires_grad_() for x in inputs]
    ids = ids % 28 + 32
    got, a = run(inputs, ids, names, implementation="triton", chunk=16)
    want, b = run(double, ids, names, implementation="torch", chunk=16)
    for k in NAMES:
        torch.testing.assert_close(getattr(got, k).double(), getattr(want, k), rtol=1e-5, atol=1e-5)
    for x, y in zip(a, b, strict=True):
        close(x, y, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(value):
    inputs, ids = problem(4, 4, 60)
    with torch.no_grad():
        inputs[0][2, 1] = value
    with pytest.raises(ValueError, match=r"row 2 .*hidden"):
        head_statistics(inputs[0], inputs[1], ids, implementation="triton")


def test_a_bfloat16_gradient_tile_is_the_float32_one_rounded():
    g = torch.Generator().manual_seed(0)
    tile = torch.randn(6, 70, generator=g).to(DEVICE)
    ids = torch.tensor([3, -5, 69, 70, 0, 12], device=DEVICE)
    matrix = torch.randn(10, 6, generator=g).to(DEVICE)
    matrix[0] = tile.amax(1)
    matrix[1] = tile.logsumexp(1) - matrix[0]
    terms = head.RowTerms(matrix, linear=True, square=True, collision=True, uniform=True, peak=True)
    outs = [torch.full((6, 70), float("nan"), dtype=t, device=DEVICE) for t in (torch.float32, torch.bfloat16)]
    for out in outs:
        TritonEngine().gradient(tile, ids, ids.flip(0), terms, out)
    want = torch.empty_like(outs[0])
    head.TorchEngine().gradient(tile, ids, ids.flip(0), terms, want)
    close(outs[0], want, 1e-6)
    torch.testing.assert_close(outs[1].float(), want.bfloat16().float(), rtol=0.01, atol=1e-3)


@pytest.mark.skipif(not CUDA, reason="16-bit products with float32 sums run on CUDA only")
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_bfloat16_products(implementation):
    inputs, ids = problem(300, 64, 3000)
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in half]
    got, a = run(half, ids, NAMES, temperature=0.7, implementation=implementation, chunk=700)
    want, b = run(double, ids, NAMES, temperature=0.7, implementation="reference")
    for k in NAMES:
        torch.testing.assert_close(getattr(got, k).double(), getattr(want, k), rtol=1e-4, atol=1e-4)
    for x, y in zip(a, b, strict=True):
        assert float((x.double() - y).norm() / y.norm()) < 1e-2
