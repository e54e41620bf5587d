"""A recipe as a verl 0.9.1 run: Hydra configuration, data preparation, launch files for one node, Ray and Slurm.

Needs no verl. `verl.yaml` is a primary Hydra configuration on top of verl's own `ppo_trainer`; it holds only what
differs from verl's defaults, and the composition with our presets and settings. Compositions that need log-probs and
advantages only go through tier A (verl's synchronous trainer, registered functions), all others through tier B (trainer
mode `rlvr`); `verl_support` says which is which and why.

What is not the same as `rlvr-lab train`: verl samples with vLLM and in its own order; trains with float32 master
weights and bfloat16 passes whatever `model.dtype` says; its warm-up starts at 0 and ours at lr / warmup; a response cut
off by the length limit is graded as it stands; the entropy ledger and pass@k are not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..methods.base import Pipeline
from ..train.config import TrainConfig
from .exchange import adapter_targets, refuse_optimizer, refuse_turns
from .verl_support import VERSION, Tier, obstacles, pipeline_of, reduction_mode, require_tier

PROMPT_TOKENS = 2048
"""Longest prompt; our recipes do not limit prompts, verl has to."""
HEAD = """\
# {title} in verl {version}, tier {tier}. Written by `rlvr-lab export --engine verl`.
# Not run by this project: it needs GPUs. Settings that are not here are verl's defaults.
#   python -m verl.trainer.main_ppo --config-path=$PWD --config-name=verl [key=value ...]
# The driver and Ray's workers need VERL_USE_EXTERNAL_MODULES={module}; the launch files set it.
"""
MODULES: dict[Tier, str] = {"a": "rlvr_lab.integrations.verl", "b": "rlvr_lab.integrations.verl_tier_b"}
FILES = {
    "launch.sh": "verl_single_node.sh",
    "ray.sh": "verl_ray.sh",
    "slurm.sbatch": "verl_slurm.sbatch",
    "wait_for_gpus.py": "wait_for_gpus.py.in",
    "prepare_data.py": "prepare_data.py.in",
}


def export(config: TrainConfig, out: Path) -> list[Path]:
    """Write configuration, recipe and launch files into `out`, a new or empty folder; returns their paths.

    Raises UserError for what verl cannot do: another task than `math`, minibatches that are not whole prompts, a linear
    learning-rate schedule, methods that choose problems, sample or replay; and for a folder in use.
    """
    tier = tier_of(config)
    tree = hydra_tree(config, out)
    title = " + ".join(config.methods)
    head = HEAD.format(title=title, version=VERSION, tier=tier.upper(), module=MODULES[tier])
    words = {"TITLE": title, "NAME": _name(config), "VERSION": VERSION, "MODULE": MODULES[tier]}
    files = {"verl.yaml": head + yaml.safe_dump(tree, sort_keys=False), "recipe.yaml": recipe_text(config)}
    return write_files(out, files, FILES, words)


def tier_of(config: TrainConfig) -> Tier:
    """The least tier that carries the recipe's composition. Raises UserError where none does."""
    pipeline = pipeline_of(config.methods)
    if not obstacles(pipeline.methods, "a"):
        return "a"
    require_tier(pipeline, "b")
    return "b"


def recipe_text(config: TrainConfig) -> str:
    """The recipe with absolute paths, since it is read in another folder."""
    tree = config.model_dump(mode="json")
    for section, key in (("data", "file"), ("evaluation", "file")):
        if tree[section][key]:
            tree[section][key] = str(Path(tree[section][key]).absolute())
    if Path(config.model.path).is_dir():
        tree["model"]["path"] = str(Path(config.model.path).absolute())
    return yaml.safe_dump(tree, sort_keys=False)


def write_files(
    out: Path, files: Mapping[str, str], templates: Mapping[str, str], words: Mapping[str, str]
) -> list[Path]:
    """Texts, and templates of `rlvr_lab/launch` with `@WORD@` filled in, into a new or empty folder.

    Raises UserError where the folder is in use; a failed write leaves no half-filled folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another --out")
    root = resources.files("rlvr_lab") / "launch"
    whole = dict(files)
    for name, template in templates.items():
        text = (root / template).read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        whole[name] = text
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in whole.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return [out / name for name in whole]


def _name(config: TrainConfig) -> str:
    """A name without spaces for jobs and experiments."""
    return "-".join(config.methods)


# -- the configuration, section by section ----------------------------------------------------------------------------


def hydra_tree(config: TrainConfig, out: Path) -> dict[str, Any]:
    """verl's configuration of the recipe, as a primary Hydra file. Raises UserError as `export` does."""
    _check(config)
    tier, pipeline = tier_of(config), pipeline_of(config.methods)
    here = str(out.absolute())
    return {
        "hydra": {"searchpath": ["pkg://verl.trainer.config"], "run": {"dir": "."}, "output_subdir": None},
        "defaults": ["ppo_trainer", "_self_"],
        "data": _data(config, here),
        "actor_rollout_ref": {
            "model": _model(config),
            "actor": _actor(config, tier, pipeline),
            "rollout": _rollout(config),
            "ref": {"log_prob_use_dynamic_bsz": True, "log_prob_max_token_len_per_gpu": 2 * _tokens(config)},
        },
        "algorithm": _algorithm(config, tier),
        "critic": {"enable": False},
        "reward": {
            "custom_reward_function": {"path": "pkg://rlvr_lab.integrations.verl_reward", "name": "compute_score"}
        },
        "trainer": _trainer(config, tier, here),
        "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"VERL_USE_EXTERNAL_MODULES": MODULES[tier]}}}},
    }


