"""The verdict, and what to change: a recipe that does not fit gets settings under which it does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlvr_lab.errors import UserError
from rlvr_lab.plan.devices import DEVICES, detected, device
from rlvr_lab.plan.memory import PHASES
from rlvr_lab.plan.planner import Plan, available, fits_elsewhere, fitted, plan
from rlvr_lab.plan.remedies import CANDIDATES, change, remedies
from rlvr_lab.plan.speed import Assumptions
from rlvr_lab.train.config import TrainConfig, load_config


def config(*overrides: str, recipe: str = "grpo/math") -> TrainConfig:
    return load_config(recipe, overrides)


def again(found: Plan) -> Plan:
    """The plan of the remedied configuration."""
    return plan(fitted(found), found.job.device, found.job.ranks)


def test_a_recipe_that_fits_needs_no_change() -> None:
    found = plan(config(), "H100")
    assert found.fits
    assert found.remedies == ()
    assert fitted(found) == found.config
    assert found.smallest == 1


@pytest.mark.parametrize(
    ("gpu", "ranks", "overrides"),
    [
        ("T4", 1, ["update.micro_batch_rows=16"]),
        ("L4", 1, ["model.path=Qwen/Qwen2.5-1.5B", "rollout.rows=512", "rollout.max_tokens=2048"]),
        ("A100-80", 8, ["model.path=Qwen/Qwen2.5-7B", "rollout.max_tokens=8192", "rollout.rows=256"]),
        ("H100", 16, ["model.path=Qwen/Qwen2.5-32B", "rollout.max_tokens=4096"]),
        ("A100-40", 1, ["model.path=Qwen/Qwen2.5-7B"]),
        ("A100-80", 8, ["model.path=Qwen/Qwen2.5-7B", "rollout.engine=vllm", "update.recompute_old_logprob=true"]),
    ],
)
def test_what_does_not_fit_gets_settings_that_do(gpu: str, ranks: int, overrides: list[str]) -> None:
    found = plan(config(*overrides), gpu, ranks)
    assert not found.fits
    assert found.remedies
    assert again(found).fits
    # every one is needed: without it the rest does not do
    for one in found.remedies:
        others = {r.key: r.value for r in found.remedies if r is not one}
        if one.key in ("parallel.shard", "model.lora.rank"):
            others = {k: v for k, v in others.items() if k not in ("parallel.offload", "model.dtype")}
        assert not plan(change(found.config, others), gpu, ranks).fits, one
    # and they are what the command line takes
    assert plan(load_config("grpo/math", [*overrides, *(r.override for r in found.remedies)]), gpu, ranks).fits


def test_what_changes_the_experiment_comes_last() -> None:
    first_other = next(i for i, c in enumerate(CANDIDATES) if not c.exact)
    assert all(not c.exact for c in CANDIDATES[first_other:])
    found = plan(config("update.micro_batch_rows=16"), "T4")
    assert {r.key for r in found.remedies} == {"update.micro_batch_rows"}


def test_where_nothing_helps_the_planner_says_so() -> None:
    found = plan(config("model.path=Qwen/Qwen2.5-32B"), "T4")
    assert not found.fits
    assert found.remedies == ()
    assert found.smallest is None  # 16 GB hold no replica that samples, however many there are


def test_more_gpus_are_offered_where_they_help() -> None:
    found = plan(config("model.path=Qwen/Qwen2.5-7B", "rollout.prompts=64", "model.precision=bfloat16"), "A100-40")
    assert not found.fits
    assert found.smallest is not None
    assert found.smallest > 1
    enough = plan(config("model.path=Qwen/Qwen2.5-7B", "rollout.prompts=64", "model.precision=bfloat16"), "A100-40",
                  found.smallest)  # fmt: skip
    assert enough.fits or all(r.key != "model.lora.rank" for r in enough.remedies)


def test_the_search_is_exact_about_its_goal() -> None:
    base = config()

    def lacking(other: TrainConfig) -> int:
        return max(0, other.update.micro_batch_rows * other.rollout.rows - 64)

    found = remedies(base, lacking)
    assert found is not None
    # 4 x 64 rows: one row a pass is enough, and two are not
    assert [r.override for r in found] == ["update.micro_batch_rows=1"]
    assert remedies(base, lambda other: 1) is None
    assert remedies(base, lambda other: 0) == ()


@given(
    st.sampled_from(["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-8B"]),
    st.sampled_from(sorted(DEVICES)),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([256, 2048, 8192]),
    st.sampled_from([1, 8]),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_plan_never_contradicts_itself(model: str, gpu: str, ranks: int, tokens: int, rows: int) -> None:
    found = plan(config(f"model.path={model}", f"rollout.max_tokens={tokens}", f"update.micro_batch_rows={rows}"),
                 gpu, ranks)  # fmt: skip
    assert found.fits == (max(found.memory.phase(name) for name in PHASES) <= found.available)
    if found.remedies:
        assert again(found).fits
    if fits_elsewhere(found).get("A100-40") and gpu != "A100-80":
        assert fits_elsewhere(found)["A100-80"]


def test_cost_is_hours_times_price() -> None:
    found = plan(config("steps=100"), "A100-80", 4, price=2.5)
    assert found.gpu_hours == pytest.approx(found.speed.seconds * 100 * 4 / 3600)
    assert found.cost == pytest.approx(2.5 * found.gpu_hours)
    assert plan(config(), "A100-80").cost is None


def test_the_dictionary_holds_everything_for_a_program() -> None:
    found = plan(config("update.micro_batch_rows=16"), "T4", price=1.0)
    tree: dict[str, Any] = json.loads(json.dumps(found.as_dict()))
    assert tree["fits"] is False
    assert "estimates" in tree["label"]
    assert tree["peak_bytes"] == max(tree["phases"].values())
    assert tree["phases"]["update"] == sum(part["bytes"].get("update", 0) for part in tree["parts"])
    assert tree["step_seconds"] == pytest.approx(sum(part["seconds"] for part in tree["times"]))
    assert tree["remedies"][0]["key"] == "update.micro_batch_rows"
    assert all(part["formula"] for part in tree["parts"] + tree["times"])


def test_notes_name_what_the_numbers_hide() -> None:
    def notes(*overrides: str, gpu: str = "A100-80", ranks: int = 1) -> str:
        return " ".join(plan(config(*overrides), gpu, ranks).notes)

    assert "no bfloat16 units" in notes("model.precision=bfloat16", gpu="T4")
    assert "rounded away" in notes("model.dtype=bfloat16")
    assert "dynamic sampling" in notes("methods.dynamic_sampling={}")
    assert "between machines" in notes(ranks=16)
    assert "main memory" in notes("parallel.shard=fsdp2", "parallel.offload=true", ranks=2)
    assert notes() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "A100-8"}, "--gpu 'A100-8' is not in the planner's table; did you mean 'A100-80'"),
        ({"gpu": "H100", "n": 0}, "--gpus must be at least 1, not 0"),
        ({"gpu": "H100", "price": -1.0}, "--price must not be negative"),
        ({"gpu": "H100", "prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(config(), **arguments)


def test_an_assumption_must_be_positive() -> None:
    with pytest.raises(UserError, match="the assumption 'mfu' must be positive, not 0"):
        Assumptions(mfu=0.0)


def test_a_detected_gpu_keeps_its_own_memory() -> None:
    found = detected("NVIDIA A100-SXM4-80GB", 85_000_000_000)
    assert found.memory == 85_000_000_000
    assert found.bandwidth == device("a100-80").bandwidth
    assert detected("NVIDIA H100 80GB HBM3", 80 * 2**30).bandwidth == device("H100").bandwidth
    assert detected("Tesla T4", 15 * 2**30).bandwidth == device("T4").bandwidth
    assert detected("NVIDIA L40S", 46 * 2**30).bandwidth == device("A100-80").bandwidth  # not an L4
    assert available(found) == int(0.95 * found.memory)
