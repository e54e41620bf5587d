r"""Spectrum of a model's last-token states: RankMe, spectral entropy, alpha-ReQ, phases (arXiv 2509.23024).

F [M, d] holds one state per text: the last layer's hidden state after the final norm at the last token that is not
padding. With singular values s_i of the centred F and lambda_i = s_i^2, largest first,

    p_i = lambda_i / sum_j lambda_j          RankMe = exp(-sum_i p_i ln p_i), 1 <= RankMe <= min(M - 1, d)
    spectral entropy = ln RankMe             participation ratio = (sum lambda)^2 / sum lambda^2
    alpha-ReQ: minimise sum_i (1/i) (ln lambda_i - c + alpha ln i)^2 over ranks i = 12 .. 100

**Two works call two numbers RankMe.** Here, and in melodylizx/Tracing-the-representation-geometry-of-language-models
@ c9b6f82, p comes from eigenvalues of the centred covariance; in the original (Garrido et al., 2023) from singular
values of F as it is. `rankme` takes any spectrum, and `Geometry` names each.

- The release adds 1e-7 to every p without normalising again (`eps`), keeps the 2048 largest eigenvalues, and fits ln of
  ratios to the *total* variance. It shifts the array of ranks that it is given by one at every call; nothing is
  shifted here.
- **alpha says nothing outside its ranks.** A spectrum that lacks them has alpha None, with the reason. `small_ranks`
  are ranks for a narrow model [inferred]; values of alpha over different ranks cannot be compared, and `phases` refuses
  to.
- At most M - 1 eigenvalues of M rows are not zero: take M >= 10 d. Constant states, and a single row, have no spectrum:
  every figure is None, with the reason; the uncentred RankMe of constant states is 1, but for `eps`.
- Half precision has a floor near 1e-6 that flattens alpha: run the forward pass in float32. Natural logarithms.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.rollout import pad
from ..errors import UserError

PUBLISHED_RANKS = (12, 100)
MOST_EIGENVALUES = 2048
EPS = 1e-7
R2_UNTIL = 500
"""Last rank of the release's R^2; ten fewer than the eigenvalues where there are no more than so many."""

Phase = Literal["entropy-seeking", "compression-seeking", "mixed"]


def small_ranks(width: int) -> tuple[int, int]:
    """First and last rank of a fit for a model of width d: max(2, ceil(0.05 d)) to floor(0.5 d). [inferred]"""
    return max(2, math.ceil(0.05 * width)), width // 2


# -------------------------------------------------------------------------------------------------------- the spectrum


def singular_values(activations_Md: Tensor, centred: bool = True) -> Tensor:
    """Singular values [min(M, d)] in float64, largest first; those within rounding of 0 are 0.

    Raises ValueError unless the activations are a matrix with at least one row and column, FloatingPointError where
    they are not finite.
    """
    if activations_Md.ndim != 2 or not activations_Md.numel():
        raise ValueError(f"activations must be [rows, width] and not empty, not {tuple(activations_Md.shape)}")
    f = activations_Md.detach().double()
    if not bool(f.isfinite().all()):
        raise FloatingPointError("the activations hold nan or infinity, so they have no spectrum")
    # relative to the states before centring: what is left of constant ones is rounding of their mean
    floor = max(f.shape) * torch.finfo(f.dtype).eps * float(f.norm())
    s: Tensor = torch.linalg.svdvals(f - f.mean(0) if centred else f)
    return torch.where(s > floor, s, 0.0)


def eigenspectrum(activations_Md: Tensor, most: int | None = MOST_EIGENVALUES) -> Tensor:
    """Covariance eigenvalues as shares of the total variance, largest first, at most `most` of them.

    Empty where there is no variance: constant rows, or one row. Raises as `singular_values` does.
    """
    return _shares(singular_values(activations_Md), most)


def _shares(singular: Tensor, most: int | None) -> Tensor:
    values = singular.square()
    total = values.sum()
    return (values / total)[:most] if float(total) > 0 else values[:0]


