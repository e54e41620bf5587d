"""Sampling with a transformers model: finished rows leave the batch, and every token's log-prob is recorded.

What pays on the tiny lab (benchmarks/step.py measures it): evicting finished rows. Prefilling each prompt once and
repeating its cache pays for long prompts and costs nothing for short ones. Static caches, bfloat16 and torch.compile
did not pay at this size and are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.paths import Path, Piece, Start
from ..core.rollout import Rollout, pad
from ..core.temperature import TemperatureRule
from ..policy.load import Policy
from .memory import MOST_BYTES, Memory
from .scoring import fill_entropy
from .stops import Stops
from .streams import PromptNoise, Streams, at_quantile, keyed_seeds, prompt_seeds

EVICT_SHARE = 0.1
BROKEN = "the policy's logits are nan: its weights are broken"

Chunk = list[tuple[Sequence[int], int]]
"""Prompts, each with the number of responses to sample."""
Source = torch.Generator | Tensor
"""The stream of all rows, or every row's own numbers [rows, T]."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 means the most likely token: a point mass, log-prob 0 and entropy 0.

    There is no top-p or top-k: under a truncated sampler the recorded log-probs would not be those of the policy.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    rows: int = 256
    """Responses in flight at once; more costs memory, fewer costs time."""
    streams: Streams = "step"
    """One random stream for the whole call, or one per prompt (`rollout.streams`)."""
    first: int = 0
    """Place of the first prompt among all prompts of the step; picks the streams of prompts."""
    temper: TemperatureRule | None = None
    """Temperature of every token relative to `temperature`, from its entropy there; without effect at temperature 0."""

    def at(self, temperature: float) -> Sampling:
        """The same settings at another temperature."""
        return replace(self, temperature=temperature)


class Drawn(NamedTuple):
    """One token per row [B]. `old` and `entropy` are of the sampler's temperature, `logprob` of the token's own."""

    tokens: Tensor
    logprob: Tensor
    entropy: Tensor
    old: Tensor
    temperature: Tensor


@dataclass(frozen=True)
class _Limits:
    """Where each row of a chunk stops: tokens [rows], and stop texts; and each row's temperature, or that of all."""

    tokens: Tensor
    temperature: float | Tensor
    stops: Stops | None = None

    def temperature_of(self, rows: Tensor) -> float | Tensor:
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature


class _Tape:
    """What is recorded while sampling: one row per response, one column per step."""

    def __init__(self, rows: int, columns: int, pad_id: int, temperature: float | Tensor, device: torch.device) -> None:
        self.ids = torch.full((rows, columns), pad_id, dtype=torch.long, device=device)
        self.logprob, self.entropy, self.old = (torch.zeros(rows, columns, device=device) for _ in range(3))
        base = torch.as_tensor(temperature, dtype=torch.float32, device=device)
        self.temperature = base.reshape(-1, 1).expand(rows, columns).clone()
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished, self.stopped = (torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(2))

    def write(self, rows: Tensor, step: int, drawn: Drawn, running: Tensor) -> None:
        """Record the rows of `drawn` that are still running at their places `rows`."""
        self.ids[rows, step] = drawn.tokens[running]
        self.logprob[rows, step] = drawn.logprob[running]
        self.entropy[rows, step] = drawn.entropy[running]
        self.old[rows, step] = drawn.old[running]
        self.temperature[rows, step] = drawn.temperature[running]
        self.length[rows] = step + 1

    def pieces(self) -> list[Piece]:
        """Every row as plain lists."""
        names = ("ids", "logprob", "temperature", "entropy", "old")
        columns = {name: getattr(self, name).tolist() for name in names}
        ends = zip(self.length.tolist(), self.finished.tolist(), self.stopped.tolist(), strict=True)
        return [
            Piece(**{name: column[i][:n] for name, column in columns.items()}, finished=done, stopped=cut)
            for i, (n, done, cut) in enumerate(ends)
        ]


