"""Opening a run: its folder, settings that fit the number of processes, and the models it needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..core.classp import Classp
from ..core.rollout import Rollout
from ..errors import UserError
from ..methods import Pipeline, build
from ..methods.kappatune import KappaTune, adapter_targets
from ..policy.forward import packing_error, scored
from ..policy.freeze import train_only
from ..policy.load import DTYPES, Policy, load_policy, pick_device
from ..policy.lora import add_adapters, without_adapters
from ..policy.shard import checkpoint_activations, shard
from ..rollout.engine import Sampling, TransformersEngine
from . import checkpoint
from .config import LoraSection, OptimizerSection, TrainConfig, parse_config
from .console import Console
from .parallel import World
from .seeds import derive_seed

# a resumed run may only differ in what does not change the steps already made
CHANGEABLE = ("steps", "evaluation", "checkpoint", "logging", "ledger", "parallel")


# -- settings ---------------------------------------------------------------------------------------------------------


def resolve(config: TrainConfig, saved: TrainConfig | None, world: World) -> TrainConfig:
    """The settings with `rollout.streams` decided: those of the run to be resumed (`saved`), else by the number of
    processes. Raises UserError for settings that do not fit the processes or the machine."""
    _refuse_misfits(config, world)
    streams = config.rollout.streams
    if streams == "auto":
        streams = saved.rollout.streams if saved else "prompt" if world.size > 1 else "step"
    if streams == "step" and world.size > 1:
        raise UserError(
            f"rollout.streams=step draws all numbers of a step from one stream, which {world.size} processes cannot "
            "share; set rollout.streams=prompt"
        )
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"streams": streams})})


def _refuse_misfits(config: TrainConfig, world: World) -> None:
    if world.size > config.rollout.prompts:
        raise UserError(
            f"{world.size} processes share rollout.prompts={config.rollout.prompts}, and each needs at least one; "
            f"raise rollout.prompts, or start at most {config.rollout.prompts} (--nproc-per-node)"
        )
    if config.parallel.shard == "fsdp2" and not world.has_group:
        raise UserError(
            "parallel.shard=fsdp2 needs a process group, also for one process; start with torchrun --standalone "
            "--nproc-per-node 1 -m rlvr_lab.cli train ..., or set parallel.shard=none"
        )
    if config.parallel.offload and pick_device(config.model.device).type != "cuda":
        raise UserError("parallel.offload moves shards from the GPU to main memory, but this run has no GPU; "
                        "set it to false")  # fmt: skip


def refuse_changes(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raises UserError where a resumed run would go on differently than it began."""
    before, after = saved.model_dump(mode="json"), asked.model_dump(mode="json")
    for tree in (before, after):
        del tree["rollout"]["streams"]  # which numbers are drawn next; `resolve` keeps the run's own unless asked
    for name in before:
        if before[name] != after[name] and name not in CHANGEABLE:
            raise UserError(
                f"--resume cannot change '{name}': the run was started with {before[name]}, not {after[name]}. "
                f"Only {', '.join(CHANGEABLE)} may differ"
            )


# -- the folder -------------------------------------------------------------------------------------------------------


def saved_settings(config: TrainConfig, out: Path, resume: bool) -> TrainConfig | None:
    """Settings of the run to be resumed, None for a new one. Raises UserError for a folder in use or without a run."""
    settings = out / "config.yaml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already exists; use --resume to continue it, or another --out")
        return None
    if not settings.exists():
        raise UserError(f"{out} holds no run to resume (no config.yaml)")
    saved = parse_config(yaml.safe_load(settings.read_text()))
    refuse_changes(saved, config)
    return saved


def starting_point(out: Path, world: World, console: Console) -> Path | None:
    """The checkpoint to go on from; None where a run died before its first. Raises UserError where none is sound."""
    found, refused = checkpoint.newest(out / "checkpoints", world)
    for reason in refused:
        console.say(f"checkpoint refused: {reason}")
    if found is None and refused:
        raise UserError(f"no sound checkpoint in {out}: {refused[0]}")
    return found


