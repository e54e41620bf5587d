"""EMPG: golden values, what its definition promises whatever the input, and input that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import GOLDEN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose, empg
from rlvr_lab.methods.empg import EMPG, EMPGConfig, number_steps
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.episodes import for_task
from rlvr_lab.tasks.agents.maze import MazeTask
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config

SEEDS = st.integers(0, 10_000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turns(seed: int = 0, **fields: Any) -> Rollout:
    """Eight trajectories of four turns of two tokens, shorter ones with fewer; every third token is an observation."""
    rollout = make_rollout([12, 12, 9, 6, 3, 12, 1, 7], group_size=4, seed=seed)
    place = torch.arange(12).expand(8, 12)
    action = rollout.response_mask & (place % 3 != 2)
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    return rollout.with_(turn_id=place // 3, action_mask=action, reward=reward, **fields)


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "empg.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


# ----------------------------------------------------------------------------------------------------- proposition 1


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 8))
def test_confident_tokens_have_small_score_functions(seed: int, vocabulary: int) -> None:
    """E |grad log pi|^2 = 1 - exp(-H_2), here with autograd's own gradients."""
    logits = 2 * torch.randn(vocabulary, generator=generator(seed), dtype=torch.float64)
    logits.requires_grad_()
    log_p = torch.log_softmax(logits, -1)
    squares = [torch.autograd.grad(log_p[a], logits, retain_graph=True)[0].square().sum() for a in range(vocabulary)]
    expected = float((log_p.detach().exp() * torch.stack(squares)).sum())
    assert float(empg.expected_squared_score(logits.detach())) == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(1 - math.exp(-float(empg.renyi2_entropy(logits.detach()))), abs=1e-9)


# --------------------------------------------------------------------------------------------------------- modulation


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0, 3), st.floats(0, 3), st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.25]))
def test_the_scale_redistributes_and_the_result_is_centred(
    seed: int, k: float, k_bonus: float, zeta: float, quantile: float
) -> None:
    entropy = 2 * torch.rand(9, generator=generator(seed), dtype=torch.float64)
    value = torch.randn(4, generator=generator(seed + 1), dtype=torch.float64)
    row = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    done = empg.modulate(entropy, value[row], row, k, k_bonus, zeta, quantile)
    assert float(done.scale.mean()) == pytest.approx(1, abs=1e-6)
    assert float(done.scale.max() / done.scale.min()) <= math.exp(k) + 1e-6  # the card's bound
    assert ((done.entropy >= 0) & (done.entropy <= 1)).all()
    assert float(done.final.mean()) == pytest.approx(0, abs=1e-9)
    order = entropy.argsort()
    assert (done.scale[order].diff() <= 1e-12).all()  # the more certain, the larger
    last = [2, 3, 7, 8]
    assert done.bonus[last].tolist() == [0.0] * 4
    assert done.bonus[4].item() == pytest.approx(zeta * float(done.clarity[5]))


def test_without_scale_and_bonus_the_base_is_left_up_to_centring() -> None:
    rollout = turns()
    method = EMPG(EMPGConfig(k=0.0, zeta=0.0))
    assert rollout.reward is not None
    base = group_advantage(rollout.reward, rollout.group_id)
    steps = method.steps(rollout)
    value = method.advantage(rollout)
    expected = base[steps.row] - base[steps.row].mean()
    assert torch.allclose(value, steps.spread(expected), atol=1e-6)


def test_equal_entropies_leave_the_bonus_alone_to_differ() -> None:
    done = empg.modulate(torch.full((4,), 0.7), torch.zeros(4), torch.tensor([0, 0, 1, 1]))
    assert done.scale.tolist() == pytest.approx([1.0] * 4)
    assert done.final.tolist() == pytest.approx([0.05, -0.05, 0.05, -0.05])


def test_one_step_learns_nothing() -> None:
    assert empg.modulate(torch.tensor([0.3]), torch.tensor([1.0]), torch.tensor([0])).final.tolist() == [0.0]


def test_equal_rewards_are_pure_entropy_minimisation_unless_the_option_is_on() -> None:
    rollout = turns().with_(reward=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]))
    faithful = EMPG().advantage(rollout)
    safe = EMPG(EMPGConfig(bonus_only_if_signal=True)).advantage(rollout)
    assert faithful[:4].any()
    assert not safe[:4].any()
    assert safe[4:].any()
    nothing = EMPG(EMPGConfig(bonus_only_if_signal=True)).advantage(rollout.with_(reward=torch.ones(8)))
    assert not nothing.any()


def test_a_quantile_range_keeps_one_degenerate_step_from_setting_the_scale() -> None:
    entropy = torch.cat([torch.linspace(0, 1, 40), torch.tensor([60.0])])
    plain, robust = (empg.normalised(entropy, q)[:40] for q in (0.0, 0.05))
    assert float(plain.max()) < 0.02
    assert float(robust.max()) > 0.99


# ------------------------------------------------------------------------------------------------------------ steps


