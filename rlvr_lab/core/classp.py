r"""CLASSP: a weight moves only where its gradient is large, and less the more it has moved (arXiv 2405.09637).

Element by element, with gradient g_t, threshold theta on the *squared* gradient, power p, rate alpha and small eps:

    open_t = 1[g_t^2 > theta]                                     the gate
    s_t    = s_{t-1} + open_t |g_t|^p                             the history, one number a weight, this step included
    w_t    = w_{t-1} - open_t alpha g_t / (eps + s_t)^(1/p)       or alpha g_t alone without `scaling`

p = 2 and theta = 0 is AdaGrad with eps inside the root. The paper's recipe for a stream of tasks: the first one with
theta > 0 and without scaling, which gathers a history, later ones with scaling.

Card: papers/classp.md. Code compared: oswaldoludwig/CLASSP @ ea3fe3c (`rule="released"`): its gate compares
`(grad**2).any()`, a boolean of the whole tensor, with theta, so that for theta < 1 every element of a tensor with any
gradient moves and for theta >= 1 none does; its history adds |g| whatever p is, while the root is still the p-th.

Weight decay is ours, in neither source: decoupled as in AdamW, and only of elements whose gate is open, so that a
weight whose gate is closed keeps its value to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError

Rule = Literal["paper", "released"]


def check_settings(settings: dict[str, Any]) -> None:
    """Raises UserError that names a setting of a parameter group which no update can work with."""
    for name in ("lr", "threshold", "weight_decay"):
        if not (math.isfinite(settings[name]) and settings[name] >= 0):
            raise UserError(f"CLASSP's {name} must be finite and not negative, not {settings[name]}")
    for name in ("eps", "power"):
        if not (math.isfinite(settings[name]) and settings[name] > 0):
            raise UserError(f"CLASSP's {name} must be positive and finite, not {settings[name]}")
    if settings["rule"] not in get_args(Rule):
        raise UserError(f"CLASSP's rule must be one of {', '.join(get_args(Rule))}, not '{settings['rule']}'")


def gate(grad: Tensor, threshold: float, rule: Rule = "paper") -> Tensor:
    """Where an update may pass, as booleans: of grad's shape, or a single one for the released rule."""
    if rule == "released":
        return (grad != 0).any() & (threshold < 1)
    return grad.square() > threshold


@torch.no_grad()
def advance(
    weight: Tensor,
    grad: Tensor,
    history: Tensor,
    *,
    lr: float,
    threshold: float = 0.5,
    eps: float = 1e-5,
    power: float = 1.0,
    scaling: bool = True,
    rule: Rule = "paper",
    weight_decay: float = 0.0,
) -> Tensor:
    """One update of `weight` and `history` in place, all of one shape; returns the gate.

    Written for tensors divided over processes as well, so without selections: a closed element adds zeros.
    """
    passed = gate(grad, threshold, rule)
    step = grad * passed
    history.add_(step.abs() if rule == "released" or power == 1 else step.abs().pow_(power))
    if weight_decay:
        weight.mul_(1 - lr * weight_decay * passed)
    if scaling:
        step.mul_((history + eps).pow_(-1 / power))
    weight.add_(step, alpha=-lr)
    return passed


class Classp(torch.optim.Optimizer):
    """CLASSP over parameters in float32 or float64; settings may differ between parameter groups, and change between
    steps, as `scaling` does from the first task to the second.

    A 16-bit sum of gradients stops growing once it is 256 times its next term, so such parameters are refused.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        *,
        threshold: float = 0.5,
        eps: float = 1e-5,
        power: float = 1.0,
        scaling: bool = True,
        rule: Rule = "paper",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "threshold": threshold, "eps": eps, "power": power, "scaling": scaling, "rule": rule}
        self._passed: list[tuple[Tensor, int]] = []
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group. Raises UserError for settings or parameters that CLASSP cannot use."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_settings(group)
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise UserError(f"CLASSP sums gradients in the parameter's type, and {p.dtype} cannot hold such a sum; "
                                "train float32 weights")  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("CLASSP takes no closure")
        self._passed = []
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name in SETTINGS}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("CLASSP takes no sparse gradients")
                if "history" not in self.state[p]:
                    self.state[p]["history"] = torch.zeros_like(p)
                passed = advance(p, p.grad, self.state[p]["history"], **settings)
                self._passed.append((passed.sum() * (p.numel() // passed.numel()), p.numel()))

    def moved_share(self) -> float:
        """Share of the elements with a gradient whose gate was open in the last step; nan before the first.

        Of weights divided over processes all must ask together."""
        total = sum(size for _, size in self._passed)
        counts = [int(getattr(count, "full_tensor", lambda count=count: count)()) for count, _ in self._passed]
        return sum(counts) / total if total else math.nan


SETTINGS = ("lr", "threshold", "eps", "power", "scaling", "rule", "weight_decay")
