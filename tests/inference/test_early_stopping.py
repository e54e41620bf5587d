"""Early stopping: the rule, the two controls, and responses that are those of plain sampling until they are stopped."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.core.entropy import softmax_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.inference.early_stopping import EarlyStopping, Rule, fixed_budget, random_positions, stop_place
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.tasks import countdown

STEP = r"(= \d+|yes|no)$"
PROBLEMS = [(p.prompt, p) for p in countdown.problems(6, 1, evaluation=True)]
ENTROPIES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]), max_size=7)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny/R", device="cpu")


def made(policy: Policy, **settings: Any) -> EarlyStopping:
    own = {"cue": "</think>", "close": "</think>", "step_end": STEP, "max_tokens": 96} | settings
    return EarlyStopping(policy.model, policy.tokenizer, **own)


def verify(text: str, problem: countdown.Problem) -> bool:
    return countdown.verify(problem, text).correct


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# -- the rule ---------------------------------------------------------------------------------------------------------


@given(entropy=ENTROPIES, threshold=st.sampled_from([0.0, 0.2, 0.5, 2.0]), least=st.integers(1, 3))
def test_a_threshold_stops_at_the_first_step_below_it(entropy: list[float], threshold: float, least: int) -> None:
    below = [k for k, h in enumerate(entropy, start=1) if h < threshold and k >= least]
    assert stop_place(entropy, Rule(threshold, min_steps=least)) == (below[0] if below else None)


@pytest.mark.parametrize(
    ("entropy", "patience", "drop", "place"),
    [
        ([0.9, 0.5, 0.5, 0.1], 1, 0.0, 3),
        ([0.9, 0.5, 0.5, 0.1], 2, 0.0, None),
        ([0.9, 0.5, 0.5, 0.6, 0.1], 2, 0.0, 4),
        ([0.9, 0.8, 0.7], 1, 0.2, 2),
        ([0.9, 0.5, 0.1], 1, 0.0, None),
        ([0.5], 1, 0.0, None),
        ([], 1, 0.0, None),
    ],
)
def test_patience_stops_once_the_entropy_no_longer_falls(
    entropy: list[float], patience: int, drop: float, place: int | None
) -> None:
    assert stop_place(entropy, Rule(patience=patience, min_drop=drop)) == place


# -- the controls -----------------------------------------------------------------------------------------------------


def test_random_positions_are_the_same_places_dealt_anew() -> None:
    places = [1, 1, None, 2, 3, None, 1, 2]
    found = random_positions(places, np.random.default_rng(0))
    assert found != places
    assert sorted(map(str, found)) == sorted(map(str, places))


LENGTHS = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda steps: np.cumsum(steps).tolist()),
    min_size=1,
    max_size=8,
)


@given(lengths=LENGTHS, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_fixed_budget_thinks_as_many_tokens_up_to_one_step(lengths: list[list[int]], share: float, seed: int) -> None:
    first, whole = sum(row[0] for row in lengths), sum(row[-1] for row in lengths)
    thought = first + round(share * (whole - first))
    places = fixed_budget(lengths, thought, np.random.default_rng(seed))
    assert max(places) - min(places) <= 1
    used = sum(row[min(k, len(row)) - 1] for k, row in zip(places, lengths, strict=True))
    assert thought - 9 < used <= thought


# -- on a model -------------------------------------------------------------------------------------------------------


def test_what_is_never_stopped_is_what_plain_sampling_gives(policy: Policy) -> None:
    report = made(policy, threshold=0.0).run(PROBLEMS, verify=verify, generator=seeded())
    assert list(report.tokens) == list(report.baseline_tokens)
    assert report.correct == report.baseline_correct
    assert set(report.notes["stopped_after"]) == {None}
    assert report.tokens_saved.value == 0
    assert sum(report.extra_tokens or ()) == sum(len(h) for h in report.notes["answer_entropy"]) > 0


@pytest.mark.parametrize("signal", ["first_token", "answer"])
def test_a_stopped_response_is_the_beginning_of_the_plain_one_and_an_answer(policy: Policy, signal: str) -> None:
    method = made(policy, threshold=0.5, signal=signal)
    report = method.run(PROBLEMS, verify=verify, generator=seeded())
    plain = made(policy, threshold=0.0).run(PROBLEMS, generator=seeded())
    places = report.notes["stopped_after"]
    assert any(places)
    for place, text, whole, h in zip(places, report.text, plain.text, report.notes["answer_entropy"], strict=True):
        if place is None:
            assert text == whole
            continue
        thinking, answer = text.split("</think>")
        assert whole.startswith(thinking)
        assert answer.strip()
        assert len(h) == place
        assert h[-1] < 0.5 <= min([1.0, *h[:-1]])
    assert report.tokens_saved.value > 0
    assert report.tokens_saved_net.value < report.tokens_saved.value


@torch.no_grad()
def test_the_entropy_is_that_of_the_answer_behind_the_cue(policy: Policy) -> None:
    first, answer = (
        made(policy, threshold=0.0, signal=signal).chart(PROBLEMS[:2], generator=seeded())
        for signal in ("first_token", "answer")
    )
    for i, chain in enumerate(first):
        prompt, whole = list(PROBLEMS[i][1].prompt_ids), list(chain.responses[-1].ids)
        for k, h in enumerate(chain.entropy):
            ids = prompt + whole[: chain.thought[k]] + policy.encode("</think>")
            logits = policy.model(torch.tensor([ids])).logits[0, -1]
            assert h == pytest.approx(float(softmax_entropy(logits)), abs=1e-5)
        greedy, token = [], int(logits.argmax())
        while token not in policy.eos_ids and len(greedy) < 16:
            greedy.append(float(softmax_entropy(logits)))
            ids.append(token)
            logits = policy.model(torch.tensor([ids])).logits[0, -1]
            token = int(logits.argmax())
        assert answer[i].entropy[-1] == pytest.approx(np.mean(greedy), abs=1e-5)


def test_a_chart_holds_what_every_rule_would_have_given(policy: Policy) -> None:
    chart = made(policy, threshold=0.0).chart(PROBLEMS, verify=verify, generator=seeded())
    for threshold in (0.02, 0.3, 5.0):
        report = made(policy, threshold=threshold).run(PROBLEMS, verify=verify, generator=seeded())
        places = [stop_place(chain.entropy, Rule(threshold)) for chain in chart]
        assert places == report.notes["stopped_after"]
        assert [c.tokens(p) for c, p in zip(chart, places, strict=True)] == list(report.tokens)
        assert [c.responses[c.at(p)].text for c, p in zip(chart, places, strict=True)] == list(report.text)
        assert [c.correct[c.at(p)] for c, p in zip(chart, places, strict=True)] == report.correct  # type: ignore[index]
        assert [c.extra[c.at(p) if p is None else p - 1] for c, p in zip(chart, places, strict=True)] == (
            report.extra_tokens
        )


def test_places_that_are_given_need_no_reading(policy: Policy) -> None:
    places = [1, 2, None, 1, 99, 3]
    report = made(policy, threshold=0.5).run(PROBLEMS, generator=seeded(), places=places)
    chart = made(policy, threshold=0.0).chart(PROBLEMS, generator=seeded())
    assert [c.tokens(p) for c, p in zip(chart, places, strict=True)] == list(report.tokens)
    assert set(report.extra_tokens or ()) == {0}
    assert report.notes["stopped_after"][4] is None
    with pytest.raises(UserError, match="places has 2 entries for 6 problems"):
        made(policy, threshold=0.5).run(PROBLEMS, generator=seeded(), places=[1, 2])


def test_nothing_is_read_behind_the_end_of_the_thinking(policy: Policy) -> None:
    for chain in made(policy, threshold=0.0).chart(PROBLEMS, generator=seeded()):
        words = chain.responses[-1].text.split()
        close = words.index("</think>")
        steps = sum(w in ("=", "yes", "no") for w in words[:close])
        assert len(chain.entropy) == steps
        assert chain.thought[-1] == close + 1


def test_the_limit_on_tokens_holds_for_stopped_responses_too(policy: Policy) -> None:
    report = made(policy, threshold=9.0, max_tokens=7).run(PROBLEMS, generator=seeded())
    assert max(report.tokens) == 7
    assert set(report.notes["stopped_after"]) == {1}


def test_a_foreign_model_with_a_tokenizer_of_its_own() -> None:
    """Random weights, another architecture, lines as steps, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    characters = ["<end>", "\n", " ", ":", *"abcdefghijklmnopqrstuvwxyzTA?"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="?")
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(characters), eos_token_id=0, bos_token_id=0, **size))
    method = EarlyStopping(model, tokenizer, threshold=10.0, cue="\nThe answer is", max_tokens=80)
    report = method.run(["what", "where"], verify=lambda text, answer: "a" in text, generator=seeded())
    assert any(report.notes["stopped_after"])
    assert "tokens a problem" in str(report)
    for h in report.notes["answer_entropy"]:
        assert h == pytest.approx([math.log(len(characters))] * len(h), abs=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "early stopping needs threshold or patience"),
        ({"threshold": -0.1}, "threshold is an entropy in nats and must be at least 0, not -0.1"),
        ({"threshold": math.nan}, "threshold is an entropy in nats"),
        ({"patience": 0}, "patience 0 and min_steps 1 must be at least 1"),
        ({"patience": 1, "min_drop": -1.0}, "min_drop -1.0 at least 0"),
        ({"threshold": 0.1, "cue": ""}, "cue holds no token"),
        ({"threshold": 0.1, "signal": "first"}, "signal 'first' is unknown; did you mean 'first_token'?"),
        ({"threshold": 0.1, "step_end": "("}, "step_end is no pattern"),
        ({"threshold": 0.1, "max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_bad_settings(policy: Policy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        made(policy, **settings)
    assert message in str(caught.value)


def test_no_room_to_read_an_answer(policy: Policy) -> None:
    with pytest.raises(UserError, match="lower it to at most 103"):
        made(policy, threshold=0.1, signal="answer", max_tokens=110).run(PROBLEMS, generator=seeded())


def test_no_problems(policy: Policy) -> None:
    with pytest.raises(UserError, match="at least one text"):
        made(policy, threshold=0.1).run([], generator=seeded())
