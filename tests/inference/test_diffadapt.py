"""DiffAdapt: golden replay, rules at their thresholds, curve, oracle, control, probe, and the method on two models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from builders import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rlvr_lab.errors import UserError
from rlvr_lab.inference import difficulty as d
from rlvr_lab.inference.diffadapt import PAPER, PLAIN, DiffAdapt
from rlvr_lab.inference.probe import Probe, ProbeSettings, assess, fit_probe, probe_logits, probe_loss
from rlvr_lab.inference.strategies import Strategy, check_table
from rlvr_lab.policy.load import Policy
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.countdown_difficulty import chance
from rlvr_lab.testing.golden import Case, read_cases, replay, replay_file

AT = d.Thresholds(alpha=0.8, beta=0.45, gamma=0.3)
RATES, ENTROPIES = st.floats(0, 1), st.floats(0, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def verify(text: str, problem: countdown.Problem) -> bool:
    return countdown.verify(problem, text).correct


def pairs(n: int, evaluation: bool = False) -> list[tuple[str, countdown.Problem]]:
    return [(p.prompt, p) for p in countdown.problems(n, 0, evaluation)]


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "diffadapt.json")}
    assert len(problems) >= 5
    assert not any(problems.values()), problems


def test_golden_cases_of_the_same_format_replay(tmp_path) -> None:
    """An empty sample, an unknown entropy and a curve that rises: keys decide, not the file."""
    data = json.loads((GOLDEN / "diffadapt.json").read_text())
    entropy, labels = data["cases"][:2]
    entropy["inputs"]["logits_per_sample"].append([])
    entropy["outputs"]["per_sample"].append(None)
    labels["inputs"] = {"correct_rate": [1.0, 0.1, 0.3], "generation_entropy": [None, None, 0.1]}
    labels["outputs"] = {"label": ["easy", "hard", "easy"]}
    path = tmp_path / "diffadapt.json"
    path.write_text(json.dumps(data))
    assert [replay(case).problem for case in read_cases(path)[:2]] == [None, None]


# ------------------------------------------------------------------------------------------------ entropy and labels


def test_entropy_is_the_mean_over_tokens_then_over_samples_that_have_one() -> None:
    tokens = [torch.tensor([1.0, 3.0]), torch.tensor([]), torch.tensor([5.0])]
    per_sample = d.generation_entropy(tokens)
    assert per_sample[[0, 2]].tolist() == [2.0, 5.0]
    assert math.isnan(per_sample[1])
    assert d.problem_entropy(per_sample) == 3.5
    assert math.isnan(d.problem_entropy(d.generation_entropy([torch.tensor([])])))
    assert d.sample_entropies([1.0, 3.0, 8.0], first=2) == (4.0, 12.0, 2.0)
    assert math.isnan(d.sample_entropies([])[0])


@pytest.mark.parametrize(
    ("rate", "entropy", "label"),
    [
        (0.8, 0.45, "normal"),  # both inclusive
        (0.8, 0.4501, "easy"),
        (0.7999, 0.45, "easy"),
        (0.3, 0.1, "easy"),  # strictly below gamma is hard
        (0.2999, 0.1, "hard"),
        (0.0, 0.0, "hard"),
        (1.0, math.nan, "easy"),
        (0.0, math.nan, "hard"),
    ],
)
def test_ties_at_the_thresholds(rate: float, entropy: float, label: str) -> None:
    assert d.proxy_labels([rate], [entropy], AT) == [label]


@given(st.lists(st.tuples(RATES, ENTROPIES), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_labels_do_not_depend_on_the_order_of_problems(rows, random) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    labels = d.proxy_labels(*zip(*rows, strict=True), AT)
    shuffled = d.proxy_labels(*zip(*[rows[i] for i in order], strict=True), AT)
    assert shuffled == [labels[i] for i in order]


@given(RATES, ENTROPIES, st.floats(0, 1))
def test_more_right_answers_never_make_a_problem_hard(rate, entropy, more) -> None:
    before, after = d.proxy_labels([rate, min(1.0, rate + more)], [entropy] * 2, AT)
    assert not (after == "hard" and before != "hard")


@given(st.lists(st.tuples(st.integers(0, 10), ENTROPIES), min_size=1, max_size=40))
def test_chosen_thresholds_are_valid_and_leave_few_hard(rows) -> None:
    rate, entropy = [c / 10 for c, _ in rows], [h for _, h in rows]
    at = d.tercile_thresholds(rate, entropy)
    labels = d.proxy_labels(rate, entropy, at)
    assert at.gamma <= at.alpha
    assert labels.count("hard") <= len(rows) / 3 + 1
    assert "normal" in labels  # the least uncertain problem among the best


def test_bad_thresholds_are_named() -> None:
    with pytest.raises(UserError, match=r"0 <= gamma <= alpha <= 1, not gamma 0.9 and alpha 0.5"):
        d.Thresholds(0.5, 0.1, 0.9)
    with pytest.raises(UserError, match="beta is an entropy in nats"):
        d.Thresholds(0.5, -0.1, 0.2)
    with pytest.raises(UserError, match="give `thresholds`"):
        d.tercile_thresholds([0.5], [math.nan])


# ------------------------------------------------------------------------------------------- curve, oracle, control


@given(st.lists(st.floats(0.01, 2), min_size=3, max_size=10), st.floats(0.1, 10))
def test_the_curve_has_no_unit(levels, factor) -> None:
    one, scaled = d.u_curve(levels), d.u_curve([factor * h for h in levels])
    assert scaled.argmin_level == one.argmin_level
    assert (scaled.drop, scaled.rise) == pytest.approx((one.drop, one.rise), abs=1e-6)
    assert scaled.quadratic == pytest.approx(factor * one.quadratic, abs=1e-9)


def test_monotone_and_flat_curves_are_not_u_shaped() -> None:
    assert not d.u_curve([1.0, 2.0, 3.0]).is_u_shaped
    assert not d.u_curve([3.0, 2.0, 1.0]).is_u_shaped
    assert not d.u_curve([1.0, 1.0, 1.0]).is_u_shaped
    assert not d.u_curve([2.0, 1.0, 1.0]).is_u_shaped
    assert d.u_curve([2.0, 1.0, 1.5]).is_u_shaped
    assert math.isnan(d.u_curve([0.0, 0.0, 0.0]).drop)
    with pytest.raises(ValueError, match="at least three finite levels"):
        d.u_curve([1.0, 2.0])
    with pytest.raises(ValueError, match="at least three finite levels"):
        d.u_curve([1.0, math.nan, 2.0])


def outcomes(seed: int, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (n, 3)), rng.integers(1, 100, (n, 3))


@given(st.integers(0, 100))
def test_no_fixed_strategy_beats_the_oracle(seed) -> None:
    correct, tokens = outcomes(seed)
    found = d.oracle(correct, tokens)
    assert found.accuracy >= correct.mean(0).max()
    assert found.accuracy == pytest.approx(correct.any(1).mean())
    for i, choice in enumerate(d.oracle_choice(correct, tokens)):
        rivals = tokens[i][correct[i].astype(bool)] if correct[i].any() else tokens[i]
        assert tokens[i, choice] == rivals.min()


def test_ties_of_the_oracle_go_to_the_first_class() -> None:
    assert d.oracle([[1, 1, 1], [0, 0, 0], [0, 1, 1]], [[5, 5, 5], [7, 3, 3], [1, 4, 4]]).choice == (
        "easy", "normal", "normal",
    )  # fmt: skip
    with pytest.raises(ValueError, match="must both be"):
        d.oracle([[1, 0]], [[1, 2]])
    with pytest.raises(ValueError, match="at least one problem"):
        d.oracle(np.zeros((0, 3)), np.zeros((0, 3)))


def test_the_control_keeps_proportions_and_expects_their_mixture() -> None:
    correct, _ = outcomes(3, 60)
    choice = ["easy"] * 30 + ["normal"] * 20 + ["hard"] * 10
    deals = [d.matched_random(choice, generator(seed)) for seed in range(400)]
    assert all(sorted(deal) == sorted(choice) for deal in deals)
    assert d.matched_random(choice, generator(1)) == deals[1]
    places = np.array([[d.CLASSES.index(c) for c in deal] for deal in deals])
    means = correct[np.arange(60), places].mean(1)
    mixture = correct.mean(0) @ [0.5, 1 / 3, 1 / 6]
    assert means.mean() == pytest.approx(mixture, abs=4 * means.std() / 20)


# ------------------------------------------------------------------------------------------------ probe and strategies


def clusters(n: int = 60) -> tuple[torch.Tensor, list[str]]:
    labels = [d.CLASSES[i % 3] for i in range(n)]
    centres = torch.eye(3, 8) * 3
    noise = torch.randn(n, 8, generator=generator(5)) * 0.3
    return centres[[i % 3 for i in range(n)]] + noise, labels


def test_a_probe_learns_what_can_be_learned_and_repeats_itself() -> None:
    states, labels = clusters()
    settings = ProbeSettings(hidden=32, lr=1e-2)
    probe = fit_probe(states, labels, generator(), settings)
    found = assess(probe.predict(states), labels)
    assert found.accuracy == 1.0
    assert found.proportions == pytest.approx((1 / 3,) * 3)
    again = fit_probe(states, labels, generator(), settings)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters(), strict=True))
    state = torch.random.get_rng_state()
    fit_probe(states, labels, generator(), ProbeSettings(epochs=1))
    assert torch.equal(state, torch.random.get_rng_state())  # randomness comes from the generator alone


def test_the_loss_does_not_depend_on_how_rows_are_split_or_ordered() -> None:
    states, labels = clusters()
    y = torch.tensor([d.CLASSES.index(label) for label in labels])
    probe, order = Probe(8), torch.randperm(60, generator=generator())

    def gradient(parts) -> list[torch.Tensor]:
        probe.zero_grad()
        for rows in parts:
            (probe_loss(probe(states[rows]), y[rows]) * len(rows) / 60).backward()
        return [p.grad.clone() for p in probe.parameters()]

    whole = gradient([torch.arange(60)])
    for parts in (order.split(7), order.split(60)):
        for a, b in zip(whole, gradient(parts), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_probe_s_gradient_is_that_of_a_finite_difference() -> None:
    weights = [torch.randn(s, dtype=torch.float64, generator=generator(i)).requires_grad_()
               for i, s in enumerate([(4, 5), (4,), (3, 4), (3,)])]  # fmt: skip
    h, y = torch.randn(6, 5, dtype=torch.float64, generator=generator(9)), torch.tensor([0, 1, 2, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda *w: probe_loss(probe_logits(h, *w), y), weights)


def test_one_class_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        UserError, match="all 4 problems have one label, 'hard': a probe needs two classes; change thre"
    ):
        fit_probe(torch.zeros(4, 8), ["hard"] * 4, generator())
    with pytest.raises(UserError, match="not finite"):
        fit_probe(torch.full((2, 8), math.nan), ["hard", "easy"], generator())


def test_a_collapse_to_the_majority_is_seen() -> None:
    found = assess(["easy"] * 5, ["easy", "easy", "easy", "normal", "hard"])
    assert found.called == (1.0, 0.0, 0.0)
    assert found.accuracy == found.majority == 0.6
    assert found.confusion == ((3, 0, 0), (1, 0, 0), (1, 0, 0))
    assert "majority class 0.600" in str(found)
    assert math.isnan(assess([], []).accuracy)


def test_budgets_are_rounded_down_and_hard_gets_less_than_normal() -> None:
    assert {name: s.max_tokens(96) for name, s in PLAIN.items()} == {"easy": 38, "normal": 96, "hard": 48}
    assert [s.temperature for s in PAPER.values()] == [0.5, 0.8, 0.4]
    assert len({s.style for s in PAPER.values()}) == 3
    assert Strategy(1.0, 1.0, "Solve {question} in {x}").prompt("{x}") == "Solve {x} in {x}"


def test_bad_strategies_are_named() -> None:
    for bad in ((-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)):
        with pytest.raises(UserError, match="budget_fraction"):
            Strategy(*bad)
    with pytest.raises(UserError, match="exactly once"):
        Strategy(1.0, 1.0, "no question")
    with pytest.raises(UserError, match="must have the classes easy, normal, hard, not easy"):
        check_table({"easy": Strategy(1.0, 1.0)}, 10)
    with pytest.raises(UserError, match="max_tokens 2 leaves strategy 'easy' no token"):
        check_table(PLAIN, 2)


# ----------------------------------------------------------------------------------------------------- the method


@pytest.fixture(scope="module")
def adapt(tiny_s: Policy) -> DiffAdapt:
    return DiffAdapt.fit(
        tiny_s.model, tiny_s.tokenizer, pairs(30), verify, generator=generator(), max_tokens=40, samples=4,
        table=PLAIN, rows=256,
    )  # fmt: skip


def test_fitting_reports_classes_and_confusion(adapt: DiffAdapt) -> None:
    fitted = adapt.fitted
    assert fitted is not None
    assert (fitted.training.problems, fitted.held_out.problems) == (24, 6)
    assert sum(fitted.training.proportions) == pytest.approx(1)
    assert len(fitted.labelled.label) == 30
    assert set(fitted.labelled.correct_rate) <= {0, 0.25, 0.5, 0.75, 1}
    # in the order of the problems: those of three numbers are the ones solved more often
    rates = np.array(fitted.labelled.correct_rate)
    three = np.array([len(problem.numbers) == 3 for _, problem in pairs(30)])
    assert rates[three].mean() > rates[~three].mean()


def test_a_run_reports_tokens_and_accuracy_beside_the_normal_strategy(adapt: DiffAdapt) -> None:
    found = adapt.run(pairs(12, True), verify=verify, generator=generator(3))
    assert found.notes["strategy"] == adapt.choose([t for t, _ in pairs(12, True)])
    assert not any(found.extra_tokens)  # one template: nothing is read twice
    limits = {name: s.max_tokens(40) for name, s in PLAIN.items()}
    assert all(n <= limits[s] for n, s in zip(found.tokens, found.notes["strategy"], strict=True))
    again = adapt.run(pairs(12, True), verify=verify, generator=generator(3))
    assert found.rows() == again.rows()


def test_normal_for_all_is_the_baseline_itself(adapt: DiffAdapt) -> None:
    found = adapt.run(pairs(8, True), verify=verify, generator=generator(), choice=["normal"] * 8)
    assert list(found.tokens) == list(found.baseline_tokens)
    assert found.accuracy_change == (0.0, 0.0, 0.0)
    for bad in (["normal"] * 7, ["plain"] * 8):
        with pytest.raises(UserError, match="one of easy, normal, hard for each of the 8 problems"):
            adapt.run(pairs(8, True), generator=generator(), choice=bad)


def test_a_run_without_verifier_still_counts_tokens(adapt: DiffAdapt) -> None:
    found = adapt.run([t for t, _ in pairs(4, True)], generator=generator())
    assert math.isnan(found.accuracy.value)
    assert not math.isnan(found.tokens_saved.value)


def test_a_saved_probe_is_the_same_probe(adapt: DiffAdapt, tiny_s: Policy, tmp_path) -> None:
    adapt.save(tmp_path / "probe")
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["diffadapt.json", "probe.safetensors"]
    loaded = DiffAdapt.load(tiny_s.model, tiny_s.tokenizer, tmp_path / "probe", rows=256)
    texts = [t for t, _ in pairs(12, True)]
    assert loaded.choose(texts) == adapt.choose(texts)
    assert (loaded.max_tokens, dict(loaded.table)) == (40, dict(PLAIN))


@pytest.mark.parametrize("broken", ["missing", "text", "weights", "json", "table", "shape"])
def test_a_broken_probe_is_one_clear_line(adapt: DiffAdapt, tiny_s: Policy, tmp_path, broken: str) -> None:
    adapt.save(tmp_path)
    weights, settings = tmp_path / "probe.safetensors", tmp_path / "diffadapt.json"
    if broken == "missing":
        weights.unlink()
    elif broken == "text":
        weights.write_text("no weights")
    elif broken == "weights":
        from safetensors.torch import save_file

        save_file({"first.weight": torch.zeros(4, 96)}, weights)
    elif broken == "json":
        settings.write_text("{")
    elif broken == "table":
        settings.write_text('{"max_tokens": 40, "table": {"easy": {"heat": 1}}}')
    else:
        from safetensors.torch import save_file

        save_file({"first.weight": torch.zeros(4)}, weights)
    with pytest.raises(UserError) as caught:
        DiffAdapt.load(tiny_s.model, tiny_s.tokenizer, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_probe_of_another_model_is_refused(tiny_s: Policy) -> None:
    with pytest.raises(UserError, match="states of width 8, the model has 96"):
        DiffAdapt(tiny_s.model, tiny_s.tokenizer, Probe(8), max_tokens=40)


def test_problems_that_one_label_covers_are_refused(tiny_s: Policy) -> None:
    with pytest.raises(UserError, match="have one label, 'hard'"):
        DiffAdapt.fit(
            tiny_s.model, tiny_s.tokenizer, pairs(6), lambda text, answer: False, generator=generator(),
            max_tokens=40, samples=2, table=PLAIN, thresholds=AT,
        )  # fmt: skip
    with pytest.raises(UserError, match="leaves 1 to train on"):
        DiffAdapt.fit(tiny_s.model, tiny_s.tokenizer, pairs(1), verify, generator=generator(), table=PLAIN)


def test_another_architecture_runs_in_three_lines(tiny_s: Policy) -> None:
    """GPT-2, randomly initialised, with prompts of unequal length and the paper's table of styles."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=128, n_positions=128, n_embd=32, n_layer=2, n_head=2, eos_token_id=countdown.EOS)
        )
    numbers = [str(i) + " +" * (i % 4) for i in range(24)]
    adapt = DiffAdapt.fit(
        model, tiny_s.tokenizer, numbers, lambda text, _: "7" in text.split(), generator=generator(),
        max_tokens=12, samples=4,
    )  # fmt: skip
    report = adapt.run(numbers, verify=lambda text, _: "7" in text.split(), generator=generator(1))
    assert len(report) == 24
    for strategy, extra in zip(report.notes["strategy"], report.extra_tokens, strict=True):
        assert (extra > 0) == (strategy != "normal")  # another style is read anew
    assert report.tokens_saved_net.value <= report.tokens_saved.value


# ------------------------------------------------------------------------------------------ difficulty without a model


def test_the_chance_of_a_problem_with_three_numbers_is_that_of_all_chains() -> None:
    problem = countdown.Problem((1, 1, 1), 3)  # 1 + 1 = 2 alone is legal at first (1 - 1, 1 * 1, 1 / 1 are not)
    # then 2 + 1 and 2 - 1 are, which is one in two
    assert chance(problem, np.random.default_rng(0)) == pytest.approx(0.5, abs=0.04)
    assert chance(countdown.Problem((1, 1, 1), 50), np.random.default_rng(0)) == 0
    with pytest.raises(ValueError, match="draws must be at least 1"):
        chance(problem, np.random.default_rng(0), 0)


def test_case_keys_are_what_the_rules_match(tmp_path) -> None:
    cases: list[Case] = read_cases(GOLDEN / "diffadapt.json")
    assert {case.kind for case in cases} == {
        "generation_entropy", "proxy_label", "probe", "u_shape", "oracle_choice",
    }  # fmt: skip
