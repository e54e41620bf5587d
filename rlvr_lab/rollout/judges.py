"""Labels for the thoughts of sampled responses: the statistics `thought_label` and `thought_step` of TP-GRPO.

A judge sees token ids, never text that was decoded and cut again, so that the spans of steps are exact.
`CountdownJudge` knows; `ModelJudge` asks a language model through an engine, once for each response, and keeps what it
said.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch

from ..core.rollout import Rollout, pad
from ..errors import UserError
from ..policy.load import Policy
from ..tasks.registry import encode_prompt
from ..tasks.thoughts import Labelled, cut_steps, judge_countdown, noisy, shuffled_runs, unjudged
from .engine import Sampling
from .factory import Engine

LABEL, STEP = "thought_label", "thought_step"
Draw = Callable[[int], Random]
"""Random numbers for the responses to a problem, by its index."""


class Judge(Protocol):
    """Cuts responses into steps and labels them."""

    def judge(
        self, responses: Sequence[Sequence[int]], correct: Sequence[bool], problems: Sequence[Any]
    ) -> list[Labelled]:
        """One entry per response; an empty response has no step."""

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, logged with the step's."""


class CountdownJudge:
    """Exact labels for Countdown traces; see `tasks.thoughts.judge_countdown`."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self._words = policy, dict[int, str]()

    def judge(
        self, responses: Sequence[Sequence[int]], correct: Sequence[bool], problems: Sequence[Any]
    ) -> list[Labelled]:
        """See `Judge`."""
        return [
            judge_countdown([self._word(i) for i in ids], right) for ids, right in zip(responses, correct, strict=True)
        ]

    def _word(self, token: int) -> str:
        if token not in self._words:
            self._words[token] = self.policy.decode([token]).strip()
        return self._words[token]

    def metrics(self) -> dict[str, float]:
        """Nothing: this judge does not fail."""
        return {}


def with_thoughts(
    rollout: Rollout,
    judge: Judge,
    problems: Sequence[Any],
    accuracy: float = 1.0,
    shuffled: bool = False,
    draw: Draw | None = None,
) -> Rollout:
    """Record label and step number of every response token.

    `accuracy` below 1 and `shuffled` are controls (`data.judge`), which need `draw`; their numbers are dealt in the
    order of the responses' tokens, so that the order of rows plays no part.
    """
    assert rollout.correct is not None
    rows = [ids[:n] for ids, n in zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)]
    correct, prompts = rollout.correct.tolist(), rollout.prompt_id.tolist()
    labelled = judge.judge(rows, correct, [problems[i] for i in prompts])
    if accuracy < 1 or shuffled:
        assert draw is not None
        groups: dict[int, list[int]] = {}
        for i, group in enumerate(rollout.group_id.tolist()):
            groups.setdefault(group, []).append(i)
        for places in groups.values():
            places = sorted(places, key=lambda i: rows[i])
            _spoil(labelled, places, correct, accuracy, shuffled, draw(prompts[places[0]]))
    tokens = [one.per_token() for one in labelled]
    width, device = rollout.response_ids.shape[1], rollout.response_ids.device
    filled = {
        LABEL: pad([labels for labels, _ in tokens], 0.0, torch.float32),
        STEP: pad([steps for _, steps in tokens], 0.0, torch.float32),
    }
    return rollout.with_statistics(
        **{
            name: torch.nn.functional.pad(v, (0, width - v.shape[1]))[:, :width].to(device)
            for name, v in filled.items()
        }
    )


def _spoil(
    labelled: list[Labelled], places: list[int], correct: list[bool], accuracy: float, shuffled: bool, draw: Random
) -> None:
    """Replace the labels of one group by a control's."""
    shares = {}
    for right in (False, True):
        steps = [x for i in places if correct[i] == right for x in labelled[i].labels[:-1]]
        shares[right] = sum(steps) / len(steps) if steps else 1.0
    for i in places:
        if shuffled:
            labelled[i] = shuffled_runs(labelled[i], shares[correct[i]], draw)
        if accuracy < 1:
            labelled[i] = noisy(labelled[i], accuracy, draw)


# -- a language model as the judge ------------------------------------------------------------------------------------

RIGHT = (
    "The final answer of the solution below is right. Some of its steps may still be wrong: a wrong step is one that "
    "the solution later notices and repairs. First find where the solution takes something back, then the steps that "
    "it takes back, and those that build on them. Reply with the numbers of these wrong steps as a JSON list, such as "
    "[2, 3], or []."
)
WRONG = (
    "The final answer of the solution below is wrong. Find the steps whose results the final answer uses. Reply with "
    "the numbers of these steps as a JSON list, such as [2, 3], or []."
)
_LIST = re.compile(r"\[\s*(?:\d{1,6}(?:\s*,\s*\d{1,6})*)?\s*\]")


