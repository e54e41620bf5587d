"""The vocabulary head: everything the methods need of p = softmax((h W^T + b) / T), without the logits [N, V].

Shapes: N rows (tokens), H hidden units, V tokens of the vocabulary; all statistics in nats.

One pass. Rows and vocabulary are tiled. Of a tile of scaled logits l = z / T with row maximum m only seven sums stay,
with y = l - m and e = exp(y):

    m,   S0 = sum e,   T1 = sum e y,   T2 = sum e y^2,   Q0 = sum e^2,   Q1 = sum e^2 y,   U = sum l

Tiles are merged by moving every one to the common maximum: for a maximum higher by d, with r = exp(-d),
S0' = r S0, T1' = r (T1 - d S0), T2' = r (T2 - 2 d T1 + d^2 S0), Q0' = r^2 Q0, Q1' = r^2 (Q1 - d Q0). Sums about the
maximum do not cancel in near-deterministic rows.

One backward. Every statistic has a derivative to l_j of the form p_j times a polynomial in log p_j and p_j, plus terms
in single columns; with s = log p_j and upstream gradients g summed over the statistics of a row:

    dl_j = p_j [c0 + c1 s + c2 s^2 + p_j (d0 + d1 s)] + uniform + delta 1[j = a] + peak 1[j = argmax]

so that one exponential per element serves all of them, and a statistic without upstream gradient costs nothing.

The derivation is checked against float64 autograd (tests/core/test_head.py). The tiling idea is that of chunked
log-prob kernels (TRL `kernels/chunked_logprob.py`, linkedin/Liger-Kernel, verl `kernel/linear_cross_entropy`); sums
are kept in float32 throughout, because rounding each tile's gradient to bfloat16 biases training (noted by TRL).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import nearest

Implementation = Literal["auto", "reference", "torch", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

KEEP_BYTES = 2**30
"""Logit tiles of live rows are kept for the backward up to this size, which saves one product of four."""
_COLUMNS = {"cpu": 2048, "cuda": 8192}
_ROWS = {"cpu": 2048, "cuda": 8192}
# elements that a thread works on at a time: tile, shifted logits, exponentials and products stay in its cache
_CACHE_ELEMENTS = 2**18
# exp(-1e4) is 0 in float64 too; used in place of -inf, whose product with 0 is nan
_FLOOR = -1e4


class NotFinite(ValueError, FloatingPointError):
    """Logits that are nan or +inf; the message names the first such row and the argument at fault."""


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics of the next-token distribution at each row: [N], or [B, T] for hidden states [B, T, H].

    float32 (float64 for float64 inputs), each differentiable to hidden states, weight and bias. A forbidden token
    (logit -inf) has probability 0; the log-probability of a forbidden token is -inf.
    """

    logprob: Tensor
    """log p(a) of the given token."""
    normaliser: Tensor
    """logsumexp_j(z_j / T)."""
    entropy: Tensor
    """H = -sum_j p_j log p_j."""
    variance: Tensor
    """Var_p[log p] = sum_j p_j (log p_j + H)^2, in nats squared (varentropy)."""
    collision: Tensor
    """sum_j p_j^2, the chance that two samples agree."""
    max_prob: Tensor
    """max_j p_j. At a tie the gradient goes through one of the maxima."""
    sampled_logit: Tensor
    """z_a of the given token: raw, with bias, before the temperature."""
    self_certainty: Tensor
    """KL(U || p) = logsumexp(z / T) - mean_j z_j / T - log V with U uniform over all V tokens; inf once any token is
    forbidden. UCAS (arXiv 2510.10649, xvolcano02/UCAS) uses this plus log V."""
    cross: Tensor
    """sum_j p_j^2 log p_j."""

    def entropy_change(self, logit_step: Tensor | float) -> Tensor:
        """First-order change of the entropy, when the given token's loss moves all logits.

            l <- l + logit_step (onehot(a) - p),    l = z / T the scaled logits
            dH = -logit_step [p_a (log p_a + H) - sum_k p_k^2 (log p_k + H)]

        This is Omega^full of STEER (arXiv 2510.10150; the paper's Omega keeps the first term only; the full form is
        [inferred] and verified numerically in the card). One ascent step eta on the clipped surrogate with respect to
        the *scaled* logits is logit_step = eta r A, and 0 where the surrogate is clipped. A step on the *raw* logits
        is logit_step = eta r A / T^2. A step on network parameters moves the logits through the Jacobian and is
        neither. Exact to first order; 0 at a uniform p, where any finite step lowers the entropy.
        """
        p_a = self.logprob.exp()
        # a forbidden token has p_a = 0 and log p_a = -inf; the product is 0, also in the gradient
        own = p_a * (self.logprob.masked_fill(p_a == 0, 0.0) + self.entropy)
        return -logit_step * (own - self.cross - self.entropy * self.collision)


