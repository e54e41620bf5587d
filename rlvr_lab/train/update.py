"""One rollout into optimizer steps: minibatches, micro-batches, and the exact savings.

Statistics that span a minibatch (reduction weights, clip bounds, token weights) are computed before it is split.
Micro-batches only sum, so their size changes memory and speed and never the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.reduce import reduction_weights
from ..core.rollout import Rollout
from ..methods.base import LossInputs, Pipeline
from ..policy.forward import response_statistics
from .clock import Clock


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to change."""


@dataclass
class UpdateTotals:
    """Sums over the micro-batches of one rollout; `metrics` turns them into means."""

    loss: float = 0.0
    minibatches: int = 0
    tokens: float = 0.0
    live_tokens: float = 0.0
    rows: int = 0
    live_rows: int = 0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    ratio_sum: float = 0.0
    ratio_max: float = 0.0
    kl_sum: float = 0.0
    grad_norms: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Means. Ratios and KL are over tokens that took part; nan where none did."""
        live = self.live_tokens or float("nan")
        return {
            "loss": self.loss / max(self.minibatches, 1),
            "clip_low": self.clipped_low / self.tokens,
            "clip_high": self.clipped_high / self.tokens,
            "ratio_mean": self.ratio_sum / live,
            "ratio_max": self.ratio_max if self.live_tokens else float("nan"),
            "kl_old_new": self.kl_sum / live,
            "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1),
            "rows_skipped": 1 - self.live_rows / max(self.rows, 1),
        }


class Updater:
    """Applies a composed method to a policy."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        pipeline: Pipeline,
        *,
        epochs: int = 1,
        minibatches: int = 8,
        micro_batch_rows: int = 16,
        skip_dead_rows: bool = True,
        grad_clip: float = 1.0,
    ) -> None:
        self.model, self.optimizer, self.pipeline = model, optimizer, pipeline
        self.epochs, self.minibatches = epochs, minibatches
        self.micro_batch_rows = micro_batch_rows
        self.skip_dead_rows = skip_dead_rows
        self.grad_clip = grad_clip

    def run(self, rollout: Rollout, generator: torch.Generator, clock: Clock, step: int = 0) -> dict[str, float]:
        """All optimizer steps on one rollout; returns their metrics. Raises TrainingStopped on a loss that is not
        finite, before the optimizer sees it."""
        advantage = self.pipeline.advantage(rollout)
        totals = UpdateTotals()
        for _ in range(self.epochs):
            order = torch.randperm(len(rollout), generator=generator, device=generator.device)
            for rows in order.to(advantage.device).tensor_split(self.minibatches):
                batch = rollout.rows(rows)
                part = advantage[rows][:, : batch.response_ids.shape[1]]
                self._minibatch(batch, part, totals, clock, step)
        return totals.metrics()

    def _minibatch(self, batch: Rollout, advantage: Tensor, totals: UpdateTotals, clock: Clock, step: int) -> None:
        with clock.part("loss"):
            # zeros rather than None: a minibatch without live rows must still move by the optimizer's momentum
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            loss = self.accumulate(batch, advantage, totals)
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip))
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise TrainingStopped(
                f"step {step}: loss is {loss}, gradient norm {norm}. This minibatch was not applied. "
                "Lower optimizer.lr or raise optimizer.warmup; with bfloat16, try model.dtype=float32."
            )
        with clock.part("optimizer"):
            self.optimizer.step()
        totals.loss += loss
        totals.minibatches += 1
        totals.grad_norms.append(norm)

    def accumulate(self, batch: Rollout, advantage: Tensor, totals: UpdateTotals) -> float:
        """Add the minibatch's gradient to the parameters; returns its loss.

        The loss is the sum of per-token losses times weights made over the whole minibatch, so the split into
        micro-batches and the skipping of rows without gradient leave it unchanged.
        """
        mask = batch.mask
        weights = reduction_weights(mask, *self.pipeline.reduction) * self.pipeline.weight(batch, advantage)
        lower, upper = self.pipeline.clip(batch, advantage)
        totals.tokens += float(mask.sum())
        totals.rows += len(batch)
        total = 0.0
        for rows in self._micro_batches(batch, (advantage * weights).ne(0).any(1) & mask.any(1)):
            micro = batch.rows(rows)
            width = micro.response_ids.shape[1]
            logprob, entropy = response_statistics(self.model, micro, want_entropy=self.pipeline.uses_entropy)
            inputs = LossInputs(
                rollout=micro,
                logprob=logprob,
                # a nan in the padding would survive the mask: the gradient of exp multiplies it by zero
                old_logprob=micro.require("old_logprob", by="surrogate").masked_fill(~micro.mask, 0.0),
                advantage=advantage[rows][:, :width],
                lower=lower[rows][:, :width],
                upper=upper[rows][:, :width],
                entropy=entropy,
            )
            total += self._backward(inputs, weights[rows][:, :width], totals)
        return total

    def _micro_batches(self, batch: Rollout, live: Tensor) -> Iterator[Tensor]:
        skip = self.skip_dead_rows and not self.pipeline.keeps_every_row
        rows = live.nonzero().squeeze(1) if skip else batch.mask.any(1).nonzero().squeeze(1)
        by_length = rows[batch.lengths[rows].argsort(descending=True, stable=True)]
        if len(by_length):
            yield from torch.split(by_length, self.micro_batch_rows)

    def _backward(self, inputs: LossInputs, weights: Tensor, totals: UpdateTotals) -> float:
        per_token, surrogate = self.pipeline.surrogate(inputs)
        mask = inputs.rollout.mask
        loss = (per_token.masked_fill(~mask, 0.0) * weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            ratio = surrogate.ratio.detach()[mask]
            log_ratio = (inputs.logprob.detach() - inputs.old_logprob)[mask]
            totals.live_tokens += float(mask.sum())
            totals.live_rows += len(mask)
            totals.clipped_low += float((surrogate.clipped_low & mask).sum())
            totals.clipped_high += float((surrogate.clipped_high & mask).sum())
            totals.ratio_sum += float(ratio.sum())
            totals.ratio_max = max(totals.ratio_max, float(ratio.max()))
            # k3 estimate of KL(old || new) from samples of old, in nats per token
            totals.kl_sum += float((log_ratio.exp() - 1 - log_ratio).sum())
        return float(loss.detach())


def schedule(step: int, steps: int, warmup: int, kind: str) -> float:
    """Learning-rate factor of step `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant" or steps <= warmup:
        return 1.0
    progress = (step - warmup) / (steps - warmup)
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))
