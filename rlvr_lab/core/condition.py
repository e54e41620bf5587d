r"""Condition numbers of weight matrices, and what they are by chance.

    kappa(W) = s_1 / s_r        s_1 >= ... >= s_r: singular values of W [m, n], r = min(m, n)

Three ways to s_r differ in what they resolve (`benchmarks/kappa_scan.py` measures them): singular values in float32
lose kappa above about 1e5; eigenvalues of the Gram matrix in float64 square kappa, so that the relative error is about
1e-16 kappa^2; singular values in float64 are good to 1e15. Here the Gram matrix comes first, because it needs n x n
numbers however long the matrix is, and where it finds kappa above 1e4 a QR decomposition by blocks of rows decides.

Kappa depends on the shape whether or not anything was learned: a Gaussian 64 x 64 matrix has a median of about 230, a
64 x 256 matrix of 2.9. `gaussian_median` gives the figure of any shape without making a matrix of it: Householder steps
turn a Gaussian matrix into a bidiagonal one of independent chi variables with the same singular values (Golub and
Kahan; Dumitriu and Edelman), whose ends a Sturm count finds by bisection.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FLOAT32_SPACING = float(torch.finfo(torch.float32).eps)
BLOCK = 1 << 21
"""Numbers of a matrix that are held in float64 at once."""
DIRECT = 1 << 16
"""Numbers of a matrix up to which singular values are computed at once."""
GRAM_LIMIT = 1e4
"""Kappa up to which the Gram matrix is trusted; its relative error is then below 1e-6."""
POINTS = 16


def extreme_singular_values(weight_MN: Tensor) -> tuple[float, float]:
    """Largest and smallest singular value of a matrix of any floating type, in float64 and bounded memory.

    (nan, nan) where an entry is not finite. Raises ValueError for what is no matrix, or an empty one.
    """
    if weight_MN.ndim != 2 or not weight_MN.numel():
        raise ValueError(f"a condition number needs a matrix with entries, not shape {tuple(weight_MN.shape)}")
    weight_MN = weight_MN.detach()
    tall = weight_MN if weight_MN.shape[0] >= weight_MN.shape[1] else weight_MN.T
    if not bool(torch.isfinite(weight_MN).all()):
        return math.nan, math.nan
    if tall.numel() > DIRECT:
        high, low = _by_gram(tall)
        if high < GRAM_LIMIT * low:
            return high, low
    values = torch.linalg.svdvals(_triangle(tall))
    return float(values[0]), float(values[-1])


def _blocks(tall: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tall, max(BLOCK // tall.shape[1], tall.shape[1]))


def _by_gram(tall: Tensor) -> tuple[float, float]:
    """Square roots of the ends of the spectrum of W^T W; 0 where rounding made an eigenvalue negative."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for block in _blocks(tall):
        wide = block.to(torch.float64)
        gram.addmm_(wide.T, wide)
    values = torch.linalg.eigvalsh(gram)
    return math.sqrt(max(float(values[-1]), 0.0)), math.sqrt(max(float(values[0]), 0.0))


def _triangle(tall: Tensor) -> Tensor:
    """A float64 matrix with the same singular values and at most as many rows as a block: R of QR, block by block."""
    first, *others = _blocks(tall)
    found = first.to(torch.float64)
    for block in others:
        stacked = torch.cat([found, block.to(torch.float64)])
        found = torch.linalg.qr(stacked, mode="r").R
    return found


def condition_number(weight_MN: Tensor, eps: float = FLOAT32_SPACING, added: float = 0.0) -> float:
    """s_1 / (s_r + added), inf where s_r <= eps s_1: nothing is resolved below the spacing of the numbers.

    A zero matrix is inf without `added`, and 0 with it. nan where an entry is not finite. Raises ValueError for what is
    no matrix. `eps` 0 keeps the rounding noise of a matrix that lacks a direction, a huge number without meaning.
    """
    high, low = extreme_singular_values(weight_MN)
    if added > 0:
        return high / (low + added)
    if math.isnan(high):
        return math.nan
    return math.inf if low <= eps * high else high / low


def live_shape(weight_MN: Tensor) -> tuple[int, int]:
    """Rows and columns that hold something else than zeros: padding adds to a shape, and not to its spectrum."""
    filled = weight_MN.detach() != 0
    return int(filled.any(1).sum()), int(filled.any(0).sum())


@lru_cache(maxsize=4096)
def gaussian_median(rows: int, columns: int, draws: int = 1001, seed: int = 0) -> float:
    """Median kappa over `draws` matrices [rows, columns] of independent Gaussian numbers; nan without an entry.

    Transposes share their figure. Its sampling error is about 5 % for a square matrix, whose kappa has a heavy tail,
    and below 1 % from 2 : 1 on.
    """
    m, n = max(rows, columns), min(rows, columns)
    if n <= 1:
        return 1.0 if n == 1 else math.nan
    rng = np.random.default_rng([seed, m, n])
    diagonal = np.sqrt(rng.chisquare(np.arange(m, m - n, -1), (draws, n)))
    beside = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1), (draws, n - 1)))
    squares = np.empty((2 * n - 1, draws, 1))
    squares[0::2, :, 0], squares[1::2, :, 0] = diagonal.T**2, beside.T**2
    longest = diagonal[:, 0] + beside[:, 0] + math.sqrt(2 * m)  # a start; widened where it is too short
    high = _singular_value(squares, 2 * n, diagonal[:, 0], longest)
    low = _singular_value(squares, n + 1, 1e-12 * diagonal[:, -1], diagonal[:, -1])
    return float(np.median(high / low))


def _singular_value(squares: np.ndarray, count: int, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The point of each draw between `below` and `above` where `count` eigenvalues lie left of it, to 1e-6 of itself.

    `squares` [2n - 1, draws, 1]: squared off-diagonals of the tridiagonal matrix with zero diagonal whose eigenvalues
    are plus and minus the singular values. Every sweep cuts the interval, on a logarithmic scale, into `POINTS` + 1
    pieces.
    """
    while bool((short := _left_of(squares, above[:, None])[:, 0] < count).any()):
        above = np.where(short, 2 * above, above)
    left, right = np.log(below), np.log(above)
    share = np.arange(1, POINTS + 1) / (POINTS + 1)
    while float((right - left).max()) > 1e-6:
        grid = left[:, None] + (right - left)[:, None] * share
        few = (_left_of(squares, np.exp(grid)) < count).sum(1)
        edges = np.concatenate([left[:, None], grid, right[:, None]], 1)
        left, right = (np.take_along_axis(edges, (few + i)[:, None], 1)[:, 0] for i in (0, 1))
    middle: np.ndarray = np.exp((left + right) / 2)
    return middle


def _left_of(squares: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Number of eigenvalues below each x [draws, points]: signs of the pivots of T - x I."""
    pivot = -x
    count = (pivot < 0).astype(np.int64)
    with np.errstate(divide="ignore"):
        for square in squares:
            pivot = -x - square / pivot
            count += pivot < 0
    return count
