r"""Rounds of agentic rollouts: where a trajectory branches, and how a group's places are spent (card 4.2 to 4.4).

A segment is what the policy writes between two answers of the environment; H is its entropy over its first tokens,
divided by ln V, and dH = H - H_initial its distance from the first segment of its own trajectory. u is uniform.

    ARPO    s = clip(u - w dH, 0, 1),                            branch iff s <= p:   P = p + w dH
    AEPO    s = clip((u + w dH) max(0, 1 - penalty l), 0, 1),    branch iff s >= p:   P = 1 - p / c_l + w dH

each P within [0, 1]; c_l = max(0, 1 - penalty l), P = 0 where it is 0; l counts consecutive branchings. The budget of k
trajectories is split by entropies before anything of the group is sampled:

    m = clip(floor(k sigmoid(beta (H_root - H_tool))) + 1, 1, k)        from the prompt, the others by branching

Sources: ARPO (arXiv 2507.19849), AEPO (arXiv 2510.14545), RUC-NLPIR/ARPO @ ff66660, as card agentic_aepo reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.paths import Path

Rule = Literal["aepo", "arpo"]
Counter = Literal["path", "prompt"]
How = Literal["mean", "sum"]
PROBE = 1_000_000
"""Numbers of probes begin here, beyond those of any group, so that their random numbers are their own."""
APART = 0x9E3779B97F4A7C15


def segment_entropy(entropy: Sequence[float], vocabulary: int, first: int = 20, how: How = "mean") -> float:
    """H of a segment from its full-softmax token entropies in nats: over its first `first` tokens their mean, or as in
    the released code their sum, divided by ln V. 0 for an empty segment."""
    values = list(entropy[:first])
    if not values:
        return 0.0
    total = sum(values) / math.log(vocabulary)
    return total / len(values) if how == "mean" else total


def truncated_segment_entropy(top_logprob_TK: Sequence[Sequence[float]], vocabulary: int, first: int = 20) -> float:
    """The released H: the sum of -p ln p over the sampler's K likeliest words of each token, not renormalised."""
    total = sum(-math.exp(x) * x for token in top_logprob_TK[:first] for x in token)
    return total / math.log(vocabulary)


def arpo_score(uniform: Tensor, change: Tensor, weight: float = 0.2) -> Tensor:
    """ARPO's s, which branches where it is at most p; `change` is dH. Any shape."""
    return (uniform - weight * change).clamp(0.0, 1.0)


def aepo_score(uniform: Tensor, change: Tensor, streak: Tensor, weight: float = 0.2, penalty: float = 0.05) -> Tensor:
    """AEPO's s, which branches where it is at least p; `streak` is l. Any shape."""
    return ((uniform + weight * change) * (1 - penalty * streak).clamp_min(0.0)).clamp(0.0, 1.0)


def branch_probability(
    change: Tensor, streak: Tensor, rule: Rule = "aepo", weight: float = 0.2, penalty: float = 0.05, p: float = 0.5
) -> Tensor:
    """Probability that an attempt branches, in closed form. Any shape."""
    if rule == "arpo":
        return (p + weight * change).clamp(0.0, 1.0)
    left = (1 - penalty * streak).clamp_min(0.0)
    return torch.where(left > 0, (1 - p / left + weight * change).clamp(0.0, 1.0), 0.0)


def expected_split(k: int, root: float, tool: float, beta: float = 0.5) -> float:
    """The paper's m, a real number: k sigmoid(beta (H_root - H_tool))."""
    return k * float(torch.sigmoid(torch.tensor(beta * (root - tool), dtype=torch.float64)))


def budget_split(k: int, root: float, tool: Sequence[float], beta: float = 0.5) -> int:
    """m as in the released code. `tool`: entropies of the segments after a tool's answer; without any, H_root."""
    mean = sum(tool) / len(tool) if len(tool) else root
    return min(max(math.floor(expected_split(k, root, mean, beta)) + 1, 1), k)


@dataclass(frozen=True)
class Branching:
    """What decides on branches; see the settings of `methods.agentic_aepo`."""

    rule: Rule
    weight: float
    probability: float
    penalty: float
    counter: Counter
    lag: int
    beam: int
    segment: How
    first: int
    call_limit: int | None

    def entropy(self, values: Sequence[float], vocabulary: int) -> float:
        """H of a segment."""
        return segment_entropy(values, vocabulary, self.first, self.segment)

    def accepts(self, uniform: float, change: float, streak: int) -> bool:
        """Whether an attempt branches."""
        u, change_, streak_ = (torch.tensor(float(x), dtype=torch.float64) for x in (uniform, change, streak))
        if self.rule == "arpo":
            return bool(arpo_score(u, change_, self.weight) <= self.probability)
        return bool(aepo_score(u, change_, streak_, self.weight, self.penalty) >= self.probability)


@dataclass(frozen=True)
class Visit:
    """One path's part in a round. `before` is the path as it stood before its segment, where a decision is due there;
    `turn` is the turn of the segment, from 0, and `entropy` its H."""

    path: Path
    before: Path | None
    turn: int
    entropy: float


