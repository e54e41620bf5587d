r"""The entropy ledger: what an update is predicted to do to entropy, by token class and by method, and what it did.

**Prediction.** Every token t gets a first-order entropy change Omega_t at its own state (core.dynamics), in units of a
*unit logit step*: as if the update moved the logits of that state by exactly c_t (1[k = a] - p_k). The ledger books
means over all N tokens of the update, (1/N) sum_t w_t Omega_t, so classes and methods add up to the total.

**Classes.** Advantage sign x whether the sampled token was likelier than typical, log p_a > -H:

| class | first-order effect of the sampled logit |
|---|---|
| `positive_likely` | entropy falls (a likely token is made likelier) |
| `positive_unlikely` | entropy rises |
| `negative_likely` | entropy rises |
| `negative_unlikely` | entropy falls |
| `none` | zero advantage: no effect of the surrogate |

That is the sign of the sampled-logit estimate (STEER, arXiv 2510.10150). The full estimate also moves the other logits
and can differ in sign on single tokens; the ledger books whatever it is given.

**Gain.** A network shares parameters and Adam rescales every gradient by its own history, so the true step is neither
a unit step nor known: only the shape of the prediction is theory. The gain g is the least-squares scale from predicted
to measured through the origin, g = sum p m / sum p^2, over a window of *earlier* updates; the residual of an update is
m - g p, a forecast error, not a fit error.

**Own states and probe.** `measured_own` is the change of the entropy re-measured on the very tokens that the update
was computed from; `measured_probe` the change on held-out responses that no update has seen. They differ: in the
prototype (research/tiny_lab.md, one seed) gradient-based predictions tracked the own states (r = 0.91) and their sum
was 2.7 times the change on fresh rollouts, because an update lowers entropy more where it was computed. The gain is
therefore fitted to the own states, and the probe is booked beside it, never used as a target.

Arithmetic only: no model, no tensors in the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CLASSES = ("positive_likely", "positive_unlikely", "negative_likely", "negative_unlikely", "none")
BARE, INTERACTION = "bare", "interaction"


def token_classes(advantage_BT: Tensor, logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Index into CLASSES of every token [B, T] (long), -1 outside the mask.

    `logprob_BT` and `entropy_BT` belong to one policy, the one that is updated. A token exactly as likely as typical
    (log p = -H) counts as not likelier.
    """
    likely = logprob_BT > -entropy_BT
    index = 2 * (advantage_BT < 0).long() + (~likely).long()
    index = index.masked_fill(advantage_BT == 0, CLASSES.index("none"))
    return index.masked_fill(~mask_BT, -1)


def by_class(change_BT: Tensor, classes_BT: Tensor) -> dict[str, float]:
    """Predicted change by class: sum over the class's tokens divided by *all* marked tokens, so the values add up to
    the total. 0 for a class without tokens (nothing was moved there); nan for every class where no token is marked."""
    marked = classes_BT >= 0
    tokens = int(marked.sum())
    sums = torch.zeros(len(CLASSES), dtype=torch.float64, device=change_BT.device)
    sums = sums.index_add(0, classes_BT[marked], change_BT[marked].double())
    return {name: value / tokens if tokens else math.nan for name, value in zip(CLASSES, sums.tolist(), strict=True)}


def class_shares(classes_BT: Tensor) -> dict[str, float]:
    """Share of the marked tokens in each class; nan where no token is marked."""
    marked = classes_BT[classes_BT >= 0]
    counts = torch.bincount(marked, minlength=len(CLASSES)).tolist()
    return {name: n / len(marked) if len(marked) else math.nan for name, n in zip(CLASSES, counts, strict=True)}


