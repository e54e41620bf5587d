"""The tree of one group of a real rollout: which tokens were shared, where paths branched, what each leaf earned.

A lane per response. What a path shares with its parent is drawn once, on the parent's lane; the path leaves it at its
`prefix_length`. A group of independent responses is a tree of roots only, an episode a lane with its turns marked and
what it was told in grey. The figure holds everything it shows, so it needs no kernel, and names each token's word,
entropy and turn under the pointer and in the table below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from ..core.rollout import Rollout
from .theme import PALETTE, figure, rgba
from .transcript import visible

__all__ = ["Lane", "lanes_of", "tree_figure"]

COLUMNS = ("path", "position", "word", "entropy (nats)", "log-prob (nats)", "turn", "kind")
"""What the table of a tree says of each token."""

_INK, _FAINT = (rgba(PALETTE["ink"], alpha) for alpha in (0.55, 0.3))
_SCALE = [[0.0, rgba(PALETTE["amber"], 0.12)], [1.0, PALETTE["amber"]]]
_ROOM = 560  # pixels for tokens at the book's column width


@dataclass(frozen=True)
class Lane:
    """One response in its group's tree: tokens `start` to `end` are its own, those before lie on the lane `parent`.

    `parent` is None for a root, and where the parent is not in the group any more: then `start` is 0.
    """

    row: int
    name: int
    start: int
    end: int
    parent: int | None


def lanes_of(rollout: Rollout, group: int = 0) -> list[Lane]:
    """The responses of a group from the top, each below its parent, the latest branch nearest to it.

    Raises ValueError for a group that is not there, and where a response differs from its parent within its prefix.
    """
    rows = (rollout.group_id == group).nonzero().flatten().tolist()
    if not rows:
        raise ValueError(f"the rollout has no group {group}; it has {sorted(set(rollout.group_id.tolist()))}")
    names = {row: _number(rollout.path_id, row, i) for i, row in enumerate(rows)}
    by_name = {name: row for row, name in names.items()}
    children: dict[int | None, list[int]] = {}
    start: dict[int, int] = {}
    for row in rows:
        parent = by_name.get(_number(rollout.parent_id, row, -1))
        start[row] = 0 if parent is None else _number(rollout.prefix_length, row, 0)
        if parent is not None and not torch.equal(*(rollout.response_ids[r, : start[row]] for r in (row, parent))):
            raise ValueError(
                f"row {row} differs from row {parent}, its parent, within its prefix of {start[row]} tokens"
            )
        children.setdefault(parent, []).append(row)

    lanes: list[Lane] = []

    def place(row: int, parent: int | None) -> None:
        lanes.append(Lane(row, names[row], start[row], int(rollout.lengths[row]), parent))
        mine = len(lanes) - 1
        for child in sorted(children.get(row, []), key=lambda r: (-start[r], names[r])):
            place(child, mine)

    for root in children.get(None, []):
        place(root, None)
    return lanes


def _number(values_B: Tensor | None, row: int, otherwise: int) -> int:
    return otherwise if values_B is None else int(values_B[row])


@dataclass(frozen=True)
class _Token:
    lane: int
    position: int
    word: str
    entropy: float
    logprob: float
    turn: int | None
    action: bool

    def cells(self, name: int) -> list[Any]:
        """A row of `COLUMNS`."""
        numbers = [_rounded(self.entropy), _rounded(self.logprob)] if self.action else ["", ""]
        turn = "" if self.turn is None else self.turn
        return [name, self.position, visible(self.word), *numbers, turn, "sampled" if self.action else "told"]


def _rounded(value: float) -> float | str:
    """Three decimals, a tiny negative rounding error as 0; empty where nothing was recorded."""
    return "" if math.isnan(value) else round(value, 3) + 0.0


def _tokens(rollout: Rollout, lanes: list[Lane], words: Callable[[int], str]) -> Iterator[_Token]:
    entropy, turn = rollout.statistics.get("token_entropy"), rollout.turn_id
    for number, lane in enumerate(lanes):
        for t in range(lane.start, lane.end):
            yield _Token(
                number,
                t,
                words(int(rollout.response_ids[lane.row, t])),
                math.nan if entropy is None else float(entropy[lane.row, t]),
                float(rollout.behaviour_logprob[lane.row, t]),
                None if turn is None else int(turn[lane.row, t]),
                bool(rollout.action_mask[lane.row, t]),
            )


def tree_figure(
    rollout: Rollout,
    words: Callable[[int], str],
    group: int = 0,
    *,
    title: str | None = None,
    alt: str | None = None,
    most: float | None = None,
) -> go.Figure:
    """The tree of one group as a figure.

    `words` turns a token id into text, such as `lambda i: policy.decode([i])`. Colour and size of a token are its
    entropy in nats, up to `most` (by default the group's largest). `alt` replaces the sentence that describes the
    figure. Raises ValueError where `lanes_of` does.
    """
    lanes = lanes_of(rollout, group)
    tokens = list(_tokens(rollout, lanes, words))
    sampled, told = ([t for t in tokens if t.action is kind] for kind in (True, False))
    known = [t.entropy for t in sampled if not math.isnan(t.entropy)]
    scale = most if most is not None else max(known, default=0.0)
    longest = max((lane.end for lane in lanes), default=1)
    size = min(13.0, max(4.0, _ROOM / max(longest, 1)))
    traces = [_branches(lanes), *_turns(tokens), _sampled(sampled, lanes, size, scale or 1.0, bool(known))]
    if told:
        traces.append(_told(told, lanes, size))
    traces += [_first_words(tokens, lanes), *_leaves(rollout, lanes)]
    names = [str(lane.name) for lane in lanes]
    return figure(
        *traces,
        x="token of the response",
        y="path",
        alt=alt or _describe(rollout, lanes, tokens, group),
        hovermode="closest",
        **({"title": title} if title else {}),
    ).update_layout(
        height=max(280, 150 + 36 * len(lanes)) + (40 if title else 0),
        yaxis={
            "tickvals": list(range(len(lanes))),
            "ticktext": names,
            "range": [len(lanes) - 0.4, -0.8],
            "showgrid": False,
        },
        xaxis={"range": [-1.0, longest + max(2.0, 0.14 * longest)]},
    )


def _segments(name: str, lines: list[tuple[float, float, float, float]], line: dict[str, Any], legend: bool) -> Any:
    x, y = ([v for a, b in ((s[i], s[i + 2]) for s in lines) for v in (a, b, None)] for i in (0, 1))
    return go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hoverinfo="skip", showlegend=legend)


def _branches(lanes: list[Lane]) -> Any:
    lines: list[tuple[float, float, float, float]] = []
    for number, lane in enumerate(lanes):
        left = lane.start - 0.5
        lines.append((left, number, max(left, lane.end - 0.5), number))
        if lane.parent is not None:
            lines.append((left, lane.parent, left, number))
    return _segments("path", lines, {"color": _INK, "width": 1.5}, False)


def _turns(tokens: list[_Token]) -> list[Any]:
    """A tick where a turn begins on its own lane; nothing where nobody has a second turn."""
    if not any(t.turn for t in tokens):
        return []
    lines, before = [], None
    for t in tokens:
        if (t.lane, t.turn) != before:
            lines.append((t.position - 0.5, t.lane - 0.38, t.position - 0.5, t.lane + 0.38))
        before = (t.lane, t.turn)
    return [_segments("a turn begins", lines, {"color": PALETTE["blue"], "width": 1.5, "dash": "dot"}, True)]


def _points(name: str, tokens: list[_Token], lanes: list[Lane], marker: dict[str, Any], hover: str) -> Any:
    return go.Scatter(
        x=[t.position for t in tokens],
        y=[t.lane for t in tokens],
        name=name,
        mode="markers",
        marker=marker,
        text=[escape(visible(t.word)) for t in tokens],  # plotly reads its text as markup; the table does not
        customdata=[t.cells(lanes[t.lane].name) for t in tokens],
        meta={"columns": list(COLUMNS)},
        hovertemplate=f"<b>%{{text}}</b><br>path %{{customdata[0]}}, token %{{customdata[1]}}{hover}<extra></extra>",
    )


def _sampled(tokens: list[_Token], lanes: list[Lane], size: float, most: float, known: bool) -> Any:
    marker: dict[str, Any] = {"symbol": "square", "size": size, "line": {"color": _INK, "width": 1}}
    entropies = [0.0 if math.isnan(t.entropy) else max(0.0, t.entropy) for t in tokens]
    if known:
        share = [min(1.0, h / most) for h in entropies]
        marker |= {
            "color": [round(h, 3) for h in entropies],
            "size": [round(size * (0.6 + 0.4 * s), 1) for s in share],
            "cmin": 0.0,
            "cmax": most,
            "colorscale": _SCALE,
            "colorbar": {"title": {"text": "entropy (nats)", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        }
    else:
        marker["color"] = _SCALE[0][1]
    turn = "<br>turn %{customdata[5]}" if any(t.turn for t in tokens) else ""
    entropy = "entropy %{customdata[3]} nats" if known else "entropy not recorded"
    return _points(
        "sampled token", tokens, lanes, marker, f"<br>{entropy}<br>log-prob %{{customdata[4]}} nats{turn}"
    ).update(showlegend=False)


def _told(tokens: list[_Token], lanes: list[Lane], size: float) -> Any:
    marker = {"symbol": "diamond", "size": 0.8 * size, "color": _FAINT, "line": {"width": 0}}
    turn = ", turn %{customdata[5]}" if any(t.turn for t in tokens) else ""
    return _points("not an action", tokens, lanes, marker, f"{turn}<br>not an action")


def _first_words(tokens: list[_Token], lanes: list[Lane]) -> Any:
    """The word that each branch chose where it left its parent."""
    first = [t for t in tokens if lanes[t.lane].parent is not None and t.position == lanes[t.lane].start]
    return go.Scatter(
        x=[t.position for t in first],
        y=[t.lane - 0.2 for t in first],
        mode="text",
        text=[escape(visible(t.word)) for t in first],
        textposition="top center",
        textfont={"size": 11},
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )


_LEAVES = (
    ("right", "circle", "green", True),
    ("wrong", "x", "magenta", False),
    ("not graded", "circle-open", "ink", None),
)


def _leaves(rollout: Rollout, lanes: list[Lane]) -> list[Any]:
    """What each path earned, right of its last token; the verdict is a colour, a shape and a word."""
    traces = []
    for name, symbol, colour, verdict in _LEAVES:
        chosen = [(i, lane) for i, lane in enumerate(lanes) if _verdict(rollout, lane.row) is verdict]
        if not chosen:
            continue
        traces.append(
            go.Scatter(
                x=[lane.end + 0.3 for _, lane in chosen],
                y=[i for i, _ in chosen],
                name=name,
                mode="markers+text",
                marker={"symbol": symbol, "color": PALETTE[colour], "size": 11},
                text=[_earned(rollout, lane.row) for _, lane in chosen],
                textposition="middle right",
                textfont={"size": 11},
                cliponaxis=False,
                hovertemplate="%{text}<extra>" + name + "</extra>",
            )
        )
    return traces


def _verdict(rollout: Rollout, row: int) -> bool | None:
    return None if rollout.correct is None else bool(rollout.correct[row])


def _earned(rollout: Rollout, row: int) -> str:
    parts = [] if rollout.reward is None else [f"{float(rollout.reward[row]):.3g}"]
    if not bool(rollout.finished[row]):
        parts.append("cut")
    return " " + ", ".join(parts)


def _describe(rollout: Rollout, lanes: list[Lane], tokens: list[_Token], group: int) -> str:
    roots = sum(lane.parent is None for lane in lanes)
    right = [_verdict(rollout, lane.row) for lane in lanes]
    sampled = [t for t in tokens if t.action]
    longest = sum(lane.end for lane in lanes)
    known = [t.entropy for t in sampled if not math.isnan(t.entropy)]
    told = len(tokens) - len(sampled)
    parts = [
        f"Tree of group {group}: {len(lanes)} paths, {roots} from the prompt and {len(lanes) - roots} branched off "
        "another",
        f"{len(tokens)} tokens are drawn where the paths written out in full have {longest}",
    ]
    if told:
        parts.append(f"{told} of them are no actions")
    if known:
        parts.append(f"mean entropy of the sampled tokens {sum(known) / len(known):.2f} nats")
    if rollout.correct is not None:
        parts.append(f"{sum(map(bool, right))} of {len(lanes)} paths are right")
    return "; ".join(parts) + "."
