"""Settings of a training run: YAML files, dotted overrides, and errors that name the nearest valid key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError, nearest
from ..methods import build, load_class
from ..policy.load import DTYPES
from ..rollout.vllm_settings import NO_TEMPER, VllmSection
from ..tasks.base import Task
from ..tasks.benchmarks import benchmark
from ..tasks.registry import entry, task

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSection(Section):
    """Low-rank adapters through peft: only they are trained, and the starting policy stays at hand for a reference."""

    rank: Annotated[int, Field(ge=0)] = 0
    """0 trains all weights."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as q_proj; empty takes all but the head."""
    kappa: dict[str, Any] = {}
    """Settings of methods.kappatune, such as {preset: peft}: an adapter only on the linear layers that it chooses."""
    dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Only 0: with dropout the importance ratio would not start at 1."""

    @model_validator(mode="after")
    def _kappa_fits(self) -> LoraSection:
        if not self.kappa:
            return self
        build("kappatune", self.kappa)
        if not self.rank:
            raise ValueError("kappa chooses layers for adapters, but rank is 0; set model.lora.rank")
        if self.targets:
            raise ValueError(f"kappa chooses the layers, and targets names {self.targets[0]}; set one of them")
        return self


class ModelSection(Section):
    """Which policy to train. `path`: a transformers directory, `tiny/S`, `tiny/R`, or a hub name."""

    path: str = "tiny/S"
    device: str = "auto"
    dtype: str = "float32"
    """Type of the weights that the optimizer moves."""
    precision: Literal["same", "bfloat16"] = "same"
    """Type of forward and backward passes. bfloat16 with dtype float32: mixed precision with float32 master weights."""
    lora: LoraSection = LoraSection()

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(nearest(value, DTYPES))
        return value


class ClustersSection(Section):
    """When answers of a prompt mean the same, for methods that need `cluster_id`; no label is read."""

    by: Literal["mathematics", "exact", "embedding", "entailment"] = "mathematics"
    """`tasks.clusters`; the last two need sentence-transformers and a model."""
    model: str | None = None
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.9
    """Least cosine of two embeddings in one cluster."""
    both_ways: bool = True
    """entailment: ask in both directions."""
    reassign: bool = False
    """A later representative may take an answer that is clustered already."""
    refuse_copies: bool = False
    """An answer that copies the question belongs to no cluster."""
    device: str = "cpu"


class JudgeSection(Section):
    """Who labels the steps of responses, for methods that need `thought_label`."""

    by: Literal["rules", "model"] = "rules"
    """rules: exact, for countdown. model: a language model is asked about every response."""
    model: str | None = None
    """The judge: a directory or hub name, or `policy` for the policy itself through the run's engine."""
    device: str = "auto"
    max_tokens: Positive = 1024
    """Length of its replies."""
    separators: tuple[str, ...] = ("\n\n",)
    """Texts that end a step."""
    close: str = "</think>"
    """Text that ends the thinking."""
    cache: Path | None = None
    """JSONL file that keeps replies beyond a run."""
    accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Control: below 1, labels of thinking steps are flipped at random."""
    shuffled: bool = False
    """Control: labels that say nothing, in runs of the same lengths."""


class DataSection(Section):
    """Which task, and where its problems come from: some tasks make their own, others read a JSONL file."""

    task: str = "countdown"
    """A name of `rlvr_lab.tasks.registry.TASKS`."""
    file: Path | None = None
    pool: Positive = 3000
    """Problems to make, or the largest number of lines to use."""
    max_bad_lines: Annotated[int, Field(ge=0)] = 20
    template: str | None = None
    """Prompt template of tasks in natural language, with {question} in it."""
    settings: dict[str, Any] = {}
    """The task's own settings."""
    clusters: ClustersSection = ClustersSection()
    judge: JudgeSection = JudgeSection()

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        return entry(value).name

    @model_validator(mode="after")
    def _file_fits(self) -> DataSection:
        content = entry(self.task).file
        if content is not None and self.file is None:
            raise ValueError(f"task '{self.task}' needs data.file, a JSONL file with {content}")
        if content is None and self.file is not None:
            raise ValueError(f"data.file is set, but task '{self.task}' makes its own problems; set data.task to math")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> DataSection:
        if self.settings or self.template is not None:
            self.make_task()
        return self

    def make_task(self) -> Task[Any]:
        """The task with its settings. Raises UserError where it has no such setting."""
        return task(self.task, self.settings | ({} if self.template is None else {"template": self.template}))