class Rounds:
    """Grows groups of trajectories, a segment of every open one at a time. Every process draws the same numbers for a
    prompt, wherever it is sampled; `counter: prompt` alone couples the prompts of a batch."""

    def __init__(
        self, engine: Any, branching: Branching, sampling: Any, generator: torch.Generator, vocabulary: int
    ) -> None:
        self.engine, self.branching, self.vocabulary = engine, branching, vocabulary
        self.sampling, self.device = sampling, generator.device
        self.base = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self.generator = self._stream(0)

    def _stream(self, number: int) -> torch.Generator:
        """The engine's numbers for probes (0) and for groups (1): how long probes take must not move the others."""
        return torch.Generator(self.device).manual_seed((self.base + APART * number) % 2**63)

    def begin(self, root: Path, number: int) -> Path:
        """A new path from the bare prompt of `root`."""
        path = Path(root.problem, root.group, root.place, number, root.prompt)
        self.engine.turns.open(path)
        return path

    def advance(self, paths: Sequence[Path]) -> list[Visit]:
        """One segment of every path, and the environment's answer; a path without room is closed instead."""
        rooms = [self.engine.turns.room(path, self.sampling) for path in paths]
        for path, room in zip(paths, rooms, strict=True):
            path.open = path.open and room > 0
        able = [(path, room) for path, room in zip(paths, rooms, strict=True) if path.open]
        if not able:
            return []
        before = [self._due(path) for path, _ in able]
        starts = [path.start(room) for path, room in able]
        pieces = self.engine.extend(starts, self.sampling, self.generator, stops=self.engine.turns.stops)
        for (path, _), piece in zip(able, pieces, strict=True):
            path.add(piece)
        self.engine.with_entropy([path for path, _ in able])
        lengths = [len(piece.ids) for piece in pieces]
        return [self._answered(path, n, past) for (path, _), n, past in zip(able, lengths, before, strict=True)]

    def _due(self, path: Path) -> Path | None:
        """A copy of a path that stands behind a tool's answer where nobody has decided yet; None elsewhere."""
        due = self.branching.lag == 0 and path.turns > 0 and path.notes.get("decided") != len(path)
        return path.branch(path.number) if due else None

    def _answered(self, path: Path, length: int, before: Path | None) -> Visit:
        turn, start = path.turns, len(path) - length
        entropy = self.branching.entropy((path.entropy or [])[start:], self.vocabulary)
        path.notes.setdefault("initial", entropy)
        answer = self.engine.turns.respond(path)
        if getattr(answer, "tool", None) is not None:
            path.notes["calls"] = path.notes.get("calls", 0) + 1
        limit = self.branching.call_limit
        if limit is not None and path.notes.get("calls", 0) > limit:
            path.open = False
        return Visit(path, before, turn, entropy)

    def monitor(self, roots: Sequence[Path], size: int, beta: float, tokens: int) -> list[int]:
        """m of every prompt, from a probe of at most `tokens` tokens and one whole trajectory, which no group holds."""
        probes = [self.begin(root, PROBE) for root in roots]
        rooms = [min(tokens, self.engine.turns.room(probe, self.sampling)) for probe in probes]
        starts = [probe.start(max(room, 1)) for probe, room in zip(probes, rooms, strict=True)]
        pieces = self.engine.extend(starts, self.sampling, self.generator, stops=self.engine.turns.stops)
        for probe, piece in zip(probes, pieces, strict=True):
            probe.add(piece)
        self.engine.with_entropy(probes)
        root_entropy = [self.branching.entropy(probe.entropy or [], self.vocabulary) for probe in probes]
        runs = [self.begin(root, PROBE + 1) for root in roots]
        tool: dict[int, list[float]] = {root.group: [] for root in roots}
        while active := [run for run in runs if run.open]:
            for visit in self.advance(active):
                if visit.turn:
                    tool[visit.path.group].append(visit.entropy)
        return [budget_split(size, h, tool[root.group], beta) for h, root in zip(root_entropy, roots, strict=True)]

    def grow(self, roots: Sequence[Path], initial: Sequence[int], size: int) -> list[list[Path]]:
        """`size` trajectories of every prompt, `initial` of them at once: the others branch, or begin anew where a
        prompt has none under way."""
        self.generator = self._stream(1)
        draws = [torch.Generator().manual_seed((self.base + APART * (root.place + 2)) % 2**63) for root in roots]
        groups = [[self.begin(root, i) for i in range(m)] for root, m in zip(roots, initial, strict=True)]
        streaks = [0] * len(groups)  # l of each prompt, where a prompt has one
        while active := [path for group in groups for path in group if path.open]:
            visits = self.advance(active)
            branched = set()
            for g, group in enumerate(groups):
                own = [visit for visit in visits if visit.path.group == roots[g].group]
                found = self._branch(group, own, size, draws[g], streaks[g])
                if found:
                    branched.add(g)
                streaks[g] += found
            for g, group in enumerate(groups):
                if branched and g not in branched:
                    streaks[g] = 0
                if len(group) < size and not any(path.open for path in group):
                    group.append(self.begin(roots[g], len(group)))
                    streaks[g] += 1
        return groups

    def _branch(
        self, group: list[Path], visits: Sequence[Visit], size: int, draws: torch.Generator, streak: int
    ) -> int:
        """Let every path of a round try, in the order of the group; returns the number of new branches."""
        rule, made = self.branching, 0
        for visit in visits:
            path, source = visit.path, visit.before if rule.lag == 0 else visit.path
            for _ in range(rule.beam - 1):
                if source is None or not source.open or len(group) >= size:
                    break
                in_a_row = path.notes.get("streak", 0) if rule.counter == "path" else streak + made
                change = visit.entropy - path.notes["initial"]
                if not rule.accepts(float(torch.rand((), generator=draws)), change, in_a_row):
                    path.notes["streak"] = 0
                    continue
                path.notes["streak"] = path.notes.get("streak", 0) + 1
                child = source.branch(len(group))
                child.notes |= {"streak": path.notes["streak"], "decided": len(child)}
                group.append(child)
                made += 1
        return made
