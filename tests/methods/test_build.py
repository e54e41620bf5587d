"""Methods by name: settings, presets, and errors that suggest the nearest name."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import golden_case

from rlvr_lab.core.reduce import reduce
from rlvr_lab.errors import UserError
from rlvr_lab.methods import ELSEWHERE, REGISTRY, Entry, build, hooks_of, load_class, trainable
from rlvr_lab.methods.base import HOOKS, LossInputs, Method
from rlvr_lab.methods.grpo import GRPO
from rlvr_lab.train.config import packaged_recipes


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("grop", {}, "no method 'grop' in methods; did you mean 'grpo'"),
        ("grpo", {"preset": "papr"}, "methods.grpo.preset 'papr' does not exist; did you mean 'paper'"),
        ("grpo", {"preset": None}, "methods.grpo.preset 'None' does not exist; choose one of: paper, released, tiny"),
        ("grpo", {"clip_hihg": 0.3}, "unknown setting methods.grpo.clip_hihg; did you mean 'clip_high'"),
        ("grpo", {"clip_high": "wide"}, "methods.grpo.clip_high must be a number, not 'wide'"),
        ("grpo", {"clip_low": 1.5}, r"methods.grpo.clip_low must lie in \[0, 1\], not 1.5"),
        ("grpo", {"clip_high": -0.1}, "methods.grpo.clip_high must not be negative"),
        ("grpo", {"dual_clip": 0.5}, "methods.grpo.dual_clip must be above 1 or null"),
        ("grpo", {"std": "samples"}, "methods.grpo.std must be one of sample, .*'samples'; did you mean 'sample'"),
        ("grpo", {"reduction": "token-mean"}, "methods.grpo.reduction must be one of token_mean"),
        ("grpo", {"reduction": "sequence_mean_of_token_sum_over_constant"}, "methods.grpo.reduction_constant is need"),
    ],
)
def test_a_wrong_name_or_value_is_one_clear_line(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(slug, settings)
    assert "\n" not in str(caught.value)


def test_settings_override_the_preset() -> None:
    method = build("grpo", {"preset": "released", "clip_high": "2.8e-1"})
    assert isinstance(method, GRPO)
    assert method.config.clip_high == 0.28
    assert method.config.dual_clip == 3.0
    assert GRPO.presets["released"].clip_high == 0.2


def test_the_default_preset_is_the_papers() -> None:
    method = build("grpo", {})
    assert isinstance(method, GRPO)
    assert method.config == GRPO.presets["paper"]


@pytest.mark.parametrize("slug", list(trainable()))
def test_every_method_keeps_the_contract_of_its_module(slug: str) -> None:
    entry = REGISTRY[slug]
    module = import_module(f"rlvr_lab.{entry.module}")
    cls = load_class(slug)
    assert issubclass(cls, Method)
    assert cls.slug == slug
    assert {"paper", "released"} <= set(cls.presets)
    assert entry.arxiv in (module.__doc__ or "")
    assert hooks_of(cls)
    assert {name.rstrip("*") for name in hooks_of(cls)} <= set(HOOKS)
    for preset in cls.presets:
        assert build(slug, {"preset": preset}).slug == slug


@pytest.mark.parametrize("entry", (REGISTRY | ELSEWHERE).values(), ids=lambda e: e.slug)
def test_the_registry_points_at_what_exists(entry: Entry) -> None:
    assert import_module(f"rlvr_lab.{entry.module}").__doc__
    assert entry.recipe is None or entry.recipe in packaged_recipes()
    assert entry.chapter is None or (Path(__file__).parents[2] / "book" / f"{entry.chapter}.ipynb").is_file()


def test_an_analysis_cannot_train() -> None:
    with pytest.raises(UserError, match=r"'policy_cliff' measures and does not train; import rlvr_lab\.methods"):
        build("policy_cliff", {})


def preset_loss(preset: str) -> float:
    """Loss of verl's golden case under a preset of GRPO, with a token whose dual clip binds."""
    case = golden_case("ppo_clip_symmetric")["inputs"]
    mask = torch.tensor(case["response_mask"], dtype=torch.bool)
    logprob, old = torch.tensor(case["log_prob"]), torch.tensor(case["old_log_prob"])
    advantage = torch.tensor(case["advantages"])
    old[1, 0] = logprob[1, 0] - 2.0  # advantage below 0, ratio e^2 above 3
    method = build("grpo", {"preset": preset})
    assert isinstance(method, GRPO)
    lower, upper = method.clip(None, advantage)  # type: ignore[arg-type]
    inputs = LossInputs(None, logprob, old, advantage, lower, upper)  # type: ignore[arg-type]
    return float(reduce(method.surrogate(inputs).loss, mask, method.reduction, method.reduction_constant))


def test_presets_differ_on_a_golden_case() -> None:
    paper, released, tiny = map(preset_loss, ("paper", "released", "tiny"))
    assert abs(paper - released) > 1e-3
    assert abs(tiny - released) > 1e-3  # no dual clip
    assert asdict(GRPO.presets["tiny"])["eps"] != asdict(GRPO.presets["released"])["eps"]


def test_the_released_preset_is_verls_on_the_golden_case() -> None:
    case = golden_case("ppo_clip_symmetric")
    inputs = case["inputs"]
    mask = torch.tensor(inputs["response_mask"], dtype=torch.bool)
    logprob = torch.tensor(inputs["log_prob"], requires_grad=True)
    advantage = torch.tensor(inputs["advantages"])
    method = build("grpo", {"preset": "released"})
    assert isinstance(method, GRPO)
    lower, upper = method.clip(None, advantage)  # type: ignore[arg-type]
    old = torch.tensor(inputs["old_log_prob"])
    per_token = method.surrogate(LossInputs(None, logprob, old, advantage, lower, upper)).loss  # type: ignore[arg-type]
    loss = reduce(per_token, mask, method.reduction, method.reduction_constant)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(case["outputs"]["token-mean"]["loss"], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logprob.grad, torch.tensor(case["grad"]["value"]["token-mean"]), rtol=1e-5, atol=1e-6)
