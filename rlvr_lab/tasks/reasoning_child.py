"""The child process that scores answers with reasoning-gym. Run as a script, never imported by the package.

It reads one JSON object per line: `{"dataset", "config", "seed", "size", "seconds"}` with `"start"` and `"stop"`, to
which it writes `{"items": [[question, answer], ...]}`, or with `"index"` and `"answer"`, to which it writes
`{"score": float}`; else `{"error": str}`. As in `sympy_child.py` the kernel ends the process at the deadline. Some
items depend on the order of a set, so the process needs PYTHONHASHSEED.

Several judges of the library call `eval` or sympy's `parse_expr`, which is `eval`, on the answer. Both are replaced
by `arithmetic`, which reads the text as a syntax tree and computes literals, arithmetic and the functions of
`CALLED` itself: no attribute, no lambda, no comprehension, no other call. Without that an answer could run code here.
"""

import ast
import json
import operator
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

CALLED = {
    "Integer", "Float", "Rational", "Symbol", "sqrt", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "Abs",
}  # fmt: skip
MOST_BITS = 100_000
"""Of a power or a shifted number; larger ones are refused before they are computed."""


class Refused(BaseException):
    """The text is more than arithmetic. No `Exception`: the library catches those and scores the answer."""


def power(base: Any, exponent: Any) -> Any:
    """`base ** exponent` where the result is not too large. Raises Refused."""
    try:
        bits = abs(int(base)).bit_length() * abs(float(exponent))
    except (TypeError, ValueError, OverflowError):
        bits = 0  # symbols; what they cost shows at the deadline
    if bits > MOST_BITS:
        raise Refused("a number too large")
    return base**exponent


def shift(number: Any, places: Any) -> Any:
    """`number << places`, bounded like `power`. Raises Refused."""
    if places > MOST_BITS:
        raise Refused("a number too large")
    return number << places


BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: power, ast.LShift: shift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Not: operator.not_,
}  # fmt: skip
KEPT = 8
"""Data sets held at once."""


def arithmetic(text: str, scope: Mapping[str, Any] | None = None, own: Mapping[str, Any] | None = None) -> Any:
    """What `eval` would give for a text of literals, arithmetic and `CALLED`. Raises Refused, or what `eval` would."""
    if not isinstance(text, str):
        raise Refused("code")
    return value(ast.parse(text.strip(), mode="eval").body, {**(scope or {}), **(own or {})})


def value(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """The value of a syntax tree, see `arithmetic`."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if not node.id.startswith("_") and node.id in scope:
            return scope[node.id]
        case ast.BinOp() if type(node.op) in BINARY:
            return BINARY[type(node.op)](value(node.left, scope), value(node.right, scope))
        case ast.UnaryOp():
            return UNARY[type(node.op)](value(node.operand, scope))
        case ast.List():
            return [value(item, scope) for item in node.elts]
        case ast.Tuple():
            return tuple(value(item, scope) for item in node.elts)
        case ast.Set():
            return {value(item, scope) for item in node.elts}
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in CALLED and name in scope:
            return scope[name](*(value(item, scope) for item in node.args))
    raise Refused(type(node).__name__)


def guard_library() -> None:
    """Shadow `eval` in every module where an answer may reach it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym") or name == "sympy.parsing.sympy_parser":
            module.__dict__["eval"] = arithmetic


def limit(megabytes: int) -> None:
    """No core files, no new files, bounded memory; best effort."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, OSError, ValueError):
        pass


Data = tuple[Any, dict[int, Any]]


def opened(request: Mapping[str, Any], kept: dict[str, Data], create: Callable[..., Any]) -> Data:
    """The data set of a request, and those of its items that were judged before."""
    key = json.dumps([request[name] for name in ("dataset", "config", "seed", "size")], sort_keys=True)
    if key not in kept:
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = create(request["dataset"], seed=request["seed"], size=request["size"], **request["config"]), {}
    return kept[key]


def answered(request: Mapping[str, Any], data: Any, items: dict[int, Any]) -> dict[str, object]:
    """Items of a data set, or the library's score of an answer to one."""
    if "answer" not in request:
        made = [data[index] for index in range(request["start"], request["stop"])]
        return {"items": [[str(item["question"]), str(item["answer"] or "")] for item in made]}
    index = request["index"]
    if index not in items:
        items[index] = data[index]
    return {"score": float(data.score_answer(request["answer"], items[index]))}


def reply_to(request: Mapping[str, Any], kept: dict[str, Data], factory: Any) -> dict[str, object]:
    """What `main` writes for a request."""
    if request["dataset"] not in factory.DATASETS:
        return {"error": "unknown data set", "known": sorted(factory.DATASETS)}
    try:
        data, items = opened(request, kept, factory.create_dataset)
    except Exception as error:
        return {"error": f"config: {error}"}
    try:
        return answered(request, data, items)
    except MemoryError:
        return {"error": "memory"}
    except RecursionError:
        return {"error": "nested too deeply"}
    except Refused as error:
        return {"error": f"refused: an answer that is more than arithmetic ({error})"}
    except Exception as error:
        return {"error": f"the judge failed: {type(error).__name__}"}


def main() -> None:
    """Serve requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library that prints must not write into the protocol

    def reply(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        import sympy.parsing.sympy_parser  # noqa: F401
        from reasoning_gym import factory
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"[:500]})
        return
    guard_library()
    limit(int(sys.argv[1]))
    reply({"ready": True})
    kept: dict[str, Data] = {}
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        result = reply_to(request, kept, factory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(result)
        if result.get("error") == "memory":
            return


if __name__ == "__main__":
    main()
