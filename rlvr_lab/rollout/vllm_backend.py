"""What `VllmEngine` asks of a vLLM, whether it runs in this process (`vllm_colocated`) or in a server (`vllm_server`).
Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..core.temperature import TemperatureRule


@dataclass(frozen=True)
class Request:
    """One prompt, the partial response to continue included, and how to sample from it."""

    prompt: Sequence[int]
    n: int
    temperature: float
    max_tokens: int
    seed: int
    """Of the first response; response i is drawn with `seed + i`, whatever else is in flight."""
    stop_ids: tuple[int, ...]
    temper: TemperatureRule | None = None
    stops: tuple[str, ...] = ()
    """Texts that end a response too; only what was sampled is looked through, with special tokens as text."""


@dataclass(frozen=True)
class Sample:
    """One response: token ids with their log-probs in nats at the temperature they were sampled at, the end token
    included."""

    ids: list[int]
    logprob: list[float]
    finished: bool
    """An end token came; the last one."""
    temperature: list[float] | None = None
    """Of every token, where the request had a rule; else it is the request's."""
    stopped: bool = False
    """A stop text came, which the last token completes. Neither: the length limit cut it."""


class Backend(Protocol):
    """A vLLM."""

    dtype: str
    """Number format of its weights."""
    longest: int
    """Most tokens of a prompt with its response."""

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """`n` samples for each request, in order."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the named weights and forget every cached prefix; weights that are not named stay."""

    def load_adapter(self, folder: Path, version: int) -> None:
        """Serve a LoRA adapter (a peft directory) from now on."""

    def sleep(self) -> None:
        """Give memory back, where the platform can."""

    def wake(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """End what was started."""


@dataclass(frozen=True)
class SyncReport:
    """How well sampler and trainer agree after a weight sync, in nats over the tokens of the probe responses."""

    version: int
    mismatch: float
    """Mean |difference| of the two programs' log-probs."""
    mismatch_max: float
    tokens: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """As logged: `sync_mismatch`, `sync_mismatch_max`, `sync_seconds`."""
        return {
            "sync_mismatch": self.mismatch,
            "sync_mismatch_max": self.mismatch_max,
            "sync_seconds": self.seconds,
        }
