"""Composition: who owns a hook, what chains, and what is refused."""

from __future__ import annotations

import pytest
import torch
from builders import make_rollout
from sample_methods import LengthBonus, NeedsBundles, PlainBonus, Reinforce, TopEntropyOnly, Watcher

from rlvr_lab.core.rollout import PROVIDED_BY, Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method, Pipeline
from rlvr_lab.methods.grpo import GRPO


def grpo() -> Method:
    return build("grpo", {"preset": "released"})


class OtherReinforce(Reinforce):
    """The same change under another name."""

    slug = "other_reinforce"


def test_a_change_takes_over_from_the_base_whatever_the_order() -> None:
    for methods in ([grpo(), Reinforce()], [Reinforce(), grpo()]):
        pipeline = compose(methods)
        assert {hook: m.slug for hook, m in pipeline.owners.items() if m} == {
            "advantage": "reinforce", "clip": "reinforce", "surrogate": "reinforce", "reduction": "reinforce",
        }  # fmt: skip
    assert "advantage reinforce" in pipeline.describe()


def test_what_a_change_leaves_alone_stays_with_the_base() -> None:
    class OnlyAdvantage(Method):
        """Owns nothing else."""

        slug = "only_advantage"

        def advantage(self, rollout: Rollout) -> torch.Tensor:
            return torch.ones_like(rollout.behaviour_logprob)

    pipeline = compose([OnlyAdvantage()])  # GRPO's released preset comes in by itself
    assert {hook: m.slug for hook, m in pipeline.owners.items() if m} == {
        "advantage": "only_advantage", "clip": "grpo", "surrogate": "grpo", "reduction": "grpo",
    }  # fmt: skip
    assert pipeline.owner("surrogate").config == GRPO.presets["released"]


def test_two_changes_of_one_hook_are_both_named() -> None:
    with pytest.raises(UserError, match="'reinforce' and 'other_reinforce' both own the hook 'advantage'"):
        compose([grpo(), Reinforce(), OtherReinforce()])


def test_two_bases_are_refused() -> None:
    class OtherBase(Reinforce):
        """A second base."""

        slug = "other_base"
        is_base = True

    with pytest.raises(UserError, match="'grpo' and 'other_base' are both bases"):
        compose([grpo(), OtherBase()])


@pytest.mark.parametrize("hook", ["advantage", "clip", "surrogate", "reduction"])
def test_a_missing_owner_names_the_hook(hook: str) -> None:
    class Partial(Reinforce):
        slug = "partial"

    setattr(Partial, hook, None)
    with pytest.raises(UserError, match=f"no method of this composition owns the hook '{hook}'.*'grpo'"):
        Pipeline([Partial()])


def test_an_empty_composition_is_the_base() -> None:
    assert [m.slug for m in compose([]).methods] == ["grpo"]
    with pytest.raises(UserError, match="owns the hook 'advantage'"):
        Pipeline([])


def test_a_reward_may_replace_the_tasks_but_only_one_may() -> None:
    class Random(LengthBonus):
        """Pays by length and for nothing else."""

        slug = "random"
        replaces_reward = True

    class Other(Random):
        """A second one."""

        slug = "other"

    rollout = make_rollout([1, 3]).with_(reward=None, reward_components={"correct": torch.tensor([1.0, 0.0])})
    done = compose([Random(0.5)]).reward(rollout)
    assert set(done.reward_components) == {"length"}
    torch.testing.assert_close(done.reward, torch.tensor([0.5, 1.5]))
    with pytest.raises(UserError, match="'random' and 'other' both replace the reward"):
        compose([Random(), Other()])


def test_filters_run_one_after_the_other() -> None:
    class DropShort(Method):
        """Keeps responses of more than one token."""

        slug = "drop_short"

        def filter(self, rollout: Rollout) -> Rollout:
            return rollout.rows((rollout.lengths > 1).nonzero().squeeze(1))

    class UnmarkFirst(Method):
        """The first token is not learned from."""

        slug = "unmark_first"

        def filter(self, rollout: Rollout) -> Rollout:
            action = rollout.action_mask.clone()
            action[:, 0] = False
            return rollout.with_(action_mask=action)

    kept = compose([DropShort(), UnmarkFirst()]).filter(make_rollout([1, 3, 2]))
    assert kept.mask.sum(1).tolist() == [2, 1]


