"""Keeps the entropy ledger of a run: what every update should do to entropy (`core.ledger`), and what it did.

During the update each micro-batch is booked, from tensors that the loss has computed anyway. Afterwards one forward
pass over a few rows measures the change: on rows of the update itself, and on held-out responses that never train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.dynamics import change_full, coefficient_of_loss
from ..core.ledger import CLASSES, EntropyLedger, by_class, by_method, token_classes
from ..core.losses import Surrogate
from ..core.reduce import masked_mean
from ..core.rollout import Rollout
from ..core.rows import concatenate
from ..methods.base import LossInputs, Term
from ..policy.forward import Moments, scored

NAMES = dict(zip(CLASSES, ("up_likely", "up_unlikely", "down_likely", "down_unlikely", "none"), strict=True))


@dataclass
class Booking:
    """Sums of one update's predictions over its micro-batches, in units of a unit logit step."""

    classes: dict[str, float] = field(default_factory=dict)
    methods: dict[str, float] = field(default_factory=dict)
    minibatches: int = 0

    def add(
        self,
        inputs: LossInputs,
        moments: Moments,
        surrogate: Surrogate,
        weights: Mapping[str, Tensor],
        reductions: Mapping[Any, Tensor],
        terms: list[Term],
    ) -> None:
        """Book one micro-batch. Reduction weights stand in place of the plain mean, so sums over micro-batches are
        the prediction of the minibatch whatever its reduction."""
        mask = inputs.rollout.mask
        n = float(mask.sum())
        logprob, entropy = inputs.logprob.detach(), moments.entropy

        def change(loss: Tensor) -> Tensor:
            coefficient = coefficient_of_loss(loss, inputs.logprob)
            return change_full(coefficient, logprob, entropy, moments.collision, moments.cross).masked_fill(~mask, 0.0)

        bare = n * reductions[None] * change(surrogate.loss)
        own = {
            t.slug: n * reductions[t.reduction] * (change(t.loss) + _through_entropy(t.loss, inputs, moments))
            for t in terms
        }
        _accumulate(self.methods, by_method(bare, mask, weights, own))
        total = bare
        for weight in weights.values():
            total = total * weight
        total = torch.stack([total, *own.values()]).sum(0)
        classes = token_classes(inputs.advantage, logprob, entropy, mask)
        _accumulate(self.classes, by_class(total, classes))

    def mean(self) -> tuple[dict[str, float], dict[str, float]]:
        """Prediction of the mean minibatch, by class and by method."""
        n = max(self.minibatches, 1)
        classes = {name: self.classes.get(name, 0.0) / n for name in CLASSES}
        return classes, {name: value / n for name, value in self.methods.items()}


def _through_entropy(loss: Tensor, inputs: LossInputs, moments: Moments) -> Tensor:
    """First-order change [b, T] by a term's gradient h = d loss / dH: the logits move by -h dH/dz, so the entropy
    moves by -h |dH/dz|^2 with dH/dz_k = -p_k (log p_k + H)."""
    if inputs.entropy is None or not loss.requires_grad:
        return torch.zeros_like(moments.collision)
    (h,) = torch.autograd.grad(loss.sum(), inputs.entropy, allow_unused=True, retain_graph=True)
    return torch.zeros_like(moments.collision) if h is None else -h * moments.slope_square


