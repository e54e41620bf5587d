"""AEPO for agents: golden values, the clip that keeps its gradient, and rounds of trajectories under a scripted engine,
whose words and entropies are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import GOLDEN, TINY_RUN, make_rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.losses import clipped_surrogate
from rlvr_lab.core.paths import Piece, Start
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import _branching as branching
from rlvr_lab.methods import agentic_aepo as module
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.agentic_aepo import AgenticAEPO
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.episodes import Turns
from rlvr_lab.rollout.meter import Meter
from rlvr_lab.tasks.agents import search_reward
from rlvr_lab.tasks.agents.base import Turn
from rlvr_lab.tasks.base import Verdict
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

WORDS = ("pad", "eos", "CALL", "DONE", "told", *(f"w{i}" for i in range(11)))
PAD, EOS, CALL, DONE, TOLD, FIRST = range(6)
LETTERS = len(WORDS) - FIRST
SEGMENT = 3


class Asks:
    """An environment that says `told` to every turn until one ends with DONE."""

    stops = ("CALL", "DONE")
    name = "asks"

    def __init__(self, max_turns: int = 50, turn_tokens: int = 8) -> None:
        self.max_turns, self.turn_tokens = max_turns, turn_tokens

    def reset(self, problem: Any) -> tuple[str, ...]:
        return ()

    def step(self, problem: Any, state: Any, action: str) -> Turn:
        done = action.endswith("DONE")
        return Turn((*state, action), "" if done else "told", done, tool=None if done else "call")

    def verdict(self, problem: Any, actions: Sequence[str], finished: bool) -> Verdict:
        return Verdict(finished, actions[-1] if actions else None, "")


Script = Callable[[list[int], int], tuple[bool, float]]


class Scripted:
    """Writes two words and CALL or DONE. `script(response so far, turn)` says whether the segment is the last one, and
    the entropy of its tokens. Words are random, and depend on the key of the start alone."""

    def __init__(self, script: Script, environment: Any = None, prompt_length: int = 2, records: bool = True) -> None:
        self.script, self.prompt_length, self.records = script, prompt_length, records
        self.calls: list[list[Start]] = []
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(WORDS)))
        self.policy: Any = SimpleNamespace(
            encode=lambda text: [WORDS.index(word) for word in text.split()],
            decode=lambda ids: " ".join(WORDS[i] for i in ids),
            eos_ids=[EOS], pad_id=PAD, device=torch.device("cpu"), model=model,
        )  # fmt: skip
        self.turns = Turns(environment or Asks(), [None] * 99, self.policy)

    def extend(
        self, starts: Sequence[Start], sampling: Any, generator: torch.Generator, *, stops: Any = (), report: Any = None
    ) -> list[Piece]:
        assert tuple(stops) == self.turns.stops
        self.calls.append(list(starts))
        return [self._piece(start) for start in starts]

    def _piece(self, start: Start) -> Piece:
        said = list(start.ids)[self.prompt_length :]
        done, entropy = self.script(said, said.count(TOLD))
        draws = torch.Generator().manual_seed(start.key or 0)
        words = (torch.randint(LETTERS, (SEGMENT - 1,), generator=draws) + FIRST).tolist()
        ids = [*words, DONE if done else CALL][: start.max_tokens]
        n = len(ids)
        return Piece(
            ids, [-1.0] * n, [1.0] * n, [entropy] * n if self.records else None, [-1.0] * n, False, n == SEGMENT
        )

    def with_entropy(self, paths: Any, rows: int = 64) -> None:
        for path in paths:
            if path.entropy is None:
                path.entropy = [0.5 * action for action in path.action]


def sampled(
    script: Script,
    settings: dict[str, Any],
    prompts: int = 1,
    size: int = 8,
    seed: int = 0,
    first: int = 0,
    **engine: Any,
) -> tuple[Rollout, Scripted, Meter]:
    own = Scripted(script, **engine)
    meter = Meter(own)
    method = build("agentic_aepo", settings)
    assert isinstance(method, AgenticAEPO)
    limits = Sampling(max_tokens=160, streams="prompt", first=first)
    rollout = method.sample(
        meter, [[FIRST + first + i, FIRST] for i in range(prompts)], size, limits,
        torch.Generator().manual_seed(seed), problem_ids=[first + i for i in range(prompts)],
    )  # fmt: skip
    return rollout, own, meter


def five_turns(said: list[int], turn: int) -> tuple[bool, float]:
    """A steady entropy and an end after five segments."""
    return turn >= 4, 0.5


def nats(h: float) -> float:
    """Token entropy whose share of ln V is h."""
    return h * math.log(len(WORDS))


# -- formulas -------------------------------------------------------------------------------------------------------


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "agentic_aepo.json")}
    assert len(problems) == 8
    assert not any(problems.values()), problems


CASES = [  # ratio, advantage, gradient factor F of PPO, of AEPO
    (2.0, 1.0, 0.0, 1.2),
    (1.1, 1.0, 1.1, 1.1),
    (0.5, 1.0, 0.5, 0.5),
    (0.5, -1.0, 0.0, 0.0),
    (2.0, -1.0, 2.0, 2.0),
    (4.0, -1.0, 0.0, 0.0),
    (2.0, 0.0, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "advantage", "ppo", "aepo"), CASES)
def test_the_gradient_factor_by_hand(ratio: float, advantage: float, ppo: float, aepo: float) -> None:
    value = torch.tensor([[advantage]])
    for preserved, factor in ((False, ppo), (True, aepo)):
        logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
        found = module.balanced_surrogate(logprob, torch.zeros(1, 1), value, 0.8, 1.2, 3.0, preserved)
        found.loss.sum().backward()  # type: ignore[no-untyped-call]
        plain = clipped_surrogate(logprob.detach(), torch.zeros(1, 1), value, 0.8, 1.2, 3.0)
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(found.clipped_high, plain.clipped_high)
        assert logprob.grad is not None
        assert float(logprob.grad) == pytest.approx(-factor * advantage, rel=1e-6)


def test_only_tokens_of_high_entropy_may_keep_their_gradient() -> None:
    entropy, mask = torch.tensor([[0.1, 2.0, 0.3, 9.0]]), torch.tensor([[True, True, True, False]])
    kept = module.preserved_tokens(entropy, mask, 0.8)
    assert kept.tolist() == [[False, True, False, False]]
    assert module.preserved_tokens(entropy, mask, None).tolist() == mask.tolist()
    logprob = torch.full((1, 4), math.log(2.0), requires_grad=True)
    loss = module.balanced_surrogate(logprob, torch.zeros(1, 4), torch.ones(1, 4), 0.8, 1.2, None, kept).loss
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [[0.0, pytest.approx(-1.2), 0.0, 0.0]]


def test_entropy_scores() -> None:
    entropy = torch.tensor([[1.0, 2.0, 6.0], [3.0, 50.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    score = module.entropy_score(entropy, mask)
    expected = (torch.tensor([1.0, 2.0, 6.0, 3.0]) - 3.0) / torch.tensor([1.0, 2.0, 6.0, 3.0]).std()
    assert torch.allclose(score[mask], expected)
    assert not score[~mask].any()
    assert not score.requires_grad
    one = torch.tensor([[True, False, False], [False] * 3])
    assert not module.entropy_score(entropy, one).any()
    assert not module.entropy_score(torch.full((2, 3), 0.7), mask).any()
    assert not module.entropy_score(entropy, torch.zeros_like(mask)).any()


def test_a_missing_entropy_is_an_error_and_not_a_factor_of_one() -> None:
    rollout = make_rollout([3, 4])
    with pytest.raises(UserError, match=r"'agentic_aepo' needs 'current_entropy'.*coefficient=0"):
        AgenticAEPO().prepare(rollout, torch.ones(2, 4), torch.Generator())
    released = build("agentic_aepo", {"preset": "released"})
    assert isinstance(released, AgenticAEPO)
    assert released.prepare(rollout, torch.ones(2, 4), torch.Generator()) == {}
    assert not released.needs_current


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 25), st.floats(0, 2), st.floats(0, 0.2))
def test_the_probability_of_a_branch_is_that_of_its_draws(change: float, streak: int, w: float, penalty: float) -> None:
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    delta, row = torch.tensor(change, dtype=torch.float64), torch.tensor(float(streak), dtype=torch.float64)
    drawn = branching.aepo_score(uniform, delta, row, w, penalty) >= 0.5
    expected = branching.branch_probability(delta, row, "aepo", w, penalty)
    assert float(drawn.double().mean()) == pytest.approx(float(expected), abs=2e-3)
    arpo = branching.arpo_score(uniform, delta, w) <= 0.5
    free = branching.branch_probability(delta, torch.zeros(()), "aepo", w, penalty)
    assert float(arpo.double().mean()) == pytest.approx(float(free), abs=2e-3)


def test_branching_stops_after_ten_in_a_row() -> None:
    odds = branching.branch_probability(torch.zeros(21), torch.arange(21.0))
    assert odds[0] == 0.5
    assert not odds[10:].any()
    assert bool((odds[:10].diff() < 0).all())


@pytest.mark.parametrize(
    ("k", "root", "tool", "m"), [(1, 0, [9.0], 1), (16, 3, [], 9), (8, 90, [0.0], 8), (8, 0, [90.0], 1)]
)
def test_budget_split(k: int, root: float, tool: list[float], m: int) -> None:
    assert branching.budget_split(k, root, tool) == m


def test_segment_entropies() -> None:
    values = [math.log(16)] * 10 + [0.0] * 10 + [99.0]
    assert branching.segment_entropy(values, 16) == pytest.approx(0.5)
    assert branching.segment_entropy(values, 16, how="sum") == pytest.approx(10)
    assert branching.segment_entropy(values[:4], 16) == pytest.approx(1)
    assert branching.segment_entropy([], 16) == 0 == branching.truncated_segment_entropy([], 16)
    uniform = [[math.log(1 / 16)] * 16] * 3
    assert branching.truncated_segment_entropy(uniform, 16) == pytest.approx(3)


def test_shared_advantages_by_hand() -> None:
    # path 1 shares 2 tokens of 0, path 2 shares 3 of 1 (two of them path 0's); path 3 is alone
    value, group = torch.tensor([1.0, 2.0, 6.0, 9.0]), torch.zeros(4, dtype=torch.long)
    lineage = torch.arange(4), torch.tensor([-1, 0, 1, -1]), torch.tensor([0, 2, 3, 0])
    found = module.shared_advantage(value, group, *lineage, tokens=4)
    assert found.tolist() == [[3, 3, 1, 1], [3, 3, 4, 2], [3, 3, 4, 6], [9, 9, 9, 9]]
    # shared or not, the advantages of a token add up to the same
    assert torch.equal(found.sum(0), value.sum().expand(4))
    some = torch.tensor([1, 2, 3])  # without path 0, its children still share its tokens
    assert module.shared_advantage(value[some], group[some], *(x[some] for x in lineage), tokens=4).tolist() == [
        [4, 4, 4, 2], [4, 4, 4, 6], [9, 9, 9, 9],
    ]  # fmt: skip


def test_the_reward_for_answers_in_words() -> None:
    def answer(text: str, before: str = "<think> t </think>") -> str:
        return f"{before}<answer>\\boxed{{{text}}}</answer>"

    calls = "<think></think><search>q</search><result>r</result><python>1</python><result>1</result>"
    reward = search_reward.search_reward
    assert reward(answer("The  Paris!"), "paris") == 1
    assert reward(answer("x{y}"), ["none", "xy"]) == 1  # braces balance, then go as punctuation
    assert reward(answer("no"), "no way") == 0 == reward(answer("yes sir"), "yes")
    assert reward(answer("Paris", calls), "Paris") == 1.1
    assert reward(answer("Rome", calls), "Paris") == 0
    assert reward(answer("Paris", "<think></think><result>stray</result>"), "Paris") == 1
    bad = [
        answer("Paris", ""),
        answer("Paris", "<think>"),
        answer("Paris") * 2,
        "<think></think></answer>\\boxed{Paris}<answer>",
        "<think></think><answer>Paris</answer>",
        "<think></think><answer>\\boxed{Paris</answer>}",
        answer("Paris", "<think></think><search>q<result>r</result></search>"),
        answer("Paris", "<think></think><python>q</python>"),
    ]
    assert [reward(text, "Paris") for text in bad] == [-1] * len(bad)


# -- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(AgenticAEPO.presets))
@pytest.mark.parametrize("size", [1, 2, 9])
def test_every_prompt_gets_its_group_and_branches_share_their_parents_tokens(preset: str, size: int) -> None:
    rollout, engine, _ = sampled(five_turns, {"preset": preset}, prompts=3, size=size)
    keys = [start.key for call in engine.calls for start in call]
    assert len(set(keys)) == len(keys)  # no two pieces have the same random numbers
    assert rollout.group_id.tolist() == [g for g in range(3) for _ in range(size)]
    assert rollout.prompt_id.tolist() == rollout.group_id.tolist()
    assert rollout.path_id is not None
    assert rollout.parent_id is not None
    assert rollout.prefix_length is not None
    assert rollout.path_id.tolist() == list(range(size)) * 3
    told = rollout.response_mask & ~rollout.action_mask
    assert torch.equal(told, rollout.response_ids == TOLD)
    assert bool(rollout.finished.all())
    for row in range(len(rollout)):
        parent, n = int(rollout.parent_id[row]), int(rollout.prefix_length[row])
        if parent < 0:
            assert n == 0
            continue
        assert parent < int(rollout.path_id[row])
        theirs = rollout.response_ids[int(rollout.group_id[row]) * size + parent]
        assert torch.equal(rollout.response_ids[row, :n], theirs[:n])
        assert int(theirs[n - 1]) == TOLD  # the answer belongs to what is shared


def test_generated_tokens_are_counted_once_and_probes_too() -> None:
    for settings_, probes in (({"monitor": False}, 0), ({"root_tokens": 2}, 2 + 5 * SEGMENT)):
        rollout, engine, meter = sampled(five_turns, settings_, prompts=2)
        assert meter.tokens == int(rollout.sampled.sum()) + 2 * probes
        assert meter.tokens == sum(min(SEGMENT, start.max_tokens) for call in engine.calls for start in call)
        assert int(rollout.sampled.sum()) < int(rollout.mask.sum())  # some were branches


def test_the_probes_set_the_number_of_beginnings() -> None:
    def unsure_of(turn_of_doubt: int) -> Script:
        return lambda said, turn: (turn >= 4, nats(0.9 if (turn > 0) == turn_of_doubt else 0.1))

    never = {"rule": "aepo", "probability": 1.0, "weight": 0.0}  # nothing branches: all else begins anew, one by one
    for doubt, m in ((0, 8), (1, 1)):
        _, engine, _ = sampled(unsure_of(doubt), {"beta": 20.0, **never})
        rounds = engine.calls[1 + 5 :]
        assert len(rounds[0]) == m
        assert [len(call) for call in rounds] == [m] * 5 + [1] * 5 * (8 - m)
        assert [len(call) for call in engine.calls[:6]] == [1] * 6  # the probe of the prompt, then a whole trajectory


def test_a_branch_is_decided_by_the_segment_behind_the_answer_or_one_too_late() -> None:
    def doubt_in_the_third(said: list[int], turn: int) -> tuple[bool, float]:
        return turn >= 4, nats(0.9 if turn == 2 else 0.1)

    rise = {"monitor": False, "probability": 1.0, "weight": 9.0, "penalty": 0.0, "segment": "mean"}
    for lag, turns in ((0, 2), (1, 3)):
        rollout, _, _ = sampled(doubt_in_the_third, {**rise, "lag": lag})
        assert rollout.prefix_length is not None
        # all four branches, and none of them at once again: of 8 places 4 are left
        assert rollout.prefix_length.tolist() == [0] * 4 + [turns * (SEGMENT + 1)] * 4
        assert rollout.parent_id is not None
        assert rollout.parent_id.tolist() == [-1] * 4 + [0, 1, 2, 3]


def test_attempts_go_in_order_until_the_places_are_used() -> None:
    always = {"monitor": False, "initial": 0.6, "penalty": 0.0, "probability": 1e-9, "weight": 0.0, "lag": 1}
    rollout, _, _ = sampled(five_turns, always, size=8)
    assert rollout.parent_id is not None
    assert rollout.parent_id.tolist() == [-1] * 5 + [0, 1, 2]
    wide, _, _ = sampled(five_turns, {**always, "initial": 0.2, "beam": 3}, size=8)
    assert wide.parent_id is not None
    assert wide.parent_id.tolist() == [-1, -1, 0, 0, 1, 1, 0, 0]


def most_branched(preset: str, penalty: float, seeds: int = 5) -> float:
    # the engine's words depend on the key of a start: those of the first trajectory are these
    first = (torch.randint(LETTERS, (SEGMENT - 1,), generator=torch.Generator().manual_seed(0)) + FIRST).tolist()

    def one_in_doubt(said: list[int], turn: int) -> tuple[bool, float]:
        unsure = said[: SEGMENT - 1] == first
        return turn >= 12, nats(0.5 if turn == 0 else 0.9 if unsure else 0.3)

    settings_ = {"preset": preset, "monitor": False, "initial": 0.25, "weight": 1.0, "penalty": penalty, "lag": 0,
                 "segment": "mean"}  # fmt: skip
    found = []
    for seed in range(seeds):
        own, _, _ = sampled(one_in_doubt, settings_, size=24, seed=seed)
        assert own.path_id is not None
        assert own.parent_id is not None
        found.append(module.most_branched_share(own.group_id, own.path_id, own.parent_id))
    return sum(found) / seeds


def test_the_penalty_takes_branches_from_the_most_branched_trajectory() -> None:
    # of six beginnings one is unsure after every answer and branches with probability 0.9, the others with 0.3; with
    # the penalty of 0.05 the shares differ by about a hundredth, far less than between these few seeds
    arpo, aepo = most_branched("arpo", 0.05), most_branched("paper", 1.0)
    assert arpo > 2 / 6
    assert aepo < arpo - 0.04


def test_descent_and_the_share_of_the_most_branched_by_hand() -> None:
    group, path = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 3, 0, 1])
    parent = torch.tensor([-1, -1, 0, 2, -1, -1])
    assert module.trees(group, path, parent) == [(0, 0), (0, 1), (0, 0), (0, 0), (1, 0), (1, 1)]
    assert module.most_branched_share(group, path, parent) == 1
    assert module.most_branched_share(group, path, torch.tensor([-1, -1, 0, 1, -1, 0])) == 0.75
    assert math.isnan(module.most_branched_share(group, path, torch.full((6,), -1)))


def test_the_two_counters_differ() -> None:
    rules = {"monitor": False, "initial": 0.25, "weight": 0.0, "penalty": 0.3}
    by_path, by_prompt = (
        sampled(lambda said, turn: (turn >= 9, 0.5), {**rules, "counter": counter}, size=24, prompts=6)[0]
        for counter in ("path", "prompt")
    )
    assert by_path.parent_id is not None
    assert by_prompt.parent_id is not None
    # one count for all of a prompt's trajectories rises faster
    assert int((by_prompt.parent_id >= 0).sum()) < int((by_path.parent_id >= 0).sum())


def test_prompts_do_not_depend_on_their_company() -> None:
    both, _, _ = sampled(five_turns, {}, prompts=2)
    alone, _, _ = sampled(lambda said, turn: (turn >= 4, 0.5), {}, prompts=1, first=1)
    second = both.rows((both.group_id == 1).nonzero().squeeze(1))
    assert torch.equal(second.response_ids, alone.response_ids)
    assert torch.equal(second.parent_id, alone.parent_id)  # type: ignore[arg-type]
    again, _, _ = sampled(five_turns, {}, prompts=2, seed=1)
    assert again.response_ids.shape != both.response_ids.shape or not torch.equal(again.response_ids, both.response_ids)


def test_nothing_to_branch_from_begins_anew() -> None:
    for lag in (0, 1):
        rollout, _, _ = sampled(lambda said, turn: (True, 0.5), {"lag": lag, "monitor": False, "initial": 0.2})
        assert rollout.parent_id is not None
        assert rollout.parent_id.tolist() == [-1] * 8
        assert rollout.lengths.tolist() == [SEGMENT] * 8


def test_an_environment_that_never_ends_is_capped() -> None:
    def never(said: list[int], turn: int) -> tuple[bool, float]:
        return False, 0.5

    by_turns, _, _ = sampled(never, {}, environment=Asks(max_turns=7))
    assert by_turns.turn_id is not None
    assert int(by_turns.turn_id.max()) == 6
    by_tokens, _, _ = sampled(never, {}, environment=Asks(max_turns=10**6))
    assert int(by_tokens.lengths.max()) == 160
    by_calls, _, _ = sampled(never, {"call_limit": 2}, environment=Asks(max_turns=10**6))
    assert int(by_calls.lengths.max()) == 3 * (SEGMENT + 1)
    assert [len(rollout) for rollout in (by_turns, by_tokens, by_calls)] == [8, 8, 8]
    assert not bool(by_tokens.finished.any() | by_calls.finished.any())


def test_an_engine_without_entropies_is_asked_to_score() -> None:
    rollout, _, _ = sampled(five_turns, {}, records=False)
    assert bool((rollout.statistics["token_entropy"][rollout.mask] == 0.5).all())
    assert rollout.parent_id is not None
    assert bool((rollout.parent_id >= 0).any())


def test_a_task_of_one_turn_is_refused(tiny_s: Any) -> None:
    with pytest.raises(UserError, match=r"'agentic_aepo' branches behind a tool's answer.*set data\.task to") as caught:
        AgenticAEPO().sample(TransformersEngine(tiny_s), [[1]], 2, Sampling(), torch.Generator())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"rule": "aeppo"}, "methods.agentic_aepo.rule must be one of aepo, arpo, not 'aeppo'; did you mean 'aepo'"),
        ({"counter": "batch"}, "methods.agentic_aepo.counter must be one of path, prompt"),
        ({"lag": 2}, "methods.agentic_aepo.lag must be 0"),
        ({"beam": 0}, "methods.agentic_aepo.beam must be an integer from 1 on, not 0"),
        ({"initial": 0.0}, r"methods.agentic_aepo.initial must lie in \(0, 1\], not 0.0"),
        ({"weight": -1}, "methods.agentic_aepo.weight must be finite and not negative"),
        ({"dual_clip": 1.0}, "methods.agentic_aepo.dual_clip must be above 1 or null"),
        ({"entropy_quantile": 2.0}, "methods.agentic_aepo.entropy_quantile must lie in"),
        ({"call_limit": -1}, "methods.agentic_aepo.call_limit must not be negative"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("agentic_aepo", settings_)


# -- updates --------------------------------------------------------------------------------------------------------


def loss_of(settings_: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one record under the composed method, entropies and ratios spread out."""
    from rlvr_lab.methods.base import LossInputs

    rollout = make_rollout([6, 4, 5, 6])
    pipeline = compose([build("agentic_aepo", settings_)])
    rollout = rollout.with_statistics(current_entropy=rollout.statistics["token_entropy"])
    rollout, advantage = pipeline.credit(rollout)
    batch = pipeline.prepare(rollout, advantage, torch.Generator())
    lower, upper = pipeline.clip(batch, advantage)
    assert rollout.old_logprob is not None
    logprob = (rollout.old_logprob + torch.linspace(0.1, 0.5, 24).view(4, 6)).requires_grad_()
    inputs = LossInputs(batch, logprob, rollout.old_logprob, advantage, lower, upper)
    loss = pipeline.surrogate(inputs).loss.masked_fill(~batch.mask, 0.0).sum()
    (gradient,) = torch.autograd.grad(loss, logprob)
    return float(loss.detach()), gradient


