"""Continuing any prefix: equal to the whole scored at once, in any batch, up to its own limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlvr_lab.core.paths import Path, Piece, Start, to_rollout
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.forward import response_statistics
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.meter import Meter
from rlvr_lab.rollout.stops import Stops
from rlvr_lab.tasks import countdown

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(4, 5)]
WORDS = countdown.VOCABULARY


def extend(policy: Policy, starts: list[Start], seed: int = 0, stops: tuple[str, ...] = (), **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return TransformersEngine(policy).extend(starts, Sampling(**settings), generator, stops=stops)


def roots(policy: Policy, seed: int = 0, **settings: Any) -> list[Path]:
    paths = [Path(i, i, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    for path, piece in zip(paths, extend(policy, [p.start(24) for p in paths], seed, **settings), strict=True):
        path.add(piece)
    return paths


def as_rollout(policy: Policy, paths: list[Path]) -> Rollout:
    return to_rollout(paths, pad_id=policy.pad_id, version=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("learn", [True, False])
def test_a_branch_has_the_log_probs_of_the_whole_sequence_scored_at_once(
    tiny_s: Policy, temperature: float, learn: bool
) -> None:
    parents = roots(tiny_s, temperature=temperature)
    cuts = [0, 3, 7, len(parents[3])]
    branches = [p.branch(1 + k, cut, learn=learn) for p, cut in zip(parents, cuts, strict=True) for k in range(2)]
    pieces = extend(tiny_s, [b.start(20) for b in branches], seed=1, temperature=temperature)
    for branch, piece in zip(branches, pieces, strict=True):
        branch.add(piece)
    rollout = as_rollout(tiny_s, [*parents, *branches])
    with torch.no_grad():
        logprob, entropy = response_statistics(tiny_s.model, rollout)
    assert entropy is not None
    assert rollout.old_logprob is not None
    mask = rollout.mask
    torch.testing.assert_close(rollout.old_logprob[mask], logprob[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.statistics["token_entropy"][mask], entropy[mask], rtol=0, atol=1e-4)
    # what was copied is the parent's, and is an action only where it shall be learned from
    for branch, cut in zip(branches, [c for c in cuts for _ in range(2)], strict=True):
        assert branch.ids[:cut] == parents[branch.group].ids[:cut]
        assert branch.action == [learn] * cut + [True] * branch.generated
    assert rollout.sampled.sum() == sum(p.generated for p in [*parents, *branches])
    assert rollout.prefix_length is not None
    assert rollout.prefix_length.tolist() == [0] * 4 + [c for c in cuts for _ in range(2)]


def test_with_streams_per_prompt_a_piece_does_not_depend_on_what_is_in_flight(tiny_s: Policy) -> None:
    together = [p.branch(1, cut) for p, cut in zip(roots(tiny_s), [1, 5, 9, 2], strict=True)]
    starts = [b.start(16) for b in together]
    whole = extend(tiny_s, starts, streams="prompt")
    for rows in (1, 3):
        assert [p.ids for p in extend(tiny_s, starts, streams="prompt", rows=rows)] == [p.ids for p in whole]
    for i in (3, 1):
        (alone,) = extend(tiny_s, [starts[i]], streams="prompt")
        assert alone.ids == whole[i].ids
        assert alone.logprob == pytest.approx(whole[i].logprob, abs=1e-5)
    # two branches of one parent differ by their numbers alone
    first, second = (together[0].branch(n).start(16) for n in (2, 3))
    a, b = extend(tiny_s, [first, second], streams="prompt")
    assert a.ids != b.ids


def test_every_start_keeps_its_own_limit_and_temperature(tiny_s: Policy) -> None:
    starts = [Start(PROMPTS[0], 3), Start(PROMPTS[0], 9, temperature=0.0), Start(PROMPTS[1], 1), Start(PROMPTS[2], 30)]
    pieces = extend(tiny_s, starts, temperature=1.3)
    assert [len(p.ids) for p in pieces[:3]] == [3, 9, 1]
    assert len(pieces[3].ids) > 9
    greedy = extend(tiny_s, [Start(PROMPTS[0], 9)], temperature=0.0)[0]
    assert pieces[1].ids == greedy.ids
    assert pieces[1].logprob == [0.0] * 9
    assert set(pieces[1].temperature) == {0.0}
    assert {round(t, 5) for t in pieces[0].temperature} == {1.3}
    assert not pieces[0].finished
    assert min(pieces[0].entropy) > 0


def test_pieces_end_with_a_stop_text_of_one_token_or_of_several(tiny_s: Policy) -> None:
    starts = [Start(prompt, 30) for prompt in PROMPTS]
    free = extend(tiny_s, starts)
    for text in ("</think>", " ".join(WORDS[i] for i in free[0].ids[4:7])):
        pieces = extend(tiny_s, starts, stops=(text, "never said"))
        assert any(p.stopped for p in pieces)
        for piece in pieces:
            words = " ".join(WORDS[i] for i in piece.ids)
            assert words.count(text) == int(piece.stopped)
            assert words.endswith(text) == piece.stopped
            assert not (piece.stopped and piece.finished)


def test_a_stop_text_that_stood_in_the_context_stops_nothing(tiny_s: Policy) -> None:
    ids = [*PROMPTS[0], countdown.END_THINK]
    (piece,) = extend(tiny_s, [Start(ids, 6)], stops=("</think>",))
    assert len(piece.ids) > 1


def test_stops_see_a_text_that_a_tokenizer_cuts_anywhere(tiny_s: Policy) -> None:
    stops = Stops(tiny_s, ("= 11",))
    ids = {word: i for i, word in enumerate(WORDS)}
    assert stops.completes([ids["1"], ids["="], ids["11"]])
    assert not stops.completes([ids["="], ids["11"], ids["="]])  # completed before, not by this token
    assert not stops.completes([ids["="], ids["12"]])
    with pytest.raises(ValueError, match="empty text"):
        Stops(tiny_s, ("",))


def test_a_start_without_room_or_context_is_refused(tiny_s: Policy) -> None:
    with pytest.raises(ValueError, match="start 1 has 8 tokens of context and room for 0"):
        extend(tiny_s, [Start(PROMPTS[0], 2), Start(PROMPTS[1], 0)])
    with pytest.raises(ValueError, match="start 0 has 0 tokens"):
        extend(tiny_s, [Start([], 2)])


def test_the_meter_counts_what_was_sampled_and_a_prefix_once(tiny_s: Policy) -> None:
    meter = Meter(TransformersEngine(tiny_s))
    generator = torch.Generator().manual_seed(0)
    rollout = meter.sample(PROMPTS, 2, Sampling(max_tokens=20), generator)
    first = int(rollout.mask.sum())
    assert meter.tokens == first
    paths = roots(tiny_s)
    pieces = meter.extend([p.branch(1, 4).start(10) for p in paths], Sampling(), generator)
    assert meter.tokens == first + sum(len(p.ids) for p in pieces)


def test_entropies_are_filled_in_where_an_engine_recorded_none(tiny_s: Policy) -> None:
    paths = roots(tiny_s)
    expected = [list(p.entropy or ()) for p in paths]
    for path in paths[1:]:
        path.entropy = None
    paths[0].entropy = [7.0] * len(paths[0])  # what is there is left alone
    TransformersEngine(tiny_s).with_entropy(paths)
    assert paths[0].entropy == [7.0] * len(paths[0])
    for path, entropy in zip(paths[1:], expected[1:], strict=True):
        assert path.entropy == pytest.approx(entropy, abs=1e-4)


def test_a_piece_without_entropies_makes_the_path_one_without() -> None:
    path = Path(0, 0, 0, 0, [1])
    path.add(Piece([5, 6], [-1.0, -2.0], [1.0, 1.0], [0.5, 0.6], [-1.0, -2.0]))
    path.add(Piece([7], [-1.0], [1.0]))
    assert path.entropy is None
    assert path.old is None
    rollout = to_rollout([path], pad_id=0, version=3)
    assert rollout.statistics == {}
    assert rollout.old_logprob is None
