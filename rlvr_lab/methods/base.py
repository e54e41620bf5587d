"""How a published method enters the training loop: one object, a few hooks, composable.

Every composition is **a baseline plus a change**. One *base* method (GRPO) owns everything an update needs: advantage,
clip bounds, surrogate and reduction. Any other method that implements one of these exclusive hooks takes it over; the
rest stays the base's. Two methods that both take over one hook are refused. Chained hooks are combined in the order
given. The loop asks the composed `Pipeline` and never asks for a method by name.

| hook | sees | returns | combination |
|---|---|---|---|
| `trainable` | parameters of the starting policy by name | names of those that train | exclusive |
| `select` | task pool, step | problem indices | exclusive |
| `sample` | engine, prompts | `Rollout` | exclusive |
| `temper` | its own state | `TemperatureRule` for this step's sampling, or None | exclusive |
| `lens` | step, number of layers | `Lens`: whose policy this step trains; None is the model's own | exclusive |
| `reward` | rollout with statistics | reward components by name, [B] each | all are added |
| `filter` | graded rollout | rollout with rows dropped or tokens unmarked | one after the other |
| `advantage` | whole rollout | advantage [B, T] | exclusive |
| `channels` | whole rollout, advantage | further advantage channels [B, T] by name | all are recorded |
| `replay` | whole rollout, advantage | earlier responses with their advantage [b, T], or None | exclusive |
| `prepare` | optimizer minibatch, advantage, generator | token statistics [B, T] by name | all are recorded |
| `weight` | optimizer minibatch, advantage | token weights [B, T] of the surrogate | multiplied |
| `clip` | optimizer minibatch, advantage | lower and upper bound of the ratio | exclusive |
| `read_old_logits` | log-probs [b, T, V] before the update | token statistics by name | all are recorded |
| `read_logits` | log-probs [b, T, V] of the policy being updated | token statistics by name | all are recorded |
| `surrogate` | micro-batch (`LossInputs`) | per-token loss (`Surrogate`) | exclusive |
| `regularise` | micro-batch (`LossInputs`) | extra per-token loss [b, T] | all are added |
| `observe` | step metrics | nothing; changes its own state | all are told |

`trainable` is asked once, before the optimizer is made, and everything it leaves out is frozen; without an owner all
parameters train. A run that is resumed gives the method its state first, and it then answers as it did at the start.

`channels` exists for what must be known of the whole rollout and is no advantage of its own, such as a second one that
a surrogate blends with the first. What it returns are statistics of the rollout from then on.

`sample` is given an engine that continues any prefix (`extend`); a method that branches keeps `core.paths.Path`s and
makes its rollout of them. `engine.turns` plays an environment and is None for a plain task.

What `replay` returns is learned from beside the new responses: dealt over the same minibatches, its importance ratios
against the log-probs stored when it was sampled, and reduced for itself, so that the loss is the reduction over new
rows plus that over replayed ones (`Rollout.replayed`); a factor between the two is a `weight`. It is asked once per
rollout, after `channels`, and its order is to draw first and to store the present rollout afterwards.

`prepare` exists so that choices which span the minibatch (top-k, quantiles, covariances) are made before it is split
into micro-batches. `weight` multiplies the surrogate alone; regularisers are reduced over all tokens.

Statistics that need the whole distribution are read from the logits, because no one keeps [B, T, V]. `read_old_logits`
is asked once per rollout, when it is scored (`update.recompute_old_logprob: true`); `read_logits` once over the
minibatch without gradient, for `prepare`, and again in every micro-batch with gradient (`LossInputs.statistics`).

`temper` is asked once per step. The engine applies the rule token by token while it samples: it knows entropies and
factors, and no method. Behaviour log-probs are then those of each token's own temperature, and the policy's stay those
of `rollout.temperature`.

`lens` is asked once per step and at the start. The loss then is a layer's: `LossInputs.logprob`, `entropy` and
`statistics`, the minibatch's `old_logprob` and `CURRENT` are of that layer's policy, and layers above it have no
gradient. The rollout keeps the real policy's: `token_entropy`, and `old_logprob` up to the update. What compares the
two in the loss (a reference, the sampler, earlier responses) cannot stand beside it and is refused.

Beside the hooks a method may speak: `metrics` adds figures to the step's, `notices` tells the user something once, and
`check_run` refuses, before the first step, what cannot be right for the run. `bind` comes before it and turns texts of
the settings, such as an end-of-thinking marker, into token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.lens import Lens
from ..core.losses import Surrogate
from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..core.temperature import TemperatureRule
from ..errors import UserError

EXCLUSIVE = ("trainable", "select", "sample", "temper", "lens", "advantage", "replay", "clip", "surrogate")
CHAINED = (
    "reward",
    "filter",
    "channels",
    "prepare",
    "weight",
    "regularise",
    "observe",
    "read_old_logits",
    "read_logits",
)
HOOKS = ("trainable", "select", "sample", "temper", "lens", "read_old_logits", "reward", "filter", "advantage",
         "channels", "replay", "read_logits", "prepare", "weight", "clip", "surrogate", "regularise",
         "observe")  # fmt: skip
NEEDED = ("advantage", "clip", "surrogate", "reduction")
Encode = Callable[[str], list[int]]
CURRENT = ("current_logprob", "current_entropy")
"""Statistics of the policy being updated, scored over the whole minibatch for methods with `needs_current`."""
MOMENTS = ("current_collision", "current_cross")
"""The same for methods with `needs_moments`: sum of p^2 and sum of p^2 log p over the vocabulary."""
CLIP_BOUNDS = ("clip_lower", "clip_upper")
"""Bounds of the ratio, by whoever owns `clip`; in the minibatch when `weight` is asked."""


@dataclass(frozen=True)
class LossInputs:
    """What a micro-batch loss may use. All [b, T]; `logprob` and `entropy` carry gradient.

    `entropy` is None unless some method of the composition sets `needs_entropy`. Batch-level statistics are not
    computed here: they arrive inside `advantage`, `lower`, `upper` and `rollout.statistics`, which were made over the
    whole minibatch.
    """

    rollout: Rollout
    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    lower: Tensor
    upper: Tensor
    entropy: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """What `read_logits` of the composition's methods found, with gradient."""


