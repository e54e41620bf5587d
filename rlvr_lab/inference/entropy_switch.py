r"""When to raise and when to lower the entropy of the next token, and a gradient step that does it.

With H_t [B] the entropy of the next-token distribution before any step, in nats:

    EMA     h_0 = H_0,   h_t = beta h_{t-1} + (1 - beta) H_t
    phase   explore, until h_t has not exceeded its running maximum for `patience` tokens in a row; then exploit
    sign    exploit: -1.  explore: mean_revert  +1 iff H_t < h_t, else -1     (so -1 at t = 0, and at a constant H)
                                   trend        +1 iff t = 0 or h_t >= h_{t-1}, else -1
    step    every k tokens, n times:  dV <- dV - eta grad_dV(-alpha_t H_t)

A step raises H for alpha = +1 and lowers it for -1 where eta is small; a large one overshoots and may do the opposite.

Source: Video Reasoning without Training, arXiv 2510.17045, no code. An entropy objective with a switching sign, an EMA
and its global maximum, an Adam-type optimiser and "every k tokens" are published; sign rules, EMA decay, peak detector,
learning rate and the number of steps are our reading, card papers/v_reason.md, 4c [inferred], and hence settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.entropy import softmax_entropy
from ..errors import UserError, nearest

SignRule = Literal["mean_revert", "trend", "random", "exploit"]
Optimizer = Literal["gradient", "adam"]
RATES: dict[str, float] = {"gradient": 0.05, "adam": 1e-2}


@dataclass(frozen=True)
class Settings:
    """How entropy is steered. Raises UserError for a value that makes no sense."""

    ema_decay: float = 0.9
    patience: int | None = 3
    """Tokens without a new maximum of the EMA that begin the exploit phase; None: it never begins."""
    rule: SignRule = "mean_revert"
    """Sign of the explore phase. Controls: `random` is +1 or -1 with equal chance, `exploit` always -1."""
    every: int = 4
    inner_steps: int = 1
    optimizer: Optimizer = "gradient"
    """Plain gradient descent, or Adam, whose moments persist with dV."""
    lr: float | None = None
    """None: 0.05 for plain gradient, 0.01 for Adam."""

    def __post_init__(self) -> None:
        for name, kinds in (("rule", get_args(SignRule)), ("optimizer", get_args(Optimizer))):
            if (value := str(getattr(self, name))) not in kinds:
                raise UserError(f"{name} '{value}' is unknown; {nearest(value, kinds)}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        for name, least in (("patience", 1), ("every", 1), ("inner_steps", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise UserError(f"lr must be finite and not negative, not {self.lr}")

    def optimizer_of(self, delta: Tensor) -> torch.optim.Optimizer:
        """The optimiser of a new prompt's dV; its state ends with the prompt."""
        rate = RATES[self.optimizer] if self.lr is None else self.lr
        if self.optimizer == "adam":
            return torch.optim.Adam([delta], lr=rate)
        return torch.optim.SGD([delta], lr=rate)


