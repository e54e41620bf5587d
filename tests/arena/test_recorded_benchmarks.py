"""What `benchmarks/` recorded for the book's chapters says which code it came from, and that code is still this one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "book" / "data"
RECORDED = {
    "agentic_aepo.json": "methods.agentic_aepo",
    "pear.json": "methods.pear",
    "one_shot.json": "methods.one_shot",
    "tp_grpo.json": "methods.tp_grpo",
    "cure.json": "methods.cure",
    "ettrl.json": "methods.ettrl",
    "light_if.json": "methods.light_if",
    "verifiers.json": "tasks.math_answer",
    "ares.json": "methods.ares",
    "cascade.json": "methods.empg",
    "environments.json": "tasks.agents.triples",
    "spear.json": "methods.spear",
    "entropy_guided_attention.json": "methods.entropy_guided_attention",
    "feedback_friction.json": "evaluate.feedback_friction",
    "diffadapt.json": "inference.difficulty",
    "bupo.json": "methods.bupo",
    "representation_geometry.json": "evaluate.representation_geometry",
    "explicit_cot.json": "evaluate.explicit_cot",
    "v_reason.json": "inference.v_reason",
    "kappatune.json": "methods.kappatune",
    "reasoning_utility.json": "evaluate.reasoning_utility",
}
"""Files whose recorders write digests, with a module that must be among them."""


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recording() -> ModuleType:
    return benchmark("recording")


def sections(value: Any) -> Iterator[dict[str, Any]]:
    """Every part of a record that has digests of modules; those of a contest are of slugs."""
    if isinstance(value, dict):
        if "." in "".join(value.get("digests", ())):
            yield value
        for part in value.values():
            yield from sections(part)


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.json")))
def test_no_module_changed_after_its_figures_were_recorded(name: str, recording: ModuleType) -> None:
    for part in sections(json.loads((DATA / name).read_text())):
        now = recording.module_digests(part["digests"])
        changed = [module for module, digest in part["digests"].items() if now[module] != digest]
        assert not changed, (
            f"the code of {', '.join(changed)} is not that of book/data/{name}; move that file away, record it again "
            f"with `{part['command']}` and execute its chapter"
        )


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_figures_name_their_code(name: str) -> None:
    found = list(sections(json.loads((DATA / name).read_text())))
    assert RECORDED[name] in {module for part in found for module in part["digests"]}
    assert all(part["command"].startswith("python benchmarks/") for part in found)


def test_a_recorder_refuses_to_go_on_with_other_code(recording: ModuleType, tmp_path: Path) -> None:
    out, arguments = tmp_path / "figures.json", ({}, "pear.py", "grpo/tiny", [], 3, ["methods.pear"])
    record = recording.opened(out, *arguments)
    assert list(record["digests"]) == ["methods.pear"]
    recording.save(out, record)
    assert recording.opened(out, *arguments)["digests"] == record["digests"]
    recording.save(out, record | {"digests": {"methods.pear": "0" * 16}})
    with pytest.raises(typer.BadParameter, match=r"was recorded with another methods\.pear"):
        recording.opened(out, *arguments)


def test_a_module_that_is_gone_has_an_empty_digest(recording: ModuleType) -> None:
    assert recording.module_digests(["methods.no_such_method"]) == {"methods.no_such_method": ""}


def test_sign_noise_keeps_the_size_of_every_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    weights = torch.nn.Parameter(torch.zeros(400))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    benchmark("one_shot").randomise_signs(optimizer, seed=0)
    moves = []
    for _ in range(2):
        before = weights.detach().clone()
        weights.grad = torch.arange(1.0, 401.0)
        optimizer.step()
        moves.append(weights.detach() - before)
    assert all(torch.allclose(move.abs(), torch.arange(1.0, 401.0)) for move in moves)
    assert all(150 < int((move > 0).sum()) < 250 for move in moves)
    assert 150 < int((moves[0].sign() == moves[1].sign()).sum()) < 250
