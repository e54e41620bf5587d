"""Any two methods that train: refused with both names where they would take over the same hook, else one update with
finite gradients. The policy is a random one of a few thousand weights, so that all pairs take seconds."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import make_rollout, ready_rollout
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import Method, Pipeline, build, compose, trainable
from rlvr_lab.methods.base import EXCLUSIVE, LossInputs
from rlvr_lab.train.update import Updater, UpdateTotals

# so that a small minibatch has something to choose from, and rules need no answers in words
SETTINGS: dict[str, dict[str, Any]] = {
    "clip_cov": {"ratio": 0.2, "low": -10.0, "high": 10.0},
    "kl_cov": {"ratio": 0.2},
    "lp_reg": {"share": 0.3},
    "siren": {"anchor": "none", "coefficient": 0.5},  # a first step has no distance from its anchor
    "bupo": {"layer": "last"},  # the model has one layer
    "overlong": {"max_length": 8, "buffer": 6},
    "riskpo": {"bundle_size": 2},
    "spear": {"length": 8},
    "spurious_rewards": {"rule": "random"},
}
PAIRS = list(combinations(trainable(), 2))


def made(slug: str) -> Method:
    return build(slug, SETTINGS.get(slug, {}))


def contested(one: Method, other: Method) -> bool:
    """Whether both would be the only owner of something; a base yields."""
    if one.is_base or other.is_base:
        return one.is_base and other.is_base
    if any(one.has(hook) and other.has(hook) for hook in EXCLUSIVE):
        return True
    if any(a.has("lens") and of_another_policy(b) for a, b in ((one, other), (other, one))):
        return True
    # a loss is written for its reduction, so the owner of the surrogate has the first say in it
    reduction = one.has("reduction") and other.has("reduction") and one.has("surrogate") == other.has("surrogate")
    return reduction or (one.replaces_reward and other.replaces_reward)


def of_another_policy(method: Method) -> bool:
    """Whether a method's loss needs log-probs of the model's own policy, which a lens replaces by a layer's."""
    in_loss = method.has("regularise") or method.has("surrogate")
    compares = in_loss and "ref_logprob" in method.requires
    return compares or method.has("replay") or method.importance_cap is not None


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=100, num_hidden_layers=1, initializer_range=0.5, **shape)).eval()


@pytest.fixture(scope="module")
def graded() -> Rollout:
    """12 ragged responses in 3 groups of right and wrong ones, one response empty."""
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0] * 3)
    record = make_rollout([7, 3, 8, 5, 1, 6, 8, 2, 0, 4, 8, 7], group_size=4)
    answer = ("1", "2", None, "3") * 3
    clusters = torch.tensor([0, 1, -1, 0] * 3)
    return record.with_(
        reward=reward, reward_components={"correct": reward}, correct=reward > 0, answer=answer, cluster_id=clusters
    )


class Recorded:
    """Notes the shapes of every per-token loss that a pipeline hands to the updater."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.shapes: set[bool] = set()
        self.inner = pipeline.surrogate, pipeline.regularise
        pipeline.surrogate, pipeline.regularise = self.surrogate, self.regularise  # type: ignore[method-assign]

    def _note(self, value: Tensor, inputs: LossInputs) -> None:
        self.shapes.add(value.shape == inputs.rollout.response_ids.shape)

    def surrogate(self, inputs: LossInputs) -> Any:
        found = self.inner[0](inputs)
        self._note(found.loss, inputs)
        return found

    def regularise(self, inputs: LossInputs) -> Any:
        found = self.inner[1](inputs)
        for term in found:
            self._note(term.loss, inputs)
        return found


def updated(pipeline: Pipeline, model: Any, graded: Rollout) -> SimpleNamespace:
    """One minibatch in micro-batches of 5: loss, gradient, what spans it, and the shapes of per-token losses."""
    pipeline.bind(lambda text: [28 + len(text)])
    rollout = ready_rollout(model, pipeline.reward(graded), pipeline)
    rollout, advantage = pipeline.credit(rollout)
    recorded = Recorded(pipeline)
    updater = Updater(model, torch.optim.SGD(model.parameters()), pipeline, micro_batch_rows=5)
    model.zero_grad()
    loss = updater.accumulate(rollout, advantage, UpdateTotals(), torch.Generator().manual_seed(0))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    whole = updater.prepare(rollout, advantage, torch.Generator().manual_seed(0))
    spans = [advantage, whole.lower, whole.upper, whole.weight, *whole.reductions.values()]
    owners = {hook: m.slug for hook, m in pipeline.owners.items() if m}
    return SimpleNamespace(
        loss=loss, gradient=gradient, spans=spans, shapes=recorded.shapes, rollout=rollout, owners=owners
    )


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_is_refused_with_both_names_or_trains(pair: tuple[str, str], model: Any, graded: Rollout) -> None:
    one, other = map(made, pair)
    if contested(one, other):
        for methods in ([one, other], [other, one]):
            with pytest.raises(UserError) as caught:
                compose(methods)
            assert all(f"'{slug}'" in str(caught.value) for slug in pair)
        return
    done = updated(compose([one, other]), model, graded)
    assert math.isfinite(done.loss)
    assert bool(done.gradient.isfinite().all())
    assert float(done.gradient.abs().max()) > 1e-6
    assert done.shapes == {True}
    assert {tuple(span.shape) for span in done.spans} == {tuple(done.rollout.response_ids.shape)}
    assert not any(bool(span[done.rollout.mask].isnan().any()) for span in done.spans)
    reverse = compose([other, one])
    assert {hook: m.slug for hook, m in reverse.owners.items() if m} == done.owners


def test_some_pairs_are_refused_and_most_are_not() -> None:
    refused = sum(contested(made(one), made(other)) for one, other in PAIRS)
    assert 0.1 < refused / len(PAIRS) < 0.5


def test_a_pair_differs_from_each_of_its_methods(model: Any, graded: Rollout) -> None:
    """Neither half of a composition is lost: three pairs that act at different places."""
    for pair in (("steer", "epo"), ("high_entropy_tokens", "siren"), ("bapo", "entropy_bonus")):
        both = updated(compose([*map(made, pair)]), model, graded).gradient
        for slug in pair:
            alone = updated(compose([made(slug)]), model, graded).gradient
            assert float((both - alone).abs().max()) > 1e-4 * float(both.abs().max())