_FIELDS = tuple(f.name for f in fields(HeadStatistics))


def head_statistics(
    hidden: Tensor,
    weight_VH: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    live: Tensor | None = None,
    chunk: int | None = None,
    keep_bytes: int | None = None,
    implementation: Implementation = "auto",
) -> HeadStatistics:
    """Statistics of softmax((hidden @ weight^T + bias) / temperature) at the tokens `ids`; see `HeadStatistics`.

    hidden [N, H] or [B, T, H]; weight [V, H]; bias [V], -inf for a forbidden token; ids [N] or [B, T].

    `live` marks the rows whose statistics reach the loss, typically those with nonzero weight: all other rows are
    treated as constants, and no backward runs for them. Rows whose upstream gradient is exactly 0 are left out of the
    backward in any case; naming them beforehand also spares the memory to keep their tiles.
    `chunk`: columns of a vocabulary tile. `keep_bytes`: logits kept for the backward instead of computed twice
    (`KEEP_BYTES`; 0 keeps none). `implementation`: "reference" materialises all logits and leaves the gradient to
    autograd; "torch" and "triton" are tiled; "auto" takes Triton on CUDA, where it is installed.

    Products of 16-bit inputs run in 16 bits on CUDA, with sums, logits and gradient sums in float32; on the CPU they
    run in float32. CUDA autocast is followed.

    Raises ValueError for shapes that disagree, an id outside the vocabulary, a temperature that is not positive, an
    unknown implementation, and for logits that are nan or +inf, naming the first such row and the argument at fault.
    """
    _check(hidden, weight_VH, ids, temperature, bias, live, chunk)
    flat, flat_ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).long()
    flat_live = None if live is None else live.reshape(-1)
    if _resolve(implementation, hidden, weight_VH) == "reference":
        stats = _reference(flat, weight_VH, bias, flat_ids, flat_live, temperature)
    else:
        inputs = (flat, weight_VH) if bias is None else (flat, weight_VH, bias)
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        keep = (KEEP_BYTES if keep_bytes is None else keep_bytes) if needs_gradient else 0
        plan = _plan(implementation, flat, weight_VH, temperature, chunk, keep)
        stats = HeadStatistics(*_Head.apply(flat, weight_VH, bias, flat_ids, flat_live, plan))  # type: ignore[no-untyped-call]
    return HeadStatistics(*(s.reshape(ids.shape) for s in _values(stats)))