def test_turns_are_steps_and_observations_belong_to_none() -> None:
    rollout = turns()
    steps = EMPG().steps(rollout)
    assert torch.bincount(steps.row, minlength=8).tolist() == [4, 4, 3, 2, 1, 4, 1, 3]
    assert (steps.index[~rollout.mask] == -1).all()
    assert (steps.index[rollout.mask] >= 0).all()
    value = EMPG().advantage(rollout)
    assert not value[~rollout.mask].any()
    assert len(value[0][rollout.mask[0]].unique()) == 4


def test_a_turn_without_an_action_does_not_exist() -> None:
    """Its tokens would bring a false minimum into the range of the entropies."""
    rollout = turns()
    silent = rollout.action_mask.clone()
    silent[0, 3:6] = False
    found = EMPG().steps(rollout.with_(action_mask=silent))
    assert int((found.row == 0).sum()) == 3
    assert sorted(found.index[found.index >= 0].unique().tolist()) == list(range(len(found.row)))


def test_a_negative_turn_belongs_to_no_step() -> None:
    rollout = turns()
    assert rollout.turn_id is not None
    outside = rollout.with_(turn_id=torch.where(rollout.turn_id == 0, -1, rollout.turn_id))
    assert not EMPG().advantage(outside)[:, :3].any()
    with pytest.raises(UserError, match=r"'empg' finds no step.*methods\.empg\.markers") as caught:
        EMPG().advantage(rollout.with_(turn_id=torch.full_like(rollout.turn_id, -1)))
    assert "\n" not in str(caught.value)


def test_markers_are_steps_within_turns_too_where_they_are_asked_for() -> None:
    """What an agent is told ends no step: its tokens are no actions."""
    rollout = turns().with_(response_ids=torch.full((8, 12), 4))
    ids = rollout.response_ids.clone()
    ids[0, [1, 5]] = 7  # an action of turn 0, an observation of turn 1
    method = EMPG(EMPGConfig(steps="marker", markers=("=",)))
    method.bind(lambda text: [7 if text == "=" else 3])
    found = method.steps(rollout.with_(response_ids=ids))
    assert torch.bincount(found.index[0][rollout.mask[0]]).tolist() == [2, 6]


def test_a_rollout_of_single_turns_is_said_once() -> None:
    method = EMPG()
    for _ in range(2):
        method.advantage(make_rollout([4, 3, 5, 2]))
    (text,) = method.notices()
    assert "no response has a second turn" in text
    method.advantage(turns())
    assert method.notices() == []
    assert EMPG().advantage(turns()).any()


def test_turns_of_played_episodes_are_steps() -> None:
    policy, task = load_policy("tiny/A", device="cpu"), MazeTask(max_turns=5)
    problems = task.problems(3, 0)
    engine = for_task(TransformersEngine(policy), task, problems)
    prompts = [task.prompt_ids(problem) for problem in problems]
    rollout = engine.sample(prompts, 4, Sampling(max_tokens=64), generator())
    rollout = rollout.with_(reward=torch.tensor([1.0, 0.0, 0.0, 1.0] * 3))
    steps = EMPG().steps(rollout)
    assert rollout.turn_id is not None
    turns_played = [len(set(t[m].tolist())) for t, m in zip(rollout.turn_id, rollout.mask, strict=True)]
    assert torch.bincount(steps.row).tolist() == turns_played
    assert max(turns_played) > 1
    value = EMPG().advantage(rollout)
    assert not value[~rollout.mask].any()
    assert value.isfinite().all()


@pytest.mark.parametrize("slug", ["empg", "epo"])
def test_the_recipe_on_long_episodes_is_read(slug: str) -> None:
    config = load_config(f"{slug}/maze_tiny")
    assert (config.data.task, config.model.path) == ("maze", "tiny/A")
    method = build(slug, config.methods[slug])
    assert getattr(method.config, "horizon", config.steps) == config.steps
    assert getattr(method.config, "steps", "turn") == "turn"


def test_segments_serve_where_there_are_no_turns() -> None:
    rollout = turns()
    by_segment = rollout.with_(segment_id=rollout.turn_id, turn_id=None)
    assert torch.equal(EMPG().advantage(by_segment), EMPG().advantage(rollout))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 7, 2, 7, 3, 0], [0, 0, 1, 1, 2, 2]),
        ([1, 8, 9, 2, 8, 8, 9, 5], [0, 0, 0, 1, 1, 1, 1, 2]),
        ([9, 8, 1, 2], [0, 0, 0, 0]),
        ([7, 7, 8, 9], [0, 1, 2, 2]),
    ],
)
def test_a_marker_ends_its_step(row: list[int], expected: list[int]) -> None:
    ids = torch.tensor([row])
    assert empg.labels_by_marker(ids, torch.ones_like(ids).bool(), [[7], [8, 9]])[0].tolist() == expected


def test_a_marker_in_an_observation_or_longer_than_the_response_ends_nothing() -> None:
    ids = torch.tensor([[1, 7, 2, 3]])
    mask = torch.tensor([[True, False, True, True]])
    assert empg.labels_by_marker(ids, mask, [[7], [1, 2, 3, 4, 5]]).tolist() == [[0, 0, 0, 0]]