def test_presets_and_controls_differ_in_the_update() -> None:
    paper, released, arpo = (loss_of({"preset": preset}) for preset in ("paper", "released", "arpo"))
    assert paper[0] != pytest.approx(released[0], rel=1e-3)  # the entropy-aware advantage
    assert released[0] == pytest.approx(arpo[0])  # the bound has PPO's value ...
    assert not torch.allclose(released[1], arpo[1])  # ... and another gradient
    ppo = loss_of({"preset": "released", "preserve": False})
    assert torch.equal(ppo[1], arpo[1])
    some = loss_of({"preset": "released", "entropy_quantile": 0.5})
    assert not torch.allclose(some[1], released[1])
    assert not torch.allclose(some[1], arpo[1])


def test_hard_advantages_need_the_lineage_and_average_over_it() -> None:
    rollout, _, _ = sampled(five_turns, {"monitor": False}, prompts=2)
    reward = torch.arange(len(rollout)).float().sqrt()
    soft, hard = (
        compose([build("agentic_aepo", {"shared": shared})]).advantage(rollout.with_(reward=reward))
        for shared in ("soft", "hard")
    )
    assert rollout.prefix_length is not None
    own = rollout.sampled & (torch.arange(soft.shape[1]) >= rollout.prefix_length.max())
    assert torch.allclose(soft[own], hard[own], atol=1e-5)
    assert not torch.allclose(soft, hard, atol=1e-3)
    for g in range(2):
        rows = rollout.group_id == g
        assert torch.allclose(soft[rows].sum(0)[:4], hard[rows].sum(0)[:4], atol=1e-4)
    with pytest.raises(UserError, match="'agentic_aepo' needs 'path_id'"):
        compose([build("agentic_aepo", {"shared": "hard"})]).advantage(make_rollout([3, 4]))


