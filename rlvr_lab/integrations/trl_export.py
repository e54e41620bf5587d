"""A recipe as a TRL script: `train_trl.py`, its `recipe.yaml`, and `launch.sh` with accelerate. Needs no TRL.

The script is for reading and changing: it spells every setting out as a GRPOConfig, and hands the methods to
`RlvrGRPOTrainer`. Three things differ from `rlvr-lab train`. Prompts come in TRL's order, and the sampler is TRL's, so
that responses are others. A bfloat16 recipe runs with float32 weights under autocast. And TRL has neither the entropy
ledger nor pass@k evaluation (`rlvr-lab evaluate` reads the model that it saves).
"""

from __future__ import annotations

import pprint
from pathlib import Path
from string import Template
from typing import Any

import yaml

from ..errors import UserError
from ..train.config import TrainConfig
from .exchange import adapter_targets, pipeline_of, refuse_optimizer, refuse_turns, unsupported

SCRIPT = Template('''\
"""Written by `rlvr-lab export --engine trl`: $title in TRL. Run launch.sh, or: python train_trl.py"""

from pathlib import Path

${lora_import}from trl import GRPOConfig

from rlvr_lab.integrations.trl import RlvrGRPOTrainer
from rlvr_lab.integrations.trl_data import split_rows, training_data
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.config import load_config
from rlvr_lab.train.update import schedule

here = Path(__file__).parent
recipe = load_config(str(here / "recipe.yaml"))  # task and data; the settings below are the rest of it

methods = $methods

# $counts
micro, accumulate = split_rows($rows, most=$most)  # rows per forward pass on one process, and passes per step
config = GRPOConfig(
    output_dir=str(here / "checkpoints"),
    per_device_train_batch_size=micro,
    gradient_accumulation_steps=accumulate,
    steps_per_generation=accumulate * $minibatches,
$settings
)


def lr_factor(rollout: int) -> float:
    """rlvr_lab's schedule, by rollouts: its warm-up starts at lr / warmup, transformers' at 0."""
    return schedule(rollout, $steps, $warmup, "$kind")


if __name__ == "__main__":
    policy = load_policy($model, device="cpu", dtype="float32")  # accelerate moves it
    dataset, rewards = training_data(recipe, policy)
    trainer = RlvrGRPOTrainer(
        policy.model,
        rewards,
        config,
        dataset,
        processing_class=policy.tokenizer,
        methods=methods,
        lr_factor=lr_factor,
${lora}    )
    trainer.train()
    trainer.save_model(str(here / "model"))
    policy.tokenizer.save_pretrained(here / "model")
''')

LAUNCH = Template("""\
#!/bin/sh
# PROCESSES=8 sh launch.sh uses eight processes; the batch stays what the recipe says. On several machines add
# --num_machines, --machine_rank and --main_process_ip; for a model that one GPU cannot hold, --use_fsdp
# --fsdp_version 2 (`accelerate launch --help`).
cd "$$(dirname "$$0")" || exit 1
exec accelerate launch --num_processes "$${PROCESSES:-1}" --num_machines 1 --dynamo_backend no $flags train_trl.py
""")


def export(config: TrainConfig, out: Path) -> list[Path]:
    """Write script, recipe and launcher into `out`, a new or empty folder; returns their paths.

    Raises UserError for a composition or an environment that TRL cannot carry, for minibatches that are not equal, and
    for a folder in use.
    """
    if reason := unsupported(pipeline_of(config.methods)):
        raise UserError(reason)
    refuse_turns(config.data.task, "TRL")
    refuse_optimizer(config.optimizer.name, "TRL")
    config = _with_whole_paths(config)
    files = {
        "train_trl.py": _script(config),
        "recipe.yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "launch.sh": _launcher(config),
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text)
    return [out / name for name in files]


def rows_per_step(config: TrainConfig) -> int:
    """Responses of one optimizer step, all processes together. Raises UserError where minibatches are unequal."""
    responses, minibatches = config.rollout.prompts * config.rollout.group_size, config.update.minibatches
    if responses % minibatches:
        raise UserError(
            f"{responses} responses do not divide into update.minibatches={minibatches}; TRL has equal minibatches "
            "only: change update.minibatches or rollout.prompts"
        )
    return responses // minibatches


def grpo_settings(config: TrainConfig) -> dict[str, Any]:
    """GRPOConfig's settings that equal the recipe's, without those that depend on the number of processes."""
    optimizer, per_rollout = config.optimizer, config.update.minibatches * config.update.epochs
    half = _in_bfloat16(config)
    return {
        "seed": config.seed,
        "max_steps": config.steps * per_rollout,
        "num_generations": config.rollout.group_size,
        "num_iterations": config.update.epochs,
        "max_completion_length": config.rollout.max_tokens,
        "temperature": config.rollout.temperature,
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.grad_clip,
        "bf16": half,
        "use_cpu": config.model.device == "cpu",
        "gradient_checkpointing": config.parallel.activation_checkpointing,
        "use_vllm": config.rollout.engine == "vllm",
        "logging_steps": per_rollout,
        "save_steps": config.checkpoint.every * per_rollout,
        "save_total_limit": config.checkpoint.keep,
        "report_to": ["tensorboard"] if config.logging.tensorboard else [],
    }


def _in_bfloat16(config: TrainConfig) -> bool:
    return "bfloat16" in (config.model.dtype, config.model.precision)


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """The recipe with local paths made absolute, because the script runs in another folder."""
    data = config.data
    if data.file is not None:
        data = data.model_copy(update={"file": data.file.absolute()})
    model = config.model
    if Path(model.path).is_dir():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    return config.model_copy(update={"data": data, "model": model})


def _script(config: TrainConfig) -> str:
    per_rollout = config.update.minibatches * config.update.epochs
    return SCRIPT.substitute(
        title=" + ".join(config.methods),
        methods=pprint.pformat(config.methods, sort_dicts=False, width=110),
        counts=(
            f"a rollout of {config.rollout.prompts} prompts x {config.rollout.group_size}, {per_rollout} optimizer "
            f"steps on each, {config.steps} rollouts"
        ),
        rows=rows_per_step(config),
        most=config.update.micro_batch_rows,
        minibatches=config.update.minibatches,
        settings="\n".join(f"    {name}={value!r}," for name, value in grpo_settings(config).items()),
        steps=config.steps,
        warmup=config.optimizer.warmup,
        kind=config.optimizer.schedule,
        model=repr(config.model.path),
        **_adapters(config),
    )


def _adapters(config: TrainConfig) -> dict[str, str]:
    """Two pieces of the script for LoRA: an import, and the trainer's argument; both empty without."""
    lora = config.model.lora
    if not lora.rank:
        return {"lora_import": "", "lora": ""}
    targets = adapter_targets(lora, "TRL")
    made = f"LoraConfig(r={lora.rank}, lora_alpha={lora.alpha}, target_modules={targets!r}, lora_dropout=0.0)"
    return {"lora_import": "from peft import LoraConfig\n", "lora": f"        peft_config={made},\n"}


def _launcher(config: TrainConfig) -> str:
    flags = "--mixed_precision " + ("bf16" if _in_bfloat16(config) else "no")
    if config.parallel.shard == "fsdp2":
        flags += " --use_fsdp --fsdp_version 2"
    return LAUNCH.substitute(flags=flags + (" --cpu" if config.model.device == "cpu" else ""))
