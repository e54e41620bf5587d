"""Times from formulas: by hand, and in which direction they move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.plan.devices import device
from rlvr_lab.plan.job import Job, job_of
from rlvr_lab.plan.speed import Assumptions, Speed, flops_per_token, speed
from rlvr_lab.train.config import load_config

EXACT = Assumptions(mfu=1.0, prefill=1.0, bandwidth=1.0, network=1.0)


def job(*overrides: str, gpu: str = "A100-80", ranks: int = 1) -> Job:
    return job_of(load_config("grpo/math", overrides), device(gpu), ranks, prompt_tokens=100, mean_tokens=200)


def seconds(found: Speed, name: str) -> float:
    return next(part.seconds for part in found.parts if part.name == name)


def test_a_forward_pass_by_hand() -> None:
    found = job()
    matrices = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864) + 151_936 * 896
    assert found.shape.matmul_parameters == matrices
    assert flops_per_token(found, 0) == 2 * matrices
    assert flops_per_token(found, 10) - flops_per_token(found, 0) == 4 * 24 * 896 * 10


def test_training_is_three_forward_passes_and_four_with_checkpointing() -> None:
    found = job("model.dtype=bfloat16", "update.epochs=2")
    forward = 128 * 300 * flops_per_token(found, 100) / 312e12
    assert seconds(speed(found, EXACT), "forward and backward") == pytest.approx(2 * 3 * forward)
    again = replace(found, checkpointing=True)
    assert seconds(speed(again, EXACT), "forward and backward") == pytest.approx(2 * 4 * forward)


def test_the_optimizer_moves_what_it_keeps() -> None:
    bytes_ = 494_032_768 * 4
    assert seconds(speed(job(), EXACT), "AdamW") == pytest.approx(2 * 7 * bytes_ / 2039e9)
    assert seconds(speed(job("optimizer.name=classp"), EXACT), "CLASSP") == pytest.approx(2 * 5 * bytes_ / 2039e9)


def test_sampling_one_row_is_bound_by_bandwidth() -> None:
    found = replace(job("rollout.prompts=1", "rollout.group_size=2"), engine="vllm", rows=1, max_tokens=200)
    step = (found.shape.parameters * 4 + 200 * found.shape.kv_bytes(4)) / 2039e9
    tiny = replace(EXACT, launch_vllm=1e-9)
    assert seconds(speed(found, tiny), "sample") == pytest.approx(2 * 200 * step, rel=0.01)


def test_passes_that_methods_ask_for_are_counted() -> None:
    def names(*overrides: str) -> set[str]:
        return {part.name for part in speed(job(*overrides), EXACT).parts}

    extra = {"old log-probs", "reference log-probs", "current log-probs"}
    assert not names() & extra
    everything = ("update.recompute_old_logprob=true", "methods.kl_reference.beta=0.1", "methods.kl_cov={}")
    assert extra <= names(*everything)


def test_episodes_are_read_again_at_every_turn() -> None:
    found = replace(job("rollout.engine=transformers"), turns=6)
    again = 2 * found.own_responses * 200 * flops_per_token(found, 100) / 19.5e12
    assert seconds(speed(found, EXACT), "read episodes again") == pytest.approx(again)
    whole = found.own_responses * found.longest * found.shape.kv_bytes(found.computed)
    half = speed(replace(found, prefix_memory=whole // 2), EXACT)
    assert seconds(half, "read episodes again") == pytest.approx(again / 2, rel=1e-3)
    for other in (replace(found, turns=1), replace(found, engine="vllm"), replace(found, prefix_memory=2 * whole)):
        assert "read episodes again" not in {part.name for part in speed(other, EXACT).parts}


def test_dynamic_sampling_samples_more() -> None:
    plain, dynamic = (speed(job(*o), EXACT) for o in ((), ("methods.dynamic_sampling={}",)))
    assert seconds(dynamic, "sample") == pytest.approx(2 * seconds(plain, "sample"))
    capped = speed(job("methods.dynamic_sampling.max_batches=3"), replace(EXACT, kept=0.1))
    assert seconds(capped, "sample") == pytest.approx(3 * seconds(plain, "sample"))


def test_shards_that_do_not_hide_cost_time() -> None:
    slow = speed(job("parallel.shard=fsdp2", "update.micro_batch_rows=1", gpu="L4", ranks=4), EXACT)
    assert seconds(slow, "between GPUs") > 0
    one = speed(job(), EXACT)
    assert "between GPUs" not in {part.name for part in one.parts}


@given(st.sampled_from(["T4", "L4", "A100-40", "A100-80", "H100", "H200"]), st.integers(1, 3), st.integers(20, 400))
@settings(max_examples=25, deadline=None)
def test_a_faster_gpu_is_never_slower_and_longer_is_never_quicker(gpu: str, doublings: int, mean: int) -> None:
    found = replace(job(gpu=gpu), mean_tokens=mean)
    longer = replace(found, max_tokens=found.max_tokens * 2**doublings, mean_tokens=mean * 2**doublings)
    assert speed(longer, EXACT).seconds > speed(found, EXACT).seconds
    best = replace(found, device=device("H200"))
    assert speed(best, EXACT).seconds <= speed(found, EXACT).seconds


def test_more_gpus_share_the_work() -> None:
    one, eight = (speed(job("rollout.prompts=64", ranks=n), Assumptions()) for n in (1, 8))
    assert eight.generated == one.generated == 64 * 8 * 200
    assert seconds(eight, "forward and backward") == pytest.approx(seconds(one, "forward and backward") / 8)
