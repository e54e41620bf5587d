"""What a training engine that is not ours needs of a composition, in tensors alone: minibatches, micro-batches, losses.

The engine calls `deal` for the minibatches of a rollout, `Parts.prepare` for what spans one of them, `micro_batches`
for the rows of each forward pass, and `Parts.loss` with its own log-probs. It is the mathematics of
`train.update.Updater`, which runs the model itself. Needs no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.rollout import Rollout
from ..errors import UserError
from ..methods import build, compose
from ..methods.base import CLIP_BOUNDS, CURRENT, MOMENTS, Method, Pipeline
from ..policy.forward import TokenView
from ..tasks.agents.base import Environment
from ..tasks.registry import task as make_task
from ..train.metrics import rollout_metrics
from ..train.parallel import World
from ..train.update import Minibatch, Updater, UpdateTotals

Methods = Mapping[str, Mapping[str, Any] | None] | Sequence[Method | str | Mapping[str, Mapping[str, Any] | None]]
"""Methods, slugs, or settings by slug."""

NOT_IN_TRL = {
    "trainable": "it freezes parameters before the optimizer is made, which is TRL's (freeze them yourself, by "
    "policy.freeze.train_only, before the model is given to the trainer)",
    "select": "it chooses problems, and TRL's sampler deals the dataset",
    "sample": "it samples in its own way, and TRL generates",
    "replay": "it learns from responses of earlier steps, and TRL trains on those it has just generated",
    "temper": "it sets the temperature of every token while sampling, and TRL generates at one",
    "lens": "it trains the policy of one layer, and TRL's forward pass gives the log-probs of the last one only",
    "read_logits": "TRL's forward pass does not keep the whole distribution of a token",
    "read_old_logits": "TRL's forward pass does not keep the whole distribution of a token",
}
CARRIED = frozenset(
    {"prompt_id", "group_id", "finished", "policy_version", "prompt_ids", "prompt_mask", "response_ids",
     "response_mask", "action_mask", "behaviour_logprob", "behaviour_temperature", "old_logprob", "reward", "correct",
     "answer", "token_entropy", "ref_logprob", *CURRENT, *MOMENTS, *CLIP_BOUNDS}
)  # fmt: skip
"""Rollout fields and statistics that a generation batch of TRL gives, or that we score."""
STATE = "rlvr_methods"


def pipeline_of(methods: Methods) -> Pipeline:
    """A composition of methods, slugs, or settings by slug. Raises UserError as `build` and `compose` do."""
    some: list[Method] = []
    for entry in [methods] if isinstance(methods, Mapping) else methods:
        if isinstance(entry, Method):
            some.append(entry)
        elif isinstance(entry, str):
            some.append(build(entry, {}))
        else:
            some += [build(slug, settings or {}) for slug, settings in entry.items()]
    return compose(some)


def unsupported(pipeline: Pipeline) -> str | None:
    """Why TRL cannot carry a composition, with the method and the reason; None where it can.

    Of the registered methods it cannot carry `agentic_aepo`, `arbitrary_entropy`, `bupo`, `empo`, `ettrl`, `kappatune`,
    `lp_reg`, `siren`, `spear`, `tp_grpo` and `ucas`; `ares` only where it counts no trigger words, `cure` only in its
    second stage (n2 0), `hapo` only with tau 0.
    """
    for method in pipeline.methods:
        for hook, reason in NOT_IN_TRL.items():
            if method.has(hook):
                instead = f"switch it off (methods.{method.slug}.tau: 0) or use" if hook == "temper" else "use"
                return f"TRL cannot carry '{method.slug}': {reason} (hook '{hook}'); {instead} rlvr-lab train"
        for field in method.requires:
            if field not in CARRIED:
                return f"TRL cannot carry '{method.slug}': it needs '{field}', which TRL's generation batch lacks"
    return None


def adapter_targets(lora: Any, engine: str) -> list[str] | str:
    """`target_modules` of an engine's LoRA for `model.lora`. Raises UserError for a choice by condition numbers, which
    needs the weights."""
    if lora.kappa:
        raise UserError(
            f"model.lora.kappa chooses layers by their weights, which an export to {engine} does not load; name the "
            "layers in model.lora.targets (methods.kappatune.adapter_targets gives their names)"
        )
    return list(lora.targets) or "all-linear"


def refuse_turns(task: str, engine: str) -> None:
    """Raise UserError for a task (`data.task`) that is an environment, which the `engine` named cannot play."""
    if isinstance(make_task(task), Environment):
        raise UserError(
            f"data.task '{task}' is an environment that answers turn by turn, and what we give {engine} samples one "
            "answer to each prompt; train it with rlvr-lab train"
        )


def refuse_optimizer(name: str, engine: str) -> None:
    """Raise UserError for an optimizer (`optimizer.name`) that the `engine` named is not given."""
    if name != "adamw":
        raise UserError(f"optimizer.name {name} is of our own loop, and {engine} brings AdamW; train it with rlvr-lab "
                        "train, or set optimizer.name=adamw and its own optimizer.lr")  # fmt: skip


# -- rollout to micro-batches -----------------------------------------------------------------------------------


def problem_numbers(inputs: Sequence[Mapping[str, Any]], output: Mapping[str, Tensor]) -> Tensor:
    """One number per row [b]: the column `problem_id` of the dataset, else a hash of the prompt's tokens."""
    if "problem_id" in inputs[0]:
        return torch.tensor([int(x["problem_id"]) for x in inputs])
    rows = zip(output["prompt_ids"].tolist(), output["prompt_mask"].tolist(), strict=True)
    texts = (",".join(str(i) for i, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests])