@dataclass(frozen=True)
class Term:
    """One method's extra loss [b, T]; a `reduction` of None is the surrogate's."""

    slug: str
    reduction: Reduction | None
    loss: Tensor


class Method:
    """Base of all methods. `slug` names module, settings and checkpoint entry."""

    slug: ClassVar[str]
    requires: tuple[str, ...] = ()
    """Rollout fields and statistics that must be there before the first update."""
    is_base: ClassVar[bool] = False
    """True for a method whose exclusive hooks others may take over."""
    needs_current: ClassVar[bool] = False
    """True where `prepare` reads `current_logprob` or `current_entropy`; costs one more forward pass."""
    needs_moments: bool = False
    """True where `weight` reads the statistics `MOMENTS` too."""
    needs_entropy: ClassVar[bool] = False
    """True where the loss reads `LossInputs.entropy`."""
    learns_without_advantage: ClassVar[bool] = False
    """True where a response of zero advantage has a gradient all the same, such as through a term in the surrogate."""
    rescored: ClassVar[bool] = False
    """True where log-probs recorded while sampling cannot serve as the old ones: `update.recompute_old_logprob`."""
    replaces_reward: ClassVar[bool] = False
    """True where the method's reward stands in place of the task's, instead of being added to it."""
    refill: int = 0
    """Most generation batches that may be drawn to replace the rows which `filter` dropped; 0 draws none."""
    replay_rows: int = 0
    """Most responses that `replay` returns at once; the planner counts them."""
    reduction: Reduction | None = None
    """Reduction of the loss. Owned like an exclusive hook; None leaves it to the base."""
    reduction_constant: float | None = None
    regularise_reduction: Reduction | None = None
    """Reduction of the method's `regularise` term; None takes the surrogate's."""

    @property
    def importance_cap(self) -> float | None:
        """Largest weight from sampler to policy, where the method corrects for their difference; None where not."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold: numbers, strings, lists and tensors only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        if state:
            raise UserError(f"checkpoint holds state for method '{self.slug}', which keeps none")

    def bind(self, encode: Encode) -> None:
        """Told once, when the tokenizer is known and before `check_run`, how a text becomes token ids (without special
        tokens). Raises UserError for a text of the settings that the method cannot find in this vocabulary."""

    def check_run(self, vocabulary: int, steps: int) -> None:
        """Asked once the model is loaded. Raises UserError for a setting that this run cannot fulfil."""

    def metrics(self) -> dict[str, float]:
        """Figures of the step just made, by name; logged as `<slug>.<name>`. Asked once per step, after the update;
        the same in every process."""
        return {}

    def notices(self) -> list[str]:
        """One-line messages for the user that have come up since the last call; each only once."""
        return []

    def has(self, hook: str) -> bool:
        """Whether the method implements a hook, or sets the reduction."""
        return self.reduction is not None if hook == "reduction" else callable(getattr(self, hook, None))


class Pipeline:
    """Several methods as one. Raises UserError where two own one exclusive hook, or where a needed owner is missing."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = tuple(methods)
        self._refuse_repetition()
        self.chains = {hook: [m for m in self.methods if m.has(hook)] for hook in CHAINED}
        self.owners = {hook: self._find_owner(hook) for hook in (*EXCLUSIVE, "reduction")}
        for hook in NEEDED:
            if self.owners[hook] is None:
                raise UserError(f"no method of this composition owns the hook '{hook}'; add a base such as 'grpo'")
        self._refuse_beside_a_lens()

    def _refuse_repetition(self) -> None:
        slugs = [m.slug for m in self.methods]
        for slug in slugs:
            if slugs.count(slug) > 1:
                raise UserError(f"method '{slug}' stands twice in this composition")
        for what, some in (
            ("are both bases", [m for m in self.methods if m.is_base]),
            ("both replace the reward", [m for m in self.methods if m.replaces_reward]),
        ):
            if len(some) > 1:
                raise UserError(f"'{some[0].slug}' and '{some[1].slug}' {what}; a composition can hold one of them")

    def _find_owner(self, hook: str) -> Method | None:
        able = [m for m in self.methods if m.has(hook)]
        changes = [m for m in able if not m.is_base]
        if hook == "reduction":
            # a loss is written for its own reduction; elsewhere a reduction is a choice of its own
            surrogates = [m for m in changes if m.has("surrogate")]
            changes = surrogates or changes
        if len(changes) > 1:
            owners = " and ".join(f"'{m.slug}'" for m in changes)
            raise UserError(f"{owners} both own the hook '{hook}'; a composition can hold one of them")
        found = changes or able
        return found[0] if found else None

    def _refuse_beside_a_lens(self) -> None:
        owner = self.owners["lens"]
        if owner is None:
            return
        for method in self.methods:
            in_loss = method.has("regularise") or method.has("surrogate")
            reasons = {
                "compares with the log-probs of a reference model": in_loss and "ref_logprob" in method.requires,
                "corrects from the sampler to the policy": method.importance_cap is not None,
                "learns from earlier responses": method.has("replay"),
            }
            for why, applies in reasons.items():
                if applies:
                    raise UserError(f"'{owner.slug}' trains the policy of a layer, and '{method.slug}' {why}, which is "
                                    "of another policy; leave one of the two out")  # fmt: skip

    def any(self, attribute: str) -> bool:
        """Whether some method sets a class attribute such as `needs_current`."""
        return any(getattr(m, attribute) for m in self.methods)

    @property
    def refill(self) -> int:
        """Most generation batches of a step; 0 where one batch is all."""
        return max(m.refill for m in self.methods)

    @property
    def importance_cap(self) -> float | None:
        """The cap of the method that corrects for the sampler; None where none does."""
        return next((m.importance_cap for m in self.methods if m.importance_cap is not None), None)

    @property
    def keeps_every_row(self) -> bool:
        """True where a response of zero advantage still has a gradient, so that none may be skipped."""
        return bool(self.chains["regularise"]) or self.any("learns_without_advantage")

    def owner(self, hook: str) -> Any:
        """The only owner of an exclusive hook, or None."""
        return self.owners[hook]

    def needs(self, field: str) -> bool:
        """Whether some method requires a rollout field or statistic."""
        return any(field in m.requires for m in self.methods)

    def check(self, rollout: Rollout) -> None:
        """Fail before the first update where a method needs a field that the rollout lacks."""
        for method in self.methods:
            for name in method.requires:
                rollout.require(name, by=method.slug)

    def bind(self, encode: Encode) -> None:
        """Tell every method how a text becomes token ids."""
        for method in self.methods:
            method.bind(encode)

    def check_run(self, vocabulary: int, steps: int) -> None:
        """Let every method refuse what it cannot do with so many words and steps. Raises UserError."""
        for method in self.methods:
            method.check_run(vocabulary, steps)

    def temper(self) -> TemperatureRule | None:
        """How this step's sampling temperature follows entropy; None where it does not."""
        owner = self.owner("temper")
        rule: TemperatureRule | None = owner.temper() if owner else None
        return rule

    def lens(self, step: int, model: Any) -> Lens | None:
        """Whose policy step `step` (from 0) trains; None for the model's own. Of a transformers `model` only the number
        of layers is read, and only where a method has the hook. Raises UserError for a layer that it lacks."""
        owner = self.owner("lens")
        if owner is None:
            return None
        depth = int(model.config.num_hidden_layers)
        lens: Lens | None = owner.lens(step, depth)
        return None if lens is None or lens.layer == depth else lens

    # -- over the whole rollout ---------------------------------------------------------------------------------

    def reward(self, rollout: Rollout) -> Rollout:
        """Add every method's reward components and set `reward` to their sum."""
        components = {} if self.any("replaces_reward") else dict(rollout.reward_components)
        for method in self._chain("reward"):
            added = method.reward(rollout)
            if clash := sorted(components.keys() & added.keys()):
                raise UserError(f"method '{method.slug}' names a reward component '{clash[0]}' that exists already")
            components |= added
        total = torch.stack(list(components.values())).sum(0)
        return rollout.with_(reward_components=components, reward=total)

    def filter(self, rollout: Rollout) -> Rollout:
        """The rollout after every method has dropped rows or unmarked tokens."""
        for method in self._chain("filter"):
            rollout = method.filter(rollout)
        return rollout

    def advantage(self, rollout: Rollout) -> Tensor:
        """Advantage [B, T], zero outside the mask, without gradient."""
        value: Tensor = self.owner("advantage").advantage(rollout)
        return value.detach().masked_fill(~rollout.mask, 0.0)

    def credit(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """The rollout with every method's further channels recorded, and its advantage [B, T]."""
        advantage = self.advantage(rollout)
        for method in self._chain("channels"):
            found = method.channels(rollout, advantage)
            rollout = rollout.with_statistics(**{k: v.detach().masked_fill(~rollout.mask, 0) for k, v in found.items()})
        return rollout, advantage

    def replay(self, rollout: Rollout, advantage_BT: Tensor) -> tuple[Rollout, Tensor] | None:
        """Earlier responses to learn from beside the rollout, with their advantage [b, T]; None without any."""
        owner = self.owner("replay")
        found: tuple[Rollout, Tensor] | None = owner.replay(rollout, advantage_BT) if owner else None
        return found

    def reader(self, old: bool = False) -> Callable[[Tensor, Tensor], dict[str, Tensor]] | None:
        """What all methods read from log-probs [..., V] and ids [...], as one function; None where none reads.

        `old`: of the policy before the update, else of the one being updated.
        """
        hook = "read_old_logits" if old else "read_logits"
        methods = self._chain(hook)
        if not methods:
            return None

        def read(log_p: Tensor, ids: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for method in methods:
                found |= getattr(method, hook)(log_p, ids)
            return found

        return read

    # -- over the optimizer minibatch ---------------------------------------------------------------------------

    def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> Rollout:
        """The minibatch with every method's token statistics recorded."""
        for method in self._chain("prepare"):
            batch = batch.with_statistics(**method.prepare(batch, advantage_BT, generator))
        return batch

    def weights(self, batch: Rollout, advantage_BT: Tensor) -> dict[str, Tensor]:
        """Token weights [B, T] of every method that has some, zero outside the mask."""
        outside = ~batch.mask
        return {m.slug: m.weight(batch, advantage_BT).masked_fill(outside, 0.0) for m in self._chain("weight")}

    def clip(self, batch: Rollout, advantage_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the importance ratio, each [B, T]."""
        lower, upper = self.owner("clip").clip(batch, advantage_BT)
        return torch.broadcast_to(lower, advantage_BT.shape), torch.broadcast_to(upper, advantage_BT.shape)

    # -- over a micro-batch -------------------------------------------------------------------------------------

    def surrogate(self, inputs: LossInputs) -> Surrogate:
        """The surrogate's per-token loss, without weights and regularisers."""
        surrogate: Surrogate = self.owner("surrogate").surrogate(inputs)
        return surrogate

    def regularise(self, inputs: LossInputs) -> list[Term]:
        """Extra per-token losses [b, T], each with the reduction it asks for."""
        return [Term(m.slug, m.regularise_reduction, m.regularise(inputs)) for m in self._chain("regularise")]

    @property
    def reduction(self) -> tuple[Reduction, float | None]:
        """Reduction of the loss, and its constant."""
        owner = self.owner("reduction")
        return owner.reduction, owner.reduction_constant

    @property
    def regularise_reductions(self) -> tuple[Reduction, ...]:
        """Reductions that regularisers ask for beside the surrogate's."""
        asked = {m.regularise_reduction for m in self._chain("regularise")} - {None}
        return tuple(sorted(asked))

    # -- after the step -----------------------------------------------------------------------------------------

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Tell every method how the step went."""
        for method in self._chain("observe"):
            method.observe(metrics)

    def metrics(self) -> dict[str, float]:
        """Every method's own figures of the step, as `<slug>.<name>`."""
        return {f"{m.slug}.{name}": value for m in self.methods for name, value in m.metrics().items()}

    def notices(self) -> list[str]:
        """What methods have to tell the user since the last call."""
        return [text for m in self.methods for text in m.notices()]

    def _chain(self, hook: str) -> list[Any]:
        return list(self.chains[hook])

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

    def describe(self) -> str:
        """Who owns what, for people: `advantage grpo, clip clip_higher, ...; weight steer`."""
        owned = ", ".join(f"{hook} {m.slug}" for hook, m in self.owners.items() if m is not None)
        chained = ", ".join(f"{hook} {'+'.join(m.slug for m in ms)}" for hook, ms in self.chains.items() if ms)
        return f"{owned}; {chained}" if chained else owned
