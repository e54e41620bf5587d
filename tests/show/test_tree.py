"""The tree viewer: what is drawn once, where branches leave, and what every mark and table row says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from rlvr_lab.core.paths import Path, Piece, to_rollout
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.show.theme import PALETTE, rgba
from rlvr_lab.show.tree import COLUMNS, Lane, lanes_of, tree_figure

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(token: int) -> str:
    return LETTERS[token]


def piece(text: str, entropy: float | None = 0.5, finished: bool = True) -> Piece:
    ids = [LETTERS.index(c) for c in text]
    values = [-0.25] * len(ids)
    return Piece(ids, values, [1.0] * len(ids), None if entropy is None else [entropy] * len(ids), values, finished)


def root(number: int, text: str, group: int = 0, **settings: Any) -> Path:
    path = Path(problem=group, group=group, place=0, number=number, prompt=[1, 2])
    path.add(piece(text, **settings))
    return path


def grown(path: Path, text: str, **settings: Any) -> Path:
    path.add(piece(text, **settings))
    return path


def tree(**fields: Any) -> Rollout:
    """Path 0 has branches at 2 and 4; the one at 4 has one at 5; path 1 stands alone; a second group."""
    zero, one = root(0, "abcdefg"), root(1, "xyz", entropy=1.5)
    early, late = grown(zero.branch(2, 2), "mn"), grown(zero.branch(3, 4), "opq", finished=False)
    deep = grown(late.branch(4, 5), "rs", entropy=2.0)
    other = root(0, "ab", group=1)
    rollout = to_rollout([zero, one, early, late, deep, other], pad_id=0, version=0)
    right = torch.tensor([True, False, True, False, True, False])
    return rollout.with_(reward=right.float(), correct=right, **fields)


def traces(rollout: Rollout, group: int = 0) -> dict[str, Any]:
    figure = json.loads(tree_figure(rollout, word, group).to_json())
    return {trace.get("name", "words"): trace for trace in figure["data"]}


def test_children_stand_below_their_parent_and_nothing_crosses() -> None:
    lanes = lanes_of(tree())
    assert lanes == [
        Lane(row=0, name=0, start=0, end=7, parent=None),
        Lane(row=3, name=3, start=4, end=7, parent=0),
        Lane(row=4, name=4, start=5, end=7, parent=1),
        Lane(row=2, name=2, start=2, end=4, parent=0),
        Lane(row=1, name=1, start=0, end=3, parent=None),
    ]
    for number, lane in enumerate(lanes):
        between = lanes[lane.parent + 1 : number] if lane.parent is not None else []
        assert all(other.start > lane.start for other in between)  # the branch's vertical line meets no token


def test_the_order_of_rows_does_not_change_the_tree() -> None:
    rollout = tree()
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    assert [(x.name, x.start, x.end) for x in lanes_of(rollout.rows(order))] == [
        (x.name, x.start, x.end) for x in lanes_of(rollout)
    ]


def test_shared_tokens_are_drawn_once() -> None:
    points = traces(tree())["sampled token"]
    assert len(points["x"]) == 7 + 3 + 2 + 2 + 3
    assert len({(x, y) for x, y in zip(points["x"], points["y"], strict=True)}) == len(points["x"])
    on_deepest = [x for x, y in zip(points["x"], points["y"], strict=True) if y == 2]
    assert on_deepest == [5, 6]


def test_every_token_says_what_it_is() -> None:
    points = traces(tree())["sampled token"]
    assert points["meta"]["columns"] == list(COLUMNS)
    assert points["customdata"][0] == [0, 0, "a", 0.5, -0.25, 0, "sampled"]
    assert points["customdata"][10] == [4, 5, "r", 2.0, -0.25, 0, "sampled"]
    marker = points["marker"]
    assert marker["color"][10] == 2.0 == marker["cmax"]
    assert marker["size"][10] > marker["size"][0]  # colour is not the only cue
    assert "turn" not in points["hovertemplate"]


def test_branches_name_the_word_they_chose() -> None:
    first = traces(tree())["words"]
    assert list(zip(first["text"], first["x"], map(round, first["y"]), strict=True)) == [
        ("o", 4, 1),
        ("r", 5, 2),
        ("m", 2, 3),
    ]


def test_leaves_say_reward_verdict_and_whether_they_were_cut() -> None:
    found = traces(tree())
    assert (found["right"]["y"], found["wrong"]["y"]) == ([0, 2, 3], [1, 4])
    assert found["wrong"]["text"] == [" 0, cut", " 0"]
    assert found["right"]["x"][0] > 6
    assert found["right"]["marker"]["symbol"] != found["wrong"]["marker"]["symbol"]
    ungraded = traces(tree().with_(reward=None, correct=None))
    assert ungraded["not graded"]["text"] == [" ", " cut", " ", " ", " "]
    assert "right" not in ungraded


def test_groups_without_branches_and_records_without_paths_are_roots() -> None:
    plain = tree(path_id=None, parent_id=None, prefix_length=None, branch_position=None)
    lanes = lanes_of(plain)
    assert [(lane.name, lane.start, lane.parent) for lane in lanes] == [(i, 0, None) for i in range(5)]
    assert len(traces(plain, 1)["sampled token"]["x"]) == 2


def test_a_branch_whose_parent_was_dropped_is_drawn_whole() -> None:
    kept = tree().rows(torch.tensor([1, 2, 5]))
    assert [(lane.name, lane.start, lane.parent) for lane in lanes_of(kept)] == [(1, 0, None), (2, 0, None)]


def test_a_prefix_that_is_not_the_parent_s_is_refused() -> None:
    rollout = tree()
    ids = rollout.response_ids.clone()
    ids[2, 1] = 9
    with pytest.raises(ValueError, match="row 2 differs from row 0"):
        lanes_of(rollout.with_(response_ids=ids))
    with pytest.raises(ValueError, match=r"no group 7; it has \[0, 1\]"):
        tree_figure(rollout, word, 7)


def episode() -> Rollout:
    path = root(0, "ab", finished=False)
    path.tell([25, 24])
    path.add(piece("c"))
    short = root(1, "d")
    return to_rollout([path, short], pad_id=0, version=0)


def test_an_episode_shows_its_turns_and_what_it_was_told() -> None:
    found = traces(episode())
    told = found["not an action"]
    assert (told["x"], told["y"]) == ([2, 3], [0, 0])
    assert told["customdata"][0] == [0, 2, "z", "", "", 0, "told"]
    begins = [x for x in found["a turn begins"]["x"] if x is not None][::2]
    assert begins == [-0.5, 3.5, -0.5]
    assert found["sampled token"]["customdata"][2][5] == 1
    assert "a turn begins" not in traces(tree())


def test_tokens_without_entropies_are_drawn_without_a_scale() -> None:
    rollout = to_rollout([root(0, "abc", entropy=None)], pad_id=0, version=0)
    points = traces(rollout)["sampled token"]
    assert "colorscale" not in points["marker"]
    assert points["customdata"][0][3] == ""
    assert "not recorded" in points["hovertemplate"]


def test_an_empty_response_and_certain_tokens_are_drawn() -> None:
    path = Path(problem=0, group=0, place=0, number=0, prompt=[1])
    certain = root(1, "ab", entropy=-1e-9)
    points = traces(to_rollout([path, certain], pad_id=0, version=0))["sampled token"]
    assert [row[3] for row in points["customdata"]] == [0.0, 0.0]


def test_words_are_text_and_no_markup() -> None:
    figure = tree_figure(tree(), lambda i: "</think>" if i == 0 else " ")
    points = next(t for t in figure.data if t.name == "sampled token")
    assert points.text[0] == "&lt;/think&gt;"
    assert points.customdata[0][2] == "</think>"
    assert points.text[1] == "␣"


def test_the_description_counts_what_is_drawn() -> None:
    alt = tree_figure(tree(), word).layout.meta["alt"]
    assert alt == (
        "Tree of group 0: 5 paths, 2 from the prompt and 3 branched off another; 17 tokens are drawn where the paths "
        "written out in full have 28; mean entropy of the sampled tokens 0.85 nats; 3 of 5 paths are right."
    )
    assert tree_figure(tree(), word, alt="Another sentence that says what is shown.").layout.meta["alt"].startswith("A")


def test_colours_are_those_that_the_dark_theme_replaces() -> None:
    text = tree_figure(episode().with_(correct=torch.tensor([True, False])), word).to_json()
    known = {*PALETTE.values(), *(rgba(c, 1)[:-3] for c in PALETTE.values())}
    drawn = json.dumps(json.loads(text)["data"])
    found = set(re.findall(r"#[0-9A-Fa-f]{6}", drawn)) | {m + "," for m in re.findall(r"rgba\(\d+, \d+, \d+", drawn)}
    assert found
    assert found <= known, found - known