def deal(
    rollout: Rollout, advantage: Tensor, generator: torch.Generator, minibatches: int, epochs: int, skip: int = 0
) -> Iterator[tuple[Rollout, Tensor] | None]:
    """Exactly `minibatches` shares of every epoch, with their advantages; None for one without a token.

    Rows are dealt as by `Updater.run` with the same generator. The first `skip` shares are dealt and passed over.
    """
    for epoch in range(epochs):
        order = torch.randperm(len(rollout), generator=generator, device=generator.device).to(advantage.device)
        parts = order.tensor_split(min(minibatches, len(rollout)))
        for i in range(minibatches):
            if epoch * minibatches + i < skip:
                continue
            batch = rollout.rows(parts[i]) if i < len(parts) else None
            if batch is None or not bool(batch.mask.any()):
                yield None
            else:
                yield batch, advantage[parts[i]][:, : batch.response_ids.shape[1]]


def micro_batches(whole: Minibatch, skip: bool, size: int, count: int, world: World) -> list[Tensor]:
    """Rows of this rank for each of exactly `count` micro-batches, at most `size` each; the first may be empty.

    Longest rows first, so that a micro-batch has little padding; micro-batches are dealt to the ranks in turn. `skip`
    leaves out rows without gradient. Raises ValueError where the rows do not fit.
    """
    keep = whole.live_rows() if skip else whole.rollout.mask.any(1)
    rows = keep.nonzero().squeeze(1)
    rows = rows[whole.rollout.lengths[rows].argsort(descending=True, stable=True)]
    mine = world.deal(torch.split(rows, size) if len(rows) else [])
    if len(mine) > count:
        raise ValueError(f"{len(rows)} rows do not fit into {count} micro-batches of {size} on {world.size} ranks")
    nothing = rows[:0]
    return [nothing] * (count - len(mine)) + [nothing if part is None else part for part in mine]


class Parts(Updater):
    """An `Updater` whose forward passes another engine makes: it prepares minibatches and gives the loss of a share.

    `score(batch, names)` returns the statistics `CURRENT` and `MOMENTS` that are asked for, [B, T] each.
    """

    def __init__(
        self, model: Any, pipeline: Pipeline, score: Callable[[Rollout, list[str]], dict[str, Tensor]]
    ) -> None:
        super().__init__(model, None, pipeline)  # type: ignore[arg-type]
        self.score = score

    def _current(self, batch: Rollout) -> dict[str, Tensor]:
        names = [*CURRENT] if self.pipeline.any("needs_current") or self.pipeline.any("needs_moments") else []
        names += [*MOMENTS] if self.pipeline.any("needs_moments") else []
        return self.score(batch, names) if names else {}

    def loss(
        self,
        whole: Minibatch,
        rows: Tensor,
        micro: Rollout,
        logprob: Tensor,
        entropy: Tensor | None,
        totals: UpdateTotals,
    ) -> Tensor:
        """Share of the rows `rows` (their rollout is `micro`) in the minibatch's loss; counts it in `totals`.

        `logprob` and, where a method needs it, `entropy` are [b, T] with gradient.
        """
        loss = self.loss_of(whole, rows, micro, TokenView(logprob, entropy, None), totals)
        totals.loss += float(loss.detach())
        return loss


def shown_metrics(rollout: Rollout) -> dict[str, float]:
    """The figures of `rollout_metrics`, without those that need verdicts or answers where there are none."""
    unknown: set[str] = set()
    if rollout.correct is None:
        unknown |= {"accuracy", "distinct_correct"}
        rollout = rollout.with_(correct=torch.zeros_like(rollout.finished))
    if rollout.answer is None:
        unknown |= {"answer_entropy", "no_answer", "distinct_correct"}
        rollout = rollout.with_(answer=(None,) * len(rollout))
    return {name: value for name, value in rollout_metrics(rollout).items() if name not in unknown}


# -- state ------------------------------------------------------------------------------------------------------


def save_methods(folder: str | Path, pipeline: Pipeline) -> None:
    """Write the methods' state into a checkpoint of another engine: JSON, and safetensors for tensors."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for slug, state in pipeline.state_dict().items():
        plain[slug] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        tensors |= {f"{slug}.{k}": v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    save_file(tensors, Path(folder) / f"{STATE}.safetensors")
    (Path(folder) / f"{STATE}.json").write_text(json.dumps(plain, indent=1))


def load_methods(folder: str | Path, pipeline: Pipeline) -> None:
    """Take up what `save_methods` wrote. Raises UserError for a checkpoint without it, or of another composition."""
    path = Path(folder) / f"{STATE}.json"
    try:
        states: dict[str, dict[str, Any]] = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no state of methods that can be read: {error}") from error
    for name, tensor in tensors.items():
        slug, key = name.split(".", 1)
        states[slug][key] = tensor
    pipeline.load_state_dict(states)
