"""COPO: golden values, what its definition promises whatever the input, and input that it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from builders import GOLDEN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.entropy import answer_entropy
from rlvr_lab.core.losses import clipped_surrogate
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose, copo
from rlvr_lab.methods.copo import COPO, COPOConfig
from rlvr_lab.testing.golden import replay_file

SEEDS = st.integers(0, 10_000)
ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=8, max_size=8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollout_of(reward: list[float], answers: list[str | None], group_size: int = 4, **fields: Any) -> Rollout:
    record = make_rollout([3 + i % 4 for i in range(len(reward))], group_size=group_size)
    return record.with_(reward=torch.tensor(reward), answer=tuple(answers), **fields)


def mixed() -> Rollout:
    """A group that mostly succeeds, one that fails in different ways, one of both, one that is all right."""
    reward = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    answers = ["a", "a", "a", "b", "c", "d", None, "e", "a", "b", "c", "a", "a", "a", "a", "a"]
    return rollout_of(reward, answers)


def channels(method: COPO, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    credited, _ = compose([method]).credit(rollout)
    return credited.statistics["copo.global"][:, 0], credited.statistics["copo.local_weight"][:, 0]


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "copo.json")}
    assert len(problems) == 6
    assert not any(problems.values()), problems


# ---------------------------------------------------------------------------------------------- entropy of the answers


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_the_consistency_entropy_is_the_answer_entropy_of_each_group(answers: list[str | None]) -> None:
    group = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2])
    found = copo.consistency_entropy(copo.answer_ids(answers), group, dtype=torch.float64)
    assert found[:4].unique().numel() == 1
    assert float(found[0]) == pytest.approx(answer_entropy(answers[:4]), abs=1e-12)
    assert float(found[4]) == pytest.approx(answer_entropy(answers[4:]), abs=1e-12)
    bits = copo.consistency_entropy(copo.answer_ids(answers), group, "bits", dtype=torch.float64)
    assert torch.allclose(bits * math.log(2), found)
    assert (found >= 0).all()


def test_a_threshold_is_not_portable_between_units() -> None:
    """Four different answers: 1.39 nats, 2 bits; rho = 1.5 lies between."""
    entropies = [
        copo.consistency_entropy(torch.arange(4), torch.zeros(4, dtype=torch.long), base) for base in ("nats", "bits")
    ]
    nothing = torch.zeros(4)
    weights = [copo.local_weight(h, nothing, nothing, torch.zeros(4), "only-soft", 20.0, 1.5) for h in entropies]
    assert float(weights[0][0]) < 0.1
    assert float(weights[1][0]) > 0.9


@pytest.mark.parametrize("base", ["nats", "bits"])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_coefficient_goes_from_one_to_the_share_of_one_answer(base: Any, size: int) -> None:
    group, n = torch.zeros(size, dtype=torch.long), torch.full((size,), float(size))
    same, different = (copo.consistency_entropy(a, group, base) for a in (torch.zeros(size).long(), torch.arange(size)))
    assert copo.consistency_coefficient(same, n, base).tolist() == pytest.approx([1.0] * size)
    assert copo.consistency_coefficient(different, n, base).tolist() == pytest.approx([1 / size] * size)


def test_a_group_of_one_has_the_coefficient_one() -> None:
    assert copo.consistency_coefficient(torch.zeros(1), torch.ones(1)).tolist() == [1.0]


# ---------------------------------------------------------------------------------------------------- global advantage


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_global_advantage_is_a_score_over_groups_that_each_count_once(seed: int) -> None:
    sizes = torch.randint(1, 6, (5,), generator=generator(seed))
    value = torch.rand(5, generator=generator(seed + 1), dtype=torch.float64)
    group = torch.arange(5).repeat_interleave(sizes)
    found = copo.global_advantage(value[group], group)
    each = torch.stack([found[group == g][0] for g in range(5)])
    assert float(each.mean()) == pytest.approx(0, abs=1e-9)
    assert float(each.std()) == pytest.approx(1, abs=1e-4)
    assert (each.argsort() == value.argsort()).all()


def test_equal_groups_have_no_global_advantage_and_one_group_has_none_that_is_defined() -> None:
    assert copo.global_advantage(torch.full((6,), 0.1), torch.arange(6) // 2).tolist() == [0.0] * 6
    assert copo.global_advantage(torch.ones(3), torch.zeros(3)).isnan().all()


def test_a_single_group_learns_from_its_own_advantage_and_it_is_said_once() -> None:
    method = COPO()
    pipeline = compose([method])
    rollout = rollout_of([1.0, 0.0, 0.0, 0.0], ["1", "2", "2", None])
    for _ in range(2):
        credited, _ = pipeline.credit(rollout)
        assert not credited.statistics["copo.global"].any()
    (text,) = pipeline.notices()
    assert "rollout.prompts" in text
    assert pipeline.notices() == []


def test_the_coefficient_lowers_what_a_prompt_of_scattered_answers_is_worth() -> None:
    plain, _ = channels(COPO(), mixed())
    reduced, _ = channels(COPO(COPOConfig(coefficient=True)), mixed())
    assert float(plain[0] - plain[12]) > float(reduced[0] - reduced[12])  # 3 of 4 right, and 4 of 4 who agree


def test_shuffling_deals_the_same_advantages_to_other_groups_anew_in_every_step() -> None:
    own, _ = channels(COPO(), mixed())
    method = COPO(COPOConfig(shuffled=True))
    seen = []
    for _ in range(6):
        dealt, _ = channels(method, mixed())
        assert torch.equal(dealt, channels(method, mixed())[0])
        assert dealt[::4].sort().values.tolist() == own[::4].sort().values.tolist()
        assert all(dealt[i] == dealt[i + 3] for i in (0, 4, 8, 12))
        seen.append(tuple(dealt[::4].tolist()))
        method.observe({})
    assert len(set(seen)) > 2
    restored = COPO(COPOConfig(shuffled=True))
    restored.load_state_dict(method.state_dict())
    assert torch.equal(channels(restored, mixed())[0], channels(method, mixed())[0])


# ------------------------------------------------------------------------------------------------------------ the gate


def weight_of(gate: str) -> list[float]:
    return [round(x, 6) for x in channels(COPO(COPOConfig(gate=gate)), mixed())[1].tolist()]  # type: ignore[arg-type]


def test_gates_force_what_they_say() -> None:
    soft = weight_of("only-soft")
    assert 0 < soft[12] < soft[0] < soft[8] < soft[4] < 1  # the more the answers differ
    reward = mixed().reward
    assert reward is not None
    right = [bool(r) for r in reward]
    uneven = [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    assert weight_of("soft-with-zero") == [w * r for w, r in zip(soft, right, strict=True)]
    assert weight_of("soft-with-forced") == [w * u for w, u in zip(soft, uneven, strict=True)]
    assert weight_of("only-forced") == [float(u) for u in uneven]
    assert weight_of("only-zero") == [float(r) for r in right]
    assert weight_of("soft-with-failed") == [0.0 if 4 <= i < 8 else w for i, w in enumerate(soft)]
    assert weight_of("only-global") == [0.0] * 16
    assert weight_of("no-global") == [1.0] * 16
    assert weight_of("only-soft-with-coef") == soft


def test_the_released_gate_reinforces_a_wrong_answer_of_a_good_prompt() -> None:
    """The card's first warning: response 3 is wrong, its own advantage is negative. The soft gate does so too, but only
    where the answers of the group agree by more than rho."""
    rollout = mixed()

    def push(gate: str, rho: float = 0.3) -> float:
        method = COPO(COPOConfig(gate=gate, rho=rho))  # type: ignore[arg-type]
        credited, local = compose([method]).credit(rollout)
        among, weight = (credited.statistics[f"copo.{n}"][3, 0] for n in ("global", "local_weight"))
        return float(weight * local[3, 0] + (1 - weight) * among)

    assert push("soft-with-zero") > 0
    assert push("soft-with-failed") < 0
    assert push("no-global") < 0
    assert push("only-soft", rho=1.0) > 0


def test_answers_of_one_meaning_are_one_where_the_rollout_knows_and_the_release_compares_strings() -> None:
    rollout = rollout_of([1.0] * 4 + [0.0] * 4, ["1/2", "0.5", "1/2", "0.5", "3", "4", "5", "6"])
    rollout = rollout.with_(cluster_id=torch.tensor([0, 0, 0, 0, 0, 1, 2, 3]))
    by_meaning, by_string = COPO(), COPO(COPOConfig(equality="string"))
    assert float(channels(by_meaning, rollout)[1][0]) < float(channels(by_string, rollout)[1][0])
    assert torch.equal(channels(by_meaning, rollout.with_(cluster_id=None))[1], channels(by_string, rollout)[1])


def test_answers_that_are_missing_are_one_class() -> None:
    nobody = rollout_of([0.0] * 4 + [1.0] * 4, [None] * 4 + ["1"] * 4)
    method = COPO()
    channels(method, nobody)
    assert method.metrics()["consistency_entropy"] == 0
    assert method.metrics()["equal_groups"] == 1
    clustered = nobody.with_(cluster_id=torch.tensor([-1] * 4 + [0] * 4))
    assert torch.equal(channels(COPO(), clustered)[1], channels(COPO(), nobody)[1])


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    rollout = mixed()
    order = torch.randperm(16, generator=generator(seed))
    for method in (COPO(), COPO(COPOConfig(shuffled=True)), COPO(COPO.presets["released"])):
        for whole, permuted in zip(channels(method, rollout), channels(method, rollout.rows(order)), strict=True):
            assert torch.allclose(permuted, whole[order], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the loss


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_two_clipped_losses_are_not_the_clipped_loss_of_a_mixed_advantage(seed: int) -> None:
    ratio = torch.rand(3, 4, generator=generator(seed), dtype=torch.float64) + 0.5
    logprob, old = ratio.log(), torch.zeros(3, 4, dtype=torch.float64)
    local, among = (torch.randn(3, 1, generator=generator(seed + i), dtype=torch.float64) for i in (1, 2))
    weight = torch.rand(3, 1, generator=generator(seed + 3), dtype=torch.float64)
    blended = copo.blended_surrogate(logprob, old, local, among, weight, 0.8, 1.2, None)
    once = clipped_surrogate(logprob, old, weight * local + (1 - weight) * among, 0.8, 1.2)
    same_sign = (local * among > 0).expand(3, 4)
    inside = (ratio > 0.8) & (ratio < 1.2)
    agree = same_sign | inside
    assert torch.allclose(blended.loss[agree], once.loss[agree])
    assert (blended.loss >= once.loss - 1e-12).all()
    far = ~same_sign & ~inside
    assert (blended.loss[far] > once.loss[far]).all()


def test_a_token_counts_as_clipped_where_a_loss_that_it_has_is() -> None:
    ratio = torch.tensor([[1.5, 0.5]]).log()
    ends = torch.zeros(1, 2)
    own, among = torch.tensor([[1.0]]), torch.tensor([[-1.0]])

    def clipped(weight: float) -> tuple[list[bool], list[bool]]:
        found = copo.blended_surrogate(ratio, ends, own, among, torch.tensor([[weight]]), 0.8, 1.2)
        return found.clipped_high[0].tolist(), found.clipped_low[0].tolist()

    assert clipped(1.0) == ([True, False], [False, False])
    assert clipped(0.0) == ([False, False], [False, True])
    assert clipped(0.5) == ([True, False], [False, True])


def test_a_group_of_equal_rewards_has_a_gradient() -> None:
    pipeline = compose([COPO()])
    credited, advantage = pipeline.credit(mixed())
    assert pipeline.keeps_every_row
    assert not advantage[4:8].any()
    assert not advantage[12:].any()
    assert credited.statistics["copo.global"][4:8, 0].lt(0).all()
    assert credited.statistics["copo.global"][12:, 0].gt(0).all()


def test_without_its_channels_the_loss_says_what_is_missing() -> None:
    from rlvr_lab.testing.minibatch import minibatch_loss

    rollout = mixed()
    with pytest.raises(UserError, match=r"method 'copo' needs 'copo\.global'"):
        minibatch_loss(compose([COPO()]), rollout, rollout.behaviour_logprob, torch.ones(rollout.response_ids.shape))


def test_a_rollout_without_answers_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"method 'copo' needs 'answer'.*data\.task"):
        compose([COPO()]).check(mixed().with_(answer=None))


# --------------------------------------------------------------------------------------------------- settings, presets


def test_presets_differ_where_the_card_lists_a_difference() -> None:
    names = ("paper", "bits", "released")
    found = {name: channels(COPO(COPO.presets[name]), mixed())[1] for name in names}
    for one, other in itertools.combinations(names, 2):
        assert not torch.allclose(found[one], found[other])
    assert {COPO.presets[name].log_base for name in names} == set(get_args(copo.LogBase))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"gate": "only_soft"}, "gate"),
        ({"gamma": -1.0}, "gamma"),
        ({"rho": -1.0}, "rho"),
        ({"log_base": "log2"}, "log_base"),
        ({"global_coefficient": 2.0}, "global_coefficient"),
        ({"gate": "only-soft-with-coef", "global_coefficient": -1.0}, "global_coefficient"),
        ({"equality": "math"}, "equality"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"reduction": "token_sum_over_constant"}, "reduction"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError, match=rf"methods\.copo\.{setting} must") as caught:
        build("copo", changes)
    assert "\n" not in str(caught.value)
