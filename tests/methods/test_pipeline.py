"""Composition: who owns a hook, what chains, and what is refused."""

from __future__ import annotations

import pytest
import torch
from builders import make_rollout
from sample_methods import EntropyBonus, LengthBonus, NeedsBundles, Reinforce, TopEntropyOnly, Watcher

from rlvr_lab.core.rollout import PROVIDED_BY
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.base import LossInputs, Method, Pipeline


def grpo() -> Method:
    return build("grpo", {"preset": "released"})


def test_two_owners_of_one_hook_are_both_named() -> None:
    with pytest.raises(UserError, match="'grpo' and 'reinforce' both own the hook 'advantage'"):
        compose([grpo(), Reinforce()])


@pytest.mark.parametrize("hook", ["advantage", "clip", "surrogate"])
def test_a_missing_owner_names_the_hook(hook: str) -> None:
    class Partial(Reinforce):
        slug = "partial"

    setattr(Partial, hook, None)
    with pytest.raises(UserError, match=f"no method of this composition owns the hook '{hook}'.*'grpo'"):
        compose([Partial()])


def test_an_empty_composition_is_refused() -> None:
    with pytest.raises(UserError, match="owns the hook 'advantage'"):
        compose([])


def test_rewards_add_up() -> None:
    rollout = make_rollout([1, 3]).with_(reward=None, reward_components={"correct": torch.tensor([1.0, 0.0])})
    done = compose([grpo(), LengthBonus(0.1)]).reward(rollout)
    assert set(done.reward_components) == {"correct", "length"}
    torch.testing.assert_close(done.reward, torch.tensor([1.1, 0.3]))
    assert rollout.reward is None


def test_weights_multiply() -> None:
    class Half(Method):
        slug = "half"

        def weight(self, rollout: object, advantage_BT: torch.Tensor) -> torch.Tensor:
            return torch.full_like(advantage_BT, 0.5)

    rollout = make_rollout([2, 4])
    advantage = torch.ones(2, 4)
    alone = compose([grpo(), TopEntropyOnly()]).weight(rollout, advantage)
    both = compose([grpo(), TopEntropyOnly(), Half()]).weight(rollout, advantage)
    assert set(alone[rollout.mask].tolist()) == {0.0, 1.0}
    assert torch.equal(both, alone / 2)
    assert torch.equal(compose([grpo()]).weight(rollout, advantage), rollout.mask.float())


def test_regularisers_are_added_to_the_surrogate_and_leave_its_metrics_alone() -> None:
    rollout = make_rollout([2, 3])
    logprob, entropy = torch.full((2, 3), -1.0), torch.full((2, 3), 0.8)
    inputs = LossInputs(rollout, logprob, logprob, torch.ones(2, 3), torch.tensor(0.8), torch.tensor(1.2), entropy)
    plain, _ = compose([grpo()]).surrogate(inputs)

    class SecondBonus(EntropyBonus):
        """The same term under another name."""

        slug = "second_bonus"

    loss, surrogate = compose([grpo(), EntropyBonus(0.5), SecondBonus(0.25)]).surrogate(inputs)
    torch.testing.assert_close(loss, plain - 0.75 * entropy)
    assert torch.equal(surrogate.loss, plain)


def test_one_method_cannot_stand_twice() -> None:
    # both would share one entry of a checkpoint
    with pytest.raises(UserError, match="'entropy_bonus' stands twice"):
        compose([grpo(), EntropyBonus(0.5), EntropyBonus(0.25)])


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
