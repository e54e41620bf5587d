"""Trees of responses: where to fork, growing under a budget of tokens, and what a tree costs.

A tree grows from roots, whole responses to a prompt (`plant`). A fork keeps the first tokens of a path and samples a
new end (`grow`). Which positions qualify, and in which order they are visited, is what tree methods differ in
(`ranking`, `candidates`): by token entropy (arXiv 2508.11016, 2508.11356), or at random, which is their control.

Two costs (`token_counts`). Generation pays a shared prefix once, because an engine continues it. Training pays it in
every row that holds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .paths import Path
from .rollout import Rollout

Order = Literal["entropy", "random"]


def ranking(entropy: Sequence[float], order: Order = "entropy", generator: torch.Generator | None = None) -> list[int]:
    """All positions of a response in the order in which they are considered as forks.

    `entropy`: highest first, of equal ones the smaller position first. `random`: a permutation by `generator`.
    """
    if order == "random":
        found: list[int] = torch.randperm(len(entropy), generator=generator).tolist()
        return found
    return sorted(range(len(entropy)), key=lambda i: -entropy[i])


def candidates(ranked: Sequence[int], accept: Callable[[int], bool], most: int, filter_first: bool = True) -> list[int]:
    """Up to `most` acceptable positions, in the order of `ranked`; possibly none.

    `filter_first` walks on until `most` are accepted; else the `most` first positions are taken, and of them those
    that are acceptable. Papers that say "top-K tokens" may mean either.
    """
    if not filter_first:
        return [i for i in ranked[:most] if accept(i)]
    found: list[int] = []
    for position in ranked:
        if len(found) >= most:
            break
        if accept(position):
            found.append(position)
    return found


def pick(choices: Sequence[int], generator: torch.Generator, default: int = 0) -> int:
    """One of the choices, all alike; `default` where there is none, and then no random number is spent."""
    return choices[int(torch.randint(0, len(choices), (1,), generator=generator))] if choices else default


class TreeDraws:
    """Random numbers of a rollout's trees: a CPU stream per path, which depends on its place in the step and its number
    in the group, and on nothing beside it. One number is spent from `generator`."""

    def __init__(self, generator: torch.Generator) -> None:
        self._base = int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def of(self, path: Path) -> torch.Generator:
        """A new generator for the path, the same at every call."""
        digest = hashlib.sha256(f"{self._base}/{path.place}/{path.number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Fork:
    """One branch to grow: the first `length` tokens of `parent`, then up to `max_tokens` new ones.

    `position` is where the method branched, where that is not `length`. `learn`: whether the kept tokens count as
    actions of the branch. `prompt` stands in for the parent's, where a window cut it.
    """

    parent: Path
    length: int
    max_tokens: int
    position: int | None = None
    learn: bool = True
    prompt: Sequence[int] | None = None

    def begin(self, number: int) -> Path:
        """The branch before its first new token."""
        path = self.parent.branch(number, self.length, learn=self.learn)
        position = self.length if self.position is None else self.position
        return replace(path, branch_position=position, prompt=path.prompt if self.prompt is None else self.prompt)


def plant(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Any,
    generator: torch.Generator,
    problem_ids: Sequence[int] | None = None,
) -> list[Path]:
    """`count` whole responses to each prompt as paths numbered from 0; those of a prompt are adjacent.

    `engine` and `sampling` as in `rlvr_lab.rollout.engine`; a response has up to `sampling.max_tokens` tokens.
    """
    problems = range(len(prompts)) if problem_ids is None else problem_ids
    roots = [
        Path(problems[i], i, sampling.first + i, number, list(prompt))
        for i, prompt in enumerate(prompts)
        for number in range(count)
    ]
    _extend(engine, [(root, sampling.max_tokens) for root in roots], sampling, generator)
    return roots


def grow(
    engine: Any,
    roots: Sequence[Path],
    choose: Callable[[list[Path], int], Sequence[Fork]],
    sampling: Any,
    generator: torch.Generator,
    budget: int | None = None,
) -> list[Path]:
    """The roots and all branches, sorted by group and within it by age.

    `choose(paths, round)` names the forks of a round, which are extended in one batch, and ends the growth with none.
    `budget`: most tokens generated for one group, roots included. A fork waits until its whole `max_tokens` fits into
    what is left, so that the budget is never exceeded and less than one fork's room stays unused; forks of a group are
    taken in the order given. A group whose next fork does not fit is complete.
    """
    paths, waiting, rounds = list(roots), list[Fork](), 0
    while True:
        if fresh := not waiting:
            waiting, rounds = list(choose(paths, rounds)), rounds + 1
        now, waiting = _admitted(waiting, paths, budget)
        if not now and fresh:
            return sorted(paths, key=lambda path: (path.group, path.number))
        numbers = {group: number + 1 for group, number in _last_numbers(paths).items()}
        begun = []
        for fork in now:
            group = fork.parent.group
            begun.append((fork.begin(numbers[group]), fork.max_tokens))
            numbers[group] += 1
        _extend(engine, begun, sampling, generator)
        paths += [path for path, _ in begun]


def _admitted(waiting: Sequence[Fork], paths: Sequence[Path], budget: int | None) -> tuple[list[Fork], list[Fork]]:
    """Forks whose room fits, and those that wait for what this batch leaves; forks of complete groups are dropped."""
    if budget is None:
        return list(waiting), []
    spent: dict[int, int] = {}
    for path in paths:
        spent[path.group] = spent.get(path.group, 0) + path.generated
    reserved = dict.fromkeys(spent, 0)
    now, later, full = list[Fork](), list[Fork](), set[int]()
    for fork in waiting:
        group = fork.parent.group
        if group not in full and spent[group] + reserved[group] + fork.max_tokens <= budget:
            reserved[group] += fork.max_tokens
            now.append(fork)
            continue
        full.add(group)
        if reserved[group]:
            later.append(fork)
    return now, later


def _last_numbers(paths: Sequence[Path]) -> dict[int, int]:
    last: dict[int, int] = {}
    for path in paths:
        last[path.group] = max(path.number, last.get(path.group, 0))
    return last


def _extend(engine: Any, begun: Sequence[tuple[Path, int]], sampling: Any, generator: torch.Generator) -> None:
    if not begun:
        return
    pieces = engine.extend([path.start(most) for path, most in begun], sampling, generator)
    for (path, _), piece in zip(begun, pieces, strict=True):
        path.add(piece)


def by_group(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The paths of each group, in the order of their first path."""
    groups: dict[int, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.group, []).append(path)
    yield from groups.values()


