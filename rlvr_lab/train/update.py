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

from ..core.dynamics import token_covariance
from ..core.losses import Surrogate
from ..core.reduce import Reduction, masked_mean, reduction_weights
from ..core.rollout import Rollout
from ..methods.base import CURRENT, LossInputs, Pipeline
from ..policy.forward import scored, token_view
from .bookkeeper import Booking
from .clock import Clock

REMEDY = "Lower optimizer.lr or raise optimizer.warmup; with bfloat16, try model.dtype=float32."


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to change."""


@dataclass
class TermTotals:
    """Value of every regulariser and the size of its gradient, so that a term without one does not go unseen."""

    values: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, slug: str, value: Tensor, inputs: LossInputs) -> None:
        """Count one micro-batch. The gradient is that with respect to log-probs and entropies, where it starts."""
        leaves = [x for x in (inputs.logprob, inputs.entropy) if x is not None and x.requires_grad]
        square = 0.0
        if value.requires_grad:
            for g in torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True):
                square += 0.0 if g is None else float(g.square().sum())
        self.values[slug] = self.values.get(slug, 0.0) + float(value.detach())
        self.squares[slug] = self.squares.get(slug, 0.0) + square

    def metrics(self, minibatches: int) -> dict[str, float]:
        """`regularise_<slug>`: mean value per minibatch; `regularise_grad_<slug>`: root mean square of its gradient."""
        n = max(minibatches, 1)
        values = {f"regularise_{slug}": value / n for slug, value in self.values.items()}
        return values | {f"regularise_grad_{slug}": (square / n) ** 0.5 for slug, square in self.squares.items()}


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
    weight_sum: float = 0.0
    terms: TermTotals = field(default_factory=TermTotals)

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
            "weight_mean": self.weight_sum / self.tokens,
            **self.terms.metrics(self.minibatches),
        }


@dataclass(frozen=True)
class Minibatch:
    """One optimizer minibatch with everything that spans it: what micro-batches may not compute for themselves."""

    rollout: Rollout
    advantage: Tensor
    weights: dict[str, Tensor]
    """Token weights [B, T] of each method that has some."""
    reductions: dict[Reduction | None, Tensor]
    """Reduction weights [B, T] by name; None is the surrogate's."""
    lower: Tensor
    upper: Tensor

    @property
    def weight(self) -> Tensor:
        """Product of the methods' token weights [B, T], without the reduction."""
        weight = self.rollout.mask.to(self.advantage.dtype)
        for one in self.weights.values():
            weight = weight * one
        return weight

    def live_tokens(self) -> Tensor:
        """Tokens whose surrogate has a gradient [B, T]."""
        return (self.advantage * self.weight).ne(0) & self.rollout.mask

    def live_rows(self) -> Tensor:
        """Rows with such a token [B]."""
        return self.live_tokens().any(1)


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
        self.booking: Booking | None = None  # set by whoever keeps a ledger
        self.model, self.optimizer, self.pipeline = model, optimizer, pipeline
        self.epochs, self.minibatches = epochs, minibatches
        self.micro_batch_rows = micro_batch_rows
        self.skip_dead_rows = skip_dead_rows
        self.grad_clip = grad_clip

    def run(self, rollout: Rollout, generator: torch.Generator, clock: Clock, step: int = 0) -> dict[str, float]:
        """All optimizer steps on one rollout; returns their metrics. Raises TrainingStopped on a loss that is not
        finite, before the optimizer sees it. `generator` (CPU) deals the minibatches and the methods' random choices.
        """
        advantage = self.pipeline.advantage(rollout)
        totals = UpdateTotals()
        for _ in range(self.epochs):
            order = torch.randperm(len(rollout), generator=generator, device=generator.device)
            for rows in order.to(advantage.device).tensor_split(min(self.minibatches, len(rollout))):
                batch = rollout.rows(rows)
                part = advantage[rows][:, : batch.response_ids.shape[1]]
                if not bool(batch.mask.any()):
                    continue  # only responses that a filter masked, or empty ones: nothing to average over
                self._minibatch(batch, part, totals, clock, step, generator)
        return totals.metrics() | {"covariance": _covariance(rollout, advantage)}

    def _minibatch(
        self,
        batch: Rollout,
        advantage: Tensor,
        totals: UpdateTotals,
        clock: Clock,
        step: int,
        generator: torch.Generator,
    ) -> None:
        with clock.part("loss"):
            # zeros rather than None: a minibatch without live rows must still move by the optimizer's momentum
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            try:
                loss = self.accumulate(batch, advantage, totals, generator)
            except FloatingPointError as error:
                raise TrainingStopped(f"step {step}: {error}. This minibatch was not applied. {REMEDY}") from error
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip))
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise TrainingStopped(
                f"step {step}: loss is {loss}, gradient norm {norm}{self._first_bad(batch)}. This minibatch was not "
                f"applied. {REMEDY}"
            )
        with clock.part("optimizer"):
            self.optimizer.step()
        totals.loss += loss
        totals.minibatches += 1
        if self.booking is not None:
            self.booking.minibatches += 1
        totals.grad_norms.append(norm)

    def _first_bad(self, batch: Rollout) -> str:
        """Where the trouble starts: a parameter, else the first response whose log-probs are not finite."""
        for name, p in self.model.named_parameters():
            if not bool(torch.isfinite(p).all()):
                return f"; parameter '{name}' is not finite"
        logprob, _ = scored(self.model, batch, self.micro_batch_rows)
        bad = (~torch.isfinite(logprob)).any(1).nonzero().squeeze(1)
        if len(bad):
            row = int(bad[0])
            return f"; the policy's log-probs of row {row} (problem {int(batch.prompt_id[row])}) are not finite"
        for name, p in self.model.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                return f"; the gradient of '{name}' is the first that is not finite"
        return ""

    def accumulate(
        self, batch: Rollout, advantage: Tensor, totals: UpdateTotals, generator: torch.Generator | None = None
    ) -> float:
        """Add the minibatch's gradient to the parameters; returns its loss.

        The loss is a sum over tokens with weights made over the whole minibatch, so the split into micro-batches and
        the skipping of rows without gradient leave it unchanged. Without a `generator` random choices use seed 0.
        """
        whole = self.prepare(batch, advantage, generator or torch.Generator().manual_seed(0))
        totals.tokens += float(whole.rollout.mask.sum())
        totals.weight_sum += float(whole.weight.sum())
        totals.rows += len(batch)
        total = 0.0
        for rows in self._micro_batches(whole.rollout, whole.live_rows()):
            total += self._backward(whole, rows, totals)
        return total

    def prepare(self, batch: Rollout, advantage: Tensor, generator: torch.Generator) -> Minibatch:
        """Everything that spans the minibatch: methods' choices, token weights, clip bounds, reduction weights."""
        if self.pipeline.any("needs_current"):
            current = scored(self.model, batch, self.micro_batch_rows)
            batch = batch.with_statistics(**dict(zip(CURRENT, current, strict=True)))
        batch = self.pipeline.prepare(batch, advantage, generator)
        reduction, constant = self.pipeline.reduction
        reductions: dict[Reduction | None, Tensor] = {None: reduction_weights(batch.mask, reduction, constant)}
        for name in self.pipeline.regularise_reductions:
            reductions[name] = reduction_weights(batch.mask, name, constant)
        lower, upper = self.pipeline.clip(batch, advantage)
        weights = self.pipeline.weights(batch, advantage)
        return Minibatch(batch, advantage, weights, reductions, lower, upper)

    def _micro_batches(self, batch: Rollout, live: Tensor) -> Iterator[Tensor]:
        skip = self.skip_dead_rows and not self.pipeline.keeps_every_row
        rows = live.nonzero().squeeze(1) if skip else batch.mask.any(1).nonzero().squeeze(1)
        by_length = rows[batch.lengths[rows].argsort(descending=True, stable=True)]
        if len(by_length):
            yield from torch.split(by_length, self.micro_batch_rows)

    def _backward(self, whole: Minibatch, rows: Tensor, totals: UpdateTotals) -> float:
        micro = whole.rollout.rows(rows)
        width = micro.response_ids.shape[1]

        def part(value: Tensor) -> Tensor:
            return value[rows][:, :width]

        live = None if self.pipeline.keeps_every_row else part(whole.live_tokens())
        view = token_view(self.model, micro, self.pipeline.any("needs_entropy"), self.booking is not None, live)
        inputs = LossInputs(
            rollout=micro,
            logprob=view.logprob,
            # a nan in the padding would survive the mask: the gradient of exp multiplies it by zero
            old_logprob=micro.require("old_logprob", by="surrogate").masked_fill(~micro.mask, 0.0),
            advantage=part(whole.advantage),
            lower=part(whole.lower),
            upper=part(whole.upper),
            entropy=view.entropy,
        )
        surrogate, terms = self.pipeline.surrogate(inputs), self.pipeline.regularise(inputs)
        if self.booking is not None and view.moments is not None:
            weights = {slug: part(value) for slug, value in whole.weights.items()}
            reductions = {name: part(value) for name, value in whole.reductions.items()}
            self.booking.add(inputs, view.moments, surrogate, weights, reductions, terms)
        outside = ~micro.mask
        loss = (surrogate.loss.masked_fill(outside, 0.0) * part(whole.reductions[None] * whole.weight)).sum()
        for term in terms:
            value = (term.loss.masked_fill(outside, 0.0) * part(whole.reductions[term.reduction])).sum()
            totals.terms.add(term.slug, value, inputs)
            loss = loss + value
        loss.backward()  # type: ignore[no-untyped-call]
        self._count(inputs, surrogate, totals)
        return float(loss.detach())

    @torch.no_grad()
    def _count(self, inputs: LossInputs, surrogate: Surrogate, totals: UpdateTotals) -> None:
        mask = inputs.rollout.mask
        ratio = torch.broadcast_to(surrogate.ratio.detach(), mask.shape)[mask]
        log_ratio = (inputs.logprob.detach() - inputs.old_logprob)[mask]
        totals.live_tokens += float(mask.sum())
        totals.live_rows += len(mask)
        totals.clipped_low += float((surrogate.clipped_low & mask).sum())
        totals.clipped_high += float((surrogate.clipped_high & mask).sum())
        totals.ratio_sum += float(ratio.sum())
        totals.ratio_max = max(totals.ratio_max, float(ratio.max()))
        # k3 estimate of KL(old || new) from samples of old, in nats per token
        totals.kl_sum += float((log_ratio.exp() - 1 - log_ratio).sum())


def _covariance(rollout: Rollout, advantage: Tensor) -> float:
    """Mean over tokens of the centred product of log-prob and advantage; nan where log-probs are unknown."""
    if rollout.old_logprob is None:
        return float("nan")
    return float(masked_mean(token_covariance(rollout.old_logprob, advantage, rollout.mask), rollout.mask))


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