class RolloutSection(Section):
    """Sampling: `prompts` problems per step, `group_size` responses each."""

    prompts: Positive = 16
    group_size: Positive = 16
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Positive = 32
    rows: Positive = 256
    """Responses in flight at once."""
    streams: Literal["auto", "step", "prompt"] = "auto"
    """Random numbers per step or per prompt. Only those per prompt do not depend on how prompts are divided over
    processes; auto takes them where there are several."""
    prefix_memory: Annotated[int, Field(ge=0)] = 256
    """MiB of keys and values that the transformers engine keeps within one sampling of a tree or of episodes, so that
    no context is read twice; 0 reads every prefix again. Changes log-probs by rounding only. vLLM has a cache of its
    own."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Program that samples. vllm needs update.recompute_old_logprob."""
    vllm: VllmSection = VllmSection()

    @field_validator("group_size")
    @classmethod
    def _has_baseline(cls, value: int) -> int:
        if value < 2:
            raise ValueError("a group of one has no baseline to compare with; use at least 2")
        return value


class GuardSection(Section):
    """What happens to a minibatch whose loss or gradient is not finite, or whose gradient is far too large."""

    skip_nonfinite: bool = False
    """Leave such a minibatch out instead of stopping at once."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """Leave out a minibatch whose gradient norm exceeds this many times the median of the last 64 applied ones."""
    stop_after: Positive = 5
    """Stop when so many minibatches in a row were left out."""


class ClasspSection(Section):
    """CLASSP's settings (`core.classp`), for `optimizer.name: classp`."""

    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Only where the squared gradient, after clipping, exceeds it does a weight move; `moved_share` in the log is the
    share that did. The paper's 0.5 belongs to gradients that are not clipped."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    scaling: bool = True
    """Divide by the history of the weight; false gathers it only."""
    rule: Literal["paper", "released"] = "paper"
    """released: a gate for whole tensors, and a history without the power."""


