"""Responses under way: sampled piece by piece, told what a tool says, cut and continued elsewhere.

A `Path` is one response as it grows. Engines continue paths (`Engine.extend` takes `Start`, gives `Piece`); trees copy
the first tokens of one path into another (`Path.branch`); environments append what the policy did not choose
(`Path.tell`). `to_rollout` turns finished paths into the record that everything else works on.

Tokens are counted once: `generated` is what an engine sampled for a path, without the tokens that it took over from its
parent and without those that it was told. Training cost is another matter, it counts every token of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .rollout import Rollout, pad

ROOT = -1
"""`parent_id` of a response that was sampled from its prompt."""


@dataclass(frozen=True)
class Start:
    """Where an engine begins to sample: a context of token ids, and the most tokens that may follow.

    `temperature` of None is that of the call. `key` names the place where random numbers are independent of what else
    is in flight (`Sampling.streams`), None for the place in the call.
    """

    ids: Sequence[int]
    max_tokens: int
    temperature: float | None = None
    key: int | None = None


@dataclass(frozen=True)
class Piece:
    """What an engine sampled from one `Start`, token by token; log-probs and entropies in nats.

    `logprob` is of the sampling distribution at `temperature`, `old` of the policy's own temperature. `entropy` and
    `old` are None where the engine records none. `finished`: the end token came. `stopped`: a stop text came; its
    tokens are part of `ids`. Neither: the limit on tokens cut it.
    """

    ids: Sequence[int]
    logprob: Sequence[float]
    temperature: Sequence[float]
    entropy: Sequence[float] | None = None
    old: Sequence[float] | None = None
    finished: bool = False
    stopped: bool = False


@dataclass
class Path:
    """One response under way. Lists have one entry per response token.

    `number` tells it from the others of its `group`; `parent` is the number of the path that its first `prefix_length`
    tokens were copied from. `place` is the prompt's place in the step, the same however prompts are divided over
    processes. `state` belongs to an environment and must be immutable, so that branches can share it.
    """

    problem: int
    group: int
    place: int
    number: int
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    action: list[bool] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    entropy: list[float] | None = field(default_factory=list)
    """None as soon as one piece came without entropies."""
    old: list[float] | None = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    finished: bool = False
    parent: int = ROOT
    branch_position: int = -1
    """Token of the parent at which a method branched; beyond `prefix_length` where a limit cut the prefix short."""
    prefix_length: int = 0
    generated: int = 0
    """Tokens that an engine sampled for this path, without those copied from the parent."""
    turns: int = 0
    """Turns begun: answers of the policy, each followed by what the environment says."""
    open: bool = True
    """False where nothing may follow: the response ended, or the environment or a limit ended it."""
    state: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    """What a sampling method remembers of the path; copied to branches."""

    def __len__(self) -> int:
        return len(self.ids)

    def start(self, max_tokens: int, temperature: float | None = None) -> Start:
        """Where the next piece begins; its random numbers are those of (place, number, tokens so far)."""
        key = (self.place * 1_000_003 + self.number) * 1_000_003 + len(self.ids)
        return Start([*self.prompt, *self.ids], max_tokens, temperature, key)

    def add(self, piece: Piece) -> None:
        """Append what was sampled, as one segment; the end token finishes and closes the path."""
        n = len(piece.ids)
        self._append(piece.ids, True)
        self.logprob += piece.logprob
        self.temperature += piece.temperature
        self.entropy = None if self.entropy is None or piece.entropy is None else [*self.entropy, *piece.entropy]
        self.old = None if self.old is None or piece.old is None else [*self.old, *piece.old]
        self.generated += n
        if piece.finished:
            self.finished, self.open = True, False

    def tell(self, ids: Sequence[int]) -> None:
        """Append tokens that the policy did not choose, as a segment of the same turn, and begin the next turn."""
        n = len(ids)
        self._append(ids, False)
        self.logprob += [0.0] * n
        self.temperature += [self.temperature[-1] if self.temperature else 1.0] * n
        if self.entropy is not None:
            self.entropy += [0.0] * n
        if self.old is not None:
            self.old += [0.0] * n
        self.turns += 1

    def _append(self, ids: Sequence[int], action: bool) -> None:
        if not len(ids):
            return
        segment = self.segment[-1] + 1 if self.segment else 0
        self.ids += ids
        self.action += [action] * len(ids)
        self.turn += [self.turns] * len(ids)
        self.segment += [segment] * len(ids)

    def branch(self, number: int, length: int | None = None, *, learn: bool = True) -> Path:
        """A new open path that shares the first `length` tokens, by default all.

        `learn`: whether those that the policy chose stay actions of the branch; else they belong to its prompt, and
        nothing is learned from them. Turn and segment go on from the last shared token. An environment's `state` and
        the count of turns are the parent's present ones, so only a branch of all tokens may have either.
        Raises ValueError for a length outside the path, and for a cut inside an episode.
        """
        n = len(self) if length is None else length
        if not 0 <= n <= len(self):
            raise ValueError(f"cannot branch at token {n} of a path of {len(self)} tokens")
        if n < len(self) and (self.state is not None or self.turns):
            raise ValueError("an episode can only branch where it stands, because its environment has gone on")
        return replace(
            self,
            number=number,
            ids=self.ids[:n],
            action=[a and learn for a in self.action[:n]],
            logprob=self.logprob[:n],
            temperature=self.temperature[:n],
            entropy=None if self.entropy is None else self.entropy[:n],
            old=None if self.old is None else self.old[:n],
            turn=self.turn[:n],
            segment=self.segment[:n],
            finished=False,
            parent=self.number,
            branch_position=n,
            prefix_length=n,
            generated=0,
            open=True,
            notes=dict(self.notes),
        )


def to_rollout(
    paths: Sequence[Path],
    *,
    pad_id: int,
    version: int,
    device: torch.device | str = "cpu",
    policy_temperature: float | None = None,
) -> Rollout:
    """Paths as one rollout, in their order; groups by their `group`.

    `old_logprob` and `token_entropy` are there where every piece brought them. `policy_temperature`: see
    `Rollout.policy_temperature`; needed where paths were sampled at another temperature than the policy's.
    Raises ValueError for no path, or where two paths of one group have one number.
    """
    if not paths:
        raise ValueError("a rollout needs at least one path")
    if len({(p.group, p.number) for p in paths}) < len(paths):
        raise ValueError("two paths of one group have the same number")

    def per_path(name: str, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in paths], dtype=dtype, device=device)

    def per_token(name: str, dtype: torch.dtype, value: float = 0) -> torch.Tensor:
        return pad([getattr(p, name) for p in paths], value, dtype).to(device)

    recorded = {name: all(getattr(p, name) is not None for p in paths) for name in ("entropy", "old")}
    base = policy_temperature or next((p.temperature[0] for p in paths if len(p)), 1.0)
    return Rollout(
        prompt_id=per_path("problem"),
        group_id=per_path("group"),
        finished=per_path("finished", torch.bool),
        policy_version=torch.full((len(paths),), version, device=device),
        prompt_ids=pad([p.prompt for p in paths], pad_id, torch.long, left=True).to(device),
        prompt_mask=pad([[1] * len(p.prompt) for p in paths], 0, torch.bool, left=True).to(device),
        response_ids=per_token("ids", torch.long, pad_id),
        response_mask=pad([[1] * len(p) for p in paths], 0, torch.bool).to(device),
        action_mask=per_token("action", torch.bool),
        behaviour_logprob=per_token("logprob", torch.float32),
        behaviour_temperature=per_token("temperature", torch.float32, base),
        policy_temperature=policy_temperature,
        old_logprob=per_token("old", torch.float32) if recorded["old"] else None,
        turn_id=per_token("turn", torch.long),
        segment_id=per_token("segment", torch.long),
        path_id=per_path("number"),
        parent_id=per_path("parent"),
        branch_position=per_path("branch_position"),
        prefix_length=per_path("prefix_length"),
        statistics={"token_entropy": per_token("entropy", torch.float32)} if recorded["entropy"] else {},
    )
