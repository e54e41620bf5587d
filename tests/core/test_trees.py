"""Where trees fork, how they grow under a budget, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from rlvr_lab.core.paths import Path, Piece, to_rollout
from rlvr_lab.core.trees import (
    Fork,
    TokenCounts,
    TreeDraws,
    candidates,
    expected_ratio,
    grow,
    pick,
    plant,
    ranking,
    token_counts,
)
from rlvr_lab.rollout.engine import Sampling

ENTROPIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=12)
PROMPTS = [[5, 6], [7], [8, 9, 5]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------- where to fork


@given(ENTROPIES)
def test_the_ranking_falls_and_equal_entropies_stay_in_order(entropy: list[float]) -> None:
    found = ranking(entropy)
    assert sorted(found) == list(range(len(entropy)))
    assert found == sorted(found, key=lambda i: (-entropy[i], i))


def test_the_random_ranking_ignores_entropy_and_follows_its_generator() -> None:
    one, other = (ranking([float(i) for i in range(20)], "random", generator(seed)) for seed in (1, 2))
    assert sorted(one) == list(range(20))
    assert one != other
    assert one == ranking([0.0] * 20, "random", generator(1))


@given(ENTROPIES, st.integers(1, 6), st.integers(0, 3))
def test_both_readings_of_top_k(entropy: list[float], most: int, modulus: int) -> None:
    def accept(i: int) -> bool:
        return i % 4 != modulus

    ranked = ranking(entropy)
    walked, strict = (candidates(ranked, accept, most, first) for first in (True, False))
    assert walked == [i for i in ranked if accept(i)][:most]
    assert strict == [i for i in ranked[:most] if accept(i)]
    assert walked[: len(strict)] == strict


def test_an_empty_list_of_candidates_gives_the_default_and_spends_no_number() -> None:
    g = generator()
    assert pick([], g) == 0
    assert pick([], g, default=-1) == -1
    assert torch.rand(1, generator=g).item() == torch.rand(1, generator=generator()).item()
    assert candidates(ranking([]), lambda i: True, 3) == []
    assert candidates(ranking([1.0, 2.0]), lambda i: False, 3) == []


def test_every_candidate_can_be_picked() -> None:
    g = generator()
    counts = torch.bincount(torch.tensor([pick([0, 1, 2], g) for _ in range(600)]))
    assert counts.min() > 150


def test_a_paths_random_numbers_depend_on_its_place_and_number_alone() -> None:
    def path(place: int, number: int) -> Path:
        return Path(0, 0, place, number, [1])

    draws = TreeDraws(generator())
    first = [torch.rand(1, generator=draws.of(path(*key))).item() for key in ((0, 0), (0, 1), (1, 0))]
    assert len(set(first)) == 3
    assert torch.rand(1, generator=draws.of(path(1, 0))).item() == first[2]
    again = TreeDraws(generator())
    assert torch.rand(1, generator=again.of(path(1, 0))).item() == first[2]
    assert torch.rand(1, generator=TreeDraws(generator(1)).of(path(1, 0))).item() != first[2]


# ------------------------------------------------------------------------------------------- growing


def halves(room: int, each: int = 1):
    """In every round, `each` forks in the middle of every path."""
    return lambda paths, turn: [Fork(p, len(p) // 2, room - len(p) // 2) for p in paths for _ in range(each)]


@given(st.integers(1, 200), st.integers(2, 9), st.integers(1, 3))
def test_a_budget_is_never_exceeded_and_almost_used_up(budget: int, room: int, each: int) -> None:
    engine = ScriptedEngine()
    sampling = Sampling(max_tokens=room)
    roots = plant(engine, PROMPTS, 2, sampling, generator())
    paths = grow(engine, roots, halves(room, each), sampling, generator(), budget)
    assert sum(path.generated for path in paths) == engine.tokens
    for group in range(len(PROMPTS)):
        own = [path for path in paths if path.group == group]
        spent = sum(path.generated for path in own)
        grown = len(own) > 2
        assert not grown or spent <= budget
        # the next fork has a room of at most `room`, so that it would have fitted otherwise
        assert spent > budget - room


def test_what_is_left_of_one_batch_goes_to_the_forks_that_waited() -> None:
    """Rooms of 10, pieces of 2: a budget of 30 admits 2, then 2, then 1 fork at a time, until 10 do not fit."""
    engine = ScriptedEngine(length=2)
    sampling = Sampling(max_tokens=10)
    roots = plant(engine, [[5]], 1, sampling, generator())
    paths = grow(engine, roots, lambda paths, turn: [Fork(roots[0], 0, 10)] * 20, sampling, generator(), 30)
    assert sum(path.generated for path in paths) == 22  # 24 would need 32 of room
    assert engine.batches > 4


@pytest.mark.parametrize("budget", [None, 60])
def test_a_group_grows_as_if_it_were_alone(budget: int | None) -> None:
    def grown(first: int, prompts: list[list[int]]) -> list[tuple[int, int, list[int]]]:
        sampling = Sampling(max_tokens=9, first=first)
        engine = ScriptedEngine()
        roots = plant(engine, prompts, 2, sampling, generator())
        rounds = (lambda paths, turn: halves(9)(paths, turn) if turn < 2 else []) if budget is None else halves(9)
        paths = grow(engine, roots, rounds, sampling, generator(), budget)
        return [(path.place, path.number, path.ids) for path in paths]

    assert grown(0, PROMPTS) == grown(0, PROMPTS[:1]) + grown(1, PROMPTS[1:])


def test_forks_are_extended_in_one_batch_and_sorted_by_group_and_age() -> None:
    engine = ScriptedEngine()
    sampling = Sampling(max_tokens=6)
    roots = plant(engine, PROMPTS, 2, sampling, generator(), problem_ids=[30, 31, 32])
    paths = grow(engine, roots, lambda paths, turn: [] if turn else halves(6)(paths, turn), sampling, generator())
    assert engine.batches == 2
    assert [(p.group, p.number) for p in paths] == [(g, n) for g in range(3) for n in range(4)]
    assert [p.problem for p in paths] == [30] * 4 + [31] * 4 + [32] * 4
    assert [p.parent for p in paths] == [-1, -1, 0, 1] * 3
    for path in paths:
        if path.parent >= 0:
            parent = next(p for p in paths if (p.group, p.number) == (path.group, path.parent))
            assert path.ids[: path.prefix_length] == parent.ids[: path.prefix_length]
            assert len(path) == path.prefix_length + path.generated <= 6


def test_no_fork_leaves_the_roots() -> None:
    engine = ScriptedEngine()
    roots = plant(engine, PROMPTS, 2, Sampling(), generator())
    assert grow(engine, roots, lambda paths, turn: [], Sampling(), generator(), 10_000) == roots
    assert engine.batches == 1


def test_a_fork_can_learn_nothing_of_its_prefix_and_have_another_prompt() -> None:
    root = Path(0, 0, 0, 0, [5, 6])
    root.add(Piece([7, 8, 9], [0.0] * 3, [1.0] * 3))
    branch = Fork(root, 1, 4, position=2, learn=False, prompt=[5]).begin(7)
    assert (branch.ids, branch.action, list(branch.prompt)) == ([7], [False], [5])
    assert (branch.number, branch.parent, branch.prefix_length, branch.branch_position) == (7, 0, 1, 2)
    assert list(root.prompt) == [5, 6]


# ------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("learn", [True, False])
def test_generation_counts_a_prefix_once_and_training_as_often_as_it_is_learned(learn: bool) -> None:
    root = Path(0, 0, 0, 0, [5])
    root.add(Piece([7] * 10, [0.0] * 10, [1.0] * 10))
    paths = [root]
    for number, (position, new) in enumerate([(4, 3), (4, 5), (9, 1)], 1):
        branch = root.branch(number, position, learn=learn)
        branch.add(Piece([8] * new, [0.0] * new, [1.0] * new))
        paths.append(branch)
    counts = token_counts(to_rollout(paths, pad_id=0, version=0))
    assert counts == TokenCounts(generated=19, trained=19 + 17 * learn, independent=36)
    assert counts.ratio == pytest.approx(19 / 36)


def test_plain_responses_cost_the_same_either_way() -> None:
    root = Path(0, 0, 0, 0, [5])
    root.add(Piece([7, 8], [0.0] * 2, [1.0] * 2))
    assert token_counts(to_rollout([root], pad_id=0, version=0)) == TokenCounts(2, 2, 2)
    assert math.isnan(TokenCounts(0, 0, 0).ratio)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(2, 40))
def test_the_papers_ratio_is_exact_for_forks_in_the_middle(forks: int, branches: int, half: int) -> None:
    root = Path(0, 0, 0, 0, [5])
    root.add(Piece([7] * 2 * half, [0.0] * 2 * half, [1.0] * 2 * half))
    paths = [root]
    for number in range(forks * branches):
        branch = root.branch(number + 1, half)
        branch.add(Piece([8] * half, [0.0] * half, [1.0] * half))
        paths.append(branch)
    counts = token_counts(to_rollout(paths, pad_id=0, version=0))
    assert counts.ratio == pytest.approx(expected_ratio(forks, branches))
