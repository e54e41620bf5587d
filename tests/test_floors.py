"""The architecture of rlvr_lab as tests on its syntax trees: floors, imports, safety, size and documentation.

Each rule is a function from one parsed module to the list of its violations. The rules run over the tree, and over
small planted violations, so that a rule which no longer sees anything is noticed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "rlvr_lab"

# Imports go down, or stay on a floor without going round in a circle. The faces may import everything.
FLOORS = (
    {"core"},
    {"tasks", "policy"},
    {"methods"},
    {"rollout", "evaluate", "inference"},
    {"show"},
    {"train", "plan"},
    {"integrations"},
    {"arena"},
    {"testing"},
    {"cli", "__main__", "__init__"},
)
HEIGHT = {part: height for height, parts in enumerate(FLOORS) for part in parts}
FREE = {"errors"}  # usable from everywhere, and uses nothing
ALONE = "elsewhere"  # demonstrations: nothing uses it but the replay of golden files
ONLY = {"show": {"show", "core", "evaluate"}, ALONE: {ALONE, "core", "show"}, "errors": {"errors"}}
USERS = {"testing": {ALONE}}
LIGHT_IMPORTS = sys.stdlib_module_names | {"torch", "numpy", PACKAGE}
ALLOWED_IN = {"core": LIGHT_IMPORTS, "methods": LIGHT_IMPORTS, ALONE: LIGHT_IMPORTS | {"scipy"}}
LAZY = {f"{PACKAGE}.core.head_triton": {"triton"}}  # loaded by name on CUDA only; triton comes with torch there

EVALUATORS = {"eval", "exec", "execfile", "sympify", "parse_expr"}  # sympy's two call eval on their text
UNSAFE_KEYWORDS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True}

LONGEST = 60
MEDIAN = 15

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, where it lies, and its text."""

    name: str
    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def part(self) -> str:
        """The floor's entry: `core` for rlvr_lab.core.losses, `__init__` for rlvr_lab itself."""
        return part_of(self.name)

    def at(self, node: ast.stmt | ast.expr, message: str) -> str:
        return f"{self.path}:{node.lineno}: {message}"


@dataclass(frozen=True)
class Import:
    """One imported module, or name in a module, as absolute dotted text."""

    node: ast.stmt
    target: str
    type_checking: bool


