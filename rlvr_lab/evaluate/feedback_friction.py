"""Feedback friction: how much of what feedback offers a solver leaves unused, over rounds of answer and feedback.

A problem leaves the pool the first time it is solved, with R rounds, N problems and c_{p,r} in {0, 1}:

    active_0 = N,  active_{r+1} = active_r - solved_r,   Acc_r = sum_{j <= r} solved_j / N

    friction = (T - Acc_{R-1}) / (T - Acc_0)

of a target accuracy T, that of a solver who uses all usable feedback (1 where feedback is right) [inferred]: the share
of the possible gain that was not realised. Acc_r cannot fall, and it rises by trying again alone: without the same
rounds without feedback nothing about feedback is known. Card: papers/feedback_friction.md (arXiv 2506.11930,
JHU-CLSP/Feedback-Friction).

Temperatures may rise with the round, min(1.5, 0.15 r), and of several draws one whose answer was not tried yet may be
taken (`pick`). The released code gives every request the seed 14, by which all draws of a deterministic server are one
and the same; here every draw has its own random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Any, Literal

import torch

from ..core.paths import Path, Piece, Start
from ..errors import UserError
from ..rollout.engine import Sampling
from ..rollout.episodes import action_text
from ..tasks.agents.base import Environment, advance

RAMP, HOTTEST = 0.15, 1.5
MISSING = "None"
"""How an answer that could not be read stands in the list of attempts."""
Feedback = Literal["own", "shuffled", "none"]


def ramp(round_: int, step: float = RAMP, cap: float = HOTTEST) -> float:
    """Temperature of a round, min(cap, step * round). The released cap is never reached in ten rounds."""
    return min(cap, step * round_)


def pick(answers: Sequence[str | None], tried: Sequence[str], rng: Random) -> int:
    """Place of an answer that was not tried yet, drawn uniformly; of any where all were. Raises ValueError for none."""
    if not answers:
        raise ValueError("no draws to pick from")
    novel = [place for place, answer in enumerate(answers) if as_attempt(answer) not in tried]
    return rng.choice(novel) if novel else rng.randint(0, len(answers) - 1)


def as_attempt(answer: str | None) -> str:
    """An answer as the list of attempts holds it."""
    return MISSING if answer is None else answer


@dataclass(frozen=True)
class Rounds:
    """What came of R rounds. `answers[p]` and `correct[p]` hold the rounds that problem p was asked in, at most R; what
    follows its first right answer is not read. Raises ValueError for no problems, no rounds, or rows that end early."""

    answers: Sequence[Sequence[str | None]]
    correct: Sequence[Sequence[bool]]
    rounds: int

    def __post_init__(self) -> None:
        if not self.correct or self.rounds < 1:
            raise ValueError("there must be a problem and a round")
        for problem, (answers, correct) in enumerate(zip(self.answers, self.correct, strict=True)):
            asked = self.rounds if self.solved_at[problem] is None else self.solved_at[problem] + 1  # type: ignore[operator]
            if min(len(answers), len(correct)) < asked:
                raise ValueError(f"problem {problem} was asked {len(correct)} times of {asked}")

    @cached_property
    def solved_at(self) -> list[int | None]:
        """Round of the first right answer of every problem."""
        return [next((r for r, right in enumerate(row[: self.rounds]) if right), None) for row in self.correct]

    @property
    def solved(self) -> list[int]:
        """Problems newly solved in every round [R]."""
        return [self.solved_at.count(r) for r in range(self.rounds)]

    @property
    def active(self) -> list[int]:
        """Problems asked in every round [R]."""
        return [len(self.correct) - sum(self.solved[:r]) for r in range(self.rounds)]

    @property
    def accuracy(self) -> list[float]:
        """Cumulative accuracy after every round [R]."""
        return [sum(self.solved[: r + 1]) / len(self.correct) for r in range(self.rounds)]

    @property
    def unsolved(self) -> list[int]:
        """Problems that stayed unsolved."""
        return [problem for problem, round_ in enumerate(self.solved_at) if round_ is None]

    def attempts(self, problem: int) -> list[str]:
        """Wrong answers to a problem, each once; a missing one counts every time, as `MISSING`."""
        wrong = self.answers[problem][: self.solved_at[problem]][: self.rounds]
        found: list[str] = []
        for answer in wrong:
            if answer is None or answer not in found:
                found.append(as_attempt(answer))
        return found

    @property
    def distinct_wrong(self) -> float | None:
        """Mean number of different wrong answers to the unsolved problems; None where all were solved."""
        counts = [len(set(self.attempts(problem))) for problem in self.unsolved]
        return sum(counts) / len(counts) if counts else None

    @property
    def repeat_rate(self) -> float | None:
        """Share of retries of unsolved problems that give the answer before again, a missing one included; None where
        nothing was retried in vain."""
        rows = [self.answers[problem][: self.rounds] for problem in self.unsolved]
        again = [a == b for row in rows for a, b in pairwise(row)]
        return sum(again) / len(again) if again else None

    @property
    def gain(self) -> float:
        """Acc_{R-1} - Acc_0."""
        return self.accuracy[-1] - self.accuracy[0]

    def friction(self, target: float = 1.0) -> float | None:
        """Share of the possible gain that was not realised; None where the target is not above the first accuracy."""
        first, last = self.accuracy[0], self.accuracy[-1]
        return (target - last) / (target - first) if target > first else None


@dataclass(frozen=True)
class Asking:
    """How problems are asked again.

    `feedback`: what a solver is told of its attempt. "own" is the environment's answer to it; "shuffled" deals the
    answers of a round out at random, one's own among them, which separates reading feedback from trying again; with
    "none" every attempt begins anew from the question. `ramp`: temperatures by `ramp(round)` in place of the one given;
    the first round is then greedy. `draws`: answers drawn each round, of which `pick` takes one.
    """

    rounds: int = 10
    feedback: Feedback = "own"
    temperature: float = 1.0
    ramp: bool = False
    draws: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.draws < 1:
            raise UserError(f"rounds and draws must be at least 1; they are {self.rounds} and {self.draws}")
        if self.feedback not in ("own", "shuffled", "none"):
            raise UserError(f"feedback '{self.feedback}' is unknown; choose own, shuffled or none")
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative; it is {self.temperature}")

    def heat(self, round_: int) -> float:
        """Temperature of a round; 0 is greedy."""
        return ramp(round_) if self.ramp else self.temperature


def ask_again(
    engine: Any,
    environment: Environment[Any],
    problems: Sequence[Any],
    asking: Asking,
    generator: torch.Generator,
    *,
    rows: int = 256,
    report: Callable[[int], None] = lambda round_: None,
) -> Rounds:
    """Rounds of answer and feedback with `engine` as the solver and the environment as the one who judges.

    A problem is answered in turns of the environment; the turn that ends it right solves it. Nothing of the solution
    reaches the solver but what the environment says. Raises UserError for no problems, for an environment that allows
    fewer turns than there are rounds, and where the dialogue outgrows the model's window.
    """
    if not problems:
        raise UserError("there are no problems to ask")
    if environment.max_turns < asking.rounds:
        raise UserError(f"the environment allows {environment.max_turns} turns and {asking.rounds} rounds were asked "
                        "for: raise data.settings.max_turns")  # fmt: skip
    policy = engine.policy
    solver = _Solver(engine, environment, problems, asking, generator, rows)
    paths = [Path(i, i, i, 0, environment.prompt_ids(p, policy.tokenizer)) for i, p in enumerate(problems)]
    for path in paths:
        path.state = environment.reset(problems[path.problem])
    rng = Random(int(torch.randint(2**31, (1,), generator=generator)))
    for round_ in range(asking.rounds):
        active = [path for path in paths if path.open]
        if active:
            solver.round(active, round_, rng)
        report(round_)
    notes = [path.notes for path in paths]
    return Rounds([n["answers"] for n in notes], [n["correct"] for n in notes], asking.rounds)


@dataclass(frozen=True)
class _Solver:
    """One round at a time, of all problems that are still open."""

    engine: Any
    environment: Environment[Any]
    problems: Sequence[Any]
    asking: Asking
    generator: torch.Generator
    rows: int

    def round(self, paths: list[Path], round_: int, rng: Random) -> None:
        """Answer, judge, tell; a path that is solved closes."""
        told: list[list[int]] = []
        for path, (piece, text) in zip(paths, self._answers(paths, round_, rng), strict=True):
            problem = self.problems[path.problem]
            turn = advance(self.environment, problem, path.state, text, path.turns)
            verdict = self.environment.verdict(problem, [text], True)
            path.notes.setdefault("answers", []).append(verdict.answer)
            path.notes.setdefault("correct", []).append(verdict.correct)
            told.append(self.engine.policy.encode(turn.observation))
            path.open = not verdict.correct
            if path.open and self.asking.feedback != "none":
                path.state = turn.state
                path.add(piece)
                path.open = True  # an end token ends the attempt, not the dialogue
        self._tell([path for path in paths if path.open], [t for t, p in zip(told, paths, strict=True) if p.open], rng)

    def _tell(self, paths: list[Path], told: list[list[int]], rng: Random) -> None:
        if self.asking.feedback == "none":
            return
        if self.asking.feedback == "shuffled":
            rng.shuffle(told)
        for path, ids in zip(paths, told, strict=True):
            path.tell(ids)

    def _answers(self, paths: list[Path], round_: int, rng: Random) -> list[tuple[Piece, str]]:
        """The piece that counts and its text, for every path."""
        draws = self.asking.draws
        starts = [self._start(path, round_, draw) for path in paths for draw in range(draws)]
        sampling = Sampling(self.asking.heat(round_), self.environment.turn_tokens, self.rows, "prompt")
        pieces = self.engine.extend(starts, sampling, self.generator, stops=tuple(self.environment.stops))
        found = []
        for number, path in enumerate(paths):
            drawn = pieces[number * draws : (number + 1) * draws]
            texts = [action_text(self.engine.policy, piece.ids) for piece in drawn]
            answers = [self.environment.verdict(self.problems[path.problem], [text], True).answer for text in texts]
            tried = [as_attempt(answer) for answer in path.notes.get("answers", ())]
            place = pick(answers, tried, rng) if draws > 1 else 0
            found.append((drawn[place], texts[place]))
        return found

    def _start(self, path: Path, round_: int, draw: int) -> Start:
        room = self.environment.turn_tokens
        window = getattr(self.engine.policy.model.config, "max_position_embeddings", None)
        if window is not None and len(path.prompt) + len(path) + room > window:
            raise UserError(f"the dialogue of round {round_} does not fit the model's window of {window} tokens; "
                            "ask fewer rounds")  # fmt: skip
        start = path.start(room, self.asking.heat(round_))
        return replace(start, key=(start.key or 0) * 1009 + round_ * 31 + draw)
