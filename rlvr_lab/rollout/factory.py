"""Which engine a run samples with. vLLM is imported only where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..core.rollout import Rollout
from ..policy.load import Policy
from .engine import Sampling, TransformersEngine

EngineName = Literal["transformers", "vllm"]


class Engine(Protocol):
    """What the loop, the evaluation and methods with a `sample` hook ask of an engine."""

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