def by_method(
    change_BT: Tensor,
    mask_BT: Tensor,
    weights: Mapping[str, Tensor],
    terms: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Contribution of each method: prediction with all of them minus prediction without that one (per-token means).

    `change_BT` is the change by the bare surrogate, `weights` each method's token weight [B, T] (they multiply it),
    `terms` each method's own added change [B, T], such as that of a regulariser. A method may appear in both.
    The result also holds `bare` (no method at all) and `interaction`, what leave-one-out contributions miss or count
    twice when several weights act on one token; all entries add up to the prediction with every method.
    nan where no token is marked. Raises ValueError for a method that is called `bare` or `interaction`.
    """
    terms = terms or {}
    names = list(dict.fromkeys([*weights, *terms]))
    if clash := {BARE, INTERACTION} & set(names):
        raise ValueError(f"a method may not be called '{clash.pop()}' here")

    def prediction(active: list[str]) -> float:
        total = change_BT.double()
        for name in active:
            total = total * weights[name] if name in weights else total
        for name in active:
            total = total + terms[name] if name in terms else total
        values = total[mask_BT]
        return float(values.mean()) if len(values) else math.nan

    everything, bare = prediction(names), prediction([])
    result = {name: everything - prediction([n for n in names if n != name]) for name in names}
    return {BARE: bare, **result, INTERACTION: everything - bare - sum(result.values())}


@dataclass(frozen=True)
class LedgerEntry:
    """One update. Predictions in units of a unit logit step (times `step_size`), measurements in nats per token."""

    step: int
    predicted: Mapping[str, float]
    """By token class."""
    total: float
    measured_own: float = math.nan
    measured_probe: float = math.nan
    gain: float = math.nan
    """Scale from predicted to measured on own states, fitted to earlier updates; nan while there are none."""
    methods: Mapping[str, float] = field(default_factory=dict)

    @property
    def forecast(self) -> float:
        """gain x total: the predicted change in nats; nan without a gain."""
        return self.gain * self.total

    @property
    def residual(self) -> float:
        """Measured change on own states minus forecast."""
        return self.measured_own - self.forecast

    @property
    def probe_residual(self) -> float:
        """Measured change on the held-out probe minus forecast."""
        return self.measured_probe - self.forecast

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log, named `ledger/...`; classes and methods scaled by the gain to nats."""
        flat = {"total": self.total, "gain": self.gain, "forecast": self.forecast}
        flat |= {"own": self.measured_own, "probe": self.measured_probe, "residual": self.residual}
        flat |= {f"class/{name}": self.gain * value for name, value in self.predicted.items()}
        flat |= {f"method/{name}": self.gain * value for name, value in self.methods.items()}
        return {f"ledger/{name}": value for name, value in flat.items()}


class EntropyLedger:
    """Books entries and keeps the window of (predicted, measured) pairs to which the gain is fitted.

    `window` counts updates. Raises ValueError for a window below 1.
    """

    def __init__(self, window: int = 50) -> None:
        if window < 1:
            raise ValueError(f"the ledger's window must be at least 1, not {window}")
        self.window = window
        self._pairs: list[tuple[float, float]] = []

    @property
    def gain(self) -> float:
        """Least squares through the origin over the window; nan where nothing was predicted yet."""
        squares = math.fsum(p * p for p, _ in self._pairs)
        return math.fsum(p * m for p, m in self._pairs) / squares if squares > 0 else math.nan

    def record(
        self,
        step: int,
        predicted: Mapping[str, float],
        measured_own: float = math.nan,
        measured_probe: float = math.nan,
        methods: Mapping[str, float] | None = None,
        step_size: float = 1.0,
    ) -> LedgerEntry:
        """Book one update; its pair joins the window afterwards. A value that is not finite never enters the gain.

        `step_size` multiplies every prediction: hand in the learning rate, or its schedule's factor, so that a warm-up
        does not look like a change of gain.
        """
        scaled = {name: step_size * value for name, value in predicted.items()}
        parts = {name: step_size * value for name, value in (methods or {}).items()}
        total = math.fsum(scaled.values())
        entry = LedgerEntry(step, scaled, total, measured_own, measured_probe, self.gain, parts)
        if math.isfinite(total) and math.isfinite(measured_own):
            self._pairs = [*self._pairs, (total, measured_own)][-self.window :]
        return entry

    def state_dict(self) -> dict[str, Any]:
        """The window, as plain numbers."""
        return {"predicted": [p for p, _ in self._pairs], "measured": [m for _, m in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved window, cut to this ledger's length."""
        pairs = zip(state["predicted"], state["measured"], strict=True)
        self._pairs = [(float(p), float(m)) for p, m in pairs][-self.window :]
