"""Sampling with a transformers model: finished rows leave the batch, and every token's log-prob is recorded.

What pays on the tiny lab (benchmarks/step.py measures it): evicting finished rows. Prefilling each prompt once and
repeating its cache pays for long prompts and costs nothing for short ones. Static caches, bfloat16 and torch.compile
did not pay at this size and are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.rollout import Rollout, pad
from ..policy.load import Policy
from .streams import PromptNoise, Streams, at_quantile, prompt_seeds

EVICT_SHARE = 0.1

Chunk = list[tuple[Sequence[int], int]]
"""Prompts, each with the number of responses to sample."""


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

    def at(self, temperature: float) -> Sampling:
        """The same settings at another temperature."""
        return replace(self, temperature=temperature)


class _Tape:
    """What is recorded while sampling: one row per response, one column per step."""

    def __init__(self, rows: int, columns: int, pad_id: int, device: torch.device) -> None:
        self.ids = torch.full((rows, columns), pad_id, dtype=torch.long, device=device)
        self.logprob = torch.zeros(rows, columns, device=device)
        self.entropy = torch.zeros(rows, columns, device=device)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)

    def write(self, rows: Tensor, step: int, tokens: Tensor, logprob: Tensor, entropy: Tensor) -> None:
        self.ids[rows, step] = tokens
        self.logprob[rows, step] = logprob
        self.entropy[rows, step] = entropy
        self.length[rows] = step + 1


class TransformersEngine:
    """Samples groups of responses from any causal language model of transformers.

    It shares the trainer's module, so that `sync` has nothing to do; or, where the trainer's is sharded, it owns a
    whole copy (`replica`), which `sync` brings up to date.
    """

    def __init__(self, policy: Policy, *, replica: bool = False) -> None:
        self.policy, self.replica = policy, replica
        self._eos = torch.tensor(policy.eos_ids, device=policy.device)

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
        temperature. `report(rows)` is called as responses are completed.
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
            tapes.append(self._sample_chunk(chunk, sampling, source))
            done += rows
            report(rows)
        problems = list(problem_ids) if problem_ids is not None else list(range(len(prompts)))
        return self._as_rollout(tapes, prompts, problems, group_size, sampling, version)

    def _sample_chunk(self, chunk: Chunk, sampling: Sampling, source: torch.Generator | Tensor) -> _Tape:
        """`source`: the stream of all rows, or every row's own numbers [rows, T]."""
        device = self.policy.device
        counts = torch.tensor([n for _, n in chunk], device=device)
        logits, cache, mask = self._prefill([p for p, _ in chunk], counts)
        tape = _Tape(len(logits), sampling.max_tokens, self.policy.pad_id, device)
        alive = torch.arange(len(logits), device=device)  # place on the tape of each row still in the cache
        running = torch.ones_like(alive, dtype=torch.bool)
        for step in range(sampling.max_tokens):
            now = source if isinstance(source, torch.Generator) else source[alive, step]
            tokens, logprob, entropy = draw(logits, sampling.temperature, now)
            tape.write(alive[running], step, tokens[running], logprob[running], entropy[running])
            ends = running & torch.isin(tokens, self._eos)
            tape.finished[alive[ends]] = True
            running = running & ~ends
            left = int(running.sum())
            if not left or step + 1 == sampling.max_tokens:
                break
            if len(running) - left >= EVICT_SHARE * len(running):
                keep = running.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, tokens, mask, running = alive[keep], tokens[keep], mask[keep], running[keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = self._forward(tokens[:, None], mask, cache)
        return tape

    def _prefill(self, prompts: list[Sequence[int]], counts: Tensor) -> tuple[Tensor, Any, Tensor]:
        from transformers import DynamicCache

        device = self.policy.device
        ids = pad(prompts, self.policy.pad_id, torch.long, left=True).to(device)
        mask = pad([[1] * len(p) for p in prompts], 0, torch.long, left=True).to(device)
        cache = DynamicCache(config=self.policy.model.config)
        logits = self._forward(ids, mask, cache)
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
        logprob = torch.cat([t.logprob for t in tapes])[:, :longest]
        return Rollout(
            prompt_id=torch.tensor(problem_ids, device=device)[group],
            group_id=group.to(device),
            finished=torch.cat([t.finished for t in tapes]),
            policy_version=torch.full((len(group),), version, device=device),
            prompt_ids=pad(repeated, self.policy.pad_id, torch.long, left=True).to(device),
            prompt_mask=pad([[1] * len(p) for p in repeated], 0, torch.bool, left=True).to(device),
            response_ids=torch.cat([t.ids for t in tapes])[:, :longest],
            response_mask=response_mask,
            action_mask=response_mask.clone(),
            behaviour_logprob=logprob,
            behaviour_temperature=torch.full_like(logprob, sampling.temperature),
            old_logprob=logprob.clone(),
            statistics={"token_entropy": torch.cat([t.entropy for t in tapes])[:, :longest]},
        )


def draw(logits_BV: Tensor, temperature: float, source: torch.Generator | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row; returns token, its log-probability and the entropy, at the given temperature.

    From a generator, the draw divides probabilities by independent exponentials and takes the largest: an exact
    sample, and faster than torch.multinomial on a large vocabulary. From uniform numbers [B], it inverts the
    cumulative distribution.
    Raises FloatingPointError where the policy's logits are not finite.
    """
    if bool(logits_BV.isnan().any()):
        raise FloatingPointError("the policy's logits are nan: its weights are broken")
    if temperature == 0:
        zeros = torch.zeros(len(logits_BV), device=logits_BV.device)
        return logits_BV.argmax(-1), zeros, zeros
    log_p = torch.log_softmax(logits_BV / temperature, -1)
    p = log_p.exp()
    if isinstance(source, torch.Generator):
        race = torch.empty_like(p).exponential_(generator=source).clamp_min(torch.finfo(p.dtype).tiny)
        tokens = (p / race).argmax(-1)
    else:
        tokens = at_quantile(p, source)
    entropy = -(p * log_p.clamp_min(torch.finfo(p.dtype).min)).sum(-1)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(-1), entropy


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