class Switch:
    """EMA, macro phase and sign of every row [B], token by token: `update` once per token, in order."""

    def __init__(self, settings: Settings, rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.settings, self.tokens = settings, 0
        self.ema = torch.full((rows,), math.nan, dtype=dtype, device=device)
        self.peak = torch.full_like(self.ema, -math.inf)
        """Running maximum of the EMA in the explore phase, and its token."""
        self.peak_index = torch.zeros(rows, dtype=torch.long, device=device)
        self.below = torch.zeros_like(self.peak_index)
        """Tokens in a row without a new maximum."""
        self.exploit = torch.zeros_like(self.peak_index, dtype=torch.bool)

    def update(self, entropy_B: Tensor, coin_B: Tensor | None = None) -> Tensor:
        """Sign alpha_t [B], +1 or -1, from the entropies H_t before any inner step.

        `coin_B` are uniform numbers in [0, 1) for the rule `random`; raises ValueError where that rule has none.
        """
        before, beta = self.ema, self.settings.ema_decay
        # in this form a constant entropy leaves the EMA exactly where it is: no new maximum out of rounding
        self.ema = before + (1 - beta) * (entropy_B - before) if self.tokens else entropy_B.clone()
        new = (self.ema > self.peak) & ~self.exploit
        self.peak = torch.where(new, self.ema, self.peak)
        self.peak_index = self.peak_index.masked_fill(new, self.tokens)
        self.below = (self.below + 1).masked_fill(new, 0)
        if self.settings.patience is not None:
            self.exploit = self.exploit | (self.below >= self.settings.patience)
        up = self._up(entropy_B, before, coin_B) & ~self.exploit
        self.tokens += 1
        return 2.0 * up.to(entropy_B.dtype) - 1.0

    def _up(self, entropy: Tensor, before: Tensor, coin: Tensor | None) -> Tensor:
        if self.settings.rule == "mean_revert":
            return entropy < self.ema
        if self.settings.rule == "trend":
            return self.ema >= before if self.tokens else torch.ones_like(self.exploit)
        if self.settings.rule == "exploit":
            return torch.zeros_like(self.exploit)
        if coin is None:
            raise ValueError("the rule 'random' needs uniform numbers")
        return coin < 0.5


@dataclass
class Schedule:
    """What a `Switch` makes of one given sequence of entropies; lists over tokens."""

    alpha: list[float] = field(default_factory=list)
    ema: list[float] = field(default_factory=list)
    exploit: list[bool] = field(default_factory=list)
    peak_index: int = 0

    @property
    def first_exploit_index(self) -> int | None:
        """Token with which the exploit phase begins; None where it never does."""
        return self.exploit.index(True) if True in self.exploit else None


def schedule(entropy: Sequence[float], settings: Settings) -> Schedule:
    """Signs, EMA and phases over entropies that do not react to them, in float64."""
    switch, found = Switch(settings, 1, torch.float64), Schedule()
    for value in entropy:
        alpha = switch.update(torch.tensor([value], dtype=torch.float64))
        found.alpha.append(float(alpha))
        found.ema.append(float(switch.ema))
        found.exploit.append(bool(switch.exploit))
    found.peak_index = int(switch.peak_index)
    return found


def steer(
    logits_of: Callable[[], Tensor], delta: Tensor, alpha_B: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[Tensor, Tensor]:
    """`steps` steps of -alpha H on `delta`, in place; logits [B, V] after them, and entropies [steps + 1, B].

    `logits_of()` gives the next-token logits under the present `delta`, a leaf that requires a gradient. Rows are
    separate where each depends on its own block of `delta`; alpha 0 leaves a row alone. Works inside `torch.no_grad`
    and `torch.inference_mode`. No gradient is left on `delta`, none reaches anything else.
    """
    trace = []
    with torch.inference_mode(False):
        for _ in range(steps):
            with torch.enable_grad():
                entropy = softmax_entropy(logits_of())
                (delta.grad,) = torch.autograd.grad(-(alpha_B * entropy).sum(), delta)
            trace.append(entropy.detach())
            optimizer.step()
        delta.grad = None
        with torch.no_grad():
            logits = logits_of()
            trace.append(softmax_entropy(logits))
    return logits, torch.stack(trace)


@dataclass(frozen=True)
class OneLayer:
    """A last layer without feed-forward part, at one position: enough to see the controller's gradient by hand.

    query [heads, d], keys and values [kv heads, S, d], output_proj [D, heads d], residual and norm_weight [D],
    unembedding [V, D]. Query heads j r, ..., j r + r - 1 read kv head j, r = heads / kv heads.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    output_proj: Tensor
    residual: Tensor
    norm_weight: Tensor
    unembedding: Tensor
    eps: float = 1e-6

    @property
    def attention(self) -> Tensor:
        """Weights [heads, S] = softmax(q K / sqrt(d)); the controller does not change them."""
        keys = self.keys.repeat_interleave(len(self.query) // len(self.keys), 0)
        return torch.softmax((keys @ self.query[..., None]).squeeze(-1) / self.query.shape[-1] ** 0.5, -1)

    def logits(self, delta: Tensor | None = None, positions: Sequence[int] = ()) -> Tensor:
        """Logits [V] with `delta` [kv heads, |C|, d] added to the values at `positions`: o_h, W_o, RMSNorm, E_u."""
        values = self.values
        if delta is not None:
            values = values.index_add(1, torch.as_tensor(positions, dtype=torch.long), delta)
        heads = self.attention[:, None] @ values.repeat_interleave(len(self.query) // len(values), 0)
        stream = self.residual + self.output_proj @ heads.flatten()
        norm = torch.nn.functional.rms_norm(stream, stream.shape, self.norm_weight, self.eps)
        return self.unembedding @ norm
