"""The IFEval-style verifier: each rule both ways, loose scoring, points, hostile text, broken files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.base import Outcome
from rlvr_lab.tasks.ifeval import MAX_CHARACTERS, RULES, IFEvalProblem, IFEvalTask, count_sentences, keeps, load_ifeval

# id, arguments, a text that keeps the rule, one that does not
EXAMPLES = [
    ("keywords:existence", {"keywords": ["tea", "Milk"]}, "Milk for the TEA", "only tea"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "Go, go", "go"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "go", "go go"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "a category", "a Cat"),
    ("keywords:letter_frequency", {"letter": "x", "let_frequency": 1, "let_relation": "less than"}, "none", "eXit"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "one two, three", "one two"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One, two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
     "a b\n\n\"So, c", "so\n\nthen"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "bye\nP. S. more", "bye, ps"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "bye\np.p.s more", "bye\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n  - b", "* a\n** b\nc"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1 a"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:title", {}, "<<On tea>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it: done", "done: say it"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.\"", "The end. Or not"),
    ("startend:quotation", {}, "\"all of it\"", "\"not all"),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "all low", "ONE"),
    ("change_case:english_capital", {}, "LOUD 1", "Loud"),
    ("change_case:english_lowercase", {}, "quiet 1", "Quiet"),
    ("punctuation:no_comma", {}, "none here", "one, here"),
]  # fmt: skip


def problem(*rules: tuple[str, dict]) -> IFEvalProblem:
    return IFEvalProblem("Write.", tuple(rules), 1, "x:1")


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), EXAMPLES)
def test_a_rule_tells_a_text_that_keeps_it_from_one_that_does_not(name, arguments, good, bad):
    assert keeps(good, name, arguments)
    assert not keeps(bad, name, arguments)


def test_every_rule_has_an_example():
    assert {name for name, *_ in EXAMPLES} == set(RULES)


def test_loose_scoring_forgives_a_polite_first_line_and_asterisks():
    text = "Sure!\nquiet *words*\nBye!"
    assert not keeps(text, "change_case:english_lowercase", {})
    assert keeps(text, "change_case:english_lowercase", {}, "loose")
    quoted = '*"all"*'
    assert not keeps(quoted, "startend:quotation", {})
    assert keeps(quoted, "startend:quotation", {}, "loose")


def test_sentences_end_at_their_marks_and_not_at_decimals():
    assert count_sentences("It is 3.5 m. Is it? Yes!") == 3
    assert count_sentences("这是一句。这是第二句！") == 2
    assert count_sentences("no mark at all") == 1
    assert count_sentences("... !") == 0


def test_the_text_after_the_last_closing_tag_is_judged():
    rule = problem(("punctuation:no_comma", {}))
    assert IFEvalTask().grade(rule, "a, b</think> c, d </think> e", True).correct
    assert not IFEvalTask().grade(rule, "a </think> b, c", True).correct
    assert IFEvalTask().grade(rule, "no tag", True).correct
    verdict = IFEvalTask(thinks=True).grade(rule, "no tag", True)
    assert (verdict.outcome, verdict.points) == (Outcome.UNPARSABLE, {})


def test_points_are_those_of_the_rules_that_are_kept():
    rules = problem(
        ("length_constraints:number_sentences", {"num_sentences": 1, "relation": "exactly"}),
        ("startend:end_checker", {"end_phrase": "done."}),
        ("keywords:letter_frequency", {"letter": "q", "let_frequency": 1, "let_relation": "less than"}),
        ("punctuation:no_comma", {}),
    )
    every = IFEvalTask().grade(rules, "It is done.", True)
    assert every.correct
    assert every.points == {"dense": pytest.approx(0.2 + 0.1 + 0.2)}
    some = IFEvalTask().grade(rules, "Quick, it is done.", True)
    assert not some.correct
    assert some.reason == "breaks keywords:letter_frequency"
    assert some.points == {"dense": pytest.approx(0.3)}
    assert IFEvalTask(dense=False).grade(rules, "It is done.", True).points == {}
    assert IFEvalTask().point_names == ("dense",)


def test_an_answer_is_read_without_rules():
    task = IFEvalTask()
    assert task.read("hm </think>  a\n b ", True) == task.read("a b", True) == "a b"
    assert task.read("</think> ", True) is None
    assert task.read("a b", False) is None


def test_a_cut_an_empty_and_an_endless_text_have_typed_verdicts():
    rule = problem(("punctuation:no_comma", {}))
    assert IFEvalTask().grade(rule, "text", False).outcome == Outcome.UNPARSABLE
    assert IFEvalTask().grade(rule, "</think>\n ", True).outcome == Outcome.UNPARSABLE
    assert IFEvalTask().grade(rule, "a" * (MAX_CHARACTERS + 1), True).outcome == Outcome.REFUSED


HOSTILE = ["[" * 90_000, "*" * 90_000, "<<" * 45_000, "\n" * 90_000 + "x", "- " * 45_000, '{"a":' * 15_000,
           "9" * 90_000, "a." * 45_000, "*** " * 22_000, "Section 1" * 9_000, " " * 90_000 + "x"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:8]))
def test_hostile_text_is_judged_in_linear_time(text):
    rules = problem(*((name, arguments) for name, arguments, *_ in EXAMPLES))
    started = time.process_time()
    IFEvalTask(scoring="loose").grade(rules, text, True)
    assert time.process_time() - started < 6  # 25 rules on 8 forms of 90,000 characters


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet='*-[]<>\n". ,PS#a1', max_size=80))
def test_no_text_raises_and_loose_scoring_only_forgives(text):
    for name, arguments, *_ in EXAMPLES:
        if keeps(text, name, arguments):
            assert keeps(text, name, arguments, "loose")
    rules = problem(*((name, arguments) for name, arguments, *_ in EXAMPLES))
    assert not IFEvalTask(scoring="loose").grade(rules, text, True).refused


# -- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ROW = {"key": 7, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
       "kwargs": [{"end_phrase": None}, {"end_phrase": "Bye.", "num_words": None}]}  # fmt: skip


def test_a_file_is_read_with_nulls_as_absent_arguments(tmp_path):
    (found,) = load_ifeval(write(tmp_path / "f.jsonl", ROW))
    assert found.rules == (("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "Bye."}))
    assert IFEvalTask().load(tmp_path / "f.jsonl") == [found]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{}]}, "needs a language detector"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": None}]}, "needs end_phrase"),
        ({"instruction_id_list": ["startend:end_checker"], "kwargs": []}, "lists of one length"),
        ({"instruction_id_list": [], "kwargs": []}, "not empty"),
        ({"instruction_id_list": [3], "kwargs": [{}]}, "unknown instruction '3'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "are no object"),
        ({"prompt": None}, "prompt is null"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [1]}]}, "as a list of words"),
        ({"instruction_id_list": ["length_constraints:number_words"],
          "kwargs": [{"num_words": 3, "relation": "at leest"}]}, "did you mean 'at least'"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_file_and_line(tmp_path, change, message):
    path = write(tmp_path / "f.jsonl", ROW, ROW | change)
    said: list[str] = []
    assert len(load_ifeval(path, report=said.append)) == 1
    assert any(line.startswith(f"{path}:2: ") and message in line for line in said), said
    with pytest.raises(UserError, match=r"f\.jsonl:2: "):
        load_ifeval(path, max_bad_lines=0)


def test_an_unknown_scoring_is_refused():
    with pytest.raises(UserError, match="did you mean 'loose'"):
        IFEvalTask(scoring="lose")