def spectral_entropy(spectrum: Tensor, eps: float = 0.0) -> float | None:
    """-sum p ln p in nats with p = spectrum / sum + eps, not normalised again; None for a spectrum without mass.

    Of covariance eigenvalues it is the von Neumann entropy of the covariance with unit trace. Raises ValueError for a
    negative value.
    """
    if spectrum.numel() and float(spectrum.min()) < 0:
        raise ValueError("a spectrum has no negative values")
    total = float(spectrum.sum())
    if not total > 0:
        return None
    p = spectrum / total + eps
    return float(-torch.special.xlogy(p, p).sum()) + 0.0


def rankme(spectrum: Tensor, eps: float = EPS) -> float | None:
    """exp of `spectral_entropy`: how many directions of equal share would be as even. None where that is.

    Give eigenvalues for this paper's RankMe, `singular_values(F, centred=False)` for the original one.
    """
    entropy = spectral_entropy(spectrum, eps)
    return None if entropy is None else math.exp(entropy)


def participation_ratio(spectrum: Tensor) -> float | None:
    """(sum lambda)^2 / sum lambda^2, which one massive direction brings to 1; None for a spectrum without mass."""
    square = float(spectrum.square().sum())
    return float(spectrum.sum()) ** 2 / square if square > 0 else None


# ------------------------------------------------------------------------------------------------------- the power law


@dataclass(frozen=True)
class PowerLaw:
    """ln lambda_i = intercept - alpha ln i, and the ranks, first and last, that it was fitted on and is valid for.

    `r2` as the release takes it, on ln lambda from the rank after `ranks[0]` to the 500th or the last but ten, which is
    another stretch than that of the fit; `r2_100` to rank 100; `r2_fit` on the fitted ranks. Undefined figures are
    None, and `reason` says why there is no fit.
    """

    ranks: tuple[int, int]
    weighted: bool = True
    alpha: float | None = None
    intercept: float | None = None
    r2: float | None = None
    r2_100: float | None = None
    r2_fit: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        where = f"ranks {self.ranks[0]}-{self.ranks[1]}"
        if self.alpha is None or self.r2_fit is None:
            return f"alpha undefined over {where}: {self.reason}"
        return f"alpha {self.alpha:.3f} over {where}, R^2 {self.r2_fit:.3f} there"

    def at(self, ranks: Tensor) -> Tensor:
        """lambda of the fitted law at these ranks; nan without a fit."""
        if self.alpha is None or self.intercept is None:
            return torch.full_like(ranks, math.nan, dtype=torch.float64)
        return (self.intercept - self.alpha * ranks.double().log()).exp()


def alpha_req(spectrum: Tensor, ranks: tuple[int, int] = PUBLISHED_RANKS, weighted: bool = True) -> PowerLaw:
    """Fit the power law on ranks first..last, counted from 1, with weights 1/i, or unweighted.

    alpha is None where the spectrum has fewer eigenvalues than `ranks` asks for, or one of them is zero. Raises
    ValueError unless 1 <= first < last.
    """
    first, last = ranks
    if not 1 <= first < last:
        raise ValueError(f"ranks must be 1 <= first < last, not {first} to {last}")
    lam = spectrum.double()
    if len(lam) < last:
        reason = f"the fit needs eigenvalues {first} to {last}, and there are {len(lam)}"
        return PowerLaw(ranks, weighted, reason=reason)
    inside = lam[first - 1 : last]
    if float(inside.min()) <= 0:
        reason = f"only {int((lam > 0).sum())} eigenvalues are above zero, and the fit needs those up to {last}"
        return PowerLaw(ranks, weighted, reason=reason)
    i = torch.arange(first, last + 1, dtype=torch.float64)
    w = 1 / i if weighted else torch.ones_like(i)
    x, y = i.log(), inside.log()
    mean_x, mean_y = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x).square()).sum()
    line = PowerLaw(ranks, weighted, alpha=-float(slope), intercept=float(mean_y - slope * mean_x))
    until = R2_UNTIL if len(lam) > R2_UNTIL else len(lam) - 10
    found = (_r2(lam, line, first, until), _r2(lam, line, first, min(100, len(lam))), _r2(lam, line, first - 1, last))
    return PowerLaw(ranks, weighted, line.alpha, line.intercept, *found)