def test_the_tiny_lab_has_a_step_per_operation_and_one_for_the_answer(tiny_s: Policy) -> None:
    words = tiny_s.encode("10 + 1 = 11 11 * 4 = 44 yes </think> ( 10 + 1 ) * 4")
    rollout = make_rollout([len(words)] * 2).with_(response_ids=torch.tensor([words] * 2))
    method = EMPG(EMPG.presets["tiny"])
    method.bind(tiny_s.encode)
    steps = method.steps(rollout)
    assert torch.bincount(steps.index[0]).tolist() == [4, 5, 3, 7]


def test_markers_that_never_occur_are_said_once_and_every_response_is_one_step() -> None:
    method = EMPG(EMPGConfig(steps="marker", markers=("=",)))
    method.bind(lambda text: [5 if text == "=" else 3])
    pipeline = compose([method])
    rollout = make_rollout([4, 3, 5, 2])
    for _ in range(2):
        assert pipeline.advantage(rollout).isfinite().all()
    (text,) = pipeline.notices()
    assert "none of methods.empg.markers ['='] occurs" in text
    assert pipeline.notices() == []
    assert method.metrics()["steps"] == 1


def test_markers_must_be_bound_and_have_tokens() -> None:
    method = EMPG(EMPGConfig(steps="marker", markers=("=", "@")))
    with pytest.raises(UserError, match=r"methods\.empg\.markers are not token ids yet: call bind"):
        method.advantage(make_rollout([4, 3]))
    with pytest.raises(UserError, match=r"methods\.empg\.markers holds '@', which has no token in"):
        method.bind(lambda text: [] if text == "@" else [len(text), 5])
    with pytest.raises(UserError, match=r"methods\.empg\.markers holds '@', with a word that this vocabulary"):
        method.bind(lambda text: [4] if text == "=" else [3])


def test_a_response_without_a_token_has_no_step_and_a_rollout_of_them_is_refused() -> None:
    method = EMPG()
    value = method.advantage(make_rollout([4, 0, 3, 2]))
    assert not value[1].any()
    with pytest.raises(UserError, match="finds no step"):
        method.advantage(make_rollout([0, 0], width=3))


def test_a_rollout_without_entropies_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"method 'empg' needs 'token_entropy'.*recompute_old_logprob"):
        compose([EMPG()]).check(make_rollout([3, 2]).with_(statistics={}))


# ------------------------------------------------------------------------------------- order, padding, control, state


@pytest.mark.parametrize("changes", [{}, {"shuffled": True}, {"quantile": 0.1}, {"bonus_only_if_signal": True}])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_rows_and_what_lies_under_the_mask_do_not_matter(changes: dict[str, Any], seed: int) -> None:
    rollout = turns(seed)
    method = EMPG(EMPGConfig(**changes))
    plain = method.advantage(rollout)
    order = torch.randperm(8, generator=generator(seed))
    assert torch.allclose(method.advantage(rollout.rows(order)), plain[order], atol=1e-6)
    entropy = rollout.statistics["token_entropy"].masked_fill(~rollout.mask, math.nan)
    ids = torch.where(rollout.response_mask, rollout.response_ids, 3)
    dirty = rollout.with_(response_ids=ids).with_statistics(token_entropy=entropy)
    assert torch.equal(method.advantage(dirty), plain)


def test_shuffling_deals_out_the_same_scales_anew_in_every_step() -> None:
    rollout = turns()
    method, own = EMPG(EMPGConfig(shuffled=True)), EMPG()
    own.advantage(rollout)
    one = method.advantage(rollout)
    assert torch.equal(method.advantage(rollout), one)
    for name in ("steps", "step_entropy", "scale_min", "scale_max"):
        assert method.metrics()[name] == pytest.approx(own.metrics()[name])
    assert not torch.allclose(one, own.advantage(rollout))
    method.observe({})
    two = method.advantage(rollout)
    assert not torch.equal(two, one)
    restored = EMPG(EMPGConfig(shuffled=True))
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.advantage(rollout), two)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_steps_are_numbered_along_each_response(seed: int) -> None:
    mask = torch.rand(3, 7, generator=generator(seed)) < 0.8
    label = (torch.rand(3, 7, generator=generator(seed + 1)) < 0.4).long().cumsum(1) - 1
    steps = number_steps(label, mask)
    assert (steps.row.diff() >= 0).all()
    for s, row in enumerate(steps.row.tolist()):
        where = (steps.index == s).nonzero()
        assert len(where)
        assert where[:, 0].unique().tolist() == [row]
        assert label[row, where[:, 1]].unique().numel() == 1
    assert ((steps.index >= 0) == (mask & (label >= 0))).all()


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"k": -1.0}, "k"),
        ({"k_bonus": -1.0}, "k_bonus"),
        ({"zeta": -0.1}, "zeta"),
        ({"quantile": 0.5}, "quantile"),
        ({"markers": "</think>"}, "markers"),
        ({"markers": ["", "="]}, "markers"),
        ({"markers": [7]}, "markers"),
        ({"markers": ["="]}, "markers"),
        ({"steps": "marker"}, "markers"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(UserError, match=rf"methods\.empg\.{setting} must") as caught:
        build("empg", changes)
    assert "\n" not in str(caught.value)
