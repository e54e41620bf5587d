"""How a published method enters the training loop: one object, a few hooks, composable.

A method implements the hooks it uses and leaves the others out; the loop asks the composed `Pipeline` and never asks
for a method by name. Exclusive hooks have one owner in a composition; the others are chained in the order given.

| hook | sees | returns | combination |
|---|---|---|---|
| `reward` | rollout with statistics | reward components by name, [B] each | all are added |
| `advantage` | whole rollout | advantage [B, T] | exclusive |
| `weight` | optimizer minibatch, advantage | token weights [B, T] | multiplied |
| `clip` | optimizer minibatch, advantage | lower and upper bound of the ratio | exclusive |
| `surrogate` | micro-batch (`LossInputs`) | per-token loss (`Surrogate`) | exclusive |
| `regularise` | micro-batch (`LossInputs`) | extra per-token loss [b, T] | all are added |
| `observe` | step metrics | nothing; changes its own state | all are told |

`select` and `sample` are hooks of the data stage: `select` returns the problems of a step, `sample` the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.losses import Surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..errors import UserError

EXCLUSIVE = ("select", "sample", "advantage", "clip", "surrogate")
CHAINED = ("reward", "weight", "regularise", "observe")
HOOKS = (*EXCLUSIVE, *CHAINED)


@dataclass(frozen=True)
class LossInputs:
    """What a micro-batch loss may use. All [b, T]; `logprob` and `entropy` carry gradient.

    `entropy` is None unless some method of the composition has a `regularise` hook. Batch-level statistics are not
    computed here: they arrive inside `advantage`, `lower` and `upper`, which were made over the whole minibatch.
    """

    rollout: Rollout
    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    lower: Tensor
    upper: Tensor
    entropy: Tensor | None = None


class Method:
    """Base of all methods. `slug` names card, module, recipe and chapter; `requires` lists needed rollout fields."""

    slug: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    learns_without_advantage: ClassVar[bool] = False
    """True for a surrogate that has a gradient where the advantage is 0, such as one with a KL term inside."""
    reduction: Reduction
    reduction_constant: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold: numbers, strings, lists and tensors only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        if state:
            raise UserError(f"checkpoint holds state for method '{self.slug}', which keeps none")


class Pipeline:
    """Several methods as one. Raises UserError where two own one exclusive hook, or where a needed owner is missing."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = tuple(methods)
        self.hooks = {hook: [m for m in self.methods if callable(getattr(m, hook, None))] for hook in HOOKS}
        slugs = [m.slug for m in self.methods]
        for slug in slugs:
            if slugs.count(slug) > 1:
                raise UserError(f"method '{slug}' stands twice in this composition")
        for hook in EXCLUSIVE:
            if len(self.hooks[hook]) > 1:
                owners = " and ".join(f"'{m.slug}'" for m in self.hooks[hook])
                raise UserError(f"{owners} both own the hook '{hook}'; a composition can hold one of them")
        for hook in ("advantage", "clip", "surrogate"):
            if not self.hooks[hook]:
                raise UserError(f"no method of this composition owns the hook '{hook}'; add one such as 'grpo'")

    @property
    def uses_entropy(self) -> bool:
        """True where a loss term needs differentiable entropies."""
        return bool(self.hooks["regularise"])

    @property
    def keeps_every_row(self) -> bool:
        """True where a response of zero advantage still has a gradient, so that none may be skipped."""
        return self.uses_entropy or any(m.learns_without_advantage for m in self.methods)

    def owner(self, hook: str) -> Any:
        """The only owner of an exclusive hook, or None."""
        return self.hooks[hook][0] if self.hooks[hook] else None

    def check(self, rollout: Rollout) -> None:
        """Fail before the first update where a method needs a field that the rollout lacks."""
        for method in self.methods:
            for name in method.requires:
                rollout.require(name, by=method.slug)

    def reward(self, rollout: Rollout) -> Rollout:
        """Add every method's reward components and set `reward` to their sum."""
        components = dict(rollout.reward_components)
        for method in self._chain("reward"):
            added = method.reward(rollout)
            if clash := sorted(components.keys() & added.keys()):
                raise UserError(f"method '{method.slug}' names a reward component '{clash[0]}' that exists already")
            components |= added
        total = torch.stack(list(components.values())).sum(0)
        return rollout.with_(reward_components=components, reward=total)

    def advantage(self, rollout: Rollout) -> Tensor:
        """Advantage [B, T], zero outside the mask, without gradient."""
        value: Tensor = self.owner("advantage").advantage(rollout)
        return value.detach().masked_fill(~rollout.mask, 0.0)

    def weight(self, rollout: Rollout, advantage_BT: Tensor) -> Tensor:
        """Product of all token weights [B, T], zero outside the mask."""
        weight = torch.ones_like(advantage_BT)
        for method in self._chain("weight"):
            weight = weight * method.weight(rollout, advantage_BT)
        return weight.masked_fill(~rollout.mask, 0.0)

    def clip(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the importance ratio, each [B, T]."""
        lower, upper = self.owner("clip").clip(rollout, advantage_BT)
        return torch.broadcast_to(lower, advantage_BT.shape), torch.broadcast_to(upper, advantage_BT.shape)

    def surrogate(self, inputs: LossInputs) -> tuple[Tensor, Surrogate]:
        """Per-token loss including regularisers, and the bare surrogate for its metrics."""
        surrogate: Surrogate = self.owner("surrogate").surrogate(inputs)
        loss = surrogate.loss
        for method in self._chain("regularise"):
            loss = loss + method.regularise(inputs)
        return loss, surrogate

    @property
    def reduction(self) -> tuple[Reduction, float | None]:
        """Reduction of the surrogate's owner, and its constant."""
        owner = self.owner("surrogate")
        return owner.reduction, owner.reduction_constant

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell every method how the step went."""
        for method in self._chain("observe"):
            method.observe(metrics)

    def _chain(self, hook: str) -> list[Any]:
        return list(self.hooks[hook])

    def state_dict(self) -> dict[str, Any]:
        """State of every method by slug."""
        return {m.slug: m.state_dict() for m in self.methods}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every method's state; a different set of methods is refused."""
        if set(state) != {m.slug for m in self.methods}:
            raise UserError(
                f"checkpoint holds methods {sorted(state)}, this run {sorted(m.slug for m in self.methods)}"
            )
        for method in self.methods:
            method.load_state_dict(state[method.slug])


def compose(methods: Sequence[Method]) -> Pipeline:
    """Join methods into one pipeline; see `Pipeline`."""
    return Pipeline(methods)
