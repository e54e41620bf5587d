"""pass@k and its relatives, from counts of correct samples per problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pass_at_k(samples: int, correct: Sequence[int] | NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Unbiased pass@k of each problem (Chen et al., arXiv 2107.03374): 1 - C(n - c, k) / C(n, k).

    `samples` is n, drawn per problem; `correct` holds c per problem. The estimate is the share of size-k subsets of
    the n samples that hold a correct one. Raises ValueError unless 1 <= k <= n and every c lies in 0..n.
    """
    c = np.asarray(correct, dtype=float)
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples per problem and k >= 1; there are {samples}")
    if len(c) and (c.min() < 0 or c.max() > samples):
        raise ValueError(f"correct counts must lie in 0..{samples}")
    # C(n-c, k) / C(n, k) as a product of k factors, so that nothing overflows
    factors = (samples - c[:, None] - np.arange(k)) / (samples - np.arange(k))
    return np.asarray(1.0 - np.clip(factors, 0.0, None).prod(1))
