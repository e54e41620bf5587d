"""What to change where a run does not fit: overrides, tried in order, the harmless ones first.

Each setting is changed step by step and kept where it lowers the peak; once the run fits, everything that turns out not
to be needed is taken back, so that what is left is a least set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..train.config import TrainConfig, parse_config

EXACT, DRAWS, ROUNDING, OTHER = (
    "same result, slower",
    "same distribution, other random draws, slower",
    "other rounding",
    "another experiment",
)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LEAST_TOKENS = 256
NEEDED_BY = {"parallel.shard": ("parallel.offload",), "model.lora.rank": ("model.dtype",)}
"""Settings that make no sense without another: shards for offloading, adapters for a base that is rounded."""
Lacking = Callable[[TrainConfig], int]
"""Bytes that a configuration lacks; 0 where it fits."""


@dataclass(frozen=True)
class Remedy:
    """One override. `effect` says what else it changes."""

    key: str
    value: Any
    effect: str

    @property
    def override(self) -> str:
        """As the command line takes it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}={value}"


@dataclass(frozen=True)
class _Candidate:
    """A setting with the values to try, mildest first; `with_` is set along with it."""

    key: str
    effect: str
    values: Callable[[TrainConfig], Iterator[Any]]
    exact: bool = True


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value


def _shares(config: TrainConfig) -> Iterator[float]:
    if config.rollout.engine == "vllm":
        yield from (share for share in (0.35, 0.3, 0.25, 0.2) if share < config.rollout.vllm.gpu_memory)


def _once(wanted: bool, value: Any) -> Iterator[Any]:
    if wanted:
        yield value


CANDIDATES = (
    _Candidate(
        "update.micro_batch_rows", EXACT, lambda c: _halves(0 if c.update.packing else c.update.micro_batch_rows, 1)
    ),
    _Candidate(
        "update.micro_batch_tokens", EXACT, lambda c: _halves(c.update.micro_batch_tokens * c.update.packing, 1024)
    ),
    _Candidate("rollout.rows", DRAWS, lambda c: _halves(c.rollout.rows, 32)),
    _Candidate("rollout.vllm.gpu_memory", EXACT, _shares),
    _Candidate(
        "parallel.activation_checkpointing", EXACT, lambda c: _once(not c.parallel.activation_checkpointing, True)
    ),
    _Candidate("parallel.shard", "same result up to rounding", lambda c: _once(c.parallel.shard == "none", "fsdp2")),
    _Candidate("model.precision", ROUNDING, lambda c: _once(_plain_float(c), "bfloat16")),
    _Candidate("ledger.rows", "a smaller ledger", lambda c: _halves(c.ledger.rows, 1)),
    _Candidate("parallel.offload", EXACT, lambda c: _once(c.parallel.shard != "none" and not c.parallel.offload, True)),
    _Candidate("rollout.rows", DRAWS, lambda c: _halves(c.rollout.rows, 2)),
    _Candidate("model.lora.rank", OTHER + ": only adapters train", lambda c: _once(not c.model.lora.rank, 32), False),
    _Candidate(
        "model.dtype", ROUNDING + " of the frozen weights", lambda c: _once(_frozen_float(c), "bfloat16"), False
    ),
    _Candidate(
        "rollout.max_tokens",
        OTHER + ": longer responses are cut off",
        lambda c: _halves(c.rollout.max_tokens, LEAST_TOKENS),
        False,
    ),
)


def _plain_float(config: TrainConfig) -> bool:
    return config.model.dtype == "float32" and config.model.precision == "same"


def _frozen_float(config: TrainConfig) -> bool:
    return config.model.lora.rank > 0 and config.model.dtype == "float32"


def change(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with dotted settings replaced."""
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        section = tree
        *parents, leaf = key.split(".")
        for name in parents:
            section = section[name]
        section[leaf] = value
    return parse_config(tree)


def remedies(config: TrainConfig, lacking: Lacking, *, only_mild: bool = False) -> tuple[Remedy, ...] | None:
    """A least set of overrides under which nothing is lacking; None where no set of the candidates does it.

    `only_mild`: leave out offloading, which is slow, and what makes it another experiment.
    """
    chosen: dict[str, Remedy] = {}
    best = lacking(config)
    if not best:
        return ()
    for candidate in CANDIDATES:
        if only_mild and (not candidate.exact or candidate.key == "parallel.offload"):
            continue
        for value in candidate.values(_with(config, chosen)):
            trial = chosen | {candidate.key: Remedy(candidate.key, value, candidate.effect)}
            size = lacking(_with(config, trial))
            if size < best or candidate.key in ("parallel.shard", "model.lora.rank"):
                chosen, best = trial, size
            if not best:
                return _least(config, lacking, chosen)
    return None


def _with(config: TrainConfig, chosen: Mapping[str, Remedy]) -> TrainConfig:
    return change(config, {key: remedy.value for key, remedy in chosen.items()}) if chosen else config


def _least(config: TrainConfig, lacking: Lacking, chosen: dict[str, Remedy]) -> tuple[Remedy, ...]:
    """Take back what is not needed, the most intrusive first; soften what is stronger than it has to be."""
    for candidate in [c for c in reversed(CANDIDATES) if c.key in chosen]:
        key = candidate.key
        if key not in chosen:
            continue
        without = {k: r for k, r in chosen.items() if k != key and k not in NEEDED_BY.get(key, ())}
        kept = {k: r for k, r in chosen.items() if k != key}
        milder = [kept | {key: Remedy(key, value, candidate.effect)} for value in candidate.values(config)]
        for trial in (without, *milder):
            if not lacking(_with(config, trial)):
                chosen = trial
                break
    return tuple(chosen[key] for key in dict.fromkeys(c.key for c in CANDIDATES) if key in chosen)
