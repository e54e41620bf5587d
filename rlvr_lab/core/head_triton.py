"""The two kernels on a tile of logits in Triton (see `head`). Imported only where they are used.

The products stay with cuBLAS, on tensor cores; each kernel reads a float32 tile once. A program holds one row of one
block of columns in registers, so that its maximum and its sums need one visit, and blocks are merged later.
"""

# torch and triton are imported before the annotations below are read; triton needs them evaluated
from typing import Protocol

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

BLOCK = 4096
"""Columns of a block: 32 per thread."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _fold_kernel(tile, tile_stride, ids, out, sampled, rows, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    start = tile + row * tile_stride
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logit = tl.load(start + column, mask=inside, other=-float("inf"))
    top = tl.max(logit, 0)
    # a block of forbidden tokens has no maximum; nan must stay nan, so the floor is set by equality, not by `maximum`
    shift = tl.where(top == -float("inf"), 0.0, top)
    y = tl.where(logit == -float("inf"), -1.0e4, logit - shift)
    e = tl.where(inside, tl.exp(y), 0.0)
    e_y = e * y
    blocks = tl.num_programs(1)
    to = out + block * rows + row
    step = blocks.to(tl.int64) * rows
    tl.store(to, top)
    tl.store(to + step, tl.sum(e, 0))
    tl.store(to + 2 * step, tl.sum(e_y, 0))
    tl.store(to + 3 * step, tl.sum(e_y * y, 0))
    tl.store(to + 4 * step, tl.sum(e * e, 0))
    tl.store(to + 5 * step, tl.sum(e * e_y, 0))
    tl.store(to + 6 * step, tl.sum(tl.where(inside, logit, 0.0), 0))
    own = tl.load(ids + row)
    if (own >= block * BLOCK) & (own < tl.minimum((block + 1) * BLOCK, columns)):
        tl.store(sampled + row, tl.load(start + own))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    tile, tile_stride, ids, peak_ids, terms, out, out_stride, rows, columns, HAS_PEAK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    logit = tl.load(tile + row * tile_stride + column, mask=inside, other=-float("inf"))
    at = terms + row
    log_p = tl.where(logit == -float("inf"), -1.0e4, logit - tl.load(at) - tl.load(at + rows))
    p = tl.exp(log_p)
    c0 = tl.load(at + 2 * rows)
    c1 = tl.load(at + 3 * rows)
    c2 = tl.load(at + 4 * rows)
    d0 = tl.load(at + 5 * rows)
    d1 = tl.load(at + 6 * rows)
    grad = p * (c0 + log_p * (c1 + log_p * c2) + p * (d0 + log_p * d1)) + tl.load(at + 7 * rows)
    grad += tl.where(column == tl.load(ids + row), tl.load(at + 8 * rows), 0.0)
    if HAS_PEAK:
        grad += tl.where(column == tl.load(peak_ids + row), tl.load(at + 9 * rows), 0.0)
    tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), mask=inside)


class Terms(Protocol):
    """`head.RowTerms`, of which the kernels read the matrix only; importing it would close a circle."""

    @property
    def matrix(self) -> Tensor: ...


class TritonEngine:
    """The kernels of `head.Engine` on CUDA tensors (or in Triton's interpreter)."""

    def fold(self, tile: Tensor, local_ids: Tensor, sampled: Tensor) -> Tensor:
        rows, columns = tile.shape
        blocks = triton.cdiv(columns, BLOCK)
        out = torch.empty((7, blocks, rows), dtype=torch.float32, device=tile.device)
        if rows:
            _fold_kernel[(rows, blocks)](
                tile, tile.stride(0), local_ids.contiguous(), out, sampled, rows, columns, BLOCK=BLOCK, num_warps=4
            )
        return out

    def gradient(self, tile: Tensor, local_ids: Tensor, peak_ids: Tensor | None, terms: Terms, out: Tensor) -> None:
        rows, columns = tile.shape
        if not rows:
            return
        block = min(1024, triton.next_power_of_2(columns))
        _gradient_kernel[(rows, triton.cdiv(columns, block))](
            tile,
            tile.stride(0),
            local_ids.contiguous(),
            local_ids if peak_ids is None else peak_ids.contiguous(),
            terms.matrix,
            out,
            out.stride(0),
            rows,
            columns,
            HAS_PEAK=peak_ids is not None,
            BLOCK=block,
            num_warps=4,
        )
