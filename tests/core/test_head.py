"""The tiled head against float64 autograd over all logits, and its promises: live rows, forbidden tokens, errors."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.head import HeadStatistics, head_statistics, logit_statistics

NAMES = [f.name for f in fields(HeadStatistics)]


def problem(n, h, v, kind="random", dtype=torch.float64, seed=0, bias=False):
    """Hidden states, weight, ids and bias whose rows are random, flat or near-deterministic."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, h), (v, h)))
    hidden *= {"random": 1.0, "flat": 1e-4, "peaked": 12.0}[kind]
    ids = torch.randint(v, (n,), generator=g)
    b = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    return [x if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, b)], ids


def gradients(stats, upstream, inputs):
    total = sum((getattr(stats, k) * u).sum() for k, u in upstream.items())
    return torch.autograd.grad(total, [x for x in inputs if x is not None])


def close(a, b, tolerance):
    """Largest difference relative to the largest entry."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(1e-30, float(b.abs().max()))


def upstreams(n, names, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(n, generator=g, dtype=torch.float64) for k in names}


def compare(inputs, ids, temperature=1.0, names=NAMES, tolerance=1e-9, **settings):
    hidden, weight, bias = inputs
    common = {"temperature": temperature, "bias": bias}
    want = head_statistics(hidden, weight, ids, implementation="reference", **common)
    got = head_statistics(hidden, weight, ids, implementation="torch", **common, **settings)
    for k in NAMES:
        assert getattr(got, k).dtype == torch.float64
        torch.testing.assert_close(getattr(got, k), getattr(want, k), rtol=tolerance, atol=tolerance)
    up = upstreams(len(ids), names)
    for a, b in zip(gradients(got, up, inputs), gradients(want, up, inputs), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("kind", ["random", "flat", "peaked"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("v", [7, 300, 1024])
def test_all_statistics_and_gradients_match_float64_autograd(v, temperature, kind):
    inputs, ids = problem(9, 5, v, kind, bias=True)
    compare(inputs, ids, temperature, chunk=128)


@pytest.mark.parametrize("v", [129920, 151936])
def test_large_vocabularies(v):
    inputs, ids = problem(3, 4, v, "random")
    compare(inputs, ids, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_each_statistic_alone(name):
    inputs, ids = problem(6, 5, 301, bias=True)
    compare(inputs, ids, 0.7, [name], chunk=100)
    compare(inputs, ids, 0.7, [name], chunk=100, keep_bytes=0)


@pytest.mark.parametrize("kind", ["random", "flat", "peaked"])
def test_float32_is_accurate(kind):
    inputs, ids = problem(16, 32, 20000, kind)
    single = [x if x is None else x.detach().float().requires_grad_() for x in inputs]
    double = [x if x is None else x.detach().double().requires_grad_() for x in single]
    up = upstreams(16, ["logprob", "entropy", "variance"])
    got = head_statistics(single[0], single[1], ids, temperature=1.3)
    want = head_statistics(double[0], double[1], ids, temperature=1.3, implementation="reference")
    for k in NAMES:
        assert getattr(got, k).dtype == torch.float32
        torch.testing.assert_close(getattr(got, k).double(), getattr(want, k), rtol=3e-5, atol=3e-5)
    a = gradients(got, {k: u.float() for k, u in up.items()}, single)
    for x, y in zip(a, gradients(want, up, double), strict=True):
        close(x.double(), y, 1e-4)


def test_near_deterministic_rows_do_not_drown_in_the_size_of_their_logits():
    # logits near 1000, one token ahead by 15 nats, 1 - p near 2e-4: exp(z - logsumexp) would be off by 3e-5
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 4, generator=g)
    hidden = torch.randn(20, 4, generator=g) * 0.1
    bias = torch.full((500,), 1000.0)
    bias[7] += 15
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    double = [x.detach().double().requires_grad_() for x in leaves]
    ids = torch.full((20,), 7)
    got = head_statistics(leaves[0], leaves[1], ids, bias=leaves[2], implementation="torch")
    want = head_statistics(double[0], double[1], ids, bias=double[2], implementation="reference")
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=0, atol=2e-5)
    up = upstreams(20, ["logprob"])
    (a, *_), (b, *_) = gradients(got, {"logprob": up["logprob"].float()}, leaves), gradients(want, up, double)
    close(a.double(), b, 0.02)


def test_a_near_deterministic_row_keeps_its_small_entropy():
    # one token ahead by 30 nats: entropy 1e-10, which log Z - E[z] with z near 100 could not hold in float32
    weight = torch.zeros(500, 1)
    weight[7] = 1.0
    hidden = torch.tensor([[30.0]])
    bias = torch.full((500,), 70.0)
    stats = head_statistics(hidden, weight, torch.tensor([7]), bias=bias, implementation="torch")
    q = 499 * math.exp(-30.0)
    assert float(stats.entropy) == pytest.approx(q * 31 / (1 + q), rel=0.5, abs=1e-12)
    assert float(stats.variance) >= 0


def test_sixteen_bit_inputs_give_float32_statistics_and_gradients_of_their_own_type():
    inputs, ids = problem(5, 8, 400, bias=True)
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in half]
    got = head_statistics(half[0], half[1], ids, bias=half[2])
    want = head_statistics(double[0], double[1], ids, bias=double[2], implementation="reference")
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)
    assert got.entropy.dtype == torch.float32
    up = upstreams(5, ["logprob", "entropy"])
    a = gradients(got, {k: u.float() for k, u in up.items()}, half)
    for x, y in zip(a, gradients(want, up, double), strict=True):
        assert x.dtype == torch.bfloat16
        close(x.double(), y, 5e-3)  # rounded to bfloat16 once


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_autocast_rounds_nothing_on_the_cpu(implementation):
    (hidden, weight, _), ids = problem(5, 8, 400, dtype=torch.float32)
    outside = head_statistics(hidden, weight, ids, implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head_statistics(hidden, weight, ids, implementation=implementation)
        up = {"entropy": torch.ones(5), "variance": torch.ones(5)}
        a, b = (gradients(s, up, (hidden, weight)) for s in (inside, outside))
        direct = logit_statistics(hidden.detach().float(), ids % 8)
    assert torch.equal(direct.variance, logit_statistics(hidden.detach(), ids % 8).variance)
    for k in NAMES:
        assert torch.equal(getattr(inside, k), getattr(outside, k))
    for x, y in zip(a, b, strict=True):
        close(x, y, 1e-5)


def test_small_integer_ids():
    (hidden, weight, _), ids = problem(5, 3, 12)
    for dtype in (torch.int32, torch.uint8):
        a, b = (head_statistics(hidden, weight, i).logprob for i in (ids, ids.to(dtype)))
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), v=st.integers(2, 40), chunk=st.integers(1, 45), keep=st.sampled_from([0, 100, 10**6]),
    live=st.lists(st.booleans(), min_size=9, max_size=9), temperature=st.floats(0.3, 3.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiling_keeping_and_dead_rows_change_nothing(n, v, chunk, keep, live, temperature, seed):
    inputs, ids = problem(n, 3, v, seed=seed, bias=True)
    compare(inputs, ids, temperature, chunk=chunk, keep_bytes=keep)
    mask = torch.tensor(live[:n])
    common = {"temperature": temperature, "bias": inputs[2]}
    want = head_statistics(inputs[0], inputs[1], ids, implementation="reference", **common)
    got = head_statistics(inputs[0], inputs[1], ids, live=mask, chunk=chunk, keep_bytes=keep, **common)
    for k in NAMES:
        torch.testing.assert_close(getattr(got, k), getattr(want, k), rtol=1e-9, atol=1e-9)
    up = upstreams(n, NAMES)
    silent = {k: u * mask for k, u in up.items()}
    for a, b in zip(gradients(got, up, inputs), gradients(want, silent, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_reference_treats_dead_rows_as_constants_too():
    inputs, ids = problem(4, 3, 11)
    live = torch.tensor([True, False, True, False])
    up = upstreams(4, NAMES)
    pair = [
        gradients(head_statistics(inputs[0], inputs[1], ids, live=live, implementation=i), up, inputs)
        for i in ("reference", "torch")
    ]
    for a, b in zip(*pair, strict=True):
        close(a, b, 1e-9)
    assert bool((pair[0][0][~live] == 0).all())


class Counting:
    """Rows that went through the backward kernel."""

    def __init__(self, inner):
        self.inner, self.rows = inner, []

    def fold(self, *args):
        return self.inner.fold(*args)

    def gradient(self, tile, *args):
        self.rows.append(len(tile))
        self.inner.gradient(tile, *args)


@pytest.mark.parametrize("how", ["live", "zero upstream"])
def test_rows_without_weight_run_no_backward(monkeypatch, how):
    from rlvr_lab.core import head

    counter = Counting(head.TorchEngine())
    monkeypatch.setattr(head, "TorchEngine", lambda: counter)
    inputs, ids = problem(10, 3, 20)
    mask = torch.arange(10) < 3
    stats = head_statistics(inputs[0], inputs[1], ids, live=mask if how == "live" else None, chunk=8)
    up = stats.entropy if how == "live" else stats.entropy * mask
    up.sum().backward()
    assert counter.rows == [3, 3, 3]


def test_rows_beyond_one_chunk_and_a_second_backward(monkeypatch):
    from rlvr_lab.core import head

    monkeypatch.setitem(head._ROWS, "cpu", 4)
    inputs, ids = problem(11, 3, 23, bias=True)
    compare(inputs, ids, 0.9, chunk=10)
    compare(inputs, ids, 0.9, chunk=10, keep_bytes=0)
    stats = head_statistics(inputs[0], inputs[1], ids)
    first = torch.autograd.grad(stats.entropy.sum(), inputs[:2], retain_graph=True)
    again = torch.autograd.grad(stats.entropy.sum(), inputs[:2])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_the_logits_are_never_whole():
    inputs, ids = problem(64, 4, 5000, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        stats = head_statistics(inputs[0], inputs[1], ids, chunk=100, keep_bytes=0)
        (stats.logprob + stats.entropy).sum().backward()
    assert largest < 64 * 5000 / 4


def test_forbidden_tokens_have_no_part():
    (hidden, weight, _), ids = problem(6, 4, 30)
    allowed = torch.cat([torch.arange(3), torch.arange(20, 30)])  # whole tiles are forbidden
    bias = torch.full((30,), float("-inf"), dtype=torch.float64)
    bias[allowed] = 0.0
    ids = torch.randint(len(allowed), (6,), generator=torch.Generator().manual_seed(0))
    names = [k for k in NAMES if k != "self_certainty"]
    up = upstreams(6, names)
    got = head_statistics(hidden, weight, allowed[ids], bias=bias, chunk=5, temperature=0.7)
    want = head_statistics(hidden, weight[allowed], ids, temperature=0.7, implementation="reference")
    for k in names:
        torch.testing.assert_close(getattr(got, k), getattr(want, k))
    assert bool((got.self_certainty == float("inf")).all())
    for a, b in zip(gradients(got, up, (hidden, weight)), gradients(want, up, (hidden, weight)), strict=True):
        close(a, b, 1e-9)
    sampled = head_statistics(hidden, weight, torch.full((6,), 10), bias=bias)
    assert bool((sampled.logprob == float("-inf")).all())
    assert bool(torch.isfinite(sampled.entropy_change(0.1)).all())


def test_a_batch_keeps_its_shape():
    (hidden, weight, _), ids = problem(6, 4, 30)
    flat = head_statistics(hidden, weight, ids)
    folded = head_statistics(hidden.reshape(2, 3, 4), weight, ids.reshape(2, 3), live=torch.ones(2, 3).bool())
    for k in NAMES:
        assert getattr(folded, k).shape == (2, 3)
        torch.testing.assert_close(getattr(folded, k).reshape(-1), getattr(flat, k))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_no_rows(implementation):
    (hidden, weight, bias), ids = problem(0, 4, 30, bias=True)
    stats = head_statistics(hidden, weight, ids, bias=bias, implementation=implementation)
    assert stats.entropy.shape == (0,)
    for x, g in zip((hidden, weight, bias), gradients(stats, upstreams(0, NAMES), (hidden, weight, bias)), strict=True):
        assert g.shape == x.shape
        assert not bool(g.any())


def test_no_gradient_where_none_is_asked():
    (hidden, weight, _), ids = problem(4, 3, 30)
    with torch.no_grad():
        assert not head_statistics(hidden, weight, ids).entropy.requires_grad
    stats = head_statistics(hidden.detach(), weight, ids)
    (g,) = torch.autograd.grad(stats.entropy.sum(), [weight])
    assert bool(g.any())
    stats = head_statistics(hidden, weight.detach(), ids)
    (g,) = torch.autograd.grad(stats.entropy.sum(), [hidden])
    assert bool(g.any())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_logit_statistics(shape, temperature):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(*shape, 13, generator=g, dtype=torch.float64) * 3
    z[..., 4] = float("-inf")
    z.requires_grad_()
    ids = torch.randint(4, shape, generator=g)
    eye = torch.eye(13, dtype=torch.float64)
    stats = logit_statistics(z, ids, temperature)
    want = head_statistics(z.masked_fill(z == float("-inf"), -1e3), eye, ids, temperature=temperature)
    names = [k for k in NAMES if k != "self_certainty"]
    up = {k: torch.randn(shape, generator=g, dtype=torch.float64) for k in names}
    for k in names:
        torch.testing.assert_close(getattr(stats, k), getattr(want, k))
    (a,), (b,) = gradients(stats, up, [z]), gradients(want, up, [z])
    close(a, b, 1e-9)


def test_entropy_change_is_the_first_order_change():
    g = torch.Generator().manual_seed(3)
    z = torch.randn(50, 9, generator=g, dtype=torch.float64) * 2
    ids = torch.randint(9, (50,), generator=g)
    p = torch.softmax(z, -1)
    step = 1e-6
    moved = z + step * (torch.nn.functional.one_hot(ids, 9) - p)
    before, after = logit_statistics(z, ids), logit_statistics(moved, ids)
    true = (after.entropy - before.entropy) / step
    torch.testing.assert_close(before.entropy_change(1.0), true, rtol=1e-4, atol=1e-5)
    assert float(before.entropy_change(1.0).abs().max()) > 0.1
    flat = logit_statistics(torch.zeros(1, 9, dtype=torch.float64), torch.tensor([2]))
    assert abs(float(flat.entropy_change(1.0))) < 1e-12


def test_self_certainty_is_the_divergence_from_uniform():
    z = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p = torch.log_softmax(z / 0.5, -1)
    uniform = torch.full_like(log_p, 1 / 8)
    want = torch.nn.functional.kl_div(log_p, uniform, reduction="none").sum(-1)
    torch.testing.assert_close(logit_statistics(z, torch.zeros(3).long(), 0.5).self_certainty, want)
    assert float(logit_statistics(torch.zeros(1, 8), torch.tensor([0])).self_certainty) == pytest.approx(0, abs=1e-6)


def test_gradcheck():
    (hidden, weight, bias), ids = problem(3, 2, 6, bias=True)

    def run(h, w, b):
        return _values(head_statistics(h, w, ids, bias=b, temperature=0.9, chunk=4))

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def _values(stats):
    return tuple(getattr(stats, k) for k in NAMES)


def spoil(tensor, index, value):
    tensor = tensor.detach().clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_argument_at_fault_is_named(implementation, value):
    (hidden, weight, bias), ids = problem(5, 3, 12, bias=True)

    def run(h, w, b):
        return head_statistics(h, w, ids, bias=b, chunk=5, implementation=implementation)

    with pytest.raises(ValueError, match=r"row 3 .*hidden"):
        run(spoil(hidden, (3, 1), value), weight, bias)
    with pytest.raises(ValueError, match=r"row 0 .*weight .*token 7"):
        run(hidden, spoil(weight, 7, torch.full((3,), value)), bias)
    with pytest.raises(ValueError, match=r"row 0 .*bias .*token 11"):
        run(hidden, weight, spoil(bias, 11, value))
    with pytest.raises(ValueError, match="forbids every token"):
        run(hidden, weight, torch.full((12,), float("-inf"), dtype=torch.float64))
    with pytest.raises(ValueError, match="row 2 of the logits"):
        logit_statistics(spoil(torch.zeros(4, 6), (2, 5), value), torch.zeros(4).long())


def test_wrong_arguments():
    (hidden, weight, _), ids = problem(5, 3, 12)
    wrong = [
        ({"ids": ids[:4]}, "ids have shape"),
        ({"ids": torch.tensor([0, 1, 12, 0, 0])}, "ids row 2 is 12, outside the vocabulary of 12"),
        ({"ids": torch.tensor([0, -1, 12, 0, 0])}, "ids row 1 is -1"),
        ({"ids": ids.float()}, "must be integers"),
        ({"weight_VH": weight[:, :2]}, r"must be \[..., H\] and \[V, H\]"),
        ({"bias": torch.zeros(11)}, "bias has shape"),
        ({"live": torch.ones(5)}, "live must be boolean"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"implementation": "tritn"}, "did you mean 'triton'"),
        ({"implementation": "triton"}, "float64"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            head_statistics(**{"hidden": hidden, "weight_VH": weight, "ids": ids, **change})
    with pytest.raises(ValueError, match="outside the vocabulary"):
        logit_statistics(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="ids have shape"):
        logit_statistics(torch.zeros(2, 3), torch.tensor([0]))