def test_what_prepare_finds_is_recorded_for_the_other_hooks() -> None:
    class Marks(Method):
        """Marks tokens at random, then weighs the marked ones with zero."""

        slug = "marks"

        def prepare(self, batch, advantage_BT, generator):  # type: ignore[no-untyped-def]
            return {"marks.chosen": torch.rand(advantage_BT.shape, generator=generator).round()}

        def weight(self, batch, advantage_BT):  # type: ignore[no-untyped-def]
            return 1 - batch.require("marks.chosen", by=self.slug)

    rollout = make_rollout([3, 4])
    pipeline = compose([Marks()])
    batch = pipeline.prepare(rollout, torch.ones(2, 4), torch.Generator().manual_seed(0))
    again = pipeline.prepare(rollout, torch.ones(2, 4), torch.Generator().manual_seed(0))
    assert torch.equal(batch.statistics["marks.chosen"], again.statistics["marks.chosen"])
    weight = pipeline.weights(batch, torch.ones(2, 4))["marks"]
    assert set(weight[rollout.mask].tolist()) == {0.0, 1.0}


def test_channels_span_the_rollout_and_stay_with_its_rows() -> None:
    class Second(Method):
        """A second advantage, centred over all prompts, undefined in the padding."""

        slug = "second"

        def channels(self, rollout, advantage_BT):  # type: ignore[no-untyped-def]
            centred = rollout.reward - rollout.reward.mean()
            return {"second.advantage": centred[:, None] + advantage_BT + torch.zeros_like(advantage_BT) / rollout.mask}

    rollout = make_rollout([1, 3, 2]).with_(reward=torch.tensor([1.0, 0.0, 0.5]))
    credited, advantage = compose([Reinforce(), Second()]).credit(rollout)
    second = credited.statistics["second.advantage"]
    assert second[rollout.mask].tolist() == (advantage + rollout.reward[:, None] - 0.5)[rollout.mask].tolist()
    assert (second[~rollout.mask] == 0).all()
    part = credited.rows(torch.tensor([1]))  # a minibatch of one row has nothing of its own to centre by
    assert part.statistics["second.advantage"].tolist() == [[-0.5, -0.5, -0.5]]


def test_every_method_learns_how_texts_become_ids() -> None:
    class Marked(Method):
        """Looks for a word."""

        slug = "marked"
        ids: tuple[int, ...] = ()

        def bind(self, encode):  # type: ignore[no-untyped-def]
            self.ids = tuple(encode("</think>"))

    method = Marked()
    compose([grpo(), method]).bind(lambda text: [len(text), 7])
    assert method.ids == (8, 7)


def test_rewards_add_up() -> None:
    rollout = make_rollout([1, 3]).with_(reward=None, reward_components={"correct": torch.tensor([1.0, 0.0])})
    done = compose([grpo(), LengthBonus(0.1)]).reward(rollout)
    assert set(done.reward_components) == {"correct", "length"}
    torch.testing.assert_close(done.reward, torch.tensor([1.1, 0.3]))
    assert rollout.reward is None


def test_every_method_has_its_weight_by_name() -> None:
    class Half(Method):
        """Every token at half weight."""

        slug = "half"

        def weight(self, rollout: object, advantage_BT: torch.Tensor) -> torch.Tensor:
            return torch.full_like(advantage_BT, 0.5)

    rollout = make_rollout([2, 4])
    weights = compose([TopEntropyOnly(), Half()]).weights(rollout, torch.ones(2, 4))
    assert list(weights) == ["top_entropy_only", "half"]
    assert set(weights["top_entropy_only"][rollout.mask].tolist()) == {0.0, 1.0}
    assert torch.equal(weights["half"], rollout.mask / 2)
    assert compose([grpo()]).weights(rollout, torch.ones(2, 4)) == {}


