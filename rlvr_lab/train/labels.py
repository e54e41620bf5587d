"""What a composition wants to know about responses beyond their verdicts: clusters of answers, labels of thoughts."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from ..core.rollout import Rollout
from ..errors import UserError
from ..methods.base import Pipeline
from ..policy.load import Policy, load_policy
from ..rollout.clusters import with_clusters
from ..rollout.engine import TransformersEngine
from ..rollout.factory import Engine
from ..rollout.judges import LABEL, STEP, CountdownJudge, Judge, ModelJudge, with_thoughts
from ..tasks.clusters import Clusterer, make_clusterer
from .config import JudgeSection, TrainConfig
from .data import Problems
from .seeds import derive_seed


@dataclass
class Labels:
    """Makes the fields that some method requires, and nothing where none does."""

    config: TrainConfig
    problems: Problems
    sampler: Policy
    engine: Engine
    _clusterer: Clusterer | None = None
    _judge: Judge | None = field(default=None)

    def prepare(self, pipeline: Pipeline) -> None:
        """Load what will be needed. Raises UserError where a library, a model or a rule is missing."""
        data = self.config.data
        if pipeline.needs("cluster_id") and self._clusterer is None:
            self._clusterer = make_clusterer(**data.clusters.model_dump(exclude={"refuse_copies"}))
        if (pipeline.needs(LABEL) or pipeline.needs(STEP)) and self._judge is None:
            self._judge = make_judge(data.judge, data.task, self.sampler, self.engine)

    def add(self, rollout: Rollout, pipeline: Pipeline, step: int) -> Rollout:
        """The graded rollout with the fields that `pipeline` needs."""
        self.prepare(pipeline)
        data, problems = self.config.data, self.problems
        if self._clusterer is not None and pipeline.needs("cluster_id"):
            rollout = with_clusters(
                rollout, problems.task, problems.train, self.sampler, self._clusterer, data.clusters.refuse_copies
            )
        if self._judge is not None and (pipeline.needs(LABEL) or pipeline.needs(STEP)):
            judge = data.judge

            def draw(problem: int) -> Random:
                return Random(derive_seed(self.config.seed, f"judge {problem}", step))

            rollout = with_thoughts(rollout, self._judge, problems.train, judge.accuracy, judge.shuffled, draw)
        return rollout

    def metrics(self) -> dict[str, float]:
        """Figures of the judge."""
        return self._judge.metrics() if self._judge is not None else {}


def make_judge(section: JudgeSection, task: str, sampler: Policy, engine: Engine) -> Judge:
    """The judge of `data.judge`. Raises UserError where the task has no rules, or the model is not named."""
    if section.by == "rules":
        if task != "countdown":
            raise UserError(
                f"data.judge.by is 'rules', but task '{task}' has none for the steps of a response; set "
                "data.judge.by=model and data.judge.model to a directory, a hub name, or policy"
            )
        return CountdownJudge(sampler)
    if section.model is None:
        raise UserError("data.judge.by is 'model', but data.judge.model is not set; give a directory, a hub name, or "
                        "policy for the policy itself")  # fmt: skip
    own = section.model == "policy"
    by: Any = sampler if own else load_policy(section.model, device=section.device)
    return ModelJudge(
        sampler, by, engine if own else TransformersEngine(by),
        separators=section.separators, close=section.close, max_tokens=section.max_tokens, cache=section.cache,
    )  # fmt: skip
