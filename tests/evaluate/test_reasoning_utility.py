"""Conditional entropy along a chain: the formulas at their edges, steps, controls, and the scorer on any model."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from builders import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.evaluate import reasoning_utility as ru
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.testing.golden import replay_file

VALUES = st.lists(st.floats(0, 5, allow_subnormal=False), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny/S", device="cpu")


def chain(entropy: list[float]) -> ru.Trajectory:
    rows = tuple((h,) for h in entropy)
    return ru.Trajectory(rows, rows)


def test_golden_cases() -> None:
    results = replay_file(GOLDEN / "reasoning_utility.json")
    assert len(results) == 4
    assert [r.problem for r in results] == [None] * 4


# -- formulas ---------------------------------------------------------------------------------------------------------


@given(values=VALUES)
def test_a_trajectory_agrees_with_its_definitions(values: list[float]) -> None:
    found = chain(values)
    assert found.steps == len(values) - 1
    assert math.isclose(sum(found.utility), found.total_reduction, abs_tol=1e-9)
    falls = [b < a for a, b in pairwise(values)]
    assert found.monotone == all(falls)
    if found.steps:
        assert found.fraction_decreasing == pytest.approx(sum(falls) / found.steps)
        assert found.slope == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-6)


def test_mean_and_sum_differ_by_the_number_of_answer_tokens() -> None:
    logits = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, total = (ru.Trajectory.from_logits(logits, torch.tensor([1, 5, 0]), r) for r in ("mean", "sum"))
    for name in ("entropy", "nll"):
        assert getattr(total, name) == pytest.approx([3 * x for x in getattr(mean, name)])
    assert mean.first_entropy == total.first_entropy == tuple(row[0] for row in mean.token_entropy)


def test_entropy_is_not_the_loss_of_the_answer() -> None:
    """A scorer that is surely wrong has little entropy and a large negative log-likelihood."""
    found = ru.Trajectory.from_logits(torch.tensor([[[0.0, 0.0, 0.0]], [[9.0, 0.0, 0.0]]]), torch.tensor([1]))
    assert found.entropy[0] == pytest.approx(math.log(3))
    assert found.entropy[1] < 0.01
    assert found.nll[1] > 8


def test_no_steps() -> None:
    found = chain([0.7])
    assert (found.slope, found.fraction_decreasing, found.total_reduction) == (None, None, 0)
    assert found.utility == ()
    assert found.monotone


def test_no_uncertainty_to_begin_with_leaves_no_relative_reduction() -> None:
    assert chain([0.0, 0.5]).relative_reduction is None
    assert chain([0.5, 0.0]).relative_reduction == 1


def test_a_flat_chain_is_not_decreasing() -> None:
    found = chain([0.5, 0.5, 0.5])
    assert (found.fraction_decreasing, found.monotone, found.slope) == (0, False, 0)


@pytest.mark.parametrize("rows", [(), ((),), ((0.1,), ())])
def test_an_empty_trajectory_is_refused(rows: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError, match="one answer token or more"):
        ru.Trajectory(rows, rows)


# -- association ------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), st.booleans()), max_size=12)


@given(pairs=SCORES)
def test_auroc_counts_pairs(pairs: list[tuple[float, bool]]) -> None:
    right, wrong = ([s for s, c in pairs if c is kind] for kind in (True, False))
    found = ru.auroc([s for s, _ in pairs], [c for _, c in pairs])
    if not right or not wrong:
        assert found is None
    else:
        wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
        assert found == pytest.approx(wins / (len(right) * len(wrong)))
        assert ru.auroc([-s for s, _ in pairs], [c for _, c in pairs]) == pytest.approx(1 - found)


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]])
def test_one_class_has_no_association(correct: list[int]) -> None:
    found = ru.association([0.1, 0.4, 0.2], correct)
    assert found.auroc is None
    assert found.point_biserial is None
    assert [found.mean_correct, found.mean_incorrect][correct[0]] is None


def test_a_constant_score_has_no_correlation_and_an_even_auroc() -> None:
    found = ru.association([1.0, 1.0, 1.0], [1, 0, 1])
    assert (found.auroc, found.point_biserial) == (0.5, None)


def test_chains_without_a_score_are_left_out() -> None:
    assert ru.association([0.9, None, 0.1], [1, 1, 0]) == ru.association([0.9, 0.1], [1, 0])


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match="without nan"):
        ru.auroc([0.1, math.nan], [1, 0])
    with pytest.raises(ValueError, match="one number for each chain"):
        ru.auroc([0.1, 0.2, 0.3], [1, 0])


def test_the_interval_draws_whole_problems() -> None:
    rng = np.random.default_rng
    score, correct = np.repeat([0.9, 0.2, 0.8, 0.4], 50), np.repeat([1, 0, 0, 1], 50)
    by_problem = ru.auroc_interval(score, correct, list(np.repeat(range(4), 50)), rng(0))
    by_chain = ru.auroc_interval(score, correct, list(range(200)), rng(0))
    assert by_problem is not None
    assert by_chain is not None
    assert by_problem[1] - by_problem[0] > 3 * (by_chain[1] - by_chain[0])
    assert ru.auroc_interval([0.1, 0.2], [1, 1], [0, 1], rng(0)) is None
    assert ru.auroc_interval([], [], [], rng(0)) is None


# -- steps ------------------------------------------------------------------------------------------------------------


@given(
    text=st.text(alphabet="ab.!? \n\t3", max_size=60), unit=st.sampled_from(["auto", "paragraph", "line", "sentence"])
)
def test_steps_joined_are_the_text_and_none_is_blank(text: str, unit: Any) -> None:
    steps = ru.split_steps(text, unit)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        (" \n ", []),
        ("one", ["one"]),
        ("a\nb\n\nc", ["a\nb\n\n", "c"]),
        ("a\nb\n", ["a\n", "b\n"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("Take 3.5. Then add. Done?", ["Take 3.5. ", "Then add. ", "Done?"]),
    ],
)
def test_where_steps_are_cut(text: str, steps: list[str]) -> None:
    assert ru.split_steps(text) == steps


def test_an_unknown_unit_of_steps() -> None:
    with pytest.raises(UserError, match=r"unit 'lines' of steps is unknown; did you mean 'line'\?"):
        ru.split_steps("a", "lines")  # type: ignore[arg-type]


@given(steps=st.lists(st.integers(0, 9), unique=True, max_size=6), seed=st.integers(0, 99))
def test_shuffled_steps_are_the_same_in_another_order(steps: list[int], seed: int) -> None:
    found = ru.shuffled_steps([[s] for s in steps], np.random.default_rng(seed))
    assert sorted(found) == sorted([s] for s in steps)
    assert (found == [[s] for s in steps]) == (len(steps) < 2)


def test_irrelevant_steps_are_others_of_the_same_length() -> None:
    pool = [[1, 2], [3, 4], [5], [6], [7, 8, 9]]
    found = ru.irrelevant_steps([[1, 2], [6], [1, 2]], pool, np.random.default_rng(0))
    assert found == [[3, 4], [5], [3, 4]]
    with pytest.raises(UserError, match="none of length 4"):
        ru.irrelevant_steps([[1, 2, 3, 4]], pool, np.random.default_rng(0))


# -- the scorer -------------------------------------------------------------------------------------------------------

QUESTION = "<bos> _ 10 1 4 to 44 <think>"
STEPS = ["10 + 1 = 11", "11 * 4 = 44"]
ANSWER = "( 10 + 1 ) * 4"


@torch.no_grad()
def by_hand(policy: Policy, texts: list[str], answer: list[int]) -> tuple[list[float], list[float]]:
    ids = policy.encode(" ".join(texts))
    log_p = policy.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).tolist(), (-log_p[range(len(answer)), answer]).tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_the_scorer_gives_what_whole_texts_give(policy: Policy, cached: bool) -> None:
    found = ru.Scorer(policy.model, policy.tokenizer, cue="</think>", cached=cached)(QUESTION, STEPS, ANSWER)
    for k in range(3):
        entropy, nll = by_hand(policy, [QUESTION, *STEPS[:k], "</think>"], policy.encode(ANSWER))
        assert found.token_entropy[k] == pytest.approx(entropy, abs=1e-5)
        assert found.token_nll[k] == pytest.approx(nll, abs=1e-5)


def test_ids_and_texts_give_the_same(policy: Policy) -> None:
    texts = ru.Scorer(policy.model, policy.tokenizer, cue="</think>")(QUESTION, STEPS, ANSWER)
    scorer = ru.Scorer(policy.model, policy.tokenizer, cue=policy.encode("</think>"))
    ids = scorer(policy.encode(QUESTION), [policy.encode(s) for s in STEPS], policy.encode(ANSWER))
    assert ids == texts


def test_one_answer_token_is_the_first_of_all_and_does_not_know_the_answer(policy: Policy) -> None:
    whole, first = (
        ru.Scorer(policy.model, policy.tokenizer, cue="</think>", answer_tokens=n)(QUESTION, STEPS, ANSWER)
        for n in (None, 1)
    )
    assert first.entropy == pytest.approx(whole.first_entropy, abs=1e-6)
    other = ru.Scorer(policy.model, policy.tokenizer, cue="</think>", answer_tokens=1)(QUESTION, STEPS, "4 * 11")
    assert other.entropy == pytest.approx(first.entropy, abs=1e-6)
    assert other.nll[2] > first.nll[2] + 1


def test_the_predicted_span_is_the_scorers_own_greedy_answer(policy: Policy) -> None:
    scorer = ru.Scorer(policy.model, policy.tokenizer, cue="yes </think>", span="predicted")
    found = scorer(QUESTION, STEPS)
    answer = policy.encode(ANSWER)  # what the chain ends in; a copy that the model is sure of
    assert len(found.token_entropy[2]) == len(answer)
    entropy, nll = by_hand(policy, [QUESTION, *STEPS, "yes </think>"], answer)
    assert found.token_entropy[2] == pytest.approx(entropy, abs=1e-5)
    assert found.token_nll[2] == pytest.approx(nll, abs=1e-5)
    cut = ru.Scorer(policy.model, policy.tokenizer, cue="yes </think>", span="predicted", max_answer=2)
    assert [len(row) for row in cut(QUESTION, STEPS).token_entropy] == [2, 2, 2]


def test_any_model_of_transformers(policy: Policy) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2)
        model = GPT2LMHeadModel(config).eval()
    cached, anew = (
        ru.Scorer(model, policy.tokenizer, cue="</think>", cached=c)(QUESTION, STEPS, ANSWER) for c in (True, False)
    )
    for name in ("token_entropy", "token_nll"):
        for row, other in zip(getattr(cached, name), getattr(anew, name), strict=True):
            assert row == pytest.approx(other, abs=1e-5)
    assert cached.entropy[0] == pytest.approx(math.log(128), abs=0.2)


def test_no_gradient_and_no_change(policy: Policy) -> None:
    scorer = ru.Scorer(policy.model, policy.tokenizer, cue="</think>")
    steps = [policy.encode(s) for s in STEPS]
    assert scorer(policy.encode(QUESTION), steps, ANSWER) == scorer(policy.encode(QUESTION), steps, ANSWER)
    assert steps == [policy.encode(s) for s in STEPS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cue": ""}, "cue holds no token"),
        ({"span": "golden"}, "span 'golden' is unknown; did you mean 'gold'?"),
        ({"reduction": "max"}, "reduction 'max' is unknown; did you mean 'mean'?"),
        ({"answer_tokens": 0}, "answer_tokens and max_answer must be at least 1, not 0 and 16"),
    ],
)
def test_bad_settings(policy: Policy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ru.Scorer(policy.model, policy.tokenizer, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("answer", [None, "", []])
def test_an_empty_answer_span(policy: Policy, answer: Any) -> None:
    with pytest.raises(UserError, match="the answer span is empty: answer needs a token, or span='predicted'"):
        ru.Scorer(policy.model, policy.tokenizer, cue="</think>")(QUESTION, STEPS, answer)


def test_an_empty_question(policy: Policy) -> None:
    with pytest.raises(UserError, match="the question holds no token"):
        ru.Scorer(policy.model, policy.tokenizer, cue="</think>")("", STEPS, ANSWER)


def test_a_chain_beyond_the_context(policy: Policy) -> None:
    with pytest.raises(UserError, match="question and steps have 123 tokens, cue and answer 8: more than the model's"):
        ru.Scorer(policy.model, policy.tokenizer, cue="</think>")(QUESTION, [[30] * 115], ANSWER)
