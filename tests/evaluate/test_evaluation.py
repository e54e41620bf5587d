from __future__ import annotations

import math

import pytest

from rlvr_lab.core.entropy import answer_entropy
from rlvr_lab.evaluate.evaluation import Evaluation, evaluate
from rlvr_lab.evaluate.passk import pass_at_k
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.grading import response_texts
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.registry import CountdownTask

SAMPLES = 6
PROBLEMS = list(countdown.problems(5, 0, evaluation=True))


def measure(policy: Policy, seed: int = 0, temperature: float = 1.0) -> Evaluation:
    return evaluate(
        policy, CountdownTask(), PROBLEMS, samples=SAMPLES, sampling=Sampling(temperature, 32, 7), seed=seed
    )


@pytest.fixture(scope="module")
def result(tiny_s: Policy) -> Evaluation:
    return measure(tiny_s)


def test_figures_agree_with_the_responses(tiny_s: Policy, result: Evaluation) -> None:
    texts, finished = response_texts(result.rollout, tiny_s), result.rollout.finished.tolist()
    for i, (problem, one) in enumerate(zip(PROBLEMS, result.problems, strict=True)):
        rows = range(i * SAMPLES, (i + 1) * SAMPLES)
        verdicts = [countdown.verify(problem, texts[j], finished[j]) for j in rows]
        assert one.problem == str(problem)
        assert one.correct == sum(v.correct for v in verdicts)
        assert one.distinct == len({v.answer for v in verdicts if v.correct})
        assert one.answer_entropy == answer_entropy([v.answer for v in verdicts])
        assert one.finished == pytest.approx(sum(finished[j] for j in rows) / SAMPLES)
        assert one.mean_tokens == pytest.approx(sum(len(texts[j].split()) for j in rows) / SAMPLES)


def test_the_summary_has_what_the_samples_allow(result: Evaluation) -> None:
    summary = result.summary()
    assert [k for k in summary if k.startswith("pass@") and "interval" not in k] == ["pass@1", "pass@2", "pass@4"]
    assert summary["pass@2"] == pytest.approx(float(pass_at_k(SAMPLES, result.correct, 2).mean()))
    assert summary["pass@2"] == result.pass_at(2)
    for k in (1, 2, 4):
        low, high = summary[f"pass@{k}_interval"]
        assert 0 <= low <= summary[f"pass@{k}"] <= high <= 1
    assert summary["distinct_correct"] == result.mean("distinct")
    assert summary["sequence_entropy"] >= summary["token_entropy"] > 0
    assert (summary["problems"], summary["samples"]) == (5, SAMPLES)
    assert summary == result.summary()
    assert all(math.isfinite(v) for v in summary.values() if isinstance(v, float))


def test_the_same_seed_gives_the_same_figures(tiny_s: Policy, result: Evaluation) -> None:
    assert measure(tiny_s).problems == result.problems
    assert measure(tiny_s, seed=1).problems != result.problems


def test_greedy_evaluation_has_no_entropy(tiny_s: Policy) -> None:
    greedy = measure(tiny_s, temperature=0)
    assert greedy.token_entropy == greedy.sequence_entropy == 0
    assert all(p.answer_entropy == 0 and p.correct in (0, SAMPLES) for p in greedy.problems)


def test_nothing_to_evaluate_is_refused(tiny_s: Policy) -> None:
    for problems, samples in (([], 4), (PROBLEMS, 0)):
        with pytest.raises(ValueError, match="at least one problem and one sample"):
            evaluate(tiny_s, CountdownTask(), problems, samples=samples, sampling=Sampling())