def test_the_step_tells_where_it_branched() -> None:
    rollout, _, _ = sampled(five_turns, {"monitor": False})
    pipeline = compose([build("agentic_aepo", {})])
    assert math.isnan(pipeline.metrics()["agentic_aepo.branches"])
    assert pipeline.filter(rollout) is rollout
    found = pipeline.metrics()
    assert rollout.parent_id is not None
    assert found["agentic_aepo.branches"] == float((rollout.parent_id >= 0).sum())
    assert 0 < found["agentic_aepo.most_branched"] <= 1


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def config() -> Any:
        return load_config("agentic_aepo/tiny", [*TINY_RUN, "rollout.max_tokens=64", "steps=4"])

    Trainer(config(), tmp_path / "straight").run()
    Trainer(config(), tmp_path / "cut", stop=iter([False, True]).__next__).run()
    Trainer(config(), tmp_path / "cut", resume=True).run()
    timed = ("seconds", "tokens_per_second", "memory")
    figures, weights = [], []
    for name in ("straight", "cut"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        figures.append([{k: str(v) for k, v in row.items() if not k.startswith(timed)} for row in rows])
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert figures[0] == figures[1]
    assert weights[0] == weights[1]
    assert all(float(row["agentic_aepo.branches"]) > 0 for row in figures[0])
