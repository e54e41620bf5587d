r"""1-shot RLVR: one training problem, chosen by how its accuracy varied, and entropy as a driver (arXiv 2504.20571).

    v_i = var(s_i1, ..., s_iE)        s: share of right responses to problem i at each of its visits in an earlier run
    L   = c_pg L_PG + beta L_KL - c_H token_mean(H)            H: entropy in nats [b, T], with gradient

The m problems `problems` (indices into the pool, from `rlvr-lab select RUN`) are repeated until a step has `rows` of
them. Every duplicate is a group of its own, so that advantages are normalised over its G responses and not over all of
them. L_PG is the base's; L_KL is `kl_reference` beside it. `pg_coefficient: 0` trains on entropy alone: responses are
sampled and graded as ever, and no reward trains. Once every response is right, A = 0 and only the entropy term acts;
`saturated` and `steps_since_saturation` in the log tell how long that has been so.

Scores: population variance (the code sorts by its root, which is the same order), and LIM, the likeness of a problem's
learning curve to the mean curve (LIMR), which has 0/0 where the mean is 1 throughout: nan here, unguarded in the code.

Card: papers/one_shot.md. Code compared: ypwang61/One-Shot-RLVR @ 21ed529. The paper says 8 updates per rollout; the
released script makes one, on-policy, so that its clip is never active: that is `update.minibatches`, 8 or 1, and so
presets `paper` and `released` are equal. Grouping by duplicate stands in the code alone.

Presets: `paper` and `released` (c_pg 1, c_H 0.001), `entropy_only` (c_pg 0), `tiny` (16 rows, c_H 0.003).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..core.reduce import Reduction
from ..core.rollout import Rollout
from ..errors import UserError
from ._settings import check
from .base import LossInputs, Method

Key = TypeVar("Key")
Score = Literal["variance", "lim", "random"]


def variance_scores(history: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Population variance of each problem's accuracies; histories of different lengths are used as they are. nan where
    there is none."""
    scores = {}
    for key, values in history.items():
        # exact sums: histories of the same values in another order tie
        mean = math.fsum(values) / len(values) if values else math.nan
        scores[key] = math.fsum((v - mean) ** 2 for v in values) / len(values) if values else math.nan
    return scores