def part_of(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else "__init__"


def read(path: Path) -> Module:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    if names[-1] == "__init__":
        names.pop()
    return Module(".".join(names), str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


@lru_cache
def package() -> tuple[Module, ...]:
    return tuple(read(path) for path in sorted((ROOT / PACKAGE).rglob("*.py")))


@lru_cache
def tools() -> tuple[Module, ...]:
    return tuple(read(path) for path in sorted((ROOT / "book" / "_tools").rglob("*.py")))


def statements(body: Iterable[ast.AST], type_checking: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, each with whether it stands under `if TYPE_CHECKING:`."""
    for node in body:
        yield node, type_checking
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.body, True)
            yield from statements(node.orelse, type_checking)
        else:
            yield from statements(ast.iter_child_nodes(node), type_checking)


def imports(module: Module) -> Iterator[Import]:
    """All imports of a module, those inside functions included; relative ones are made absolute."""
    for node, type_checking in statements(module.tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node, alias.name, type_checking)
        elif isinstance(node, ast.ImportFrom):
            base = module.name.split(".")
            keep = len(base) - node.level + module.is_package
            prefix = [*(base[:keep] if node.level else []), *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(node, ".".join([*prefix, alias.name]), type_checking)


def inside(found: Iterable[Import]) -> Iterator[Import]:
    return (item for item in found if item.target.split(".")[0] == PACKAGE)


def functions(module: Module) -> list[Function]:
    return [node for node in ast.walk(module.tree) if isinstance(node, Function)]


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


# The rules.


def upward_imports(module: Module) -> list[str]:
    """Imports that go up a floor, into `elsewhere`, or beyond what it and `show` may use."""
    found = []
    if module.part not in HEIGHT and module.part not in FREE | {ALONE}:
        return [f"{module.path}: '{module.part}' has no floor; give it one in FLOORS"]
    for item in inside(imports(module)):
        target = part_of(item.target)
        if item.target == f"{PACKAGE}.__version__" or target in FREE:
            continue
        allowed = ONLY.get(module.part)
        if allowed is None:
            height = HEIGHT.get(target)
            good = target == module.part or (height is not None and height <= HEIGHT[module.part])
            good |= target in USERS.get(module.part, set())
        else:
            good = target in allowed
        if not good:
            found.append(module.at(item.node, f"'{module.part}' must not import {item.target}"))
    return found


def heavy_imports(module: Module) -> list[str]:
    """Third-party imports of core and methods other than torch and numpy, and of elsewhere other than these and scipy;
    for type checking they are free."""
    allowed = ALLOWED_IN.get(module.part)
    if allowed is None:
        return []
    return [
        module.at(item.node, f"'{module.part}' must not import {item.target}")
        for item in imports(module)
        if not item.type_checking and item.target.split(".")[0] not in allowed | LAZY.get(module.name, set())
    ]


def unsafe_calls(module: Module) -> list[str]:
    """Whatever turns data into running code: eval, exec, pickle in any form, an unsafe yaml loader."""
    found = [
        module.at(item.node, f"import of {item.target}")
        for item in imports(module)
        if "pickle" in item.target or item.target.split(".")[0] in {"dill", "shelve", "marshal", "joblib"}
    ]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            found += [module.at(node, message) for message in unsafe_call(node)]
    return found


def unsafe_call(call: ast.Call) -> Iterator[str]:
    dotted = ast.unparse(call.func)
    name = dotted.split(".")[-1]
    bare = isinstance(call.func, ast.Name) or dotted.startswith(("builtins.", "sympy."))
    if (bare and name in EVALUATORS) or "pickle" in name or dotted in {"yaml.load", "yaml.unsafe_load"}:
        yield f"call of {dotted}"
    for keyword in call.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in UNSAFE_KEYWORDS and value is UNSAFE_KEYWORDS[keyword.arg]:
            yield f"{keyword.arg}={value} in a call of {dotted}"


def long_functions(module: Module) -> list[str]:
    return [
        module.at(node, f"{node.name} has {length(node)} lines; {LONGEST} is the most")
        for node in functions(module)
        if length(node) > LONGEST
    ]


def undocumented(module: Module) -> list[str]:
    """Public functions and classes without a docstring."""
    return [
        module.at(node, f"{node.name} has no docstring")
        for node in module.tree.body
        if isinstance(node, Function | ast.ClassDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]


def unannotated(module: Module) -> list[str]:
    """Public functions, and methods of public classes, with an argument or a result that has no type."""
    found = []
    owners: list[ast.Module | ast.ClassDef] = [module.tree]
    owners += [node for node in module.tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
                found += [module.at(node, f"{node.name}: {what}") for what in missing_types(node, owner)]
    return found


def missing_types(function: Function, owner: ast.Module | ast.ClassDef) -> Iterator[str]:
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *(a for a in (spec.vararg, spec.kwarg) if a)]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    if isinstance(owner, ast.ClassDef) and not static:
        named = named[1:]
    yield from (f"argument '{argument.arg}' has no type" for argument in named if argument.annotation is None)
    if function.returns is None and function.name != "__init__":
        yield "the result has no type"


def circle(modules: Iterable[Module], key: Callable[[str], str]) -> list[str]:
    """One import circle among the keys of the modules, or nothing. A package's own import of itself does not count."""
    names = {module.name: module for module in modules}

    def owner(target: str) -> str:
        return target if target in names else target.rpartition(".")[0]

    graph: dict[str, set[str]] = {}
    for module in names.values():
        targets = {key(owner(item.target)) for item in inside(imports(module)) if owner(item.target) in names}
        graph.setdefault(key(module.name), set()).update(targets - {key(module.name)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


RULES = (upward_imports, heavy_imports, unsafe_calls, long_functions, undocumented, unannotated)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_has_no(rule: Callable[[Module], list[str]]) -> None:
    modules = package() + (tools() if rule is unsafe_calls else ())
    violations = [violation for module in modules for violation in rule(module)]
    assert not violations, "\n" + "\n".join(violations)


def test_no_import_circle_between_modules() -> None:
    assert circle(package(), key=str) == []


def test_no_import_circle_between_parts() -> None:
    below_faces = [module for module in package() if module.part != "__init__"]
    assert circle(below_faces, key=part_of) == []


def test_median_function_is_short() -> None:
    lengths = [length(node) for module in package() for node in functions(module)]
    assert median(lengths) <= MEDIAN


@pytest.mark.slow
def test_light_floors_load_nothing_heavy() -> None:
    probe = f"import sys, {PACKAGE}.core, {PACKAGE}.methods; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"transformers", "vllm", "trl", "verl", "pandas", "plotly"} & set(loaded.split())


PLANTED = {
    "a floor up": (upward_imports, "core.a", "from ..methods import x"),
    "a floor up, absolute": (upward_imports, "core.a", "import rlvr_lab.train.loop"),
    "a floor up, inside a function": (upward_imports, "methods.a", "def f():\n    from ..rollout import x"),
    "a floor up, for type checking": (upward_imports, "core.a", "if TYPE_CHECKING:\n    from ..train import x"),
    "a floor up, through the package": (upward_imports, "policy.a", "from rlvr_lab import train"),
    "a face": (upward_imports, "train.a", "from ..cli import main"),
    "into elsewhere": (upward_imports, "cli", "from .elsewhere import ising"),
    "into elsewhere from a method": (upward_imports, "methods.a", "from ..elsewhere import x"),
    "out of elsewhere": (upward_imports, "elsewhere.a", "from ..methods import x"),
    "show beyond its two": (upward_imports, "show.a", "from ..methods import x"),
    "a part without a floor": (upward_imports, "helpers.a", ""),
    "errors that use something": (upward_imports, "errors", "from .core import x"),
    "transformers in core": (heavy_imports, "core.a", "import transformers"),
    "transformers in elsewhere": (heavy_imports, "elsewhere.a", "import transformers"),
    "scipy in a method's function": (heavy_imports, "methods.a", "def f():\n    from scipy import stats"),
    "eval": (unsafe_calls, "tasks.a", "x = eval(text)"),
    "exec": (unsafe_calls, "tasks.a", "builtins.exec(text)"),
    "pickle": (unsafe_calls, "train.a", "import pickle"),
    "pickle by name": (unsafe_calls, "train.a", "from torch import pickle_load"),
    "pickle in numpy": (unsafe_calls, "train.a", "np.load(path, allow_pickle=True)"),
    "pickle in torch": (unsafe_calls, "train.a", "torch.load(path, weights_only=False)"),
    "pickle in pandas": (unsafe_calls, "train.a", "pd.read_pickle(path)"),
    "eval in sympy": (unsafe_calls, "tasks.a", "sympy.sympify(text)"),
    "yaml": (unsafe_calls, "train.a", "yaml.load(text, Loader)"),
    "a long function": (long_functions, "core.a", "def f():\n" + "    x = 1\n" * LONGEST),
    "no docstring": (undocumented, "core.a", "def f(): ..."),
    "no docstring on a class": (undocumented, "core.a", "class F: ..."),
    "no type of an argument": (unannotated, "core.a", "def f(x) -> int: ..."),
    "no type of a keyword argument": (unannotated, "core.a", "def f(*, x=1) -> int: ..."),
    "no type of a result": (unannotated, "core.a", "def f(x: int): ..."),
    "no type in a method": (unannotated, "core.a", "class F:\n    def f(self, x) -> int: ..."),
}

ALLOWED = {
    "a floor down": (upward_imports, "train.a", "from ..core import x\nfrom ..errors import UserError"),
    "the same floor": (upward_imports, "policy.a", "from ..tasks import countdown\nfrom . import tiny"),
    "the version": (upward_imports, "train.a", "from rlvr_lab import __version__\nfrom .. import __version__"),
    "out of elsewhere to core": (upward_imports, "elsewhere.a", "from ..core import x\nfrom ..show import theme"),
    "the replay of golden files": (upward_imports, "testing.adapters.a", "from ...elsewhere import x"),
    "scipy in elsewhere": (heavy_imports, "elsewhere.a", "from scipy import linalg"),
    "torch in core": (heavy_imports, "core.a", "import math\nimport numpy\nimport torch.nn.functional"),
    "transformers as a type": (heavy_imports, "methods.a", "if TYPE_CHECKING:\n    import transformers"),
    "transformers in policy": (heavy_imports, "policy.a", "import transformers"),
    "a model set to evaluation": (unsafe_calls, "train.a", "model.eval()\ntorch.load(path, weights_only=True)"),
    "a function of the greatest length": (long_functions, "core.a", "def f():\n" + "    x = 1\n" * (LONGEST - 1)),
    "private names": (undocumented, "core.a", "def _f(): ...\nclass _F: ..."),
    "self and a private helper": (unannotated, "core.a", "class F:\n    def f(self) -> int: ...\ndef _g(x): ..."),
}


def snippet(name: str, source: str) -> Module:
    return Module(f"{PACKAGE}.{name}", f"{PACKAGE}/{name.replace('.', '/')}.py", source)


@pytest.mark.parametrize(("rule", "name", "source"), PLANTED.values(), ids=PLANTED)
def test_rule_sees(rule: Callable[[Module], list[str]], name: str, source: str) -> None:
    assert len(rule(snippet(name, source))) == 1


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED.values(), ids=ALLOWED)
def test_rule_allows(rule: Callable[[Module], list[str]], name: str, source: str) -> None:
    assert rule(snippet(name, source)) == []


def test_circle_is_seen() -> None:
    a = snippet("tasks.a", "from ..policy import b")
    b = snippet("policy.b", "def f():\n    from ..tasks.a import x")
    assert circle([a, b], key=str)
    assert circle([a, b], key=part_of)
    assert circle([a], key=str) == []