def _r2(lam: Tensor, line: PowerLaw, start: int, stop: int) -> float | None:
    """R^2 of ln lambda over zero-based places start..stop - 1; None for fewer than two, a zero, or no spread."""
    part = lam[start : max(stop, start)]
    if len(part) < 2 or float(part.min()) <= 0:
        return None
    y, fitted = part.log(), line.at(torch.arange(start + 1, start + 1 + len(part))).log()
    spread = float((y - y.mean()).square().sum())
    return 1 - float((y - fitted).square().sum()) / spread if spread > 0 else None


# ---------------------------------------------------------------------------------------------------- all of it at once


@dataclass(frozen=True)
class Geometry:
    """Figures of one matrix of states [rows, width]. None is undefined, and `reason` says why."""

    rows: int
    width: int
    rankme: float | None
    """From covariance eigenvalues, with the release's `eps`."""
    spectral_entropy: float | None
    """ln RankMe in nats, exactly, without `eps`."""
    rankme_singular: float | None
    """From singular values of the centred states."""
    rankme_uncentred: float | None
    """From singular values of the states as they are: RankMe of Garrido et al."""
    participation_ratio: float | None
    power_law: PowerLaw
    reason: str | None = None

    @property
    def most(self) -> int:
        """The largest RankMe that so many rows of this width can have."""
        return min(self.rows - 1, self.width)


def geometry(
    activations_Md: Tensor,
    ranks: tuple[int, int] = PUBLISHED_RANKS,
    eps: float = EPS,
    most: int | None = MOST_EIGENVALUES,
) -> Geometry:
    """Every figure of a matrix of states; raises as `singular_values` and `alpha_req` do.

    Fewer than ten rows per dimension are measured, but RankMe then grows with the rows.
    """
    rows, width = activations_Md.shape if activations_Md.ndim == 2 else (0, 0)
    values, raw = singular_values(activations_Md), singular_values(activations_Md, centred=False)
    spectrum = _shares(values, most)
    reason = None
    if not len(spectrum):
        reason = "one row has no variance" if rows == 1 else "the rows are constant, so they have no variance"
    return Geometry(
        rows=rows,
        width=width,
        rankme=rankme(spectrum, eps),
        spectral_entropy=spectral_entropy(spectrum),
        rankme_singular=rankme(values, eps),
        rankme_uncentred=rankme(raw, eps),
        participation_ratio=participation_ratio(spectrum),
        power_law=alpha_req(spectrum, ranks),
        reason=reason,
    )


def phases(rankmes: Sequence[float | None], laws: Sequence[PowerLaw]) -> list[Phase | None]:
    """The phase between each two checkpoints, from the signs of change after a running median of three. [inferred]

    RankMe up and alpha down is entropy-seeking, RankMe down and alpha up compression-seeking, all else mixed; the two
    ends are not smoothed. None where a figure is undefined. What the paper calls warm-up is a first fall of RankMe, and
    gets no label of its own. Raises ValueError for unequal lengths or fits over different ranks or weights.
    """
    if len(rankmes) != len(laws):
        raise ValueError(f"{len(rankmes)} values of RankMe and {len(laws)} fits")
    if len({(law.ranks, law.weighted) for law in laws}) > 1:
        raise ValueError("alpha was fitted over different ranks or weights, and such values cannot be compared")
    both = zip(_smooth(rankmes), _smooth([law.alpha for law in laws]), strict=True)
    return [_phase(old, new) for old, new in pairwise(both)]


Pair = tuple[float | None, float | None]


def _phase(old: Pair, new: Pair) -> Phase | None:
    if old[0] is None or old[1] is None or new[0] is None or new[1] is None:
        return None
    rank, alpha = new[0] - old[0], new[1] - old[1]
    if rank > 0 > alpha:
        return "entropy-seeking"
    return "compression-seeking" if rank < 0 < alpha else "mixed"


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """Median of each value and its neighbours; ends, and neighbours of what is undefined, stay as they are."""
    out = list(values)
    for i in range(1, len(values) - 1):
        near = [v for v in values[i - 1 : i + 2] if v is not None]
        if len(near) == 3:
            out[i] = sorted(near)[1]
    return out


