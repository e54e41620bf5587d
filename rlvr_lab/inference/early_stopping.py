r"""Early stopping: end the thinking as soon as the answer's entropy says that more of it will not help.

    from rlvr_lab.inference.early_stopping import EarlyStopping
    method = EarlyStopping(model, tokenizer, threshold=0.1)
    print(method.run(problems, verify=verify, generator=generator))

After step k the model's own entropy of the answer is read behind a cue and forgotten again,

    H_k = H(p(. | X, R_1..R_k, cue))                       signal="first_token", or
    H_k = mean_j H(p(. | X, R_1..R_k, cue, y_<j))          signal="answer", y its greedy answer there

and thinking stops at the first k >= `min_steps` where H_k < `threshold`, or where none of the last `patience` steps
brought H below what it had been before them (by more than `min_drop`). Then the cue stands in the text and the answer
is sampled as usual. H is in nats. It measures confidence: a model that is surely wrong is stopped as well.

That conditional entropy could stop a chain is said in arXiv 2508.20395, which only measures (`evaluate.
reasoning_utility`); rule, signal and settings are ours [inferred].

Two controls come with it. `random_positions` gives the stopping places to other problems at random: the same
distribution of places, without the signal. `fixed_budget` stops everybody after equally many steps, such that as many
tokens are thought in all. A rule that does not beat both has learned the length of a chain, not its state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.entropy import softmax_entropy
from ..errors import UserError, nearest
from ..evaluate.reasoning_utility import CUE, greedy_answer
from ..policy.reader import Reader
from ..rollout.engine import draw
from ..rollout.streams import PromptNoise, keyed_seeds
from .lm import Response, Verify, as_policy, as_questions, prompt_ids, respond, verified
from .report import Report

Signal = Literal["first_token", "answer"]
Stop = Callable[[Sequence[float]], bool]
"""Whether to stop, given H_1..H_k so far."""
Place = int | None
"""After how many steps thinking was stopped; None where it ended by itself."""


@dataclass(frozen=True)
class Rule:
    """When to stop; see the module. Raises UserError without threshold and patience, or for one out of range."""

    threshold: float | None = None
    patience: int | None = None
    min_drop: float = 0.0
    min_steps: int = 1

    def __post_init__(self) -> None:
        if self.threshold is None and self.patience is None:
            raise UserError("early stopping needs threshold or patience: with neither it never stops")
        if self.threshold is not None and not self.threshold >= 0:
            raise UserError(f"threshold is an entropy in nats and must be at least 0, not {self.threshold}")
        if (self.patience is not None and self.patience < 1) or self.min_steps < 1 or not self.min_drop >= 0:
            raise UserError(
                f"patience {self.patience} and min_steps {self.min_steps} must be at least 1, "
                f"min_drop {self.min_drop} at least 0"
            )

    def __call__(self, entropy: Sequence[float]) -> bool:
        if len(entropy) < self.min_steps:
            return False
        if self.threshold is not None and entropy[-1] < self.threshold:
            return True
        n = self.patience
        return n is not None and len(entropy) > n and min(entropy[-n:]) >= min(entropy[:-n]) - self.min_drop


def stop_place(entropy: Sequence[float], rule: Stop) -> Place:
    """The first k at which the rule stops a chain whose entropies after steps 1..K are known; None if it never does."""
    return next((k for k in range(1, len(entropy) + 1) if rule(entropy[:k])), None)


def random_positions(places: Sequence[Place], rng: np.random.Generator) -> list[Place]:
    """The same places, dealt to the problems at random. A chain with fewer steps than its place is not stopped."""
    return [places[i] for i in rng.permutation(len(places))]


def fixed_budget(lengths: Sequence[Sequence[int]], thought: int, rng: np.random.Generator) -> list[Place]:
    """Places with one number of steps b for all, and b + 1 for as many problems, drawn at random, as it takes to think
    `thought` tokens in all, up to one step.

    `lengths[i]`: tokens thought up to the end of steps 1, 2, ... of problem i, and last those of its whole thinking.
    """
    steps = max(map(len, lengths))
    total = [sum(row[min(b, len(row)) - 1] for row in lengths) for b in range(1, steps + 1)]
    b = max((b for b in range(1, steps + 1) if total[b - 1] <= thought), default=1)
    places, now = [b] * len(lengths), total[b - 1]
    for i in rng.permutation(len(lengths)).tolist():
        more = lengths[i][min(b + 1, len(lengths[i])) - 1] - lengths[i][min(b, len(lengths[i])) - 1]
        if now + more <= thought:
            places[i], now = b + 1, now + more
    return list(places)


@dataclass(frozen=True)
class Chain:
    """One problem with every place at which it could have been stopped; see `EarlyStopping.chart`.

    `entropy[k - 1]` is H_k; `tokens`, `thought` and `responses` have one entry per step, and the last entry is the
    response that was not stopped. `thought` counts tokens before the cue, or of the thinking.
    """

    entropy: tuple[float, ...]
    responses: tuple[Response, ...]
    thought: tuple[int, ...]
    extra: tuple[int, ...]
    """Tokens read and written to know H_1..H_k."""
    correct: tuple[float, ...] | None = None

    def at(self, place: Place) -> int:
        """Index of the response at a place; the last one where the chain is shorter, or was not stopped."""
        return len(self.entropy) if place is None else min(place - 1, len(self.entropy))

    def tokens(self, place: Place) -> int:
        """Tokens of that response."""
        return len(self.responses[self.at(place)])


class EarlyStopping:
    r"""Early stopping for any causal language model of transformers with its tokenizer; see the module.

    `step_end`: pattern that the text of a step matches at its end once it is complete, by default a line break.
    `close`: text that ends the thinking, such as "</think>"; behind it nothing is read any more. None: every part of
    the response is a step. `cue`: what stands before an answer that is asked for; for a model that closes its thinking
    it begins with `close`. `max_answer`: tokens of an answer that is only read, `max_tokens`: of a response.

    Problems run one after another, each with its own key-value cache and its own random numbers, those that plain
    sampling has at the same place: until it is stopped, a response is the one that would have been sampled anyway.
    Raises UserError for settings out of range, an empty cue or a pattern that is none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        threshold: float | None = None,
        patience: int | None = None,
        min_drop: float = 0.0,
        min_steps: int = 1,
        signal: Signal = "first_token",
        cue: str = CUE,
        step_end: str = r"\n\s*$",
        close: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        max_answer: int = 16,
    ) -> None:
        self.rule = Rule(threshold, patience, min_drop, min_steps)
        self.policy = as_policy(model, tokenizer)
        if signal not in ("first_token", "answer"):
            raise UserError(f"signal '{signal}' is unknown; {nearest(str(signal), ('first_token', 'answer'))}")
        if temperature < 0 or max_tokens < 1 or max_answer < 1:
            raise UserError(
                f"temperature {temperature} must be at least 0, max_tokens {max_tokens} and max_answer {max_answer} "
                "at least 1"
            )
        self.cue = self.policy.encode(cue)
        if not self.cue:
            raise UserError("cue holds no token; the answer needs one to follow")
        try:
            self.step_end = re.compile(step_end)
        except re.error as error:
            raise UserError(f"step_end is no pattern: {error}") from None
        self.signal, self.close = signal, close
        self.temperature, self.max_tokens, self.max_answer = temperature, max_tokens, max_answer

    @torch.no_grad()
    def run(
        self,
        problems: Sequence[str | tuple[str, Any]],
        *,
        verify: Verify | None = None,
        generator: torch.Generator,
        baseline: Sequence[Response] | None = None,
        places: Sequence[Place] | None = None,
    ) -> Report:
        """One response to each problem, beside the same model without stopping, drawn with the same random numbers.

        `places` stops there instead, without reading anything: a control. The notes have the place of each problem
        (`stopped_after`, None where it was not stopped) and the entropies that were read (`answer_entropy`).
        """
        questions = as_questions(problems)
        texts = [q.text for q in questions]
        prompts = self._prompts(texts)
        if places is not None and len(places) != len(prompts):
            raise UserError(f"places has {len(places)} entries for {len(prompts)} problems")
        again = torch.Generator(device=generator.device)
        again.set_state(generator.get_state())
        done = [
            self._respond(_Writing(self, prompt, noise), None if places is None else (places[i],))
            for i, (prompt, noise) in enumerate(zip(prompts, self._noise(len(prompts), generator), strict=True))
        ]
        found = [response for response, *_ in done]
        if baseline is None:
            baseline = respond(
                self.policy, prompts, max_tokens=self.max_tokens, temperature=self.temperature, generator=again
            )
        return Report(
            "early_stopping", texts, [r.text for r in found], [len(r) for r in found], [len(r) for r in baseline],
            verified(found, questions, verify), verified(baseline, questions, verify),
            [extra for *_, extra in done],
            {"stopped_after": [place for _, place, *_ in done], "answer_entropy": [h for _, _, h, _ in done]},
        )  # fmt: skip

    @torch.no_grad()
    def chart(
        self,
        problems: Sequence[str | tuple[str, Any]],
        *,
        verify: Verify | None = None,
        generator: torch.Generator,
    ) -> list[Chain]:
        """What would come of every place to stop, for each problem: any rule and any control can be read off it.

        The responses are those that `run` gives with a generator in the same state.
        """
        questions = as_questions(problems)
        prompts = self._prompts([q.text for q in questions])
        noises = self._noise(len(prompts), generator)
        return [
            self._chain(_Writing(self, prompt, noise), verify, question)
            for prompt, noise, question in zip(prompts, noises, questions, strict=True)
        ]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        prompts = prompt_ids(self.policy, texts, self.max_tokens)
        longest, most = getattr(self.policy.model.config, "max_position_embeddings", None), max(map(len, prompts))
        read = len(self.cue) + (self.max_answer if self.signal == "answer" else 0)
        if longest is not None and most + self.max_tokens + read > longest:
            raise UserError(
                f"max_tokens {self.max_tokens} leaves no room to read an answer ({read} tokens) after a prompt of "
                f"{most} in the model's context of {longest}; lower it to at most {longest - most - read}"
            )
        return prompts

    def _noise(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Uniform numbers [max_tokens] of each problem: those of `lm.respond` with this generator."""
        seeds = keyed_seeds(generator, range(count))
        return [PromptNoise([seed], 1, self.max_tokens).rows(0, 1)[0].to(self.policy.device) for seed in seeds]

    def _respond(self, text: _Writing, forced: tuple[Place] | None) -> tuple[Response, Place, list[float], int]:
        entropy: list[float] = []
        while text.step():
            if forced is None:
                entropy.append(text.answer_entropy())
            stop = self.rule(entropy) if forced is None else forced[0] == text.steps
            if stop:
                place = text.steps
                return text.answered(), place, entropy, text.extra
        return text.response(), None, entropy, text.extra

    def _chain(self, text: _Writing, verify: Verify | None, question: Any) -> Chain:
        entropy, responses, thought, extra = [], [], [], []
        while text.step():
            entropy.append(text.answer_entropy())
            extra.append(text.extra)
            thought.append(len(text.written))
            responses.append(text.answered(keep=True))
        responses.append(text.response())
        thought.append(text.thought)
        extra.append(text.extra)
        correct = verified(responses, [question] * len(responses), verify)
        return Chain(
            tuple(entropy), tuple(responses), tuple(thought), tuple(extra), None if correct is None else tuple(correct)
        )


class _Writing:
    """One response under way."""

    def __init__(self, method: EarlyStopping, prompt: Sequence[int], noise: Tensor) -> None:
        self.method, self.policy, self.noise = method, method.policy, noise
        self.reader, self.prompt = Reader(method.policy.model, prompt), len(prompt)
        self.entropy: list[float] = []
        self.steps, self.extra, self._begin = 0, 0, 0
        self.closed: int | None = None
        """Tokens up to the end of the thinking; None while it goes on."""

    @property
    def written(self) -> list[int]:
        """Ids of the response so far."""
        return self.reader.ids[self.prompt :]

    @property
    def over(self) -> bool:
        """Whether the end token was written, or the limit is reached."""
        ids = self.written
        return len(ids) >= self.method.max_tokens or bool(ids and ids[-1] in self.policy.eos_ids)

    @property
    def thought(self) -> int:
        """Tokens of the thinking; all of a response that never closed it."""
        return len(self.written) if self.closed is None else self.closed

    def step(self) -> bool:
        """Write on to the end of a step. False where the response came to its own end first."""
        while not self.over:
            self._sample()
            if self.closed is None and not self.over and self._complete():
                self.steps += 1
                self._begin = len(self.written)
                return True
        return False

    def answer_entropy(self) -> float:
        """H of the answer if it were asked for now; the text stays as it is."""
        method = self.method
        if method.signal == "first_token":
            self.extra += len(method.cue)
            return float(softmax_entropy(self.reader.peek(method.cue))[0])
        logits, answer = greedy_answer(self.reader, method.cue, method.max_answer, self.policy.eos_ids)
        self.extra += len(method.cue) + len(answer)
        return float(softmax_entropy(logits).mean())

    def answered(self, keep: bool = False) -> Response:
        """The response if thinking stops now. `keep`: go on afterwards as if it had not."""
        length, known = len(self.reader), len(self.entropy)
        room = self.method.max_tokens - len(self.written)
        self.reader.append(self.method.cue[:room])
        self.entropy += [0.0] * len(self.method.cue[:room])  # given, not sampled
        while not self.over:
            self._sample()
        found = self.response()
        if keep:
            self.reader.rewind(length)
            del self.entropy[known:]
        return found

    def response(self) -> Response:
        """What was written, as a response."""
        ids = self.written
        finished = bool(ids) and ids[-1] in self.policy.eos_ids
        return Response(ids, self.policy.decode(ids[:-1] if finished else ids), list(self.entropy), finished)

    def _sample(self) -> None:
        uniform = self.noise[len(self.written)][None]
        token, _, entropy = draw(self.reader.logits().float(), self.method.temperature, uniform)
        self.reader.append([int(token)])
        self.entropy.append(float(entropy))

    def _complete(self) -> bool:
        """Whether a step ended with the newest token; notices the end of the thinking as well."""
        step = self.policy.decode(self.written[self._begin :])
        if self.method.close is not None and self.method.close in step:
            self.closed = len(self.written)
            return False
        return bool(step.strip()) and self.method.step_end.search(step) is not None
