"""Which engine a run samples with. vLLM is imported only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..core.paths import Path, Piece, Start
from ..core.rollout import Rollout
from ..policy.load import Policy
from .engine import Sampling, TransformersEngine

EngineName = Literal["transformers", "vllm"]


class Continues(Protocol):
    """What samples: all that a method's `sample` hook, a meter and an engine of episodes ask of an engine."""

    @property
    def policy(self) -> Policy:
        """What is sampled from, with its tokenizer."""

    @property
    def turns(self) -> Any:
        """How an environment's turns are played (`rollout.episodes.Turns`); None for a plain task."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
        report: Callable[[int], None] = ...,
    ) -> Rollout:
        """`group_size` responses to each prompt."""

    def extend(
        self,
        starts: Sequence[Start],
        sampling: Sampling,
        generator: torch.Generator,
        *,
        stops: Sequence[str] = (),
        report: Callable[[int], None] = ...,
    ) -> list[Piece]:
        """Continue each start, a context of any length, by one piece; a text of `stops` ends it. Of `sampling` the
        limit on tokens is not used, every start has its own."""

    def with_entropy(self, paths: Sequence[Path], rows: int = ...) -> None:
        """Fill in the entropies of paths that lack them, `rows` paths per pass."""


class Engine(Continues, Protocol):
    """An engine with weights of its own to keep up to date, as the loop holds it."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Any:
        """Take up the trainer's weights, whole and by name; returns a report where the engine checks itself."""

    def sleep(self) -> None:
        """Give up memory that the update needs."""

    def wake(self) -> None:
        """Be ready to sample again."""

    def close(self) -> None:
        """End everything that was started."""


def make_engine(
    name: EngineName,
    policy: Policy,
    settings: Any = None,
    *,
    replica: bool = False,
    prompts: Sequence[Sequence[int]] = (),
    tempers: bool = False,
) -> Engine:
    """The engine `rollout.engine`. `policy` is sampled from; `replica` says that the trainer holds another module,
    whose weights come by `sync`. `settings`: the section `rollout.vllm`. `prompts`: some of the run's, on which a sync
    is checked before anything was sampled. `tempers`: `Sampling.temper` will be used.

    Raises UserError where vLLM is missing or unsupported.
    """
    if name == "transformers":
        return TransformersEngine(policy, replica=replica)
    from .vllm import VllmEngine

    engine: Engine = VllmEngine(policy, settings, prompts=prompts, tempers=tempers)
    return engine
