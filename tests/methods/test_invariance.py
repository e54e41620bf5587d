"""Loss, gradient and selected tokens of every method do not depend on how a minibatch is split or ordered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import ready_rollout, sampled_rollout
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import Method, Pipeline, build, compose, load_class, trainable
from rlvr_lab.methods.epo import EPO
from rlvr_lab.policy.load import Policy
from rlvr_lab.tasks import countdown
from rlvr_lab.testing.invariance import check_invariance, update_result

COMPOSITIONS = [
    *(
        pytest.param([(slug, preset)], id=f"{slug}-{preset}")
        for slug in trainable()
        for preset in load_class(slug).presets
    ),
    pytest.param([("rloo", "paper"), ("gspo", "paper"), ("entropy_bonus", "paper")], id="rloo+gspo+entropy_bonus"),
    pytest.param([("opo", "paper"), ("kl_cov", "paper"), ("kl_reference", "paper")], id="opo+kl_cov+kl_reference"),
    pytest.param([("clip_cov", "paper"), ("truncated_importance_sampling", "paper")], id="clip_cov+tis"),
]  # fmt: skip
# so that a small minibatch has something to choose from
WIDER: dict[str, dict[str, Any]] = {
    "clip_cov": {"ratio": 0.2, "low": -10.0, "high": 10.0},
    "kl_cov": {"ratio": 0.2},
    "lp_reg": {"share": 0.3},
    "overlong": {"max_length": 20, "buffer": 10},
    "canon": {"max_length": 20},
    "riskpo": {"bundle_size": 2},
    "spear": {"length": 20},
    "one_shot": {"entropy_coefficient": 0.1},
    "bupo": {"layer": 2},
    "ares": {"trigger_words": ["=", "yes"]},
}


@pytest.fixture(scope="module")
def sampled(tiny_s: Policy) -> Rollout:
    """16 ragged responses in 4 groups, one of them dead, one response empty."""
    return sampled_rollout(tiny_s)


@pytest.fixture(scope="module")
def ready(tiny_s: Policy, sampled: Rollout) -> Callable[[Pipeline], Rollout]:
    """The same responses with every field that a composition may require."""
    return lambda pipeline: ready_rollout(tiny_s.model, sampled, pipeline)


@pytest.fixture(scope="module")
def moved(tiny_s: Policy) -> Any:
    """A policy some way off the one that sampled, so that ratios differ from 1 and some are clipped."""
    model = copy.deepcopy(tiny_s.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def made(parts: list[tuple[str, str]]) -> Pipeline:
    methods = [build(slug, {"preset": preset, **WIDER.get(slug, {})}) for slug, preset in parts]
    for method in methods:
        if isinstance(method, EPO):
            method.history = [0.05, 0.1]  # without a history there is no corridor
    pipeline = compose(methods)
    pipeline.bind(lambda text: [countdown.ID.get(word, countdown.ID["<unk>"]) for word in text.split()])
    return pipeline


@pytest.mark.parametrize("parts", COMPOSITIONS)
def test_an_update_is_the_same_however_it_is_split(parts: list[tuple[str, str]], moved: Any, ready: Any) -> None:
    pipeline = made(parts)
    whole = check_invariance(pipeline, moved, ready(pipeline))
    assert float(whole.gradient.abs().max()) > 1e-4  # there is something to compare


@pytest.mark.parametrize("slug", ["clip_cov", "kl_cov", "high_entropy_tokens", "lp_reg"])
def test_selected_tokens_are_some_and_not_all(slug: str, moved: Any, ready: Any) -> None:
    pipeline = made([(slug, "paper")])
    rollout = ready(pipeline)
    result = update_result(pipeline, moved, rollout, 4)
    chosen = result.choices[f"{slug}.selected"].bool()
    assert 0 < int(chosen.sum()) < int(rollout.mask.sum())


def test_the_harness_notices_a_statistic_of_the_micro_batch(moved: Any, ready: Any) -> None:
    class PerMicroBatch(Method):
        """What public frameworks do: a top-k over whatever rows happen to share a pass."""

        slug = "per_micro_batch"

        def regularise(self, inputs: Any) -> Tensor:
            centred: Tensor = inputs.logprob - inputs.logprob[inputs.rollout.mask].mean()
            return centred.square()

    with pytest.raises(AssertionError, match="micro-batches of 1: loss differs"):
        check_invariance(compose([PerMicroBatch()]), moved, ready(compose([])))


def test_the_harness_notices_a_choice_by_position(moved: Any, ready: Any) -> None:
    class FirstRows(Method):
        """Random numbers dealt in the order in which rows arrive."""

        slug = "first_rows"

        def prepare(self, batch: Rollout, advantage_BT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            return {"first_rows.chosen": torch.rand(advantage_BT.shape, generator=generator)}

    with pytest.raises(AssertionError, match=r"permuted rows: 'first_rows\.chosen' differs"):
        check_invariance(compose([FirstRows()]), moved, ready(compose([])))
