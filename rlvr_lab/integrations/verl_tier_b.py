"""Tier B for verl 0.9.1: a trainer of verl's in which every hook sees what it sees in our loop.

`trainer.v1.trainer_mode=rlvr` selects it, `VERL_USE_EXTERNAL_MODULES=rlvr_lab.integrations.verl_tier_b` makes it known
in every process, and `actor.policy_loss.methods` holds the composition, as in tier A. It is verl's synchronous trainer
with three things changed:

1. `_compute_advantage` builds a `Rollout` from the queue's columns and asks the composition for rewards, filter and
   advantage over all of it. Dropped rows stay in verl's batch, whose size is fixed, and weigh nothing.
2. `_update_actor` deals the optimizer minibatches itself, one `update_actor` call each. Before a call the methods see
   the whole minibatch (with the current policy's log-probs and entropies where they ask for them), and what they decide
   travels with the rows as extra columns: advantage, bounds, token weights, statistics.
3. The loss function, set on the workers by verl's `set_loss_fn`, reads these columns. It sums over tokens with weights
   made over the minibatch, so micro-batches, dynamic batch sizes and ranks change nothing.

Since each minibatch is one call, verl's learning-rate schedule advances per optimizer step and not per rollout; its
horizon is stretched accordingly. The state of the methods is written beside verl's checkpoints (`rlvr_methods.json`).

Not carried: `select` and `sample` (verl's dataset and agent loops), `replay`, refill after a filter
(`algorithm.filter_groups` does that before the batch reaches us), several outputs per sample, the KL in the reward and
verl's own rollout correction (`kl_reference` and `truncated_importance_sampling` are ours).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.metric import AggregationType, Metric, reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested, response_to_nested

from ..core.reduce import masked_mean, reduction_weights
from ..core.rollout import Rollout, pad
from ..errors import UserError
from ..methods.base import CLIP_BOUNDS, CURRENT, LossInputs, Pipeline
from .verl import SETTING, plain, record
from .verl_support import pipeline_of, require_tier

MODE = "rlvr"
STATE_FILE = "rlvr_methods.json"
COLUMN = "rlvr:"
NUMBER, MASK, REDUCTION = COLUMN + "number:", COLUMN + "mask:", COLUMN + "reduction:"
ROW = "verl.row"
READ = ("uid", "prompts", "responses", "response_mask", "rm_scores", "old_log_probs", "rollout_log_probs",
        "ref_log_prob", "entropy", "extra_fields")  # fmt: skip


# -- a minibatch, and what the workers need to know of it -------------------------------------------------------------


def prepare_columns(
    pipeline: Pipeline, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Everything that spans an optimizer minibatch, as columns [B, T] by name: advantage, bounds of the ratio, the
    surrogate's weight (reduction times token weights), the regularisers' reduction weights, and all statistics."""
    batch = pipeline.prepare(batch, advantage_BT, generator)
    reduction, constant = pipeline.reduction
    lower, upper = pipeline.clip(batch, advantage_BT)
    weight = reduction_weights(batch.mask, reduction, constant)
    columns = {COLUMN + "advantage": advantage_BT, COLUMN + "lower": lower, COLUMN + "upper": upper}
    columns[REDUCTION] = weight
    for asked in pipeline.regularise_reductions:
        columns[REDUCTION + asked] = reduction_weights(batch.mask, asked, constant)
    bounds = dict(zip(CLIP_BOUNDS, (lower.detach(), upper.detach()), strict=True))
    for one in pipeline.weights(batch.with_statistics(**bounds), advantage_BT).values():
        weight = weight * one
    columns[COLUMN + "weight"] = weight
    columns[COLUMN + "kept"] = batch.mask
    for name, value in batch.statistics.items():
        columns[(MASK if value.dtype == torch.bool else NUMBER) + name] = value
    return {name: value.float() for name, value in columns.items()}