def logit_statistics(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> HeadStatistics:
    """The same statistics from logits [..., V] that exist already (small vocabularies), differentiable to the logits.

    Raises ValueError as `head_statistics` does.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected {tuple(logits.shape[:-1])} as the logits")
    _check_ids(ids, logits.shape[-1])
    _check_temperature(temperature)
    flat = logits.reshape(-1, logits.shape[-1])
    stats = _FromLogits.apply(flat, ids.reshape(-1).long(), temperature)  # type: ignore[no-untyped-call]
    return HeadStatistics(*(s.reshape(ids.shape) for s in stats))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would round sums; the products' type is chosen in `_plan`."""
    return torch.autocast(tensor.device.type, enabled=False)


def _values(stats: HeadStatistics) -> tuple[Tensor, ...]:
    return tuple(getattr(stats, name) for name in _FIELDS)


# --- what is asked for


def _check(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    bias: Tensor | None,
    live: Tensor | None,
    chunk: int | None,
) -> None:
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight_VH {tuple(weight.shape)} must be [..., H] and [V, H]"
        )
    if ids.shape != hidden.shape[:-1]:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected {tuple(hidden.shape[:-1])} as the hidden states")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    if live is not None and (live.shape != ids.shape or live.dtype != torch.bool):
        raise ValueError(f"live must be boolean of shape {tuple(ids.shape)}, not {live.dtype} {tuple(live.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 column, not {chunk}")
    _check_temperature(temperature)
    _check_ids(ids, weight.shape[0])


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    if ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"ids must be integers, not {ids.dtype}")
    if ids.numel():
        outside = ((ids < 0) | (ids >= vocabulary)).reshape(-1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(f"ids row {row} is {int(ids.reshape(-1)[row])}, outside the vocabulary of {vocabulary}")


def _resolve(implementation: str, hidden: Tensor, weight: Tensor) -> str:
    """The implementation meant by "auto", after checks."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{implementation}'; {nearest(implementation, IMPLEMENTATIONS)}")
    double = torch.float64 in (hidden.dtype, weight.dtype)
    if implementation == "triton":
        if double:
            raise ValueError("implementation 'triton' is for 32 and 16 bits; use 'torch' for float64")
        if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"implementation 'triton' needs CUDA tensors (here {hidden.device}) or TRITON_INTERPRET=1")
    if implementation != "auto":
        return implementation
    return "triton" if hidden.is_cuda and not double and _has_triton() else "torch"


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


# --- plain autograd


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, live: Tensor | None, temperature: float
) -> HeadStatistics:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with _no_autocast(hidden):
        z = hidden.to(dtype) @ weight.to(dtype).t()
        stats = _reference_from_logits(z if bias is None else z + bias.to(dtype), ids, temperature)
    _raise_if_bad(stats.normaliser, stats.entropy, hidden, weight, bias)
    if live is None:
        return stats
    return HeadStatistics(*(torch.where(live, s, s.detach()) for s in _values(stats)))


def _reference_from_logits(z: Tensor, ids: Tensor, temperature: float) -> HeadStatistics:
    """Every definition written out, for autograd to differentiate: the yardstick of the tiled implementations."""
    scaled = z / temperature
    normaliser = torch.logsumexp(scaled, -1)
    log_p = scaled - normaliser.unsqueeze(-1)
    p = log_p.exp()
    finite = log_p.masked_fill(log_p == float("-inf"), 0.0)  # times p = 0
    entropy = -(p * finite).sum(-1)
    return HeadStatistics(
        logprob=log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        normaliser=normaliser,
        entropy=entropy,
        variance=(p * (finite + entropy.unsqueeze(-1)).square()).sum(-1),
        collision=p.square().sum(-1),
        max_prob=p.max(-1).values if len(p) else p.sum(-1),
        sampled_logit=z.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        self_certainty=normaliser - scaled.mean(-1) - math.log(z.shape[-1]),
        cross=(p.square() * finite).sum(-1),
    )


# --- rows: from partial sums to statistics, and from upstream gradients to coefficients


class RowTerms(NamedTuple):
    """Coefficients of the gradient of a row (see the head of this file), and which of them can be nonzero.

    `matrix` [10, R]: maximum m and log S0, which are subtracted one after the other (their sum, the log-normaliser,
    would be rounded by its own size), then c0, c1, c2, d0, d1, uniform, delta, peak.
    """

    matrix: Tensor
    linear: bool
    square: bool
    collision: bool
    uniform: bool
    peak: bool

    def select(self, rows: Tensor | slice) -> RowTerms:
        return self._replace(matrix=self.matrix[:, rows].contiguous())


class Engine(Protocol):
    """The two kernels on a tile of scaled logits [R, C]."""

    def fold(self, tile: Tensor, local_ids: Tensor, sampled: Tensor) -> Tensor:
        """Partial sums [7, blocks, R] (m, S0, T1, T2, Q0, Q1, U); writes the given tokens' logits into `sampled`.

        `local_ids` [R] are columns of this tile; those outside 0..C-1 belong to another tile.
        """

    def gradient(self, tile: Tensor, local_ids: Tensor, peak_ids: Tensor | None, terms: RowTerms, out: Tensor) -> None:
        """Gradient to the logits into `out` [R, C]; `peak_ids` are the columns of the row maxima, as `local_ids`."""


class _Rows(NamedTuple):
    """Merged statistics of rows, [N] each."""

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    variance: Tensor
    collision: Tensor
    cross: Tensor
    certainty: Tensor
    best_block: Tensor

    def saved(self, dtype: torch.dtype) -> Tensor:
        """What the backward needs, [7, N]."""
        kept = (self.maximum, self.log_sum, self.entropy, self.variance, self.collision, self.cross)
        return torch.stack([*kept, (-self.log_sum).exp()]).to(dtype)


def _merge(partials: Tensor, vocabulary: int) -> _Rows:
    """Partial sums [7, blocks, N] about their own maxima, to statistics. In float64: these are N numbers, not N V."""
    m, s0, t1, t2, q0, q1, u = partials.double()
    top, best = m.max(0)
    # a block of forbidden tokens only has no maximum; its sums are 0 wherever they are moved to
    d = torch.where(s0 == 0, 0.0, top - m).clamp(max=-_FLOOR)
    r = (-d).exp()
    sum_0 = (r * s0).sum(0)
    mean = (r * (t1 - d * s0)).sum(0) / sum_0
    square = (r * (t2 - 2 * d * t1 + d * d * s0)).sum(0) / sum_0
    collision = (r * r * q0).sum(0) / sum_0**2
    log_sum = sum_0.log()
    cross = (r * r * (q1 - d * q0)).sum(0) / sum_0**2 - log_sum * collision
    certainty = top + log_sum - u.sum(0) / vocabulary - math.log(vocabulary)
    variance = (square - mean * mean).clamp_min(0)
    return _Rows(top, log_sum, log_sum - mean, variance, collision, cross, certainty, best)


def _statistics(rows: _Rows, sampled: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The fields of `HeadStatistics` in their order."""
    normaliser = rows.maximum + rows.log_sum
    found = (
        sampled - rows.maximum - rows.log_sum,
        normaliser,
        rows.entropy,
        rows.variance,
        rows.collision,
        (-rows.log_sum).exp(),
        sampled.double() * temperature,
        rows.certainty,
        rows.cross,
    )
    return tuple(x.to(sampled.dtype) for x in found)


def _row_terms(upstream: Sequence[Tensor | None], saved: Tensor, temperature: float, vocabulary: int) -> RowTerms:
    """Upstream gradients [R] by field, and saved statistics [7, R], to coefficients.

    With u = s + H: dlogp_a = delta - p, dlogZ = p, dH = -p u, dV = p (u^2 - V + 2u), dS2 = 2p (p - S2),
    dW = p (2 p s + p - 2W - S2), dp_max = p_max (peak - p), dKL(U||p) = p - 1/V. All over T, but the raw logit.
    """
    maximum, log_sum, h, v, s2, w, p_max = saved
    zero = torch.zeros_like(h)
    g = {name: zero if x is None else x.to(h.dtype) for name, x in zip(_FIELDS, upstream, strict=True)}
    present = {name for name, x in zip(_FIELDS, upstream, strict=True) if x is not None}
    peak = g["max_prob"] * p_max
    c0 = (
        g["normaliser"] - g["logprob"] - g["entropy"] * h + g["variance"] * (h * h - v + 2 * h)
        - 2 * g["collision"] * s2 - g["cross"] * (2 * w + s2) - peak + g["self_certainty"]
    )  # fmt: skip
    c1 = 2 * g["variance"] * (h + 1) - g["entropy"]
    d0 = 2 * g["collision"] + g["cross"]
    uniform = -g["self_certainty"] / vocabulary
    scaled = torch.stack([c0, c1, g["variance"], d0, 2 * g["cross"], uniform, g["logprob"], peak]) / temperature
    scaled[6] += g["sampled_logit"]
    return RowTerms(
        torch.cat([torch.stack([maximum, log_sum]), scaled]),
        linear=bool(present & {"entropy", "variance"}),
        square="variance" in present,
        collision=bool(present & {"collision", "cross"}),
        uniform="self_certainty" in present,
        peak="max_prob" in present,
    )


# --- the tiles in torch


class TorchEngine:
    """Tiles in plain torch, a cacheful of rows at a time, in place."""

    def fold(self, tile: Tensor, local_ids: Tensor, sampled: Tensor) -> Tensor:
        inside, column = _inside(local_ids, tile.shape[1])
        sampled.copy_(torch.where(inside, tile.gather(1, column.unsqueeze(1)).squeeze(1), sampled))
        out = tile.new_empty((7, 1, len(tile)))
        scratch = [tile.new_empty((_block_rows(tile), tile.shape[1])) for _ in range(3)]
        for rows in _spans(len(tile), len(scratch[0])):
            _fold_block(tile[rows], out[:, 0, rows], scratch)
        return out

    def gradient(self, tile: Tensor, local_ids: Tensor, peak_ids: Tensor | None, terms: RowTerms, out: Tensor) -> None:
        same = out.dtype == tile.dtype
        s, spare = (tile.new_empty((_block_rows(tile), tile.shape[1])) for _ in range(2))
        for rows in _spans(len(tile), len(s)):
            n = rows.stop - rows.start
            grad = out[rows] if same else spare[:n]
            _gradient_block(tile[rows], terms, terms.matrix[:, rows].unsqueeze(-1), s[:n], grad)
            _add_columns(grad, local_ids[rows], terms.matrix[8, rows])
            if peak_ids is not None:
                _add_columns(grad, peak_ids[rows], terms.matrix[9, rows])
            if not same:
                out[rows].copy_(grad)


def _fold_block(tile: Tensor, out: Tensor, scratch: Sequence[Tensor]) -> None:
    """Partial sums of one block of rows into `out` [7, R]."""
    y, e, product = (x[: len(tile)] for x in scratch)
    torch.amax(tile, 1, out=out[0])
    torch.sum(tile, 1, out=out[6])
    # the maximum of a block of forbidden tokens is -inf, and -inf - -inf is nan
    torch.sub(tile, out[0].clamp_min(torch.finfo(tile.dtype).min).unsqueeze(1), out=y).clamp_(min=_FLOOR)
    torch.exp(y, out=e)
    torch.mul(e, y, out=product)
    torch.sum(e, 1, out=out[1])
    torch.sum(product, 1, out=out[2])
    out[3] = torch.linalg.vecdot(product, y)
    out[4] = torch.linalg.vecdot(e, e)
    out[5] = torch.linalg.vecdot(e, product)


def _gradient_block(tile: Tensor, terms: RowTerms, columns: Tensor, s: Tensor, grad: Tensor) -> None:
    """Gradient to the logits of one block of rows, but for the single columns, into `grad`; `s` is scratch."""
    maximum, log_sum, c0, c1, c2, d0, d1, uniform = columns[:8]
    torch.sub(tile, maximum, out=s).sub_(log_sum).clamp_(min=_FLOOR)
    p = torch.exp(s, out=grad)
    if terms.collision:
        extra = (s * d1).add_(d0).mul_(p)
    if terms.square:
        s.mul_(s * c2 + c1).add_(c0)
    elif terms.linear:
        s.mul_(c1).add_(c0)
    if terms.collision:
        s = s.add_(extra) if terms.linear else extra.add_(c0)
    elif not terms.linear:
        s = c0
    p.mul_(s)
    if terms.uniform:
        p.add_(uniform)


def _inside(local_ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return (local_ids >= 0) & (local_ids < columns), local_ids.clamp(0, columns - 1)


def _add_columns(grad: Tensor, local_ids: Tensor, value: Tensor) -> None:
    inside, column = _inside(local_ids, grad.shape[1])
    grad.scatter_add_(1, column.unsqueeze(1), torch.where(inside, value, 0.0).unsqueeze(1))


def _block_rows(tile: Tensor) -> int:
    """Rows of a block: what fits the caches on a processor; all rows on other devices."""
    if tile.device.type != "cpu":
        return max(1, len(tile))
    return max(1, min(len(tile), _CACHE_ELEMENTS * torch.get_num_threads() // tile.shape[1]))


def _spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


# --- the products


@dataclass(frozen=True)
class _Plan:
    """How one call is run: tile sizes, number types and the kernels on a tile."""

    temperature: float
    columns: int
    rows: int
    keep_bytes: int
    operand: torch.dtype
    accumulator: torch.dtype
    engine: Engine


def _plan(
    implementation: str, hidden: Tensor, weight: Tensor, temperature: float, chunk: int | None, keep_bytes: int
) -> _Plan:
    kind = hidden.device.type
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    if kind == "cuda" and torch.is_autocast_enabled(kind) and operand != torch.float64:
        operand = torch.get_autocast_dtype(kind)
    accumulator = torch.promote_types(operand, torch.float32)
    if kind == "cpu":  # 16-bit products are slow or rounded there
        operand = accumulator
    engine: Engine = TorchEngine()
    if _resolve(implementation, hidden, weight) == "triton":
        from .head_triton import TritonEngine

        engine = TritonEngine()
    columns = min(chunk or _COLUMNS.get(kind, 8192), max(1, weight.shape[0]))
    return _Plan(temperature, columns, _ROWS.get(kind, 4096), keep_bytes, operand, accumulator, engine)


class _Projection:
    """Tiles of scaled logits, and sums of products in the accumulator's type."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> None:
        self.weight, self.bias, self.plan = weight, bias, plan
        self.hidden = hidden.to(plan.operand)
        self.mixed = plan.operand != plan.accumulator
        # 16-bit hidden states are not rounded again: the product itself is scaled
        self.scaled = self.hidden if self.mixed or plan.temperature == 1 else self.hidden / plan.temperature
        self._scratch: dict[str, Tensor] = {}
        self._span, self._columns = slice(0, 0), weight[:0]

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that is used again for each tile."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=dtype, device=self.hidden.device)
        return self._scratch[name][:size].view(shape)

    def columns(self, span: slice) -> Tensor:
        """Rows `span` of the weight as an operand, [C, H]."""
        if span != self._span:
            self._span, self._columns = span, self.weight[span].to(self.plan.operand)
        return self._columns

    def tile(self, rows: slice | Tensor, span: slice, keep: bool) -> Tensor:
        """Scaled logits [R, C], in memory of their own if `keep`, else in scratch."""
        a, b = self.scaled[rows], self.columns(span).t()
        dtype = self.plan.accumulator
        size = (len(a), b.shape[1])
        out = a.new_empty(size, dtype=dtype) if keep else self.scratch("tile", size, dtype)
        inverse = 1 / self.plan.temperature
        if self.mixed:
            torch.addmm(out, a, b, out_dtype=dtype, beta=0, alpha=inverse, out=out)
        else:
            torch.mm(a, b, out=out)
        if self.bias is not None:
            out.add_(self.bias[span].to(dtype) * inverse)
        return out

    def accumulate(self, into: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        """`into` [.., ..] = a b, plus what it held unless `first`, summed in the accumulator's type."""
        beta = 0 if first else 1
        if self.mixed:
            torch.addmm(into, a, b, out_dtype=into.dtype, beta=beta, out=into)
        elif first:
            torch.mm(a, b, out=into)
        else:
            into.addmm_(a, b)


class _Layout(NamedTuple):
    """Live rows first, in chunks; `order` [N] is None where the rows stay as they are."""

    order: Tensor | None
    live: int
    chunks: tuple[slice, ...]


def _layout(live: Tensor | None, rows: int, size: int) -> _Layout:
    if live is None or bool(live.all()):
        return _Layout(None, rows, tuple(_spans(rows, size)))
    order = torch.cat([live.nonzero().squeeze(1), (~live).nonzero().squeeze(1)])
    count = int(live.sum())
    dead = (slice(count + s.start, count + s.stop) for s in _spans(rows - count, size))
    return _Layout(order, count, (*_spans(count, size), *dead))


class _Head(torch.autograd.Function):
    """Tiled forward and backward; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, live: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layout = _layout(live, len(hidden), plan.rows)
        order = layout.order
        arranged, arranged_ids = (hidden, ids) if order is None else (hidden[order], ids[order])
        projection = _Projection(arranged, weight, bias, plan)
        with _no_autocast(hidden):
            partials, sampled, kept, tile_of_block = _forward_tiles(projection, arranged_ids, layout)
        rows = _merge(partials, weight.shape[0])
        found = torch.stack(_statistics(rows, sampled, plan.temperature))
        if order is not None:
            found = torch.empty_like(found).index_copy_(1, order, found)
        _raise_if_bad(found[1], found[2], hidden, weight, bias)
        saved = rows.saved(sampled.dtype)[:, : layout.live]
        best_tile = tile_of_block[rows.best_block]
        ctx.save_for_backward(hidden, weight, bias, ids, saved, best_tile, order, *kept.values())
        ctx.plan, ctx.layout, ctx.kept = plan, layout, tuple(kept)
        return tuple(x.clone() for x in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, saved, best_tile, order, *kept = ctx.saved_tensors
        plan, layout = ctx.plan, ctx.layout
        if order is not None:
            live = order[: layout.live]
            upstream = tuple(None if g is None else g[live] for g in upstream)
            arranged, ids = hidden[live], ids[live]
        else:
            live, arranged = None, hidden
        terms = _row_terms(upstream, saved, plan.temperature, weight.shape[0])
        work = _Backward(
            projection=_Projection(arranged, weight, bias, plan),
            ids=ids,
            terms=terms,
            best_tile=best_tile,
            parts=_active_parts(upstream, layout, arranged.device),
            kept=dict(zip(ctx.kept, kept, strict=True)),
        )
        with _no_autocast(hidden):
            grads = work.run(*ctx.needs_input_grad[:3])
        return _scatter_rows(grads[0], live, hidden), grads[1], grads[2], None, None, None


def _forward_tiles(
    projection: _Projection, ids: Tensor, layout: _Layout
) -> tuple[Tensor, Tensor, dict[tuple[int, int], Tensor], Tensor]:
    """Partial sums [7, blocks, N], the given tokens' scaled logits [N], kept tiles, and the tile of each block."""
    plan, budget = projection.plan, projection.plan.keep_bytes
    sampled = torch.zeros(len(ids), dtype=plan.accumulator, device=ids.device)
    kept: dict[tuple[int, int], Tensor] = {}
    partials, blocks = [], []
    for t, span in enumerate(_spans(len(projection.weight), plan.columns)):
        parts = [sampled.new_empty((7, 1, 0))]
        for c, rows in enumerate(layout.chunks):
            size = (rows.stop - rows.start) * (span.stop - span.start) * sampled.element_size()
            keep = rows.stop <= layout.live and size <= budget
            tile = projection.tile(rows, span, keep)
            if keep:
                kept[t, c], budget = tile, budget - size
            parts.append(plan.engine.fold(tile, ids[rows] - span.start, sampled[rows]))
        partials.append(torch.cat(parts[1:] or parts, 2))
        blocks += [t] * partials[-1].shape[1]
    return torch.cat(partials, 1), sampled, kept, torch.tensor(blocks, device=ids.device)


def _active_parts(
    upstream: Sequence[Tensor | None], layout: _Layout, device: torch.device
) -> list[tuple[int, slice, Tensor | None]]:
    """Chunks of live rows (number, rows, and those of its rows with an upstream gradient; None for all of them)."""
    chunks = [(c, rows) for c, rows in enumerate(layout.chunks) if rows.stop <= layout.live]
    active = torch.zeros(layout.live, dtype=torch.bool, device=device)
    for g in upstream:
        if g is not None:
            active |= g != 0
    if bool(active.all()):
        return [(c, rows, None) for c, rows in chunks]
    picked = [(c, rows, active[rows].nonzero().squeeze(1)) for c, rows in chunks]
    return [(c, rows, pick) for c, rows, pick in picked if len(pick)]


@dataclass
class _Backward:
    """The backward of one call: vocabulary tiles outside, row chunks inside, so that a tile of dW is done at once."""

    projection: _Projection
    ids: Tensor
    terms: RowTerms
    best_tile: Tensor
    parts: list[tuple[int, slice, Tensor | None]]
    kept: dict[tuple[int, int], Tensor]

    def run(self, for_hidden: bool, for_weight: bool, for_bias: bool) -> tuple[Tensor | None, ...]:
        p = self.projection
        dtype = p.plan.accumulator
        d_hidden = torch.zeros(p.hidden.shape, dtype=dtype, device=p.hidden.device) if for_hidden else None
        d_weight = (torch.empty_like if self.parts else torch.zeros_like)(p.weight) if for_weight else None
        d_bias = torch.zeros_like(p.bias, dtype=dtype) if for_bias and p.bias is not None else None
        parts = [(c, r, pick, self._index(r, pick)) for c, r, pick in self.parts]
        operands = [p.hidden[index] for *_, index in parts]
        terms = [self.terms.select(index) for *_, index in parts]
        # a chunk whose rows are all active is summed in place; advanced indexing makes a copy
        sums = [None if d_hidden is None else d_hidden[index] for *_, index in parts]
        for t, span in enumerate(_spans(len(p.weight), p.plan.columns)):
            for i, (c, _, pick, index) in enumerate(parts):
                grad = self._tile_gradient(t, span, c, pick, index, terms[i])
                if (into := sums[i]) is not None:
                    p.accumulate(into, grad, p.columns(span), first=t == 0)
                if d_weight is not None:
                    self._add_weight(d_weight[span], grad, operands[i], first=i == 0, last=i == len(parts) - 1)
                if d_bias is not None:
                    d_bias[span] += grad.sum(0, dtype=dtype)
        for (*_, index), part in zip(parts, sums, strict=True):
            if d_hidden is not None and part is not None:
                d_hidden[index] = part
        return d_hidden, d_weight, None if d_bias is None or p.bias is None else d_bias.to(p.bias.dtype)

    @staticmethod
    def _index(rows: slice, pick: Tensor | None) -> slice | Tensor:
        return rows if pick is None else pick + rows.start

    def _tile_gradient(
        self, t: int, span: slice, c: int, pick: Tensor | None, index: slice | Tensor, terms: RowTerms
    ) -> Tensor:
        """Gradient to the raw logits of one tile, as an operand of the two products."""
        p = self.projection
        tile = self.kept.get((t, c))
        if tile is None:
            tile = p.tile(index, span, keep=False)
        elif pick is not None:
            tile = tile[pick]
        out = p.scratch("gradient", tuple(tile.shape), p.plan.operand)
        peak = None
        if terms.peak:
            peak = torch.where(self.best_tile[index] == t, tile.argmax(1), -1)
        p.plan.engine.gradient(tile, self.ids[index] - span.start, peak, terms, out)
        return out

    def _add_weight(self, into: Tensor, grad: Tensor, hidden: Tensor, first: bool, last: bool) -> None:
        """One chunk's share of a tile of dW, summed in the accumulator's type and rounded once at the end."""
        p = self.projection
        exact = into.dtype == p.plan.accumulator
        total = into if exact else p.scratch("weight", tuple(into.shape), p.plan.accumulator)
        p.accumulate(total, grad.t(), hidden, first)
        if last and not exact:
            into.copy_(total)


def _scatter_rows(grad: Tensor | None, rows: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Gradient of the live rows to the place of each in the gradient of all; the others get 0."""
    if grad is None or rows is None:
        return None if grad is None else grad.to(hidden.dtype)
    return torch.zeros_like(hidden).index_copy_(0, rows, grad.to(hidden.dtype))


class _FromLogits(torch.autograd.Function):
    """The same sums and coefficients on logits that exist: the vocabulary is one tile."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        tile = _scale(logits, temperature)
        sampled = torch.zeros(len(ids), dtype=tile.dtype, device=ids.device)
        with _no_autocast(logits):
            rows = _merge(TorchEngine().fold(tile, ids, sampled), tile.shape[1])
        found = torch.stack(_statistics(rows, sampled, temperature))
        _raise_if_bad(found[1], found[2])
        ctx.save_for_backward(logits, ids, rows.saved(sampled.dtype))
        ctx.temperature = temperature
        return tuple(x.clone() for x in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, ids, saved = ctx.saved_tensors
        tile = _scale(logits, ctx.temperature)
        terms = _row_terms(upstream, saved, ctx.temperature, tile.shape[1])
        out = torch.empty_like(logits)
        TorchEngine().gradient(tile, ids, tile.argmax(1) if terms.peak else None, terms, out)
        return out, None, None


def _scale(logits: Tensor, temperature: float) -> Tensor:
    tile = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return tile if temperature == 1 else tile / temperature


def _raise_if_bad(
    normaliser: Tensor,
    entropy: Tensor,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """ValueError for the first row without a distribution, naming the argument that is to blame."""
    bad = ~(torch.isfinite(normaliser) & torch.isfinite(entropy))
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    if hidden is None or weight is None:
        raise NotFinite(f"row {row} of the logits holds nan or +inf, or forbids every token")
    if not bool(torch.isfinite(hidden[row]).all()):
        raise NotFinite(f"row {row} has no distribution: hidden is not finite there")
    tokens = (~torch.isfinite(weight).all(1)).nonzero()
    if len(tokens):
        raise NotFinite(f"row {row} has no distribution: weight is not finite (first at token {int(tokens[0])})")
    if bias is not None:
        tokens = (torch.isnan(bias) | (bias == float("inf"))).nonzero()
        if len(tokens):
            raise NotFinite(f"row {row} has no distribution: bias is not finite (first at token {int(tokens[0])})")
        if bool((bias == float("-inf")).all()):
            raise NotFinite(f"row {row} has no distribution: bias forbids every token")
    raise NotFinite(f"row {row} has no distribution: the product of hidden and weight overflows")