def write_settings(config: TrainConfig, out: Path) -> None:
    """Only once everything else is known to fit, so that a start that fails leaves no folder behind."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json")
        (out / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error


# -- models -----------------------------------------------------------------------------------------------------------


class Reference:
    """The policy the run started from: a frozen copy, or the policy with its adapters switched off."""

    def __init__(self, model: Any, adapters: bool) -> None:
        self.model, self.adapters = model, adapters

    def logprob(self, rollout: Rollout, rows: int, tokens: int | None, world: World) -> Tensor:
        """Log-probs [B, T] of the recorded tokens; see `policy.forward.scored`."""
        with without_adapters(self.model) if self.adapters else nullcontext():
            return scored(self.model, rollout, rows, tokens, world)[0]


@dataclass(frozen=True)
class Models:
    """`policy` is trained. `sampler` is what a transformers engine samples from: the same, or where that is divided
    over processes a whole copy on every one."""

    policy: Policy
    sampler: Policy
    reference: Reference | None

    @property
    def replica(self) -> bool:
        """Whether the sampler has weights of its own."""
        return self.sampler is not self.policy


def load_models(config: TrainConfig, world: World, start: Path | None, pipeline: Pipeline) -> Models:
    """Load from the checkpoint `start` or from `model.path`, add adapters, freeze what does not train, divide over
    processes."""
    section, needs_reference = config.model, pipeline.needs("ref_logprob")
    # a checkpoint's weights have the adapters merged in; the run goes on from base and adapters apart
    where = str(start) if start and not section.lora.rank else section.path
    policy = _load(config, where)
    if section.lora.rank:
        seed = derive_seed(config.seed, "adapters", 0)
        targets = _adapter_targets(policy.model, section.lora)
        policy.model = add_adapters(policy.model, section.lora.rank, section.lora.alpha, targets, seed)
    _freeze(policy.model, pipeline, start)
    if config.parallel.activation_checkpointing:
        checkpoint_activations(policy.model)
    if config.update.packing:
        _check_packing(policy)
    policy.model = _divide(policy.model, config, world)
    sampler = policy
    if config.parallel.shard == "fsdp2" and engine_name(config) == "transformers":
        sampler = load_policy(where, device=section.device, dtype=compute_dtype(config) or section.dtype)
    reference = None
    if needs_reference and section.lora.rank:
        reference = Reference(policy.model, adapters=True)
    elif needs_reference:
        frozen = _load(config, section.path).model.requires_grad_(False)
        reference = Reference(_divide(frozen, config, world), adapters=False)
    return Models(policy, sampler, reference)


def _adapter_targets(model: Any, section: LoraSection) -> tuple[str, ...]:
    """`model.lora.targets`, or the full names of what `model.lora.kappa` chooses in the starting policy."""
    if not section.kappa:
        return section.targets
    method = build("kappatune", section.kappa)
    assert isinstance(method, KappaTune)
    return tuple(adapter_targets(model, method.config))


def _freeze(model: Any, pipeline: Pipeline, start: Path | None) -> None:
    """Freeze what the owner of `trainable` leaves out; a run that goes on leaves out what it did from the start."""
    owner = pipeline.owner("trainable")
    if owner is None:
        return
    if start is not None and (state := checkpoint.read_parts(start).get(owner.slug)) is not None:
        owner.load_state_dict(state)
    train_only(model, owner.trainable(dict(model.named_parameters())))


def _load(config: TrainConfig, where: str) -> Policy:
    section = config.model
    device = "cpu" if config.parallel.shard == "fsdp2" else section.device  # shards are cut from main memory
    return load_policy(where, device=device, dtype=section.dtype)


def _divide(model: Any, config: TrainConfig, world: World) -> Any:
    if config.parallel.shard == "none":
        return model
    name = compute_dtype(config)
    precision = DTYPES[name] if name else None
    return shard(model, pick_device(config.model.device), world.size, precision, config.parallel.offload)


def _check_packing(policy: Policy) -> None:
    """Raises UserError for a model whose attention does not keep packed rows apart."""
    prompts = [[i % 7 + 1 for i in range(n)] for n in (3, 5)]
    sampling = Sampling(max_tokens=6, streams="prompt")
    generator = torch.Generator(device=policy.device).manual_seed(0)
    rollout = TransformersEngine(policy).sample(prompts, 2, sampling, generator)
    tolerance = 1e-3 if policy.model.dtype == torch.float32 else 0.2
    error = packing_error(policy.model, rollout)
    if not error < tolerance:
        raise UserError(
            f"update.packing: the attention of {type(policy.model).__name__} does not keep packed responses apart "
            f"(log-probs differ by {error:.3g} nats); set update.packing=false"
        )


def engine_name(config: TrainConfig) -> Any:
    """`rollout.engine`."""
    return getattr(config.rollout, "engine", "transformers")


def compute_dtype(config: TrainConfig) -> str | None:
    """Type of the passes where it differs from that of the weights."""
    section = config.model
    return section.precision if section.precision != "same" and section.precision != section.dtype else None


def export_dtype(config: TrainConfig) -> torch.dtype | None:
    """Type of the weights that a run hands on: that of its passes; None for that of its weights."""
    name = compute_dtype(config)
    return DTYPES[name] if name else None


def passes_in(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Mixed precision without sharding, which brings its own. No cache: weights move between passes."""
    enabled = compute_dtype(config) is not None and config.parallel.shard == "none"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def make_optimizer(model: Any, section: OptimizerSection) -> torch.optim.Optimizer:
    """`optimizer.name` over the weights that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if section.name == "classp":
        return Classp(trained, section.lr, weight_decay=section.weight_decay, **section.classp.model_dump())
    return torch.optim.AdamW(
        trained,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        foreach=True,
    )