@dataclass
class TierBLoss:
    """The loss of one micro-batch from its columns; picklable, since verl sends it to its workers.

    `methods` and `state` are the composition's settings and state: a regulariser may have moved its coefficient.
    """

    methods: dict[str, dict[str, Any]]
    state: Mapping[str, Any]
    _pipeline: Pipeline | None = field(default=None, repr=False)

    @property
    def pipeline(self) -> Pipeline:
        """The composition, made in the worker when it is first needed."""
        if self._pipeline is None:
            self._pipeline = pipeline_of(self.methods)
            self._pipeline.load_state_dict(self.state)
        return self._pipeline

    def __call__(self, model_output: Any, data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """Loss, times the number of ranks because verl's engines average gradients over them, and metrics."""
        logprob = no_padding_2_padding(model_output["log_probs"], data)
        entropy = model_output.get("entropy", None)
        if entropy is not None:
            entropy = no_padding_2_padding(entropy, data)
        columns = [name for name in data.keys() if name.startswith(COLUMN)]  # noqa: SIM118  (a TensorDict)
        padded = data.select("old_log_probs", *columns).to_padded_tensor()
        inputs = _loss_inputs(padded, logprob, entropy)
        loss, metrics = _weighted_loss(self.pipeline, inputs, padded)
        ranks = int(data["dp_size"])
        values = {name: value * ranks for name, value in metrics.items()}
        return loss * ranks, Metric.from_dict(values, aggregation=AggregationType.SUM)


def _loss_inputs(data: Any, logprob_BT: Tensor, entropy_BT: Tensor | None) -> LossInputs:
    mask = data[COLUMN + "kept"] > 0
    statistics = {name.removeprefix(NUMBER): data[name] for name in data.keys() if name.startswith(NUMBER)}  # noqa: SIM118
    statistics |= {name.removeprefix(MASK): data[name] > 0 for name in data.keys() if name.startswith(MASK)}  # noqa: SIM118
    old = data["old_log_probs"].masked_fill(~mask, 0.0)
    return LossInputs(
        rollout=record(mask, old_logprob=old, statistics=statistics),
        logprob=logprob_BT,
        old_logprob=old,
        advantage=data[COLUMN + "advantage"],
        lower=data[COLUMN + "lower"],
        upper=data[COLUMN + "upper"],
        entropy=entropy_BT,
    )


def _weighted_loss(pipeline: Pipeline, inputs: LossInputs, data: Any) -> tuple[Tensor, dict[str, float]]:
    """Sum over tokens of weight times loss, as in train/update.py, and shares of the minibatch under verl's names."""
    outside = ~inputs.rollout.mask
    surrogate = pipeline.surrogate(inputs)
    policy = (surrogate.loss.masked_fill(outside, 0.0) * data[COLUMN + "weight"]).sum()
    token = data[REDUCTION]
    metrics = {
        "pg_loss": float(policy.detach()),
        "pg_clipfrac_lower": float((surrogate.clipped_low * token).sum()),
        "pg_clipfrac": float(((surrogate.clipped_low | surrogate.clipped_high) * token).sum()),
        "ppo_kl": float(((inputs.old_logprob - inputs.logprob.detach()).masked_fill(outside, 0.0) * token).sum()),
    }
    loss = policy
    for term in pipeline.regularise(inputs):
        weight = data[REDUCTION + (term.reduction or "")]
        value = (term.loss.masked_fill(outside, 0.0) * weight).sum()
        metrics[f"regularise_{term.slug}"] = float(value.detach())
        loss = loss + value
    return loss, {f"actor/{name}": value for name, value in metrics.items()}


# -- from verl's columns to a rollout ---------------------------------------------------------------------------------


def rollout_from(data: TensorDict, padding: list[bool], limit: int) -> Rollout:
    """verl's rows as a `Rollout`. `padding` marks synthetic rows, which are left out; statistic `verl.row` keeps each
    response's place. `limit` is the longest response that verl samples: one as long is taken as cut off."""
    rows = torch.tensor([i for i, synthetic in enumerate(padding) if not synthetic])
    dense = data.select(*[n for n in READ if n in data and isinstance(data[n], Tensor) and n != "prompts"])
    padded = {name: value[rows] for name, value in dense.to_padded_tensor().items()}
    lengths = data["responses"].offsets().diff()[rows]
    width = padded["responses"].shape[1]
    prompts = [data["prompts"][int(i)].tolist() for i in rows]
    _, group = np.unique(np.asarray(_listed(data, "uid")).astype(str)[rows.numpy()], return_inverse=True)
    group_id = torch.as_tensor(group)
    reward = padded["rm_scores"].float().sum(-1)
    old = padded["old_log_probs"].float()
    statistics = {ROW: rows[:, None].float().expand(-1, width)}
    for name, source in (("token_entropy", "entropy"), ("ref_logprob", "ref_log_prob")):
        if source in padded:
            statistics[name] = padded[source].float()
    return Rollout(
        prompt_id=group_id,
        group_id=group_id,
        finished=lengths < limit,
        policy_version=torch.zeros_like(group_id),
        prompt_ids=pad(prompts, 0, torch.long, left=True),
        prompt_mask=pad([[1] * len(p) for p in prompts], 0, torch.bool, left=True),
        response_ids=padded["responses"].long(),
        response_mask=torch.arange(width) < lengths[:, None],
        action_mask=padded["response_mask"].bool(),
        behaviour_logprob=padded["rollout_log_probs"].float() if "rollout_log_probs" in padded else old,
        behaviour_temperature=torch.ones_like(old),
        old_logprob=old,
        reward=reward,
        reward_components={"verl": reward},
        correct=_correct(data, rows),
        statistics=statistics,
    )


def _listed(data: TensorDict, name: str) -> list[Any]:
    """A column that is no tensor, as a list; tensordict has two types for it."""
    value = data.get(name)
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _correct(data: TensorDict, rows: Tensor) -> Tensor | None:
    """What the reward function called `acc`, where it gave it for every response; None otherwise."""
    if "extra_fields" not in data:
        return None
    extra = _listed(data, "extra_fields")
    info = [(extra[int(i)] or {}).get("reward_extra_info") or {} for i in rows]
    if not all("acc" in one for one in info):
        return None
    return torch.tensor([float(one["acc"]) > 0.5 for one in info])


HINTS = {
    "correct": "a reward function that returns a dictionary with 'acc'",
    "ref_logprob": "actor_rollout_ref.actor.use_kl_loss=true, which makes verl keep the reference policy",
    "token_entropy": "algorithm.rollout_correction.bypass_mode=false, which makes verl score the rollout",
    "old_logprob": "verl's pass over old log-probs",
}


def check_fields(pipeline: Pipeline, rollout: Rollout) -> None:
    """As `Pipeline.check`, with the settings of verl that provide a field. Raises UserError."""
    for method in pipeline.methods:
        for name in method.requires:
            if rollout.statistics.get(name, getattr(rollout, name, None)) is None:
                hint = HINTS.get(name, "nothing that verl records")
                raise UserError(f"method '{method.slug}' needs '{name}'; in verl it comes with {hint}")


# -- the trainer ------------------------------------------------------------------------------------------------------


@register_trainer(MODE)
class RlvrTrainer(PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer with our hooks; see the module's docstring."""

    # verl asks this attribute whether it samples synchronously, by name; the mode's own name is the registry's
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    def __init__(self, config: DictConfig) -> None:
        self.methods = plain(config.actor_rollout_ref.actor.policy_loss.get("methods"))
        if not self.methods:
            raise UserError(f"{SETTING}.methods is empty; name the methods of trainer_mode '{MODE}' there")
        self.pipeline = pipeline_of(self.methods)
        require_tier(self.pipeline, "b")
        check_settings(config)
        self._graded: tuple[Rollout, Tensor] | None = None
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        optimizer = self.config.actor_rollout_ref.actor.optim
        with open_dict(self.config):
            optimizer.total_training_steps *= self._updates_per_step()

    def _updates_per_step(self) -> int:
        actor = self.config.actor_rollout_ref.actor
        return -(-int(self.config.data.train_batch_size) // int(actor.ppo_mini_batch_size)) * int(actor.ppo_epochs)

    def on_init_end(self) -> None:
        """Give the workers our loss, then go on as verl does."""
        self.pipeline.bind(lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.send_loss()
        super().on_init_end()

    def send_loss(self) -> None:
        """Set the loss function on every worker, with the methods' present state."""
        self.actor_rollout_wg.set_loss_fn(TierBLoss(self.methods, self.pipeline.state_dict()))

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        if any(int(key.rsplit("_", 1)[1]) for key in batch.keys):
            raise UserError("trainer_mode 'rlvr' takes one output per sample; this agent loop returns several")
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(READ))
        padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        rollout = rollout_from(data, padding, int(self.config.data.max_response_length))
        check_fields(self.pipeline, rollout)
        self._observed = _measure(rollout)
        rollout = self.pipeline.filter(self.pipeline.reward(rollout))
        rollout, advantage = self.pipeline.credit(rollout) if len(rollout) else (rollout, torch.zeros(0, 1))
        self._graded = rollout, advantage
        metrics["rlvr/rows_kept"] = len(rollout) / max(len(padding) - sum(padding), 1)
        whole = _scatter(rollout, advantage, len(batch), int(data["responses"].offsets().diff().max()))
        nested = response_to_nested(whole, data["response_mask"])
        fields = TensorDict({"advantages": nested, "returns": nested.clone()}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        assert self._graded is not None
        outputs: dict[str, list[Any]] = {}
        seed = int(self.config.actor_rollout_ref.actor.data_loader_seed) * 1_000_003 + self.global_steps
        generator = torch.Generator().manual_seed(seed)
        for kept, keys in self._minibatches(batch, generator):
            part = self._prepared(batch, kept, keys, generator)
            part.extra_info.update(self._update_info(len(part)))
            result = self.actor_rollout_wg.update_actor(part)
            for name, values in rename_dict(result["metrics"], "actor/").items():
                outputs.setdefault(name, []).extend(values if isinstance(values, list) else [values])
        outputs["perf/mfu/actor"] = outputs.pop("actor/mfu", [float("nan")])
        metrics.update(reduce_metrics(outputs))
        self.pipeline.observe(self._observed | {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)})
        if any(self.pipeline.state_dict().values()):
            self.send_loss()
        return batch

    def _minibatches(self, batch: KVBatchMeta, generator: torch.Generator) -> Iterator[tuple[Tensor, list[str]]]:
        """Kept responses of each optimizer minibatch, and the keys of verl's rows that carry it. Dropped rows fill the
        minibatch up to verl's size, which has to divide evenly over ranks and micro-batches."""
        assert self._graded is not None
        rollout, _ = self._graded
        actor = self.config.actor_rollout_ref.actor
        size = int(actor.ppo_mini_batch_size) * int(self.config.actor_rollout_ref.rollout.n)
        places = rollout.statistics[ROW][:, 0].long().tolist() if len(rollout) else []
        spare = sorted(set(range(len(batch))) - set(places))
        for _ in range(int(actor.ppo_epochs)):
            free = list(spare)
            for kept in torch.randperm(len(rollout), generator=generator).tensor_split(max(len(batch) // size, 1)):
                rows = [places[i] for i in kept.tolist()]
                rows += [free.pop() for _ in range(size - len(rows))]
                if len(kept) and bool(rollout.mask[kept].any()):
                    yield kept, [batch.keys[i] for i in self._balanced(batch, rows)]

    def _balanced(self, batch: KVBatchMeta, rows: list[int]) -> list[int]:
        """The rows in an order that gives every rank about as many tokens; verl hands each rank a contiguous part."""
        ranks = max(self._dispatch_info()) + 1
        lengths = [int(batch.tags[i]["seq_len"]) for i in rows]
        parts = get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True)
        return [rows[i] for part in parts for i in part]

    def _dispatch_info(self) -> list[int]:
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        ranks: list[int] = group._dispatch_info["actor"]
        return ranks

    def _prepared(self, batch: KVBatchMeta, kept: Tensor, keys: list[str], generator: torch.Generator) -> KVBatchMeta:
        """One minibatch with its columns in the queue."""
        assert self._graded is not None
        rollout, advantage = self._graded
        part = batch.select_keys(keys)
        part.fields = None  # all that the queue holds, the new columns among it
        minibatch = rollout.rows(kept)
        if self.pipeline.any("needs_current"):
            minibatch = self._with_current(part, batch, minibatch)
        width = minibatch.response_ids.shape[1]
        columns = prepare_columns(self.pipeline, minibatch, advantage[kept][:, :width], generator)
        index = {key: i for i, key in enumerate(batch.keys)}
        order = torch.tensor([index[key] for key in keys])
        mask = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        longest = int(mask["response_mask"].offsets().diff().max())
        nested = {
            name: response_to_nested(_scatter(minibatch, value, len(batch), longest)[order], mask["response_mask"])
            for name, value in columns.items()
        }
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(nested, batch_size=len(keys)))
        return part

    def _with_current(self, part: KVBatchMeta, batch: KVBatchMeta, minibatch: Rollout) -> Rollout:
        """Log-probs and entropies of the policy as it is before this minibatch, from verl's scoring pass."""
        temperature = self.config.actor_rollout_ref.rollout.temperature
        part.extra_info.update({"calculate_entropy": True, "compute_loss": False, "temperature": temperature})
        self.actor_rollout_wg.compute_log_prob(part)
        names = ["log_probs", "entropy", "response_mask"]
        data = tq.kv_batch_get(keys=part.keys, partition_id=part.partition_id, select_fields=names)
        row = {key: i for i, key in enumerate(part.keys)}
        places = minibatch.statistics[ROW][:, 0].long().tolist()
        order = torch.tensor([row[batch.keys[i]] for i in places])
        width = minibatch.response_ids.shape[1]
        found = {}
        for ours, theirs in zip(CURRENT, ("log_probs", "entropy"), strict=True):
            nested = response_from_nested(data[theirs], data["response_mask"])
            found[ours] = nested.to_padded_tensor(0.0)[order][:, :width].float()
        return minibatch.with_statistics(**found)

    def _update_info(self, rows: int) -> dict[str, Any]:
        actor = self.config.actor_rollout_ref.actor
        return {
            "calculate_entropy": self.pipeline.any("needs_entropy"),
            "distillation_use_topk": False,
            "distillation_only": False,
            "global_batch_size": rows,
            "mini_batch_size": rows,
            "epochs": 1,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},
            "temperature": self.config.actor_rollout_ref.rollout.temperature,
        }

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder / STATE_FILE, self.pipeline)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            folder = Path(self.config.trainer.get("resume_from_path") or self.config.trainer.default_local_dir)
            step = f"global_step_{self.global_steps}"
            load_state((folder if folder.name == step else folder / step) / STATE_FILE, self.pipeline)


def check_settings(config: DictConfig) -> None:
    """Refuse settings of verl that would act beside the composition unseen. Raises UserError."""
    correction = config.algorithm.get("rollout_correction") or {}
    actor = config.actor_rollout_ref.actor
    wrong = {
        "algorithm.use_kl_in_reward": (config.algorithm.use_kl_in_reward, "methods kl_reference"),
        "algorithm.rollout_correction.rollout_is": (
            correction.get("rollout_is"),
            "methods truncated_importance_sampling",
        ),
        "algorithm.rollout_correction.rollout_rs": (correction.get("rollout_rs"), "methods with a filter"),
        "actor_rollout_ref.actor.entropy_coeff": (actor.entropy_coeff, "methods entropy_bonus"),
    }
    for name, (value, instead) in wrong.items():
        if value:
            raise UserError(f"{name}={value} has no effect under trainer_mode 'rlvr'; leave it off and use {instead}")


def _measure(rollout: Rollout) -> dict[str, float]:
    """What methods may observe of the rollout, under the names of our own loop; nan where verl did not record it."""
    entropy = rollout.statistics.get("token_entropy")
    assert rollout.reward is not None
    return {
        "token_entropy": float("nan") if entropy is None else float(masked_mean(entropy, rollout.mask)),
        "behaviour_logprob": float(masked_mean(rollout.behaviour_logprob, rollout.mask)),
        "reward": float(rollout.reward.mean()),
        "mean_tokens": float(rollout.lengths.float().mean()),
    }


def _scatter(rollout: Rollout, value_BT: Tensor, rows: int, width: int) -> Tensor:
    """Values of the kept responses in verl's row order [rows, width], 0 for the others."""
    whole = torch.zeros(rows, width)
    if len(rollout):
        places = rollout.statistics[ROW][:, 0].long()
        whole[places, : value_BT.shape[1]] = value_BT.float()
    return whole


# -- state of the methods ---------------------------------------------------------------------------------------------


def save_state(path: Path, pipeline: Pipeline) -> None:
    """Write the methods' state as JSON, under another name first, so that a torn file never stands there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(pipeline.state_dict(), default=_tensor), encoding="utf-8")
    os.replace(partial, path)


def _tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(f"a method's state holds a {type(value).__name__}")


def load_state(path: Path, pipeline: Pipeline) -> None:
    """Take up what `save_state` wrote. Raises UserError where the file is missing or of another composition."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"), object_hook=_untensor)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the methods' state {path}: {error}") from error
    pipeline.load_state_dict(state)


def _untensor(value: dict[str, Any]) -> Any:
    if set(value) == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value
