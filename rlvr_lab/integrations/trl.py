"""Any composition of methods inside TRL's GRPOTrainer (TRL 1.16): TRL generates and steps, the methods do the rest.

    trainer = RlvrGRPOTrainer(model, reward, GRPOConfig(...), dataset, methods={"clip_cov": {"preset": "paper"}})
    trainer.train()

| from TRL | from the composition |
|---|---|
| data, generation (transformers or vLLM), reward functions, reference model | rewards, filters, refill, advantages |
| forward pass, optimizer, schedule, sharding, checkpoints, logs | weights, clip, surrogate, regularisers, reduction |

Every rank holds the whole gathered rollout and draws the same minibatches from it, so that advantages span the
generation batch, and all statistics of a minibatch span the optimizer step: every micro-batch of every rank.
Micro-batches only sum, as in `train.update`, and rows without gradient are left out. So the result does not depend on
`per_device_train_batch_size`, on gradient accumulation, or on the number of processes; in TRL itself it does for
quantiles, and for means over unequal micro-batches.

Left to the methods, and refused where set in GRPOConfig: see `OWNED`. A prompt may be text, messages, or token ids.
The tests run it in one process and in two (DDP, gloo). FSDP 2, DeepSpeed, peft and generation with vLLM are TRL's and
accelerate's own paths, written for and not run here; FSDP 1 is refused where a method needs moments.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ..core.rollout import Rollout
from ..core.rows import concatenate
from ..errors import UserError
from ..methods.base import CURRENT, Pipeline
from ..policy.forward import scored_fields
from ..train.metrics import sampler_metrics
from ..train.parallel import World
from ..train.seeds import numpy_generator, torch_generator
from ..train.update import Minibatch, TrainingStopped, UpdateTotals
from .exchange import (
    Methods,
    Parts,
    deal,
    load_methods,
    micro_batches,
    pipeline_of,
    problem_numbers,
    save_methods,
    shown_metrics,
    unsupported,
)

_log = logging.getLogger(__name__)
OWNED = {
    "loss_type": "a method with a surrogate, such as cispo or sapo, and its `reduction`",
    "epsilon": "methods.grpo.clip_low and clip_high, or clip_higher",
    "epsilon_high": "clip_higher",
    "delta": "methods.grpo.dual_clip",
    "beta": "kl_reference",
    "entropy_coef": "entropy_bonus",
    "use_adaptive_entropy": "adaptive_entropy",
    "top_entropy_quantile": "a method with a `weight` hook",
    "scale_rewards": "the method that owns `advantage`, such as dr_grpo",
    "multi_objective_aggregation": "the method that owns `advantage`",
    "importance_sampling_level": "gspo",
    "off_policy_mask_threshold": "a method with a `weight` hook",
    "mask_truncated_completions": "overlong with preset filtering",
    "use_bias_correction_kl": "kl_reference",
}
"""Settings of GRPOConfig that belong to the methods, and what to use in their place."""


class RlvrGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with a composition of methods; other arguments are GRPOTrainer's.

    `methods`: methods, slugs, or `{slug: settings}`. `lr_factor(k)`: factor of the learning rate for rollout number k,
    in place of transformers' schedule. A reward function called `correct` (0 or 1) provides the field of that name; one
    with an attribute `answers` (a list, one entry per response of its last call) provides `answer`.

    Raises UserError at construction for a composition that TRL cannot carry (`unsupported`) and for a setting of
    GRPOConfig that a method owns; TrainingStopped for a loss that is not finite or a rollout without tokens.
    """

    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *rest: Any,
        methods: Methods,
        lr_factor: Any = None,
        skip_dead_rows: bool = True,
        **others: Any,
    ) -> None:
        self.pipeline: Pipeline = pipeline_of(methods)
        if reason := unsupported(self.pipeline):
            raise UserError(reason)
        self.skip_dead_rows = skip_dead_rows
        self._lr_factor = lr_factor
        self._suppress_scoring = False
        super().__init__(model, reward_funcs, _own(args or GRPOConfig("rlvr-lab-trl"), self.pipeline), *rest, **others)
        self._refuse_what_does_not_fit()
        self.pipeline.bind(lambda text: list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))
        self.world = World(self.accelerator.process_index, self.accelerator.num_processes)
        self.parts = Parts(self.model, self.pipeline, self._current)
        self._rollout: Rollout | None = None
        self._minibatches: Iterator[tuple[Rollout, Tensor] | None] | None = None
        self._queue: list[Tensor] = []
        self._whole: Minibatch | None = None
        self._left = 0
        self._totals = UpdateTotals()
        self._checked = False
        self.add_callback(_EndOfStep(self))

    def _refuse_what_does_not_fit(self) -> None:
        if self.args.steps_per_generation % self.args.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation is {self.args.steps_per_generation}, which is no multiple of "
                f"gradient_accumulation_steps {self.args.gradient_accumulation_steps}: a minibatch would span rollouts"
            )
        if self.aux_loss_enabled:
            raise UserError("the router's auxiliary loss is not carried; set router_aux_loss_coef: 0")
        if self.pipeline.needs("correct") and "correct" not in self.reward_func_names:
            raise UserError(
                "a method of this composition needs 'correct'; call one reward function `correct` (it returns 0 or 1), "
                "or choose another metric of that method, such as methods.dynamic_sampling.metric=reward"
            )
        if self.is_fsdp_enabled and self.pipeline.any("needs_moments"):
            plugin = self.accelerator.state.fsdp_plugin
            if getattr(plugin, "fsdp_version", 1) != 2:
                raise UserError("a method of this composition needs moments, which FSDP 1 hides; use --fsdp_version 2")
        if self.pipeline.refill and not hasattr(self.train_dataset, "__len__"):
            raise UserError("a method of this composition draws further batches, which needs a dataset with a length")

    # -- where a rollout stands ---------------------------------------------------------------------------------

    @property
    def minibatches(self) -> int:
        """Optimizer steps per epoch over one rollout."""
        return int(self.args.steps_per_generation // self.args.gradient_accumulation_steps)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout. Checkpoints at multiples of it resume exactly; others sample anew."""
        return self.minibatches * int(self.num_iterations)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """In training the rows of one micro-batch of this rank; a rollout and minibatches are made when due."""
        if not self.model.training:
            prepared: dict[str, Any] = super()._prepare_inputs(generation_batch)
            return prepared
        if not self._queue:
            if self._minibatches is None:
                self._begin_rollout(generation_batch)
            self._begin_minibatch()
        return {"rows": self._queue.pop(0)}

    def _begin_rollout(self, generation_batch: Any) -> None:
        rollout, advantage = self.pipeline.credit(self._collect(generation_batch))
        self._rollout = rollout
        number, done = divmod(self.state.global_step, self.steps_per_rollout)
        generator = torch_generator(self.args.seed, "minibatches", number, torch.device("cpu"))
        self._totals = UpdateTotals()
        self._left = self.steps_per_rollout - done
        self._minibatches = deal(rollout, advantage, generator, self.minibatches, int(self.num_iterations), skip=done)
        self._generator = generator

    def _begin_minibatch(self) -> None:
        assert self._minibatches is not None
        self._left -= 1
        self._rate = float(self.optimizer.param_groups[0]["lr"])
        part = next(self._minibatches)
        count = self.args.gradient_accumulation_steps
        if part is None:  # nothing to average over: the optimizer sees no gradient
            self._whole, self._queue = None, [torch.empty(0, dtype=torch.long)] * count
            return
        self._whole = whole = self.parts.prepare(*part, self._generator)
        self._totals.tokens += float(whole.rollout.mask.sum())
        self._totals.weight_sum += float(whole.weight.sum())
        self._totals.rows += len(whole.rollout)
        self._totals.minibatches += 1
        skip = self.skip_dead_rows and not self.pipeline.keeps_every_row
        self._queue = micro_batches(whole, skip, self._train_batch_size, count, self.world)
        if self.world.size == 1 and not any(map(len, self._queue)):
            # zeros rather than None: a minibatch without live rows must still move by the optimizer's momentum
            for p in self.model.parameters():
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)

    # -- rollout ------------------------------------------------------------------------------------------------

    def _collect(self, generation_batch: Any) -> Rollout:
        """Generate, score, reward, filter, refill: a graded rollout of all ranks that is ready for advantages."""
        rollout = self._graded(generation_batch)
        if not self._checked:
            self.pipeline.check(rollout)
            self._checked = True
        wanted = len(torch.unique(rollout.group_id))
        rollout = self.pipeline.filter(rollout)
        if self.pipeline.refill:
            rollout = self._refill(rollout, wanted)
        if not len(rollout) or not bool(rollout.mask.any()):
            raise TrainingStopped(
                f"step {self.state.global_step}: the filters of this composition left no token to learn from"
            )
        return rollout

    def _refill(self, rollout: Rollout, wanted: int) -> Rollout:
        """Sample further batches until enough groups passed the filters; surplus groups are dropped."""
        parts, have = [rollout], len(torch.unique(rollout.group_id))
        for attempt in range(1, self.pipeline.refill):
            if have >= wanted:
                break
            parts.append(self.pipeline.filter(self._graded(self._further(attempt))))
            have += len(torch.unique(parts[-1].group_id))
        if have < wanted:
            raise TrainingStopped(
                f"step {self.state.global_step}: only {have} of {wanted} groups passed the filters in "
                f"{self.pipeline.refill} generation batches; choose other problems or enlarge num_generations"
            )
        joined = concatenate([part for part in parts if len(part)])
        kept = torch.unique(joined.group_id)[:wanted]
        return joined.rows(torch.isin(joined.group_id, kept).nonzero().squeeze(1))

    def _further(self, attempt: int) -> list[Any]:
        """This rank's share of a further generation batch: other rows of the dataset, the same draw on every rank."""
        number = self.state.global_step // self.steps_per_rollout
        random = numpy_generator(self.args.seed, f"refill {attempt}", number)
        prompts = self.args.generation_batch_size // self.num_generations
        total = len(self.train_dataset)
        chosen = random.choice(total, prompts, replace=prompts > total).tolist()
        repeated = [i for i in chosen for _ in range(self.num_generations)]
        share = len(repeated) // self.world.size
        first = share * self.world.rank
        return [dict(self.train_dataset[i]) for i in repeated[first : first + share]]

    def _graded(self, inputs: list[Any]) -> Rollout:
        """One generation batch of all ranks, scored and rewarded. Responses without any reward are left out."""
        rollout = self.world.gather_rollout(self._sampled(inputs))
        # groups may span ranks, whose rows follow each other
        rollout = rollout.with_(group_id=torch.arange(len(rollout)).to(rollout.group_id) // self.num_generations)
        components, scored, answers = self._verdicts()
        named = {"correct": components["correct"] > 0} if "correct" in components else {}
        rollout = rollout.with_(reward_components=components, answer=answers, **named)
        rollout = self.pipeline.reward(rollout)
        return rollout if bool(scored.all()) else rollout.rows(scored.nonzero().squeeze(1))

    def _sampled(self, inputs: list[Any]) -> Rollout:
        """This rank's share of a generation batch as a record, with log-probs and entropies of the policy."""
        output = self._generate_and_score_completions(inputs)
        mask = output["completion_mask"].bool()
        last = output["completion_ids"].gather(1, (mask.sum(1) - 1).clamp_min(0)[:, None]).squeeze(1)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=mask.device)
        zeros = torch.zeros(mask.shape, device=mask.device)
        rollout = Rollout(
            prompt_id=problem_numbers(inputs, output).to(mask.device),
            group_id=torch.zeros_like(last),
            finished=torch.isin(last, ends),
            policy_version=torch.full_like(last, self.state.global_step),
            prompt_ids=output["prompt_ids"],
            prompt_mask=output["prompt_mask"].bool(),
            response_ids=output["completion_ids"],
            response_mask=mask,
            action_mask=mask & output["tool_mask"].bool() if "tool_mask" in output else mask,
            behaviour_logprob=zeros,
            behaviour_temperature=zeros + self.temperature,
        )
        logprob, entropy = self._scored(rollout, World.single())
        # without a sampler's log-probs, behaviour and old policy are one; so where vLLM gave nan
        sampler = output.get("sampling_per_token_logps")
        behaviour = logprob if sampler is None else torch.where(sampler.isnan(), logprob, sampler.float())
        rollout = rollout.with_(old_logprob=logprob, behaviour_logprob=behaviour.masked_fill(~mask, 0.0))
        statistics = {"token_entropy": entropy}
        if "ref_per_token_logps" in output:
            statistics["ref_logprob"] = output["ref_per_token_logps"].float()
        return rollout.with_statistics(**statistics)

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        """TRL's generation batch of this rank. In training TRL's own pass for old log-probs is left out: `_scored`
        gives entropies too, and does not pad every response to the longest."""
        self._suppress_scoring = self.model.training
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._suppress_scoring = False
        foreign = [k for k in output if k.startswith(("pixel", "image", "num_images", "token_type", "mm_"))]
        if foreign and self.model.training:
            raise UserError(f"this adapter carries text only, and the batch holds '{foreign[0]}'")
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *args: Any, **others: Any) -> Any:
        if self._suppress_scoring and model is self.model and self._is_policy(model):
            width = args[1] if len(args) > 1 else others["logits_to_keep"]
            return input_ids.new_zeros(len(input_ids), width, dtype=torch.float32), None, None
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **others)

    def _is_policy(self, model: Any) -> bool:
        """False while a PEFT model stands in for the reference: its adapter is off, or the one called `ref` is on."""
        if not hasattr(model, "peft_config"):
            return True
        active = getattr(self.accelerator.unwrap_model(model), "active_adapters", [])
        enabled = not any(getattr(m, "disable_adapters", False) for m in model.modules())
        return enabled and list(active) != ["ref"]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """A prompt that is a list of token ids is taken as it is."""
        if isinstance(prompts[0], list) and prompts[0] and isinstance(prompts[0][0], int):
            return prompts, None, {}
        return super()._tokenize_prompts(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = rewards
        return rewards

    def _verdicts(self) -> tuple[dict[str, Tensor], Tensor, tuple[str | None, ...] | None]:
        """Weighted reward components by function, which rows any function scored, and answers where known."""
        from accelerate.utils import gather_object

        weights = self.reward_weights.to(self._rewards.device)
        weighted = torch.nan_to_num(self._rewards * weights, nan=0.0)
        components = {name: weighted[:, i] for i, name in enumerate(self.reward_func_names)}
        scored = ~self._rewards.isnan().all(1)
        readers = [f.answers for f in self.reward_funcs if getattr(f, "answers", None) is not None]
        answers = tuple(gather_object(list(readers[0]))) if readers else None
        return components, scored, answers

    # -- forward passes -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scored(self, rollout: Rollout, world: World) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, T] of all rows, zero outside the mask, longest rows first; the ranks of
        `world` share the work."""
        order = rollout.lengths.argsort(descending=True, stable=True)
        found: list[Any] = []
        for rows in world.deal(torch.split(order, self._train_batch_size)):
            part = rollout.rows(order[-1:] if rows is None else rows)
            values = self._forward(self.model_wrapped, part, True)
            if rows is not None:
                masked = (v.float().masked_fill(~part.mask, 0.0).cpu() for v in values if v is not None)
                found.append((rows.cpu(), *masked))
        logprob, entropy = (torch.zeros(rollout.response_ids.shape) for _ in range(2))
        for rows, some, other in (entry for share in world.gather_objects(found) for entry in share):
            logprob[rows, : some.shape[1]], entropy[rows, : some.shape[1]] = some, other
        device = rollout.response_ids.device
        return logprob.to(device), entropy.to(device)

    @torch.no_grad()
    def _current(self, batch: Rollout, names: list[str]) -> dict[str, Tensor]:
        """Statistics of the policy being updated; see `Parts`. Moments, which TRL's head lacks, come from a pass of
        ours, on every rank over all rows."""
        found = dict(zip(CURRENT, self._scored(batch, self.world), strict=True))
        if missing := [name for name in names if name not in found]:
            with self.accelerator.autocast():
                fields = [name.removeprefix("current_") for name in missing]
                values = scored_fields(self.model, batch, fields, self._train_batch_size)
            found |= dict(zip(missing, values, strict=True))
        return found

    def _forward(self, model: Any, micro: Rollout, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """TRL's forward pass over some rows, without the columns in which all prompts are padding."""
        first = int(micro.prompt_mask.any(0).int().argmax())
        ids = torch.cat([micro.prompt_ids[:, first:], micro.response_ids], 1)
        mask = torch.cat([micro.prompt_mask[:, first:], micro.response_mask], 1).long()
        logprob, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, micro.response_ids.shape[1], compute_entropy=entropy
        )
        return logprob, entropies

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Loss of one micro-batch: its share of a sum that is normalised over the whole optimizer step.

        Data parallelism averages gradients over ranks, so the sum is multiplied by their number. In evaluation the
        loss is nan: what TRL would report is not the loss of this composition.
        """
        if "rows" not in inputs:
            return torch.full((), torch.nan, device=self.accelerator.device)
        rows = inputs["rows"]
        if not len(rows):
            return self._nothing(model)
        assert self._whole is not None
        micro = self._whole.rollout.rows(rows)
        logprob, entropy = self._forward(model, micro, self.pipeline.any("needs_entropy"))
        loss = self.parts.loss(self._whole, rows, micro, logprob, entropy, self._totals)
        if not bool(torch.isfinite(loss)):
            raise TrainingStopped(
                f"step {self.state.global_step}: loss is {float(loss)}; this minibatch was not applied. "
                "Lower learning_rate or raise warmup_steps; with bfloat16, try float32."
            )
        return loss * self.world.size

    def _nothing(self, model: Any) -> Tensor:
        """A loss of zero. With several ranks a forward pass goes with it, because their communication counts on it."""
        if self.world.size == 1:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        assert self._rollout is not None
        logprob, _ = self._forward(model, self._rollout.rows(self._rollout.lengths.argmin()[None]), False)
        return logprob.sum() * 0.0

    # -- end of a step ------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._totals.grad_norms.append(float(norm))
        return norm

    def _end_step(self) -> None:
        """After the last minibatch of a rollout: log its metrics and tell the methods."""
        if self._left or self._rollout is None:
            return
        totals = self._totals.over(self.world)
        totals.loss = self.world.sum_floats({"loss": totals.loss})["loss"]
        version = int(self._rollout.policy_version.max())
        metrics = shown_metrics(self._rollout) | sampler_metrics(self._rollout, version, self.model.config.vocab_size)
        metrics |= totals.metrics() | self.pipeline.metrics() | {"lr": self._rate}
        self.pipeline.observe(metrics)
        for text in self.pipeline.notices():
            _log.warning(text)
        for name, value in metrics.items():
            if name not in ("loss", "grad_norm", "lr", "reward"):  # TRL's own logs have these
                self._metrics["train"][name].append(value)
        self._minibatches = self._rollout = self._whole = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule by rollouts where `lr_factor` is given, else that of transformers."""
        if self.lr_scheduler is None and self._lr_factor is not None:
            factor, per = self._lr_factor, self.steps_per_rollout
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factor(step // per)
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_methods(folder, self.pipeline)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_methods(checkpoint, self.pipeline)


class _EndOfStep(TrainerCallback):  # type: ignore[misc]
    """Runs before the first step, and after each optimizer step before logging and saving."""

    def __init__(self, trainer: RlvrGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        trainer = self.trainer
        rollouts = -(-int(state.max_steps) // trainer.steps_per_rollout)
        trainer.pipeline.check_run(trainer.model.config.vocab_size, rollouts)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.trainer._end_step()


def _own(args: GRPOConfig, pipeline: Pipeline) -> GRPOConfig:
    """A copy of the settings with what the composition needs of TRL; refuses what a method owns."""
    fields = GRPOConfig.__dataclass_fields__
    for name, remedy in OWNED.items():
        if getattr(args, name) != fields[name].default:
            raise UserError(f"GRPOConfig.{name} is {getattr(args, name)!r}, but methods own it; use {remedy}")
    own = copy.copy(args)
    own.vllm_importance_sampling_correction = False  # truncated_importance_sampling is the method for it
    if pipeline.needs("ref_logprob"):
        own.beta = 1.0  # makes TRL keep a reference model and score with it; its coefficient is the method's
    return own