class TransformersEngine:
    """Samples groups of responses from any causal language model of transformers.

    It shares the trainer's module, so that `sync` has nothing to do; or, where the trainer's is sharded, it owns a
    whole copy (`replica`), which `sync` brings up to date.
    """

    turns = None
    """No environment: a response is one turn. See `rollout.episodes`."""

    def __init__(self, policy: Policy, *, replica: bool = False) -> None:
        self.policy, self.replica = policy, replica
        self._eos = torch.tensor(policy.eos_ids, device=policy.device)
        self._stops: dict[tuple[str, ...], Stops] = {}
        self.memory: Memory | None = None

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy whole weights by name into the replica; nothing where the trainer's module is shared. Tied weights come
        once. Raises KeyError for a weight that the model lacks."""
        if not self.replica:
            return
        own = dict(self.policy.model.named_parameters(remove_duplicate=False))
        for name, value in weights:
            own[name].copy_(value)

    def sleep(self) -> None:
        """Give up memory during the update: a shared module has none of its own."""

    def wake(self) -> None:
        """Undo `sleep`."""

    def close(self) -> None:
        """End the engine; nothing to end here."""

    @contextmanager
    def remembering(self, most_bytes: int = MOST_BYTES) -> Iterator[None]:
        """Within the block contexts that were read or sampled are not read again. The weights must not change in it."""
        self.memory = Memory(most_bytes)
        try:
            yield
        finally:
            self.memory = None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
        report: Callable[[int], None] = lambda rows: None,
    ) -> Rollout:
        """`group_size` responses to each prompt as one rollout; rows of a prompt are adjacent and share a group id.

        `old_logprob` and the statistic `token_entropy` are those recorded while sampling, exact at the sampling
        temperature. Under `sampling.temper` they stay those of `sampling.temperature`, the policy's; only
        `behaviour_logprob` is of the token's own, which `behaviour_temperature` names. `report(rows)` is called as
        responses are completed.
        Raises ValueError for an empty prompt.
        """
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: a causal model needs at least one token to start from")
        noise = None
        if sampling.streams == "prompt":
            seeds = prompt_seeds(generator, sampling.first, len(prompts))
            noise = PromptNoise(seeds, group_size, sampling.max_tokens)
        tapes, done = [], 0
        for chunk in _chunks(prompts, group_size, sampling.rows):
            rows = sum(n for _, n in chunk)
            source = generator if noise is None else noise.rows(done, done + rows).to(self.policy.device)
            tokens = torch.full((rows,), sampling.max_tokens, device=self.policy.device)
            tapes.append(self._sample_chunk(chunk, _Limits(tokens, sampling.temperature), sampling.temper, source))
            done += rows
            report(rows)
        problems = list(problem_ids) if problem_ids is not None else list(range(len(prompts)))
        return self._as_rollout(tapes, prompts, problems, group_size, sampling, version)

    @torch.no_grad()
    def extend(
        self,
        starts: Sequence[Start],
        sampling: Sampling,
        generator: torch.Generator,
        *,
        stops: Sequence[str] = (),
        report: Callable[[int], None] = lambda rows: None,
    ) -> list[Piece]:
        """Continue each start by one piece, which ends with the end token, a text of `stops` or the start's limit.

        Contexts of different length share a batch; equal ones that stand side by side are read once. With streams per
        prompt the numbers of a start are those of its `key`, whatever else is in flight.
        Raises ValueError for an empty context, or a start without room.
        """
        for i, start in enumerate(starts):
            if not len(start.ids) or start.max_tokens < 1:
                raise ValueError(f"start {i} has {len(start.ids)} tokens of context and room for {start.max_tokens}")
        seeds = None
        if sampling.streams == "prompt":
            seeds = keyed_seeds(generator, [i if s.key is None else s.key for i, s in enumerate(starts)])
        order = sorted(range(len(starts)), key=lambda i: len(starts[i].ids))  # little padding in a batch
        pieces: list[Piece | None] = [None] * len(starts)
        for first in range(0, len(order), sampling.rows):
            rows = order[first : first + sampling.rows]
            own = None if seeds is None else [seeds[i] for i in rows]
            found = self._extend([starts[i] for i in rows], sampling, generator, own, stops)
            for i, piece in zip(rows, found, strict=True):
                pieces[i] = piece
            report(len(rows))
        return [piece for piece in pieces if piece is not None]

    def with_entropy(self, paths: Sequence[Path], rows: int = 64) -> None:
        """Fill in the entropies of paths that lack them; this engine records them, so none of its own does."""
        fill_entropy(self.policy, paths, rows)

    def _extend(
        self,
        starts: Sequence[Start],
        sampling: Sampling,
        generator: torch.Generator,
        seeds: Sequence[int] | None,
        stops: Sequence[str],
    ) -> list[Piece]:
        device = self.policy.device
        tokens = torch.tensor([s.max_tokens for s in starts], device=device)
        own = [sampling.temperature if s.temperature is None else s.temperature for s in starts]
        temperature = own[0] if len(set(own)) == 1 else torch.tensor(own, device=device)
        source: Source = generator
        if seeds is not None:
            source = PromptNoise(seeds, 1, int(tokens.max())).rows(0, len(seeds)).to(device)
        chunk: Chunk = []
        for start in starts:
            if chunk and list(chunk[-1][0]) == list(start.ids):
                chunk[-1] = chunk[-1][0], chunk[-1][1] + 1
            else:
                chunk.append((start.ids, 1))
        limits = _Limits(tokens, temperature, self._stops_of(stops))
        return self._sample_chunk(chunk, limits, sampling.temper, source).pieces()

    def _stops_of(self, texts: Sequence[str]) -> Stops | None:
        key = tuple(texts)
        if key and key not in self._stops:
            self._stops[key] = Stops(self.policy, key)
        return self._stops[key] if key else None

    def _sample_chunk(self, chunk: Chunk, limits: _Limits, rule: TemperatureRule | None, source: Source) -> _Tape:
        device = self.policy.device
        counts = torch.tensor([n for _, n in chunk], device=device)
        logits, cache, mask = self._prefill([p for p, _ in chunk], counts)
        begun = mask.shape[1]
        most = int(limits.tokens.max())
        tape = _Tape(len(logits), most, self.policy.pad_id, limits.temperature, device)
        alive = torch.arange(len(logits), device=device)  # place on the tape of each row still in the cache
        running = torch.ones_like(alive, dtype=torch.bool)
        for step in range(most):
            now = source if isinstance(source, torch.Generator) else source[alive, step]
            drawn = draw_tempered(logits, limits.temperature_of(alive), now, rule)
            tokens = drawn.tokens
            tape.write(alive[running], step, drawn, running)
            running = running & ~self._ends(tape, limits, alive, running, tokens, step)
            left = int(running.sum())
            if not left or step + 1 == most:
                self._keep(chunk, tape, cache, mask, alive, torch.ones_like(running), begun)
                break
            if len(running) - left >= EVICT_SHARE * len(running):
                keep = running.nonzero().squeeze(1)
                self._keep(chunk, tape, cache, mask, alive, ~running, begun)
                cache.batch_select_indices(keep)
                alive, tokens, mask, running = alive[keep], tokens[keep], mask[keep], running[keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = self._forward(tokens[:, None], mask, cache)
        return tape

    def _keep(
        self, chunk: Chunk, tape: _Tape, cache: Any, mask: Tensor, alive: Tensor, leaving: Tensor, begun: int
    ) -> None:
        """Remember rows that leave the cache: `begun` columns of contexts, and the tokens read since."""
        if self.memory is None or not bool(leaving.any()):
            return
        rows = leaving.nonzero().squeeze(1)
        contexts = [prompt for prompt, n in chunk for _ in range(n)]
        # the newest token has not been read; rows that ended before they left have columns of no meaning
        read = tape.length[alive[rows]].clamp_max(mask.shape[1] - begun)
        tokens = [
            [*contexts[i], *tape.ids[i, :n].tolist()] for i, n in zip(alive[rows].tolist(), read.tolist(), strict=True)
        ]
        columns = torch.arange(mask.shape[1], device=mask.device)
        self.memory.keep(tokens, cache, mask[rows].bool() & (columns < begun + read[:, None]), rows)

    def _ends(self, tape: _Tape, limits: _Limits, alive: Tensor, running: Tensor, tokens: Tensor, step: int) -> Tensor:
        """Which of the rows in the cache end with this token; the tape learns why."""
        ends = running & torch.isin(tokens, self._eos)
        tape.finished[alive[ends]] = True
        if limits.stops is not None:
            cut = limits.stops.met(tape.ids[alive, : step + 1], running & ~ends)
            tape.stopped[alive[cut]] = True
            ends = ends | cut
        return ends | (running & (limits.tokens[alive] <= step + 1))

    def _prefill(self, prompts: list[Sequence[int]], counts: Tensor) -> tuple[Tensor, Any, Tensor]:
        from transformers import DynamicCache

        device = self.policy.device
        places = [self.memory.find(p) for p in prompts] if self.memory is not None else []
        known = [place for place in places if place is not None]
        if self.memory is not None and len(known) == len(prompts):
            cache, before = self.memory.cache(known, self.policy.model.config)
            prompts = [p[place.length :] for p, place in zip(prompts, known, strict=True)]
        else:
            cache, before = DynamicCache(config=self.policy.model.config), None
        ids = pad(prompts, self.policy.pad_id, torch.long, left=True).to(device)
        mask = pad([[1] * len(p) for p in prompts], 0, torch.long, left=True).to(device)
        mask = mask if before is None else torch.cat([before, mask], 1)
        logits = self._forward(ids, mask, cache)
        if bool((counts == 1).all()):
            return logits, cache, mask
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(counts)
        cache.batch_select_indices(repeat)
        return logits[repeat], cache, mask[repeat]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        # without left padding the causal pattern alone is right, and attention can take its faster path
        attention = None if bool(mask.all()) else mask
        out = self.policy.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _as_rollout(
        self,
        tapes: list[_Tape],
        prompts: Sequence[Sequence[int]],
        problem_ids: Sequence[int],
        group_size: int,
        sampling: Sampling,
        version: int,
    ) -> Rollout:
        device = self.policy.device
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        repeated = [p for p in prompts for _ in range(group_size)]
        length = torch.cat([t.length for t in tapes])
        longest = int(length.max())
        response_mask = torch.arange(longest, device=device)[None] < length[:, None]

        def taken(name: str) -> Tensor:
            return torch.cat([getattr(t, name) for t in tapes])[:, :longest]

        return Rollout(
            prompt_id=torch.tensor(problem_ids, device=device)[group],
            group_id=group.to(device),
            finished=torch.cat([t.finished for t in tapes]),
            policy_version=torch.full((len(group),), version, device=device),
            prompt_ids=pad(repeated, self.policy.pad_id, torch.long, left=True).to(device),
            prompt_mask=pad([[1] * len(p) for p in repeated], 0, torch.bool, left=True).to(device),
            response_ids=taken("ids"),
            response_mask=response_mask,
            action_mask=response_mask.clone(),
            behaviour_logprob=taken("logprob"),
            behaviour_temperature=taken("temperature"),
            policy_temperature=None if sampling.temper is None else sampling.temperature,
            old_logprob=taken("old"),
            statistics={"token_entropy": taken("entropy")},
        )


def draw(logits_BV: Tensor, temperature: float | Tensor, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row; returns token, its log-probability and the entropy, at the given temperature, which may
    differ between rows ([B]).

    From a generator, the draw divides probabilities by independent exponentials and takes the largest: an exact
    sample, and faster than torch.multinomial on a large vocabulary. From uniform numbers [B], it inverts the
    cumulative distribution.
    Raises FloatingPointError where the policy's logits are not finite.
    """
    if bool(logits_BV.isnan().any()):
        raise FloatingPointError(BROKEN)
    if isinstance(temperature, Tensor):
        greedy = temperature.eq(0)
        log_p = torch.log_softmax(logits_BV / temperature.masked_fill(greedy, 1.0)[:, None], -1)
    elif temperature == 0:
        zeros = torch.zeros(len(logits_BV), device=logits_BV.device)
        return logits_BV.argmax(-1), zeros, zeros
    else:
        greedy = None
        log_p = torch.log_softmax(logits_BV / temperature, -1)
    p = log_p.exp()
    tokens = _pick(p, source)
    if greedy is None:
        return tokens, log_p.gather(-1, tokens[:, None]).squeeze(-1), entropy_of(p, log_p)
    tokens = torch.where(greedy, logits_BV.argmax(-1), tokens)
    logprob = log_p.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, logprob.masked_fill(greedy, 0.0), entropy_of(p, log_p).masked_fill(greedy, 0.0)


