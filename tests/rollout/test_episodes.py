"""Episodes: turns of a policy and an environment as one response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rlvr_lab.core.paths import Path
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.evaluate.evaluation import evaluate
from rlvr_lab.policy.forward import response_statistics
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.episodes import EpisodeEngine, actions_of, for_task, play
from rlvr_lab.rollout.grading import grade
from rlvr_lab.rollout.meter import Meter
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.agents.base import ERROR, Turn
from rlvr_lab.tasks.base import Verdict

PROBLEMS = countdown.problems(3, 5)


@dataclass(frozen=True)
class Echo:
    """Answers every sum with its number of words so far; done after the third, or never."""

    ends: bool = True
    broken: bool = False
    max_turns: int = 6
    turn_tokens: int = 8
    stops: tuple[str, ...] = ("=",)
    name: str = "echo"

    def prompt_ids(self, problem: countdown.Problem, tokenizer: Any) -> list[int]:
        return list(problem.prompt_ids)

    def reset(self, problem: countdown.Problem) -> tuple[str, ...]:
        return ()

    def step(self, problem: countdown.Problem, state: tuple[str, ...], action: str) -> Turn:
        if self.broken:
            raise RuntimeError("the tool broke")
        told = (*state, action)
        return Turn(told, f"yes {len(action.split())} no", self.ends and len(told) == 3)

    def verdict(self, problem: countdown.Problem, actions: Sequence[str], finished: bool) -> Verdict:
        return Verdict(finished and len(actions) == 3, " | ".join(actions), "counted", points={"said": len(actions)})

    def grade(self, problem: countdown.Problem, response_text: str, finished: bool) -> Verdict:
        raise NotImplementedError("the rollout knows its turns")

    def read(self, response_text: str, finished: bool) -> str | None:
        return None


def episodes(policy: Policy, environment: Echo, group: int = 2, seed: int = 0, **settings: Any) -> Rollout:
    engine = for_task(TransformersEngine(policy), environment, PROBLEMS)
    prompts = [environment.prompt_ids(p, None) for p in PROBLEMS]
    sampling = Sampling(**{"max_tokens": 60, **settings})
    return engine.sample(prompts, group, sampling, torch.Generator().manual_seed(seed))  # type: ignore[no-any-return]


def test_turns_alternate_and_what_is_told_is_no_action(tiny_s: Policy) -> None:
    rollout = episodes(tiny_s, Echo())
    assert rollout.group_id.tolist() == [0, 0, 1, 1, 2, 2]
    assert bool(rollout.finished.all())
    for row in range(6):
        actions = actions_of(rollout, row, tiny_s)
        assert len(actions) == 3
        n = int(rollout.lengths[row])
        told = [t for t, a in zip(rollout.response_ids[row, :n].tolist(), rollout.action_mask[row, :n].tolist(),
                                  strict=True) if not a]  # fmt: skip
        expected = " ".join(f"yes {len(action.split())} no" for action in actions[:2])
        assert tiny_s.decode(told) == expected


def test_recorded_log_probs_are_those_of_the_whole_episode_scored_at_once(tiny_s: Policy) -> None:
    rollout = episodes(tiny_s, Echo(), temperature=0.8)
    with torch.no_grad():
        logprob, entropy = response_statistics(tiny_s.model, rollout)
    assert entropy is not None
    mask = rollout.mask
    assert not bool(mask[rollout.response_mask].all())
    torch.testing.assert_close(rollout.behaviour_logprob[mask], logprob[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.statistics["token_entropy"][mask], entropy[mask], rtol=0, atol=1e-4)


def test_verdicts_see_the_turns(tiny_s: Policy) -> None:
    rollout = grade(episodes(tiny_s, Echo()), Echo(), PROBLEMS, tiny_s)
    assert rollout.correct is not None
    assert bool(rollout.correct.all())
    assert rollout.answer is not None
    assert rollout.answer[0] == " | ".join(actions_of(rollout, 0, tiny_s))
    assert rollout.reward_components["said"].tolist() == [3.0] * 6


@pytest.mark.parametrize("environment", [Echo(ends=False), Echo(broken=True)], ids=["endless", "broken"])
def test_an_endless_or_broken_environment_is_ended_by_the_cap_on_turns(tiny_s: Policy, environment: Echo) -> None:
    rollout = episodes(tiny_s, environment, max_tokens=100)
    assert {len(actions_of(rollout, row, tiny_s)) for row in range(6)} == {6}


def test_what_an_environment_raises_is_told_and_changes_nothing(tiny_s: Policy) -> None:
    engine = EpisodeEngine(TransformersEngine(tiny_s), Echo(broken=True), PROBLEMS)
    path = Path(0, 0, 0, 0, list(PROBLEMS[0].prompt_ids))
    engine.turns.open(path)
    (piece,) = engine.extend([path.start(8)], Sampling(), torch.Generator().manual_seed(0), stops=engine.turns.stops)
    path.add(piece)
    turn = engine.turns.respond(path)
    assert (turn.observation, turn.valid, turn.done) == (ERROR, False, False)
    assert path.ids[len(piece.ids) :] == tiny_s.encode(ERROR)
    assert path.state == ()
    assert path.open


def test_the_limit_on_tokens_cuts_an_episode_unfinished(tiny_s: Policy) -> None:
    rollout = episodes(tiny_s, Echo(ends=False), max_tokens=13)
    assert not bool(rollout.finished.any())
    assert int(rollout.lengths.max()) <= 13 + 3  # the last answer may pass it, nothing is sampled behind
    assert int(rollout.mask.sum(1).max()) <= 13


def test_the_window_of_the_model_is_a_limit_too(tiny_s: Policy) -> None:
    environment = Echo(ends=False, max_turns=100)
    rollout = episodes(tiny_s, environment, group=1, max_tokens=1000)
    window = tiny_s.model.config.max_position_embeddings
    assert int(rollout.lengths.max()) + len(PROBLEMS[0].prompt_ids) <= window + 3
    assert not bool(rollout.finished.any())


def test_only_sampled_tokens_are_counted(tiny_s: Policy) -> None:
    meter = Meter(TransformersEngine(tiny_s))
    engine = for_task(meter, Echo(), PROBLEMS)
    prompts = [list(p.prompt_ids) for p in PROBLEMS]
    rollout = engine.sample(prompts, 2, Sampling(max_tokens=60), torch.Generator().manual_seed(0))
    assert meter.tokens == int(rollout.mask.sum()) < int(rollout.lengths.sum())


def test_with_streams_per_prompt_episodes_do_not_depend_on_how_prompts_are_divided(tiny_s: Policy) -> None:
    engine = EpisodeEngine(TransformersEngine(tiny_s), Echo(), PROBLEMS)
    prompts = [list(p.prompt_ids) for p in PROBLEMS]
    sampling = Sampling(max_tokens=60, streams="prompt")
    whole = engine.sample(prompts, 2, sampling, torch.Generator().manual_seed(4))
    last = engine.sample(prompts[2:], 2, Sampling(max_tokens=60, streams="prompt", first=2),
                         torch.Generator().manual_seed(4), problem_ids=[2])  # fmt: skip
    n = int(last.lengths.max())
    assert torch.equal(whole.response_ids[4:, :n].masked_fill(~whole.response_mask[4:, :n], 0),
                       last.response_ids.masked_fill(~last.response_mask, 0))  # fmt: skip


def test_a_branched_episode_shares_its_past_and_goes_on_alone(tiny_s: Policy) -> None:
    engine = EpisodeEngine(TransformersEngine(tiny_s), Echo(), PROBLEMS)
    path = Path(0, 0, 0, 0, list(PROBLEMS[0].prompt_ids))
    generator = torch.Generator().manual_seed(0)
    engine.turns.open(path)
    (piece,) = engine.extend([path.start(8)], Sampling(), generator, stops=engine.turns.stops)
    path.add(piece)
    engine.turns.respond(path)
    twin = path.branch(1)
    play(engine, [path, twin], Sampling(max_tokens=60), generator)
    assert twin.state[0] == path.state[0]
    assert len(twin.state) == len(path.state) == 3


def test_evaluation_plays_an_environment(tiny_s: Policy) -> None:
    result = evaluate(tiny_s, Echo(), PROBLEMS, samples=2, sampling=Sampling(max_tokens=60))
    assert result.pass_at(1) == 1.0
    assert not bool(result.rollout.action_mask[result.rollout.response_mask].all())
