"""One rollout into optimizer steps: minibatches, micro-batches, and the exact savings.

Statistics that span a minibatch (reduction weights, clip bounds, token weights) are computed before it is split.
Micro-batches only sum, so their size changes memory and speed and never the result. The same holds for their division
over processes: all of them prepare the whole minibatch, each runs its share, and gradients are summed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.classp import Classp
from ..core.dynamics import token_covariance
from ..core.lens import Lens
from ..core.losses import Surrogate
from ..core.reduce import Reduction, masked_mean, reduction_weights
from ..core.rollout import Rollout
from ..core.rows import with_replayed
from ..errors import UserError
from ..methods.base import CLIP_BOUNDS, CURRENT, MOMENTS, LossInputs, Pipeline
from ..policy.forward import LAYER_LOGPROB, TokenView, passes, scored, scored_statistics, token_view, untouched
from ..policy.shard import in_one_piece, is_sharded
from .bookkeeper import Booking
from .clock import Clock
from .guard import Guard
from .parallel import World

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
    skipped: int = 0
    moved: list[float] = field(default_factory=list)
    """Share of the weights that each minibatch moved, where the optimizer has a gate."""
    terms: TermTotals = field(default_factory=TermTotals)

    def over(self, world: World) -> UpdateTotals:
        """The totals of all processes: of what each summed over its own micro-batches. The rest is the same in all."""
        names = ("live_tokens", "live_rows", "clipped_low", "clipped_high", "ratio_sum", "kl_sum")
        sums = world.sum_floats({name: getattr(self, name) for name in names})
        largest = world.max_floats({"ratio_max": self.ratio_max})["ratio_max"]
        terms = TermTotals(world.sum_floats(self.terms.values), world.sum_floats(self.terms.squares))
        return replace(self, **sums, ratio_max=largest, terms=terms)  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """Means. Ratios and KL are over tokens that took part; nan where none did."""
        live, tokens = self.live_tokens or float("nan"), self.tokens or float("nan")
        return {
            "loss": self.loss / self.minibatches if self.minibatches else float("nan"),
            "clip_low": self.clipped_low / tokens,
            "clip_high": self.clipped_high / tokens,
            "ratio_mean": self.ratio_sum / live,
            "ratio_max": self.ratio_max if self.live_tokens else float("nan"),
            "kl_old_new": self.kl_sum / live,
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms) if self.grad_norms else float("nan"),
            "rows_skipped": 1 - self.live_rows / max(self.rows, 1),
            "weight_mean": self.weight_sum / tokens,
            "skipped_updates": float(self.skipped),
            **({"moved_share": sum(self.moved) / len(self.moved)} if self.moved else {}),
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
    """Applies a composed method to a policy.

    `micro_batch_tokens` packs micro-batches without padding, so many tokens each. With a `world` of several processes
    all call `run` with the same rollout and generator.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        pipeline: Pipeline,
        *,
        epochs: int = 1,
        minibatches: int = 8,
        micro_batch_rows: int = 16,
        micro_batch_tokens: int | None = None,
        skip_dead_rows: bool = True,
        grad_clip: float = 1.0,
        guard: Guard | None = None,
        world: World | None = None,
    ) -> None:
        self.booking: Booking | None = None  # set by whoever keeps a ledger
        self.model, self.optimizer, self.pipeline = model, optimizer, pipeline
        self.epochs, self.minibatches = epochs, minibatches
        self.micro_batch_rows, self.micro_batch_tokens = micro_batch_rows, micro_batch_tokens
        self.skip_dead_rows = skip_dead_rows
        self.grad_clip = grad_clip
        self.guard, self.world = guard or Guard(), world or World.single()
        self.sharded = is_sharded(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.lens: Lens | None = None
        """Whose policy the present step trains; None for the model's own."""

    def run(self, rollout: Rollout, generator: torch.Generator, clock: Clock, step: int = 0) -> dict[str, float]:
        """All optimizer steps on one rollout; returns their metrics. `generator` (CPU) deals the minibatches and the
        methods' random choices.

        Raises TrainingStopped on a loss that is not finite, before the optimizer sees it; or, where the guard leaves
        such minibatches out, when it left out too many in a row.
        """
        rollout, advantage = self.pipeline.credit(rollout)
        covariance = _covariance(rollout, advantage)
        rollout = self.look_through(self.pipeline.lens(step, self.model), rollout)
        added = self.pipeline.replay(rollout, advantage)
        if added is not None and len(added[0]):
            rollout, advantage = with_replayed(rollout, advantage, *added)
        totals = UpdateTotals()
        for _ in range(self.epochs):
            for rows in self._deal(rollout, generator):
                batch = rollout.rows(rows)
                part = advantage[rows][:, : batch.response_ids.shape[1]]
                if not bool(batch.mask.any()):
                    continue  # only responses that a filter masked, or empty ones: nothing to average over
                self._minibatch(batch, part, totals, clock, step, generator)
        if self.booking is not None:
            self.booking.classes = self.world.sum_floats(self.booking.classes)
            self.booking.methods = self.world.sum_floats(self.booking.methods)
        replayed = 0 if rollout.replayed is None else int(rollout.replayed.sum())
        return totals.over(self.world).metrics() | {"covariance": covariance, "replayed_rows": float(replayed)}

    def look_through(self, lens: Lens | None, rollout: Rollout) -> Rollout:
        """Train the policy of `lens` from here on: the old log-probs become its own, and weights that it does not use
        lose their gradient. None, not zero: neither weight decay nor momentum may move them.

        Raises UserError where another method has frozen every weight that the policy of `lens` uses."""
        idle = untouched(self.model, lens) if lens is not None else []
        for p in idle:
            p.grad = None
        known = {id(p) for p in idle}
        self.lens = lens
        self.trained = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        if lens is None:
            return rollout
        if not self.trained:
            raise UserError(
                f"the policy of layer {lens.layer} is trained, and all parameters that train lie above it: choose a "
                "higher layer (methods.bupo.layer), or other parameters (methods.kappatune)"
            )
        return rollout.with_(old_logprob=rollout.require(LAYER_LOGPROB, by="the hook 'lens'"))

    def _deal(self, rollout: Rollout, generator: torch.Generator) -> list[Tensor]:
        """Rows of every minibatch: new and replayed responses are dealt apart, so that each has its share of both."""
        device = rollout.response_ids.device
        flags = rollout.replayed if rollout.replayed is not None else torch.zeros(len(rollout), dtype=torch.bool)
        new, old = ((flags.cpu() == kind).nonzero().squeeze(1) for kind in (False, True))
        parts = min(self.minibatches, len(new))
        dealt = []
        for rows in (new, old) if len(old) else (new,):
            order = torch.randperm(len(rows), generator=generator, device=generator.device).cpu()
            dealt.append(rows[order].to(device).tensor_split(parts))
        return [torch.cat(some) for some in zip(*dealt, strict=True)]

    def _minibatch(
        self,
        batch: Rollout,
        advantage: Tensor,
        totals: UpdateTotals,
        clock: Clock,
        step: int,
        generator: torch.Generator,
    ) -> None:
        before = copy.deepcopy((totals, self.booking)) if self.guard.active else (None, None)
        with clock.part("loss"):
            loss, norm, problem = self._gradient(batch, advantage, totals, generator)
        reason = problem or self._reason(loss, norm, batch)
        if reason is not None:
            self._leave_out(reason, math.isfinite(loss) and math.isfinite(norm), before, totals, step)
            return
        with clock.part("optimizer"):
            self.optimizer.step()
        if isinstance(self.optimizer, Classp):
            totals.moved.append(self.optimizer.moved_share())
        self.guard.applied(norm)
        totals.loss += loss
        totals.minibatches += 1
        if self.booking is not None:
            self.booking.minibatches += 1
        totals.grad_norms.append(norm)

    def _gradient(
        self, batch: Rollout, advantage: Tensor, totals: UpdateTotals, generator: torch.Generator
    ) -> tuple[float, float, str | None]:
        """Loss and clipped gradient over all processes, the norm before clipping, and what broke on one of them."""
        # zeros rather than None: a minibatch without live rows must still move by the optimizer's momentum
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        loss, problem = 0.0, None
        try:
            loss = self.accumulate(batch, advantage, totals, generator)
        except FloatingPointError as error:
            problem = str(error)
        parts = self.world.gather_objects((loss, problem))
        problem = next((text for _, text in parts if text is not None), None)
        if problem is not None:
            return math.nan, math.nan, problem
        if not self.sharded:
            self.world.sum_gradients(self.trained)
        norm = float(in_one_piece(torch.nn.utils.clip_grad_norm_(self.trained, self.grad_clip)))
        return sum(part for part, _ in parts), self.world.broadcast_object(norm), None

    def _reason(self, loss: float, norm: float, batch: Rollout) -> str | None:
        """Why the minibatch cannot be applied, None where it can."""
        if math.isfinite(loss) and math.isfinite(norm):
            return self.guard.spike(norm)
        where = "" if self.guard.skip_nonfinite else self._first_bad(batch)
        return f"loss is {loss}, gradient norm {norm}{where}"

    def _leave_out(self, reason: str, finite: bool, before: tuple[Any, Any], totals: UpdateTotals, step: int) -> None:
        """Forget the minibatch, or stop the run."""
        if not finite and not self.guard.skip_nonfinite:
            raise TrainingStopped(f"step {step}: {reason}. This minibatch was not applied. {REMEDY}")
        vars(totals).update(vars(before[0]))
        if self.booking is not None:
            vars(self.booking).update(vars(before[1]))
        totals.skipped += 1
        self.guard.skipped()
        if self.guard.exhausted:
            raise TrainingStopped(
                f"step {step}: {self.guard.in_a_row} minibatches in a row were left out (optimizer.guard.stop_after); "
                f"of the last one, {reason}. {REMEDY}"
            )

    def _first_bad(self, batch: Rollout) -> str:
        """Where the trouble starts: a parameter, else the first response whose log-probs are not finite."""
        for name, p in self.model.named_parameters():
            if not bool(torch.isfinite(in_one_piece(p)).all()):
                return f"; parameter '{name}' is not finite"
        logprob, _ = scored(self.model, batch, self.micro_batch_rows, lens=self.lens)
        bad = (~torch.isfinite(logprob)).any(1).nonzero().squeeze(1)
        if len(bad):
            row = int(bad[0])
            return f"; the policy's log-probs of row {row} (problem {int(batch.prompt_id[row])}) are not finite"
        for name, p in self.model.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(in_one_piece(p.grad)).all()):
                return f"; the gradient of '{name}' is the first that is not finite"
        return ""

    def accumulate(
        self, batch: Rollout, advantage: Tensor, totals: UpdateTotals, generator: torch.Generator | None = None
    ) -> float:
        """Add the minibatch's gradient to the parameters; returns its loss. Of several processes each adds its share.

        The loss is a sum over tokens with weights made over the whole minibatch, so the split into micro-batches and
        the skipping of rows without gradient leave it unchanged. Without a `generator` random choices use seed 0.
        """
        whole = self.prepare(batch, advantage, generator or torch.Generator().manual_seed(0))
        totals.tokens += float(whole.rollout.mask.sum())
        totals.weight_sum += float(whole.weight.sum())
        totals.rows += len(batch)
        total = 0.0
        for rows in self.world.deal(self._micro_batches(whole.rollout, whole.live_rows())):
            if rows is not None:
                total += self._backward(whole, rows, totals)
            elif self.sharded:
                self._run_along(whole.rollout)
        return total

    def _run_along(self, batch: Rollout) -> None:
        """A pass of weight zero, for a process that has one micro-batch less: divided weights are brought together by
        all processes or by none."""
        row = batch.rows(batch.mask.any(1).nonzero()[0])
        nothing = token_view(self.model, row, False, lens=self.lens).logprob.masked_fill(~row.mask, 0.0).sum() * 0.0
        nothing.backward()  # type: ignore[no-untyped-call]

    def prepare(self, batch: Rollout, advantage: Tensor, generator: torch.Generator) -> Minibatch:
        """Everything that spans the minibatch: methods' choices, token weights, clip bounds, reduction weights."""
        batch = batch.with_statistics(**self._current(batch))
        batch = self.pipeline.prepare(batch, advantage, generator)
        reduction, constant = self.pipeline.reduction
        reductions: dict[Reduction | None, Tensor] = {None: _reduction(batch, reduction, constant)}
        for name in self.pipeline.regularise_reductions:
            reductions[name] = _reduction(batch, name, constant)
        lower, upper = self.pipeline.clip(batch, advantage)
        bounds = dict(zip(CLIP_BOUNDS, (lower.detach(), upper.detach()), strict=True))
        weights = self.pipeline.weights(batch.with_statistics(**bounds), advantage)
        return Minibatch(batch, advantage, weights, reductions, lower, upper)

    def _current(self, batch: Rollout) -> dict[str, Tensor]:
        """Statistics of the policy being updated, for methods that ask for them."""
        moments, read = self.pipeline.any("needs_moments"), self.pipeline.reader()
        if not moments and read is None and not self.pipeline.any("needs_current"):
            return {}
        names = [*CURRENT, *(MOMENTS if moments else ())]
        fields = [name.removeprefix("current_") for name in names]
        cut = self.micro_batch_rows, self.micro_batch_tokens
        found = scored_statistics(self.model, batch, fields, *cut, self.world, read, self.lens)
        return {f"current_{name}" if name in fields else name: value for name, value in found.items()}

    def _micro_batches(self, batch: Rollout, live: Tensor) -> Sequence[Tensor]:
        skip = self.skip_dead_rows and not self.pipeline.keeps_every_row
        rows = live.nonzero().squeeze(1) if skip else batch.mask.any(1).nonzero().squeeze(1)
        by_length = rows[batch.lengths[rows].argsort(descending=True, stable=True)]
        return passes(batch, by_length, self.micro_batch_rows, self.micro_batch_tokens)

    def _backward(self, whole: Minibatch, rows: Tensor, totals: UpdateTotals) -> float:
        micro = whole.rollout.rows(rows)
        width = micro.response_ids.shape[1]
        live = None if self.pipeline.keeps_every_row else whole.live_tokens()[rows][:, :width]
        entropy, moments = self.pipeline.any("needs_entropy"), self.booking is not None
        packed, read = self.micro_batch_tokens is not None, self.pipeline.reader()
        view = token_view(self.model, micro, entropy, moments, live, packed, read, lens=self.lens)
        loss = self.loss_of(whole, rows, micro, view, totals)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def loss_of(self, whole: Minibatch, rows: Tensor, micro: Rollout, view: TokenView, totals: UpdateTotals) -> Tensor:
        """Share of the rows `rows` (their rollout is `micro`) in the minibatch's loss, with gradient; counts it."""
        width = micro.response_ids.shape[1]

        def part(value: Tensor) -> Tensor:
            return value[rows][:, :width]

        inputs = LossInputs(
            rollout=micro,
            logprob=view.logprob,
            # a nan in the padding would survive the mask: the gradient of exp multiplies it by zero
            old_logprob=micro.require("old_logprob", by="surrogate").masked_fill(~micro.mask, 0.0),
            advantage=part(whole.advantage),
            lower=part(whole.lower),
            upper=part(whole.upper),
            entropy=view.entropy,
            statistics=view.read,
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
        self._count(inputs, surrogate, totals)
        return loss

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


def _reduction(batch: Rollout, reduction: Reduction, constant: float | None) -> Tensor:
    """Reduction weights [B, T] over the new rows, and by themselves over the replayed ones."""
    if batch.replayed is None:
        return reduction_weights(batch.mask, reduction, constant)
    weights = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for kind in (False, True):
        rows = (batch.replayed == kind).nonzero().squeeze(1)
        if bool(batch.mask[rows].any()):
            weights[rows] = reduction_weights(batch.mask[rows], reduction, constant)
    return weights


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