class OptimizerSection(Section):
    """AdamW, or CLASSP. The learning rate warms up linearly, then follows `schedule`."""

    name: Literal["adamw", "classp"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Of adamw."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Of adamw."""
    classp: ClasspSection = ClasspSection()
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled. CLASSP decays the weights that move, and no other."""
    warmup: Annotated[int, Field(ge=0)] = 8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    grad_clip: Annotated[float, Field(gt=0)] = 0.3
    guard: GuardSection = GuardSection()

    @model_validator(mode="after")
    def _settings_are_of_the_optimizer(self) -> OptimizerSection:
        # by value: a run's own config.yaml names every setting
        owners = {"betas": "adamw", "eps": "adamw", "classp": "classp"}
        for key, owner in owners.items():
            default = type(self).model_fields[key].default
            if owner != self.name and getattr(self, key) != default:
                usual = list(default) if isinstance(default, tuple) else default
                back = "" if isinstance(default, Section) else f", or set it back to {usual}"
                raise ValueError(
                    f"optimizer.{key} is of {owner} and does nothing with optimizer.name={self.name}; set "
                    f"optimizer.name={owner}{back}"
                )
        return self

    @model_validator(mode="after")
    def _the_gate_can_open(self) -> OptimizerSection:
        if self.name != "classp":
            return self
        threshold, whole = self.classp.threshold, self.classp.rule == "released"
        highest = 1.0 if whole else self.grad_clip**2
        if threshold >= highest:
            why = (
                "the released gate never opens from 1 on"
                if whole
                else f"no squared gradient exceeds optimizer.grad_clip squared, {highest:.3g}"
            )
            raise ValueError(f"optimizer.classp.threshold is {threshold:g}, and {why}; lower it")
        return self


class UpdateSection(Section):
    """From one rollout to optimizer steps. More minibatches or epochs mean more off-policy updates."""

    epochs: Positive = 1
    minibatches: Positive = 8
    micro_batch_rows: Positive = 16
    """Responses per forward and backward pass; changes memory and speed, never the result."""
    packing: bool = False
    """Join the responses of a pass into one sequence without padding, `micro_batch_tokens` at most. For flash attention
    on GPUs; on a CPU it was 1.3 times slower (benchmarks/results/packing.json)."""
    micro_batch_tokens: Positive = 16384
    """Prompt and response tokens per pass with `packing`; a longer response gets a pass of its own."""
    skip_dead_rows: bool = True
    """Leave out rows whose loss has no gradient. Exact: they keep their place in the normaliser."""
    recompute_old_logprob: bool = False
    """Score the rollout again instead of using the log-probs recorded while sampling."""


class ParallelSection(Section):
    """Several processes (torchrun). Without `shard` every process holds the whole model and optimizer."""

    shard: Literal["none", "fsdp2"] = "none"
    """fsdp2: weights, gradients and optimizer state are divided over the processes."""
    offload: bool = False
    """With fsdp2 on GPUs: keep what is divided in main memory."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds to wait for a process that is alive but late."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> ParallelSection:
        if self.offload and self.shard == "none":
            raise ValueError("offload needs parallel.shard: fsdp2")
        return self


class EvaluationSection(Section):
    """Held-out evaluation every `every` steps (0: only before and after)."""

    every: Annotated[int, Field(ge=0)] = 0
    problems: Annotated[int, Field(ge=0)] = 96
    """0 switches evaluation off."""
    samples: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    file: Path | None = None
    """JSONL of problems for `math`; by default the training file."""
    benchmarks: tuple[str, ...] = ()
    """Measured beside: math500, aime24, ..., or NAME=FILE; without a file they are found as by `rlvr-lab evaluate`."""

    @field_validator("benchmarks")
    @classmethod
    def _known_benchmarks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            benchmark(item.partition("=")[0])
        return value


class CheckpointSection(Section):
    """Resumable state every `every` steps; the newest `keep` are kept."""

    every: Positive = 20
    keep: Positive = 2


class LoggingSection(Section):
    """`metrics.jsonl` is always written."""

    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases, installed by `pip install wandb`. `offline` writes into the run folder, for `wandb sync`."""
    wandb_project: Annotated[str, Field(min_length=1)] = "rlvr-lab"
    wandb_name: str | None = None
    """Name of the run there; by default that of the run folder."""
    wandb_group: str | None = None
    """Runs that W&B shows as one, such as the seeds of one experiment."""
    view: Literal["auto", "live", "plain", "quiet"] = "auto"
    """What the terminal shows. `auto`: the live view on a terminal, plain lines elsewhere."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Transcripts written to samples.jsonl and samples.html every `samples_every` steps; 0 writes none."""
    samples_every: Positive = 20

    @field_validator("wandb", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML reads a bare `off` as false and `on` as true
        return {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value


class LedgerSection(Section):
    """The entropy ledger: predicted and measured entropy change of every step, in metrics.jsonl as `ledger_*`."""

    rows: Annotated[int, Field(ge=0)] = 8
    """Responses measured again after every update, and as many held-out ones; 0 keeps no ledger."""
    window: Positive = 50
    """Steps to which the scale from predicted to measured change is fitted."""


class TrainConfig(Section):
    """All settings of a run. `methods` maps method slugs to `{preset: NAME, setting: value}`."""

    seed: int = 0
    steps: Positive = 80
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    rollout: RolloutSection = RolloutSection()
    methods: dict[str, dict[str, Any]] = {"grpo": {"preset": "tiny"}}
    optimizer: OptimizerSection = OptimizerSection()
    update: UpdateSection = UpdateSection()
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    ledger: LedgerSection = LedgerSection()

    @field_validator("methods", mode="before")
    @classmethod
    def _fill_empty_settings(cls, value: Any) -> Any:
        # `methods: {grpo: }` in YAML means "with its defaults"
        return {k: v or {} for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _minibatches_fit(self) -> TrainConfig:
        responses = self.rollout.prompts * self.rollout.group_size
        if self.update.minibatches > responses:
            raise ValueError(f"update.minibatches is {self.update.minibatches}, but a step has {responses} responses")
        for slug, settings in self.methods.items():
            build(slug, settings)
        return self

    @model_validator(mode="after")
    def _classp_has_room_for_its_sums(self) -> TrainConfig:
        if self.optimizer.name == "classp" and self.model.dtype != "float32" and not self.model.lora.rank:
            raise ValueError(
                f"optimizer.name is classp, whose sums of gradients stop growing in {self.model.dtype}; set "
                "model.dtype=float32, and model.precision=bfloat16 for passes in 16 bits"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit_the_sampling(self) -> TrainConfig:
        for slug, settings in self.methods.items():
            method = build(slug, settings)
            if (method.rescored or method.has("read_old_logits")) and not self.update.recompute_old_logprob:
                raise ValueError(
                    f"method '{slug}' needs figures of the policy that sampling does not record: set "
                    "update.recompute_old_logprob=true"
                )
            if method.has("trainable") and self.model.lora.rank:
                raise ValueError(
                    f"method '{slug}' chooses which weights train, and with model.lora only adapters do; set "
                    "model.lora.rank=0, or choose the layers that get an adapter by model.lora.kappa"
                )
            if method.has("temper") and self.rollout.engine == "vllm" and self.rollout.vllm.server is not None:
                raise ValueError(f"method '{slug}': {NO_TEMPER}")
        return self

    @model_validator(mode="after")
    def _vllm_is_scored_again(self) -> TrainConfig:
        if self.rollout.engine == "vllm" and not self.update.recompute_old_logprob:
            raise ValueError(
                "rollout.engine is vllm, which gives no token entropies and whose log-probs are another program's: set "
                "update.recompute_old_logprob=true"
            )
        return self


def recipe_path(name: str) -> Path:
    """File of a recipe: a path to a YAML file, or the name of a packaged one such as `grpo/tiny`."""
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        path = Path(name)
        if not path.is_file():
            raise UserError(f"recipe file '{name}' does not exist")
        return path
    packaged = packaged_recipes()
    if name not in packaged:
        raise UserError(f"no recipe '{name}'; {nearest(name, packaged)}")
    return packaged[name]


def packaged_recipes() -> dict[str, Path]:
    """Recipes shipped with the package, by name."""
    root = Path(str(resources.files("rlvr_lab"))) / "recipes"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.glob("*/*.yaml"))}


def load_config(recipe: str | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Defaults, then the recipe, then `key.path=value` overrides, whose values are read as YAML.

    Raises UserError that names the setting and the nearest valid one.
    """
    tree = _read_yaml(recipe_path(recipe)) if recipe else {}
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> TrainConfig:
    """Validate a nested mapping; see `load_config`."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must hold settings (key: value), not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}' is not of the form section.key=value")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': {' '.join(str(error).split())}") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{name}'; {_suggest(item['loc'])}")
        elif name:
            # a whole section is not shown: the reason names what is wrong in it
            got = "" if isinstance(item["input"], Mapping) else f" (got {item['input']!r})"
            lines.append(f"setting '{name}': {_reason(item)}{got}")
        else:
            lines.append(_reason(item))
    return "; ".join(lines)


def _reason(item: Mapping[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _suggest(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = TrainConfig
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    prefix = ".".join(map(str, location[:-1]))
    own = nearest(str(location[-1]), section.model_fields)
    if prefix:
        return own.replace("'", f"'{prefix}.", 1) if "did you mean" in own else own
    # the key may be right and only its section missing, as in `lr=1e-4`; that comes before a key that looks like it
    for name, field in TrainConfig.model_fields.items():
        annotation = field.annotation
        if (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and location[-1] in annotation.model_fields
        ):
            return f"did you mean '{name}.{location[-1]}'?"
    return own


def describe_settings() -> list[tuple[str, str]]:
    """Every setting with its default, dotted, for `--help`."""
    rows = []
    for name, field in TrainConfig.model_fields.items():
        if name == "methods":
            rows += [(f"methods.{slug}.*", ", ".join(load_class(slug).presets)) for slug in field.default]
        else:
            rows += _leaves(name, field.default)
    return rows


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, BaseModel):
        return [(name, str(value))]
    return [leaf for key in type(value).model_fields for leaf in _leaves(f"{name}.{key}", getattr(value, key))]