def impact_scores(history: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """LIM_i = 1 - sum_k (s_ik - m_k)^2 / sum_k (1 - m_k)^2 over the shortest history, m the mean curve; nan where every
    problem was always solved, or one has no visit."""
    shortest = min((len(values) for values in history.values()), default=0)
    mean = [sum(values[k] for values in history.values()) / len(history) for k in range(shortest)]
    below = sum((1 - m) ** 2 for m in mean)
    return {
        key: 1 - sum((s - m) ** 2 for s, m in zip(values, mean, strict=False)) / below if below else math.nan
        for key, values in history.items()
    }


def random_scores(history: Mapping[Key, Sequence[float]], seed: int = 0) -> dict[Key, float]:
    """A control: uniform numbers, dealt in the order of the keys as text."""
    numbers = torch.rand(len(history), generator=torch.Generator().manual_seed(seed)).tolist()
    return dict(zip(sorted(history, key=str), numbers, strict=True))


def ranking(scores: Mapping[Key, float]) -> list[Key]:
    """Keys by falling score; ties keep their order, and undefined scores come last."""
    return sorted(scores, key=lambda key: -math.inf if math.isnan(scores[key]) else scores[key], reverse=True)


def repeated(problems: Sequence[int], rows: int) -> list[int]:
    """The problems in turn until there are `rows`."""
    return [problems[i % len(problems)] for i in range(rows)]


@dataclass(frozen=True)
class OneShotConfig:
    """Settings. `problems` empty takes the whole pool; `rows` is the number of groups of a step, as `rollout.prompts`
    is without this method; `saturation` the accuracy from which the problems count as solved."""

    problems: tuple[int, ...] = ()
    rows: int = 128
    pg_coefficient: float = 1.0
    entropy_coefficient: float = 0.001
    saturation: float = 0.99

    def __post_init__(self) -> None:
        given = self.problems
        listed = isinstance(given, list | tuple) and all(isinstance(i, int) and i >= 0 for i in given)
        check(listed, "one_shot.problems", "be a list of indices into the pool, such as [17]", given)
        object.__setattr__(self, "problems", tuple(given))
        check(self.rows >= 1, "one_shot.rows", "be at least 1", self.rows)
        check(self.rows >= len(given), "one_shot.rows", f"hold all {len(given)} problems", self.rows)
        check(self.pg_coefficient >= 0, "one_shot.pg_coefficient", "not be negative", self.pg_coefficient)
        check(0 < self.saturation <= 1, "one_shot.saturation", "lie in (0, 1]", self.saturation)


class OneShot(Method):
    """Owner of `select`; `weight` scales the surrogate, `regularise` holds the entropy term."""

    slug: ClassVar[str] = "one_shot"
    needs_entropy: ClassVar[bool] = True
    regularise_reduction: Reduction | None = "token_mean"
    config_class: ClassVar[type[OneShotConfig]] = OneShotConfig
    presets: ClassVar[Mapping[str, OneShotConfig]] = {
        "paper": OneShotConfig(),
        "released": OneShotConfig(),
        "entropy_only": OneShotConfig(pg_coefficient=0.0),
        "tiny": OneShotConfig(rows=16, entropy_coefficient=0.003),
    }

    def __init__(self, config: OneShotConfig | None = None) -> None:
        self.config = config or OneShotConfig()
        self.steps = 0
        self.saturated_at: int | None = None

    def has(self, hook: str) -> bool:
        """Without problems every problem is seen; coefficients of 1 and 0 need no weight and no term."""
        c = self.config
        off = {"select": not c.problems, "weight": c.pg_coefficient == 1, "regularise": not c.entropy_coefficient}
        return super().has(hook) and not off.get(hook, False)

    def select(self, problems: Any, step: int) -> list[int]:
        """The chosen problems, repeated. Raises UserError for one that the pool does not have."""
        pool = len(problems.prompts)
        if beyond := [i for i in self.config.problems if i >= pool]:
            raise UserError(
                f"methods.one_shot.problems names problem {beyond[0]}, but the pool has {pool} (data.pool); indices "
                "start at 0 and are those of `rlvr-lab select RUN` for the same data and seed"
            )
        return repeated(self.config.problems, self.config.rows)

    def filter(self, rollout: Rollout) -> Rollout:
        """The rollout as it is; its accuracy tells whether the problems are solved."""
        if self.saturated_at is None and rollout.correct is not None and len(rollout):
            solved = float(rollout.correct.float().mean()) >= self.config.saturation
            self.saturated_at = self.steps if solved else None
        return rollout

    def weight(self, batch: Rollout, advantage_BT: Tensor) -> Tensor:
        """c_pg on every token [B, T]."""
        return torch.full_like(advantage_BT, self.config.pg_coefficient)

    def regularise(self, inputs: LossInputs) -> Tensor:
        """-c_H H per token [b, T]."""
        assert inputs.entropy is not None
        return -self.config.entropy_coefficient * inputs.entropy

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Count the steps."""
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        """`saturated`, 1 from the first step whose rollout reached `saturation`, and the steps since (nan before)."""
        since = math.nan if self.saturated_at is None else float(self.steps - self.saturated_at)
        return {"saturated": float(self.saturated_at is not None), "steps_since_saturation": since}

    def state_dict(self) -> dict[str, Any]:
        """Steps made, and the step of saturation or -1."""
        return {"steps": self.steps, "saturated_at": -1 if self.saturated_at is None else self.saturated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.steps, at = int(state["steps"]), int(state["saturated_at"])
        self.saturated_at = at if at >= 0 else None
