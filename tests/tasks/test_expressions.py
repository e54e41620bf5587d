import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_lab.tasks.expressions import MAX_DEPTH, MAX_INTEGER, ExpressionError, parse

Tree = int | tuple[str, "Tree", "Tree"]

TREES: st.SearchStrategy[Tree] = st.recursive(
    st.integers(0, 60), lambda sub: st.tuples(st.sampled_from("+-*/"), sub, sub), max_leaves=8
)


def value(tree: Tree) -> Fraction | None:
    """Independent arithmetic on the tree itself; `None` where the grammar must refuse."""
    if isinstance(tree, int):
        return Fraction(tree)
    sign, a, b = tree[0], value(tree[1]), value(tree[2])
    if a is None or b is None or (sign == "/" and b == 0):
        return None
    result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[sign]()
    return result if result.denominator == 1 and abs(result) <= MAX_INTEGER else None


def write(tree: Tree, space: str = " ") -> str:
    """Every operation in brackets, so that the text says nothing about precedence."""
    if isinstance(tree, int):
        return str(tree)
    return f"({space}{write(tree[1], space)}{space}{tree[0]}{space}{write(tree[2], space)})"


def write_bare(tree: Tree, parent: int = 0) -> str:
    """Only the brackets that precedence and left association require."""
    if isinstance(tree, int):
        return str(tree)
    strength = 1 if tree[0] in "+-" else 2
    text = f"{write_bare(tree[1], strength)}{tree[0]}{write_bare(tree[2], strength + 1)}"
    return f"({text})" if strength < parent else text


def leaves(tree: Tree) -> tuple[int, ...]:
    return (tree,) if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def commuted(tree: Tree) -> Tree:
    if isinstance(tree, int):
        return tree
    sign, a, b = tree[0], commuted(tree[1]), commuted(tree[2])
    return (sign, b, a) if sign in "+*" else (sign, a, b)


@given(TREES)
def test_value_and_leaves_agree_with_fractions(tree: Tree) -> None:
    expected = value(tree)
    for text in (write(tree), write(tree, space=""), write_bare(tree)):
        if expected is None:
            with pytest.raises(ExpressionError):
                parse(text)
        else:
            found = parse(text)
            assert found.value == expected
            assert found.leaves == leaves(tree)


@given(TREES)
def test_canonical_form_ignores_order_of_sum_and_product_only(tree: Tree) -> None:
    if value(tree) is None:
        return
    canonical = parse(write(tree)).canonical
    assert parse(write(commuted(tree))).canonical == canonical
    assert parse(canonical).value == value(tree)
    assert parse(canonical).canonical == canonical


def test_canonical_form_keeps_different_solutions_apart() -> None:
    assert parse("7-2").canonical != parse("5-0").canonical
    assert parse("8/2").canonical != parse("2*2").canonical
    assert parse("(1+2)+3").canonical != parse("1+(2+3)").canonical


@pytest.mark.parametrize(("text", "expected"), [("8-3-2", 3), ("24/4/2", 3), ("2+3*4", 14), ("(2+3)*4", 20)])
def test_precedence_and_left_association(text: str, expected: int) -> None:
    assert parse(text).value == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the end"),
        ("9**9**9**9", r"expected a number, found '\*'"),
        ("2^9", r"unexpected '\^'"),
        ("__import__('os')", "unexpected '_'"),
        ("1 2", "unexpected '2'"),
        ("(1", "unbalanced"),
        ("1)", r"unexpected '\)'"),
        ("-1", "expected a number"),
        ("1/0", "not exact"),
        ("7/2", "not exact"),
        ("1+" * 300, "longer than"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "brackets deep"),
        (str(MAX_INTEGER + 1), "beyond"),
        ("9" * 400, "beyond"),
        ("99999*99999", "beyond"),
        ("0-99999*9999-99999*9999", "beyond"),
        ("1\x00", "unexpected"),
    ],
)
def test_refused_with_a_reason_and_at_once(text: str, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ExpressionError, match=reason):
        parse(text)
    assert time.perf_counter() - start < 0.1


def test_limits_are_inclusive() -> None:
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1
    assert parse(str(MAX_INTEGER)).value == MAX_INTEGER


@given(st.text(alphabet="0123456789+-*/() ²٣x", max_size=40))
def test_any_text_parses_or_raises_its_own_error(text: str) -> None:
    try:
        found = parse(text)
    except ExpressionError:
        return
    assert abs(found.value) <= MAX_INTEGER
    assert found.leaves
