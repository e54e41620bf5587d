"""CURE: golden values, where branches start and what they learn from, their log-probs and their cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GOLDEN, TINY_RUN
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import WORDS, ScriptedEngine

from rlvr_lab.core.advantages import group_advantage
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.trees import token_counts
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.cure import CURE, start_states, window_cut, word_filter
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.meter import Meter
from rlvr_lab.tasks import countdown
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

PROMPTS = [[5, 6, 7], [7], [8, 9]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scripted(engine: ScriptedEngine | None = None, room: int = 12, first: int = 0, prompts: Any = PROMPTS,
             **settings: Any) -> tuple[CURE, Rollout]:  # fmt: skip
    method = build("cure", {"preset": "tiny", "n1": 2, "n2": 3, **settings})
    assert isinstance(method, CURE)
    sampling = Sampling(max_tokens=room, first=first)
    size = method.config.n1 * (1 + method.config.n2)
    return method, method.sample(engine or ScriptedEngine(), prompts, size, sampling, generator())


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "cure.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


# ------------------------------------------------------------------------------------------- the rows


def test_the_originals_come_first_and_branches_continue_their_parents() -> None:
    _, rollout = scripted()
    assert rollout.group_id.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert rollout.parent_id is not None
    assert rollout.prefix_length is not None
    assert rollout.branch_position is not None
    assert rollout.parent_id.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1] * 3
    for i, (parent, kept) in enumerate(zip(rollout.parent_id.tolist(), rollout.prefix_length.tolist(), strict=True)):
        if parent < 0:
            assert bool((rollout.mask[i] == rollout.response_mask[i]).all())
            continue
        root = 8 * (i // 8) + parent
        assert torch.equal(rollout.response_ids[i, :kept], rollout.response_ids[root, :kept])
        # no loss on what was given, and all on what is new
        assert not rollout.mask[i, :kept].any()
        assert bool(rollout.mask[i, kept : rollout.lengths[i]].all())
        assert int(rollout.lengths[i]) - kept <= 12  # the full budget on top of the prefix
    # siblings share their start, because one position is drawn for each original
    siblings = rollout.branch_position.view(-1, 8)[:, 2:].reshape(-1, 3)
    assert torch.equal(siblings, siblings[:, :1].expand_as(siblings))
    assert int(rollout.prefix_length.max()) > 0


@pytest.mark.parametrize("kind", ["entropy", "random"])
def test_branches_start_at_words_only(kind: str) -> None:
    _, rollout = scripted(min_chars=2, critical_token_type=kind)
    assert rollout.branch_position is not None
    assert rollout.parent_id is not None
    for i in range(len(rollout)):
        position = int(rollout.branch_position[i])
        if position > 0:
            root = 8 * (i // 8) + int(rollout.parent_id[i])
            assert len(WORDS[int(rollout.response_ids[root, position])].strip()) >= 2
            assert int(rollout.response_ids[root, position]) > 1


def test_entropy_decides_unless_positions_are_visited_at_random() -> None:
    entropy = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.2, 0.6, 0.1, 0.5]
    method, control = (build("cure", {"top_k": 3, "critical_token_type": kind}) for kind in ("entropy", "random"))
    assert isinstance(method, CURE)
    assert isinstance(control, CURE)
    assert method.candidates([3] * 10, entropy, lambda token: True, generator()) == [1, 3, 5]
    drawn = {
        p for seed in range(40) for p in control.candidates([3] * 10, entropy, lambda token: True, generator(seed))
    }
    assert drawn == set(range(1, 10))


def test_both_readings_of_top_k_and_of_the_kept_token() -> None:
    ids, entropy = [2, 6, 3, 6, 4, 6, 7], [9.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0]  # "+" at 1, 3, 5
    accept = word_filter(ScriptedEngine().policy, 2)
    found = {
        name: build("cure", {"preset": name, "top_k": 3}).candidates(ids, entropy, accept, generator())  # type: ignore[attr-defined]
        for name in CURE.presets
    }
    assert found["released"] == [6, 4, 2]
    assert found["paper"] == []  # the three highest are position 0 and two operators
    everything = word_filter(ScriptedEngine().policy, 0)
    assert build("cure", {"top_k": 3}).candidates(ids, entropy, everything, generator()) == [1, 3]  # type: ignore[attr-defined]
    _, without = scripted(keep_critical=False)
    _, kept = scripted(keep_critical=True)
    assert without.prefix_length is not None
    assert kept.prefix_length is not None
    branches = without.branch_position > 0  # type: ignore[operator]
    assert torch.equal(kept.prefix_length[branches], without.prefix_length[branches] + 1)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.lists(st.integers(2, 9), max_size=8), st.integers(1, 12))
def test_a_start_that_does_not_fit_is_cut_on_the_right(prompt: list[int], prefix: list[int], window: int) -> None:
    cut, kept = window_cut(prompt, prefix, window)
    assert cut + prefix[:kept] == (prompt + prefix)[:window]
    assert window_cut(prompt, prefix, None) == (prompt, len(prefix))


def test_a_window_moves_the_start_before_the_critical_token() -> None:
    _, rollout = scripted(window=4, room=12)
    assert rollout.prefix_length is not None
    assert rollout.branch_position is not None
    assert rollout.parent_id is not None
    size = rollout.prompt_mask.sum(1)
    branch = rollout.parent_id >= 0
    assert int((size + rollout.prefix_length)[branch].max()) == 4
    cut = branch & (rollout.branch_position > rollout.prefix_length)
    assert bool(cut.any())
    assert torch.equal((size + rollout.prefix_length)[cut], torch.full((int(cut.sum()),), 4))
    _, bare = scripted(window=2)
    assert bare.prompt_mask.sum(1).view(3, 8)[0].tolist() == [3, 3, 2, 2, 2, 2, 2, 2]


def test_presets_differ_where_the_card_says() -> None:
    found = {name: build("cure", {"preset": name}).config for name in CURE.presets}  # type: ignore[attr-defined]
    assert (found["paper"].min_chars, found["released"].min_chars) == (0, 2)
    assert (found["paper"].window, found["released"].window) == (None, 1500)
    rows = {}
    for name in ("paper", "released"):
        method = build("cure", {"preset": name, "top_k": 3})
        rows[name] = method.sample(ScriptedEngine(), PROMPTS, 16, Sampling(max_tokens=12), generator())  # type: ignore[attr-defined]
    assert not torch.equal(rows["paper"].branch_position, rows["released"].branch_position)


def test_a_prompts_tree_does_not_depend_on_the_prompts_beside_it() -> None:
    _, together = scripted()
    parts = [scripted(first=0, prompts=PROMPTS[:1])[1], scripted(first=1, prompts=PROMPTS[1:])[1]]
    apart = [row[:n] for part in parts for row, n in zip(part.response_ids.tolist(), part.lengths, strict=True)]
    assert apart == [row[:n] for row, n in zip(together.response_ids.tolist(), together.lengths, strict=True)]


# ------------------------------------------------------------------------------------------- bad input


def test_without_a_candidate_branches_are_fresh_samples_and_the_user_is_told_once() -> None:
    engine = ScriptedEngine(words=["<pad>", "<eos>", "a", "b", "+", "-"])
    method, rollout = scripted(engine, min_chars=2)
    assert rollout.parent_id is not None
    branch = rollout.parent_id >= 0
    assert rollout.prefix_length is not None
    assert not rollout.prefix_length.any()
    assert rollout.branch_position is not None
    assert rollout.branch_position[branch].eq(0).all()
    assert bool((rollout.mask == rollout.response_mask).all())
    (notice,) = method.notices()
    assert "in 6 of 6 responses" in notice
    assert "methods.cure.min_chars is 2" in notice
    method.channels(rollout, torch.zeros(rollout.response_ids.shape))
    assert method.metrics()["restarts"] == 1
    method.sample(engine, PROMPTS, 8, Sampling(max_tokens=12), generator())
    assert method.notices() == []


def test_one_token_responses_only_have_position_zero() -> None:
    method, rollout = scripted(ScriptedEngine(length=1))
    assert rollout.prefix_length is not None
    assert not rollout.prefix_length.any()
    assert rollout.lengths.tolist() == [1] * 24
    assert method.notices()


def test_an_engine_without_entropies_is_asked_to_score_the_originals() -> None:
    _, rollout = scripted(ScriptedEngine(entropies=False))
    assert "token_entropy" not in rollout.statistics
    assert rollout.prefix_length is not None
    assert int(rollout.prefix_length.max()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n1": 0}, "methods.cure.n1 must be at least 1, not 0"),
        ({"n2": -1}, "methods.cure.n2 must not be negative"),
        ({"top_k": 0}, "methods.cure.top_k must be at least 1"),
        ({"window": 0}, "methods.cure.window must be at least 1 or null"),
        ({"critical_token_type": "entrop"}, "did you mean 'entropy'"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("cure", settings)


def test_a_group_size_that_is_no_tree_names_the_settings() -> None:
    method = build("cure", {})
    with pytest.raises(
        UserError, match=r"group_size is 12, but methods.cure.n1 = 4 and n2 = 3 .* rollout.group_size=16"
    ):
        method.sample(ScriptedEngine(), PROMPTS, 12, Sampling(), generator())  # type: ignore[attr-defined]


def test_an_episode_of_turns_is_refused() -> None:
    engine = ScriptedEngine()
    engine.turns = object()
    with pytest.raises(UserError, match="method 'cure' cannot branch inside an episode"):
        scripted(engine)


# ------------------------------------------------------------------------------------------- advantages and figures


def test_one_baseline_for_the_group_or_one_for_each_start() -> None:
    _, rollout = scripted()
    rollout = rollout.with_(reward=torch.rand(24, generator=generator(3)))
    mixed = compose([build("cure", {"preset": "tiny"})]).advantage(rollout)
    plain = group_advantage(rollout.require("reward", "test"), rollout.group_id, singleton="raw")
    assert torch.allclose(mixed, torch.where(rollout.mask, plain[:, None], 0.0))
    method = build("cure", {"preset": "tiny", "group_by_start_state": True})
    apart = compose([method]).advantage(rollout)
    assert not torch.allclose(mixed, apart)
    for group in range(3):
        for rows in ([0, 1], [2, 3, 4], [5, 6, 7]):
            own = rollout.require("reward", "test")[[8 * group + i for i in rows]]
            kept = rollout.require("prefix_length", "test")[8 * group + rows[0]]
            if rows == [0, 1] or kept:  # a branch that kept nothing is a further original
                expected = (own - own.mean()) / (own.std() + 1e-6)
                states = start_states(rollout)
                if len(states[states == states[8 * group + rows[0]]]) == len(rows):
                    first = 8 * group + rows[0]
                    at = int(rollout.mask[first].long().argmax())
                    assert float(apart[first, at]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_a_branch_that_kept_nothing_counts_as_an_original() -> None:
    _, rollout = scripted(ScriptedEngine(length=1))
    assert start_states(rollout).tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_figures_of_roots_and_branches_by_hand() -> None:
    method, rollout = scripted()
    advantage = torch.rand(rollout.response_ids.shape, generator=generator(1))
    assert method.channels(rollout, advantage) == {}
    found = method.metrics()
    entropy = rollout.statistics["token_entropy"]
    rows = {"root": [i for i in range(24) if i % 8 < 2], "branch": [i for i in range(24) if i % 8 >= 2]}
    for name, chosen in rows.items():
        values = [float(advantage[i][rollout.mask[i]].mean()) for i in chosen]
        assert found[f"{name}_advantage"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        tokens = torch.cat([entropy[i][rollout.mask[i]] for i in chosen])
        assert found[f"{name}_entropy"] == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert 0 < found["prefix_tokens"] < 12
    only_roots = rollout.rows(torch.tensor(rows["root"]))
    method.channels(only_roots, advantage[rows["root"], : only_roots.response_ids.shape[1]])
    assert math.isnan(method.metrics()["branch_advantage"])
    assert math.isnan(method.metrics()["restarts"])


def test_stage_two_leaves_sampling_to_the_engine() -> None:
    pipeline = compose([build("cure", {"preset": "stage2"})])
    assert pipeline.owner("sample") is None
    assert not pipeline.chains["channels"]
    assert compose([build("cure", {})]).owner("sample") is not None


# ------------------------------------------------------------------------------------------- with a policy


@pytest.fixture(scope="module")
def sampled(tiny_s: Policy) -> tuple[Meter, Rollout]:
    engine = Meter(TransformersEngine(tiny_s))
    prompts = [list(p.prompt_ids) for p in countdown.problems(6, 0)]
    method = build("cure", {"preset": "tiny", "keep_critical": False})
    rollout = method.sample(engine, prompts, 16, Sampling(max_tokens=24), generator(2))  # type: ignore[attr-defined]
    return engine, rollout


def test_a_branch_has_the_log_probs_of_its_whole_sequence_scored_at_once(
    tiny_s: Policy, sampled: tuple[Meter, Rollout]
) -> None:
    _, rollout = sampled
    assert rollout.prefix_length is not None
    assert int((rollout.prefix_length > 3).sum()) > 10
    whole = rollout.with_(action_mask=rollout.response_mask)  # the copied prefix too
    logprob, entropy = scored(tiny_s.model, whole, 16)
    mask = rollout.response_mask
    assert float((logprob - rollout.behaviour_logprob)[mask].abs().max()) < 1e-4
    assert float((entropy - rollout.statistics["token_entropy"])[mask].abs().max()) < 1e-4


def test_generated_tokens_count_a_shared_prefix_once(sampled: tuple[Meter, Rollout]) -> None:
    engine, rollout = sampled
    counts = token_counts(rollout)
    assert counts.generated == engine.tokens == int(rollout.sampled.sum())
    assert counts.trained == counts.generated  # branches learn from their new tokens only
    assert rollout.prefix_length is not None
    assert counts.independent == counts.generated + int(rollout.prefix_length.sum()) == int(rollout.lengths.sum())


def test_no_gradient_reaches_a_copied_prefix(tiny_s: Policy, sampled: tuple[Meter, Rollout]) -> None:
    _, rollout = sampled
    reward = torch.rand(len(rollout), generator=generator(1))
    pipeline = compose([build("clip_higher", {}), build("cure", {"preset": "tiny"})])
    _, advantage = pipeline.credit(rollout.with_(reward=reward))
    copied = rollout.response_mask & ~rollout.mask
    assert int(copied.sum()) > 0
    assert not advantage[copied].any()
    assert bool(advantage[rollout.mask].any())


# ------------------------------------------------------------------------------------------- training


def lines(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory")
    return [{k: str(v) for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = [*TINY_RUN, "rollout.group_size=16", "checkpoint.every=2", "steps=4"]
    config = load_config("cure/tiny", settings)
    Trainer(config, tmp_path / "straight").run()
    Trainer(config, tmp_path / "cut", stop=iter([False, True]).__next__).run()
    Trainer(config, tmp_path / "cut", resume=True).run()
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "straight")]
    assert weights[0] == weights[1]
    last = lines(tmp_path / "straight")[-1]
    assert {"cure.root_advantage", "cure.branch_advantage", "cure.branch_entropy", "cure.restarts"} <= set(last)
    assert float(last["cure.restarts"]) < 0.5
    assert float(last["generated_tokens"]) > 0


@pytest.mark.slow
def test_stage_two_goes_on_from_the_model_of_stage_one(tmp_path: Path) -> None:
    first = [*TINY_RUN, "rollout.group_size=16", "steps=1"]
    Trainer(load_config("cure/tiny", first), tmp_path / "one").run()
    second = [*TINY_RUN, "steps=1", "methods.cure.n2=0", f"model.path={tmp_path / 'one' / 'model'}"]
    result = Trainer(load_config("cure/tiny", second), tmp_path / "two").run()
    assert math.isfinite(result.history[-1]["loss"])
    assert not any(name.startswith("cure.") for name in result.history[-1])
