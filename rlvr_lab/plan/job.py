"""What the planner needs of a run: settings, composition and model brought to plain numbers."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..methods import build, compose
from ..methods.base import Pipeline
from ..tasks.registry import entry, task
from ..train.config import TrainConfig
from .devices import Device
from .shapes import Shape, shape_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROMPT = 512
"""Tokens assumed of the longest prompts where they cannot be counted without a tokenizer."""
COUNTED = 64
"""Problems that are made to count their prompts."""
WORDS = 512
"""Size of a vocabulary up to which it is the tiny lab's, in which tasks encode their prompts themselves."""


@dataclass(frozen=True)
class Job:
    """One run on `ranks` GPUs of one kind; all numbers are per rank unless they say otherwise."""

    shape: Shape
    device: Device
    ranks: int
    stored: int
    """Bytes of a parameter that the optimizer moves, as of its gradient and of each number kept with it."""
    computed: int
    """Bytes of a number in products and activations."""
    dtype: str
    """Type of the products."""
    prompts: int
    """Of a step, over all ranks."""
    group: int
    prompt_tokens: int
    """Of the longest prompts."""
    max_tokens: int
    mean_tokens: int
    """Mean length of responses, for times only."""
    rows: int
    """Responses in flight on this rank."""
    micro_rows: int
    """Responses of one forward and backward pass, without packing."""
    packed_tokens: int | None
    """Tokens of one pass with packing; None without."""
    minibatches: int
    epochs: int
    steps: int
    replayed: int
    """Most responses of earlier steps that an update learns from beside the new ones."""
    turns: int
    """Most turns of a response; 1 without an environment."""
    prefix_memory: int
    """Bytes of keys and values kept while responses grow from prefixes; 0 where none does, or where vLLM samples."""
    padded: bool
    """Whether prompts of different lengths share a batch, so that attention needs a mask."""
    recompute: bool
    needs_current: bool
    reference: bool
    entropy: bool
    ledger_rows: int
    refill: int
    """Most generation batches of a step; 0 without dynamic sampling."""
    engine: str
    engine_share: float
    engine_sleeps: bool
    sharded: bool
    offload: bool
    checkpointing: bool
    lora_rank: int
    lora_parameters: int
    optimizer: str = "adamw"

    @property
    def responses(self) -> int:
        """Responses of a step, over all ranks."""
        return self.prompts * self.group

    @property
    def own_responses(self) -> int:
        """Responses that this rank samples and trains on, rounded up."""
        return -(-self.responses // self.ranks)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.prompt_tokens + self.max_tokens

    @property
    def pass_tokens(self) -> int:
        """Prompt and response tokens of one forward and backward pass over the longest rows."""
        if self.packed_tokens is None:
            return self.micro_rows * self.longest
        most = -(-(self.responses + self.replayed) // self.minibatches)
        return max(self.longest, min(self.packed_tokens, most * self.longest))

    @property
    def pass_answers(self) -> int:
        """Response tokens of such a pass."""
        return self.pass_tokens * self.max_tokens // self.longest

    @property
    def mask_numbers(self) -> int:
        """Entries of the attention mask of such a pass: rows are kept apart, or left padding is hidden; 0 where the
        causal pattern is enough."""
        if self.packed_tokens is not None:
            return self.pass_tokens**2 if self.pass_tokens > self.longest else 0
        return self.micro_rows * self.longest**2 if self.padded else 0

    @property
    def passes(self) -> float:
        """Forward and backward passes of this rank over a step's responses of mean length."""
        if self.packed_tokens is None:
            return self.own_responses / self.micro_rows
        return self.own_responses * (self.prompt_tokens + self.mean_tokens) / self.pass_tokens

    @property
    def shards(self) -> int:
        """Ranks over which weights, gradients and optimizer state are divided."""
        return self.ranks if self.sharded else 1

    @property
    def trained(self) -> int:
        """Parameters with a gradient."""
        return self.lora_parameters if self.lora_rank else self.shape.parameters

    @property
    def trained_bytes(self) -> int:
        """Bytes of a parameter with a gradient: peft keeps adapters in float32 on 16-bit weights."""
        return max(self.stored, BYTES["float32"]) if self.lora_rank else self.stored

    @property
    def kept_per_weight(self) -> int:
        """Numbers that the optimizer keeps with every trained parameter: two moments, or CLASSP's history."""
        return 1 if self.optimizer == "classp" else 2

    @property
    def largest_tensor(self) -> int:
        """Parameters of the largest tensor that trains."""
        s = self.shape
        if self.lora_rank:
            return min(self.lora_rank * max(max(sides) for sides in s.matrices.values()), self.trained)
        return max(s.vocabulary * s.hidden, *(a * b for a, b in s.matrices.values()))

    @property
    def autocast(self) -> bool:
        """Mixed precision without shards: weights are cast in every product, and the residual stream stays wide."""
        return self.computed < self.stored and not self.sharded

    @property
    def residual(self) -> int:
        """Bytes of a number between layers."""
        return self.stored if self.autocast else self.computed

    @property
    def weight_bytes(self) -> int:
        """Bytes of a parameter, and of its gradient, as the passes see it."""
        return self.computed if self.sharded else self.stored

    @property
    def replica(self) -> bool:
        """Whether sampling needs a whole copy of a sharded policy."""
        return self.sharded and self.engine == "transformers"

    @property
    def operand(self) -> int:
        """Bytes of an operand of the vocabulary head's products: 16-bit ones run in float32 on the processor."""
        return 4 if self.device.kind == "cpu" else self.computed


def job_of(
    config: TrainConfig,
    device: Device,
    ranks: int = 1,
    *,
    prompt_tokens: int | None = None,
    mean_tokens: int | None = None,
    shape: Shape | None = None,
) -> Job:
    """A configuration on `ranks` devices. Lengths that no setting gives are assumed: see `Assumptions` of the plan."""
    pipeline = compose([build(slug, settings) for slug, settings in config.methods.items()])
    rollout, update = config.rollout, config.update
    shape = shape or shape_of(config.model.path)
    prompts = _prompts(config.data.task, json.dumps(config.data.settings, sort_keys=True, default=str))
    lengths = prompts.lengths if prompts.fixed or shape.vocabulary <= WORDS else (PROMPT, 0)
    stored, computed, dtype = _types(config)
    parallel, lora = config.parallel, config.model.lora
    vllm = rollout.vllm
    responses = rollout.prompts * rollout.group_size
    return Job(
        shape=shape,
        device=device,
        ranks=ranks,
        stored=stored,
        computed=computed,
        dtype=dtype,
        prompts=rollout.prompts,
        group=rollout.group_size,
        prompt_tokens=prompt_tokens or lengths[0],
        max_tokens=rollout.max_tokens,
        mean_tokens=min(mean_tokens or -(-rollout.max_tokens // 2), rollout.max_tokens),
        rows=min(rollout.rows, -(-responses // ranks)),
        micro_rows=min(update.micro_batch_rows, -(-responses // update.minibatches)),
        packed_tokens=update.micro_batch_tokens if update.packing else None,
        minibatches=update.minibatches,
        epochs=update.epochs,
        steps=config.steps,
        turns=prompts.turns,
        prefix_memory=_prefix_memory(config, pipeline, prompts.turns),
        padded=lengths[0] != lengths[1],
        recompute=update.recompute_old_logprob,
        **_composition(pipeline),
        ledger_rows=config.ledger.rows,
        engine="server" if rollout.engine == "vllm" and vllm.server else rollout.engine,
        engine_share=vllm.gpu_memory,
        engine_sleeps=vllm.sleep,
        sharded=parallel.shard != "none",
        offload=parallel.offload,
        checkpointing=parallel.activation_checkpointing,
        lora_rank=lora.rank,
        lora_parameters=shape.lora_parameters(lora.rank, lora.targets or None),
        optimizer=config.optimizer.name,
    )


def _prefix_memory(config: TrainConfig, pipeline: Pipeline, turns: int) -> int:
    continues = turns > 1 or pipeline.owner("sample") is not None
    return config.rollout.prefix_memory << 20 if continues and config.rollout.engine == "transformers" else 0


def _composition(pipeline: Pipeline) -> dict[str, Any]:
    """What the methods ask of memory and time."""
    return {
        "needs_current": any(m.needs_current or getattr(m, "needs_moments", False) for m in pipeline.methods),
        "reference": pipeline.needs("ref_logprob"),
        "entropy": pipeline.any("needs_entropy"),
        "refill": pipeline.refill,
        "replayed": max(m.replay_rows for m in pipeline.methods),
    }


class _Prompts(NamedTuple):
    """Of a task: the longest and the shortest of some prompts, and whether they are the same whatever the model is."""

    lengths: tuple[int, int]
    fixed: bool
    turns: int


@cache
def _prompts(name: str, settings: str) -> _Prompts:
    """What can be known of a task's prompts without a tokenizer; `settings` as JSON.

    Raises UserError as `tasks.registry.task` does.
    """
    found, which = entry(name), task(name, json.loads(settings))
    turns = int(getattr(which, "max_turns", 1))
    # tasks that write their own prompts in the small vocabulary need no tokenizer for it
    own_words = inspect.signature(which.prompt_ids).parameters["tokenizer"].default is None
    if found.file is not None or not own_words:
        return _Prompts((PROMPT, 0), False, turns)
    problems = found.problems(which, COUNTED, 0)
    lengths = [len(which.prompt_ids(problem, None)) for problem in problems]
    return _Prompts((max(lengths), min(lengths)), all(hasattr(p, "prompt_ids") for p in problems), turns)


def _types(config: TrainConfig) -> tuple[int, int, str]:
    """Bytes of stored and of computed numbers, and the type of the products."""
    stored = config.model.dtype
    dtype = stored if config.model.precision == "same" else config.model.precision
    return BYTES[stored], BYTES[dtype], dtype