def _check(config: TrainConfig) -> None:
    refuse_turns(config.data.task, "verl")
    if config.data.task != "math":
        raise UserError(
            f"verl reads prompts as chat messages, and data.task '{config.data.task}' has none; set data.task=math "
            "and data.file"
        )
    if config.rollout.prompts % config.update.minibatches:
        raise UserError(
            f"verl's minibatches are whole prompts: rollout.prompts={config.rollout.prompts} is no multiple of "
            f"update.minibatches={config.update.minibatches}"
        )
    refuse_optimizer(config.optimizer.name, "verl")
    if config.optimizer.schedule == "linear":
        raise UserError("verl has no linear schedule; set optimizer.schedule to constant or cosine")


def _tokens(config: TrainConfig) -> int:
    """Tokens that one GPU takes per pass: as many full-length responses as the recipe's micro-batch."""
    return config.update.micro_batch_rows * (PROMPT_TOKENS + config.rollout.max_tokens)


def _data(config: TrainConfig, here: str) -> dict[str, Any]:
    return {
        "train_files": f"{here}/train.parquet",
        "val_files": f"{here}/validation.parquet",
        "train_batch_size": config.rollout.prompts,
        "max_prompt_length": PROMPT_TOKENS,
        "max_response_length": config.rollout.max_tokens,
        "filter_overlong_prompts": True,
        "seed": config.seed,
    }


def _model(config: TrainConfig) -> dict[str, Any]:
    path = Path(config.model.path)
    found = {
        "path": str(path.absolute()) if path.is_dir() else config.model.path,
        "use_remove_padding": True,
        "enable_gradient_checkpointing": True,
    }
    lora = config.model.lora
    if lora.rank:
        targets = adapter_targets(lora, "verl")
        found |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    return found


def _actor(config: TrainConfig, tier: Tier, pipeline: Pipeline) -> dict[str, Any]:
    mode, constant = reduction_mode(pipeline)
    optimizer, update = config.optimizer, config.update
    # tier A is reduced by verl under this name; in tier B it only labels verl's own entropy curve
    factor = int(constant) if mode == "seq-mean-token-sum-norm" and constant else None
    per_rollout = update.minibatches * update.epochs if tier == "b" else 1
    return {
        "policy_loss": {
            "_target_": "rlvr_lab.integrations.verl.RlvrPolicyLossConfig",
            "loss_mode": "rlvr" if tier == "a" else "rlvr_tier_b",
            "methods": {slug: dict(settings) for slug, settings in config.methods.items()},
        },
        "loss_agg_mode": mode,
        "loss_scale_factor": factor,
        "strategy": "fsdp2",
        "ppo_mini_batch_size": config.rollout.prompts // update.minibatches,  # in prompts
        "ppo_epochs": update.epochs,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": _tokens(config),
        # verl only loads a reference policy where its own KL is on; our trainer does not add that term
        "use_kl_loss": tier == "b" and pipeline.needs("ref_logprob"),
        "entropy_coeff": 0,
        "grad_clip": optimizer.grad_clip,
        "data_loader_seed": config.seed,
        "fsdp_config": {"param_offload": config.parallel.offload, "optimizer_offload": config.parallel.offload},
        "optim": {
            "lr": optimizer.lr,
            "betas": list(optimizer.betas),
            "weight_decay": optimizer.weight_decay,
            "clip_grad": optimizer.grad_clip,
            # the schedule advances once per rollout in tier A, once per optimizer step in tier B
            "lr_warmup_steps": optimizer.warmup * per_rollout,
            "lr_scheduler_type": optimizer.schedule,
            "override_optimizer_config": {"eps": optimizer.eps},
        },
    }


def _rollout(config: TrainConfig) -> dict[str, Any]:
    return {
        "name": "vllm",
        "n": config.rollout.group_size,
        "temperature": config.rollout.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "calculate_log_probs": True,  # so that verl reports the mismatch between vLLM and trainer
        "gpu_memory_utilization": config.rollout.vllm.gpu_memory,
        "tensor_model_parallel_size": 1,
        "log_prob_use_dynamic_bsz": True,
        "log_prob_max_token_len_per_gpu": 2 * _tokens(config),
        "val_kwargs": {
            "n": config.evaluation.samples,
            "temperature": config.evaluation.temperature,
            "top_p": 1.0,
            "do_sample": config.evaluation.temperature > 0,
        },
    }


def _algorithm(config: TrainConfig, tier: Tier) -> dict[str, Any]:
    refill = "dynamic_sampling" in config.methods  # verl draws the missing groups; our filter then drops none
    return {
        "adv_estimator": "rlvr" if tier == "a" else "rlvr_tier_b",
        "rlvr_methods": "${actor_rollout_ref.actor.policy_loss.methods}",
        "use_kl_in_reward": False,
        "filter_groups": {"enable": refill, "metric": "acc"},
    }


def _trainer(config: TrainConfig, tier: Tier, here: str) -> dict[str, Any]:
    name = _name(config)
    return {
        "v1": {"trainer_mode": "sync" if tier == "a" else "rlvr"},
        "nnodes": "${oc.decode:${oc.env:NNODES,1}}",
        "n_gpus_per_node": "${oc.decode:${oc.env:GPUS_PER_NODE,8}}",
        "total_training_steps": config.steps,
        "total_epochs": config.steps,  # an upper bound; total_training_steps ends the run
        "save_freq": config.checkpoint.every,
        "max_actor_ckpt_to_keep": config.checkpoint.keep,
        "test_freq": config.evaluation.every or -1,
        "val_before_train": config.evaluation.problems > 0,
        "resume_mode": "auto",
        "default_local_dir": f"{here}/checkpoints",
        "project_name": "rlvr_lab",
        "experiment_name": name,
        "logger": ["console", *(["tensorboard"] if config.logging.tensorboard else [])],
    }