@dataclass(frozen=True)
class TokenCounts:
    """What responses cost. `independent` is what the same responses would have cost to generate one by one."""

    generated: int
    trained: int
    independent: int

    @property
    def ratio(self) -> float:
        """Generated tokens relative to independent responses; nan for no token."""
        return self.generated / self.independent if self.independent else float("nan")


def token_counts(rollout: Rollout) -> TokenCounts:
    """Generated tokens count a shared prefix once, with the path that sampled it; trained ones (`Rollout.mask`) in
    every row that learns from it. Count before a filter drops rows or unmarks tokens."""
    return TokenCounts(
        int(rollout.sampled.sum()),
        int(rollout.mask.sum()),
        int((rollout.response_mask & _chosen_or_copied(rollout)).sum()),
    )


def _chosen_or_copied(rollout: Rollout) -> torch.Tensor:
    """Actions, and tokens copied from a parent whether learned from or not: all but what a tool said."""
    if rollout.prefix_length is None:
        return rollout.action_mask
    place = torch.arange(rollout.response_ids.shape[1], device=rollout.response_ids.device)
    return rollout.action_mask | (place < rollout.prefix_length[:, None])


def expected_ratio(forks: int, branches: int) -> float:
    """Tokens of a tree relative to as many independent responses, if forks lie anywhere alike on paths of one length
    (ETTRL, arXiv 2508.11356): (1 + BN / 2) / (1 + BN), with N forks and B branches at each."""
    grown = forks * branches
    return (1 + grown / 2) / (1 + grown)