def _accumulate(into: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        into[name] = into.get(name, 0.0) + value


class Bookkeeper:
    """The ledger of one run and the states on which it measures.

    `rows` responses of every rollout are measured again after the update; `probe` holds as many held-out responses,
    sampled once from the starting policy and kept in checkpoints.
    """

    def __init__(self, model: Any, probe: Rollout | None, rows: int, window: int = 50) -> None:
        self.model, self.probe, self.rows = model, probe, rows
        self.ledger = EntropyLedger(window)
        self.booking = Booking()
        self._probe_before: float | None = None

    def begin(self, rollout: Rollout, generator: torch.Generator) -> None:
        """Before the update: choose the rows to be measured, and measure what is not recorded."""
        self.booking = Booking()
        index = torch.randperm(len(rollout), generator=generator)[: self.rows].to(rollout.response_ids.device)
        self._own = rollout.rows(index)
        fresh = bool((self._own.policy_version == rollout.policy_version.max()).all())
        recorded = self._own.statistics.get("token_entropy") if fresh else None
        self._own_before = self._mean_entropy(self._own) if recorded is None else _mean(recorded, self._own)
        if self.probe is not None and self._probe_before is None:
            self._probe_before = self._mean_entropy(self.probe)

    def end(self, step: int, step_size: float) -> dict[str, float]:
        """After the update: measure, book, and return the metrics `ledger_*`.

        Classes, methods and `ledger_predicted` are in units of a unit logit step times `step_size`, the factor of the
        learning-rate schedule; `ledger_forecast` is that times the gain, and like what was measured in nats.
        """
        own, probe = self._measure()
        classes, methods = self.booking.mean()
        entry = self.ledger.record(step, classes, own, probe, methods, step_size)
        named = {f"ledger_{NAMES[name]}": value for name, value in entry.predicted.items()}
        parts = {f"ledger_by_{name}": value for name, value in entry.methods.items()} if len(methods) > 2 else {}
        return {
            **named,
            **parts,
            "ledger_predicted": entry.total,
            "ledger_gain": entry.gain,
            "ledger_forecast": entry.forecast,
            "ledger_measured": own,
            "ledger_probe": probe,
            "ledger_residual": entry.residual,
        }

    def measure(self) -> dict[str, float]:
        """`end` for an update of another policy than the one measured, a layer's: what happened to the model's own
        entropy, without a prediction, and so nothing for the gain."""
        own, probe = self._measure()
        return {"ledger_measured": own, "ledger_probe": probe}

    def _measure(self) -> tuple[float, float]:
        """Change of the mean token entropy on own rows and on the probe, from one forward pass over both."""
        if self.probe is None or self._probe_before is None:
            return self._mean_entropy(self._own) - self._own_before, float("nan")
        both = concatenate([_bare(self._own), _bare(self.probe)])
        _, entropy = scored(self.model, both, len(both))
        own = torch.arange(len(both), device=entropy.device) < len(self._own)
        after = float(masked_mean(entropy[~own], both.mask[~own]))
        change = after - self._probe_before
        self._probe_before = after
        return float(masked_mean(entropy[own], both.mask[own])) - self._own_before, change

    def _mean_entropy(self, rollout: Rollout) -> float:
        _, entropy = scored(self.model, rollout, len(rollout))
        return _mean(entropy, rollout)

    def state_dict(self) -> dict[str, Any]:
        """The window of the gain, and the probe as tensors."""
        state = self.ledger.state_dict()
        if self.probe is not None:
            state |= {f"probe_{name}": getattr(self.probe, name) for name in _PROBE}
            state["probe_before"] = self._probe_before
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's window, and its probe in place of the one given."""
        self.ledger.load_state_dict(state)
        if self.probe is not None and "probe_response_ids" in state:
            device = self.probe.response_ids.device
            self.probe = Rollout(**{name: state[f"probe_{name}"].to(device) for name in _PROBE})
            self._probe_before = state["probe_before"]


_PROBE = ("prompt_id", "group_id", "finished", "policy_version", "prompt_ids", "prompt_mask", "response_ids",
          "response_mask", "action_mask", "behaviour_logprob", "behaviour_temperature")  # fmt: skip


def _bare(rollout: Rollout) -> Rollout:
    """Only what a forward pass needs, at the policy's own temperature: rollouts of different origin can be joined."""
    bare = {name: getattr(rollout, name) for name in _PROBE}
    if rollout.policy_temperature is not None:
        bare["behaviour_temperature"] = torch.full_like(rollout.behaviour_temperature, rollout.policy_temperature)
    return Rollout(**bare)


def _mean(entropy: Tensor, rollout: Rollout) -> float:
    return float(masked_mean(entropy, rollout.mask))