# ------------------------------------------------------------------------------------------------------------ subspaces


@dataclass(frozen=True)
class Subspace:
    """Mean [d] of states, and their principal directions [d, r], by falling variance."""

    mean: Tensor
    directions: Tensor

    def keep(self, hidden: Tensor, k: int) -> Tensor:
        """States [..., d] projected on the mean and the first k directions. Raises ValueError for k outside 0..r."""
        return self.mean.to(hidden) + self._part(hidden, k)

    def remove(self, hidden: Tensor, k: int) -> Tensor:
        """States [..., d] without what lies along the first k directions from the mean; `keep` is the rest."""
        return hidden - self._part(hidden, k)

    def _part(self, hidden: Tensor, k: int) -> Tensor:
        if not 0 <= k <= self.directions.shape[1]:
            raise ValueError(f"k must lie in 0..{self.directions.shape[1]}, not {k}")
        v = self.directions[:, :k].to(hidden)
        return (hidden - self.mean.to(hidden)) @ v @ v.T


def principal_subspace(activations_Md: Tensor) -> Subspace:
    """Mean and principal directions of the states, in float64; the paper leaves open whether the mean is moved, and
    here it never is [inferred]."""
    f = activations_Md.detach().double()
    mean = f.mean(0)
    return Subspace(mean, torch.linalg.svd(f - mean, full_matrices=False).Vh.T)


@contextmanager
def changed_states(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the model's head reads `change(states)` in place of its post-norm states [B, S, d], in generation too.

    With `Subspace.keep` or `.remove` of the same model's states it is the paper's subspace test.
    """

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    handle = model.get_decoder().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------- states of a model


def at_last_token(hidden_BSd: Tensor, mask_BS: Tensor) -> Tensor:
    """The state [B, d] at each row's last token that is not padding, whichever side the padding is on.

    Raises ValueError for a row that is all padding.
    """
    mask = mask_BS.bool()
    if not bool(mask.any(1).all()):
        raise ValueError("a row is all padding, so it has no last token")
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = place.masked_fill(~mask, -1).amax(1)
    return hidden_BSd[torch.arange(len(mask), device=mask.device), last]


@torch.no_grad()
def last_token_states(
    model: Any, sequences: Sequence[Sequence[int]], *, rows: int = 32, max_tokens: int | None = 512, left: bool = False
) -> Tensor:
    """Post-norm states [M, d] in float32 on the CPU at the last token of each sequence of token ids.

    For any causal language model of transformers. `rows` sequences at a time, cut after `max_tokens`; besides the
    result, memory holds the states of one pass, and no logits. `left` pads on the left; both sides give the same
    states, because positions count tokens only. Dropout is off. Raises UserError for no sequence, an empty one, or a
    model that names no decoder.
    """
    if not sequences or min(map(len, sequences)) < 1:
        raise UserError("sequences must hold at least one text, and each text at least one token")
    if not hasattr(model, "get_decoder"):
        raise UserError(f"{type(model).__name__} names no decoder (get_decoder), so its last states cannot be read")
    decoder, training = model.get_decoder(), model.training
    model.eval()
    try:
        parts = [
            _states(decoder, [s[:max_tokens] for s in sequences[i : i + rows]], left)
            for i in range(0, len(sequences), rows)
        ]
    finally:
        model.train(training)
    return torch.cat(parts)


def _states(decoder: Any, sequences: Sequence[Sequence[int]], left: bool) -> Tensor:
    device = next(decoder.parameters()).device
    ids = pad(sequences, 0, torch.long, left=left).to(device)  # which word stands under the mask plays no part
    mask = pad([[1] * len(s) for s in sequences], 0, torch.long, left=left).to(device)
    inputs = {"use_cache": False, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    # models that take positions from the mask, or have none, know no such argument
    known = inspect.signature(decoder.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    hidden = decoder(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
    return at_last_token(hidden, mask).float().cpu()


def text_states(model: Any, tokenizer: Any, texts: Sequence[str], **settings: Any) -> Tensor:
    """`last_token_states` of texts; the tokenizer needs no padding token."""
    return last_token_states(model, [tokenizer(text)["input_ids"] for text in texts], **settings)