class ModelJudge:
    """Asks a language model which steps are wrong (right responses) or used by the answer (wrong ones).

    `separators` and `close` are texts; they are looked for as the tokens of `policy`, whose responses are judged. A
    reply without a list, or that names a step which does not exist, leaves the response unjudged. Replies are kept by
    the text of the question, and in the JSONL file `cache` beyond this run.
    """

    def __init__(
        self,
        policy: Policy,
        judge: Policy,
        engine: Engine,
        *,
        separators: Sequence[str] = ("\n\n",),
        close: str = "</think>",
        max_tokens: int = 1024,
        cache: Path | None = None,
    ) -> None:
        self.policy, self.by, self.engine, self.max_tokens, self.cache = policy, judge, engine, max_tokens, cache
        self.texts = tuple(separators)
        self.separators, self.close = [policy.encode(text) for text in separators], policy.encode(close)
        self._known: dict[str, str] = _read_cache(cache)
        self._separating: dict[int, bool] = {}
        self._figures = {"judge_asked": 0.0, "judge_kept": 0.0, "judge_unread": 0.0}

    def judge(
        self, responses: Sequence[Sequence[int]], correct: Sequence[bool], problems: Sequence[Any]
    ) -> list[Labelled]:
        """See `Judge`. A response whose question leaves the judge no room is unjudged."""
        spans = [cut_steps(ids, self.separators, self.close, self._separates) for ids in responses]
        questions = [
            self.question(ids, cuts, right, problem) if len(cuts) > 1 else ""
            for ids, cuts, right, problem in zip(responses, spans, correct, problems, strict=True)
        ]
        self._ask(dict.fromkeys(q for q in questions if q))
        return [
            self._labelled(cuts, right, self._known.get(_key(question), ""), bool(question))
            for cuts, right, question in zip(spans, correct, questions, strict=True)
        ]

    def question(self, ids: Sequence[int], spans: Sequence[tuple[int, int]], correct: bool, problem: Any) -> str:
        """What the judge is asked about one response."""
        steps = [self.policy.decode(list(ids[a:b])).strip() for a, b in spans]
        numbered = "\n\n".join(f"Step {k}: {text}" for k, text in enumerate(steps[:-1], 1))
        task = getattr(problem, "question", str(problem))
        return f"{RIGHT if correct else WRONG}\n\nProblem: {task}\n\n{numbered}\n\nFinal answer: {steps[-1]}"

    def _separates(self, token: int) -> bool:
        if token not in self._separating:
            text = self.policy.decode([token])
            self._separating[token] = any(marker in text for marker in self.texts)
        return self._separating[token]

    def _ask(self, questions: dict[str, None]) -> None:
        """Sample the replies that are not known yet, greedily."""
        new = [q for q in questions if _key(q) not in self._known]
        self._figures["judge_kept"] += len(questions) - len(new)
        window = getattr(self.by.model.config, "max_position_embeddings", None) or 1 << 30
        prompts = [(q, encode_prompt(q, self.by.tokenizer)) for q in new]
        prompts = [(q, ids) for q, ids in prompts if len(ids) + self.max_tokens <= window]
        if not prompts:
            return
        sampling = Sampling(temperature=0.0, max_tokens=self.max_tokens)
        generator = torch.Generator(device=self.by.device).manual_seed(0)
        replies = self.engine.sample([ids for _, ids in prompts], 1, sampling, generator)
        kept = []
        for i, (q, _) in enumerate(prompts):
            text = self.by.decode(replies.response_ids[i, : int(replies.lengths[i])].tolist())
            self._known[_key(q)] = text
            kept.append({"key": _key(q), "reply": text})
        self._figures["judge_asked"] += len(prompts)
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in kept)

    def _labelled(self, spans: list[tuple[int, int]], correct: bool, reply: str, asked: bool) -> Labelled:
        named = read_reply(reply, len(spans) - 1)
        if named is None:
            self._figures["judge_unread"] += asked
            return unjudged(spans, correct)
        return Labelled(tuple(spans), (*(int(k + 1 not in named) for k in range(len(spans) - 1)), int(correct)))

    def metrics(self) -> dict[str, float]:
        """`judge_asked`, `judge_kept` (known already) and `judge_unread`: responses since the last call."""
        found = dict(self._figures)
        self._figures = dict.fromkeys(found, 0.0)
        return found


def read_reply(reply: str, steps: int) -> set[int] | None:
    """The step numbers of the last JSON list of a reply; None where there is none, or where a number is no step."""
    lists = _LIST.findall(reply[-20_000:])
    if not lists:
        return None
    numbers = set(json.loads(lists[-1]))
    return numbers if all(1 <= n <= steps for n in numbers) else None


def _key(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()


def _read_cache(path: Path | None) -> dict[str, str]:
    """Replies by key; a line cut by a kill is left out. Raises UserError for a file of something else."""
    if path is None or not path.exists():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                found[str(row["key"])] = str(row["reply"])
        except (ValueError, KeyError, TypeError) as error:
            if number == 1:
                raise UserError(f"data.judge.cache: {path} holds no replies of a judge; name another file") from error
    return found