def draw_tempered(
    logits_BV: Tensor, temperature: float | Tensor, source: Source, rule: TemperatureRule | None
) -> Drawn:
    """`draw`, each row at its own temperature where a rule sets one from the row's entropy at `temperature`.

    Raises ValueError for a rule over temperatures of which some are 0 and some are not.
    """
    base = torch.as_tensor(temperature, dtype=torch.float32, device=logits_BV.device).expand(len(logits_BV))
    greedy = base.eq(0)
    if rule is None or bool(greedy.all()):
        tokens, logprob, entropy = draw(logits_BV, temperature, source)
        return Drawn(tokens, logprob, entropy, logprob, base)
    if bool(greedy.any()):
        raise ValueError("a temperature rule cannot act on rows of temperature 0 beside others")
    if bool(logits_BV.isnan().any()):
        raise FloatingPointError(BROKEN)
    log_p = torch.log_softmax(logits_BV / base[:, None], -1)
    entropy = entropy_of(log_p.exp(), log_p)
    factor = rule.factors(entropy)
    own = torch.log_softmax(log_p / factor[:, None], -1)
    tokens = _pick(own.exp(), source)
    logprob, old = (x.gather(-1, tokens[:, None]).squeeze(-1) for x in (own, log_p))
    return Drawn(tokens, logprob, entropy, old, base * factor)


def _pick(p_BV: Tensor, source: Source) -> Tensor:
    if not isinstance(source, torch.Generator):
        return at_quantile(p_BV, source)
    race = torch.empty_like(p_BV).exponential_(generator=source).clamp_min(torch.finfo(p_BV.dtype).tiny)
    return (p_BV / race).argmax(-1)


def entropy_of(p_BV: Tensor, log_p_BV: Tensor) -> Tensor:
    """Entropy [B] in nats; words of probability 0 count nothing."""
    return -(p_BV * log_p_BV.clamp_min(torch.finfo(log_p_BV.dtype).min)).sum(-1)


def _chunks(prompts: Sequence[Sequence[int]], group_size: int, rows: int) -> Iterator[Chunk]:
    """At most `rows` responses a chunk; large groups are split."""
    chunk: Chunk = []
    room = rows
    for prompt in prompts:
        left = group_size
        while left:
            n = min(left, room)
            chunk.append((prompt, n))
            left, room = left - n, room - n
            if not room:
                yield chunk
                chunk, room = [], rows
    if chunk:
        yield chunk