def test_regularisers_stand_apart_from_the_surrogate() -> None:
    rollout = make_rollout([2, 3])
    logprob, entropy = torch.full((2, 3), -1.0), torch.full((2, 3), 0.8)
    inputs = LossInputs(rollout, logprob, logprob, torch.ones(2, 3), torch.tensor(0.8), torch.tensor(1.2), entropy)

    class SecondBonus(PlainBonus):
        """The same term under another name and another reduction."""

        slug = "second_bonus"
        regularise_reduction = "sequence_mean_of_token_sum"

    pipeline = compose([grpo(), PlainBonus(0.5), SecondBonus(0.25)])
    assert torch.equal(pipeline.surrogate(inputs).loss, compose([grpo()]).surrogate(inputs).loss)
    first, second = pipeline.regularise(inputs)
    torch.testing.assert_close(first.loss, -0.5 * entropy)
    torch.testing.assert_close(second.loss, -0.25 * entropy)
    assert (first.reduction, second.reduction) == (None, "sequence_mean_of_token_sum")
    assert pipeline.regularise_reductions == ("sequence_mean_of_token_sum",)


def test_one_method_cannot_stand_twice() -> None:
    # both would share one entry of a checkpoint
    with pytest.raises(UserError, match="'plain_bonus' stands twice"):
        compose([grpo(), PlainBonus(0.5), PlainBonus(0.25)])


def test_the_advantage_is_detached_and_zero_outside_the_mask() -> None:
    rollout = make_rollout([1, 3])
    reward = torch.tensor([1.0, 0.0], requires_grad=True)
    advantage = compose([grpo()]).advantage(rollout.with_(reward=reward))
    assert not advantage.requires_grad
    assert (advantage[~rollout.mask] == 0).all()
    assert (advantage[rollout.mask] != 0).all()


def test_an_undefined_advantage_in_the_padding_stays_there() -> None:
    class Divides(Reinforce):
        """A per-token baseline that is 0 / 0 in the padding: legal, because padding means nothing."""

        slug = "divides"

        def advantage(self, rollout):  # type: ignore[no-untyped-def]
            tokens = rollout.mask.float()
            return rollout.reward[:, None] * tokens / tokens

    rollout = make_rollout([1, 3])
    advantage = compose([Divides()]).advantage(rollout)
    assert torch.isfinite(advantage).all()


def test_the_reduction_is_that_of_the_surrogates_owner() -> None:
    assert compose([Reinforce(), TopEntropyOnly()]).reduction == ("sequence_mean_of_token_sum", None)
    assert compose([grpo()]).reduction == ("token_mean", None)


def test_a_missing_field_is_reported_before_the_first_update() -> None:
    pipeline = compose([grpo(), NeedsBundles()])
    with pytest.raises(UserError) as caught:
        pipeline.check(make_rollout([2, 2]))
    assert "method 'needs_bundles' needs 'bundle_id'" in str(caught.value)
    assert PROVIDED_BY["bundle_id"] in str(caught.value)
    pipeline.check(make_rollout([2, 2]).with_(bundle_id=torch.zeros(2)))


def test_every_method_observes() -> None:
    first, second = Watcher(), Watcher()
    second.slug = "second"  # type: ignore[misc]
    compose([grpo(), first, second]).observe({"mean_tokens": 8.0})
    assert (first.seen, second.seen) == (1, 1)
    assert float(first.mean_tokens) == 4


def test_state_goes_round() -> None:
    def pipeline() -> tuple[Pipeline, Watcher]:
        watcher = Watcher()
        return compose([grpo(), watcher]), watcher

    (before, old), (after, new) = pipeline(), pipeline()
    old.observe({"mean_tokens": 8.0})
    after.load_state_dict(before.state_dict())
    assert (new.seen, float(new.mean_tokens)) == (1, 4.0)


def test_state_of_other_methods_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint holds methods \['grpo', 'watcher'\], this run \['grpo'\]"):
        compose([grpo()]).load_state_dict(compose([grpo(), Watcher()]).state_dict())
    with pytest.raises(UserError, match="checkpoint holds state for method 'grpo', which keeps none"):
        compose([grpo()]).load_state_dict({"grpo": {"seen": 1}})
