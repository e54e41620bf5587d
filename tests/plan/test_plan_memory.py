"""Memory by part: against hand-made sums, against what autograd really keeps, and in which direction it moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_lab.core.head import KEEP_BYTES
from rlvr_lab.plan.devices import DEVICES, GIB, MIB, device
from rlvr_lab.plan.gate import processor
from rlvr_lab.plan.job import Job, job_of
from rlvr_lab.plan.memory import PHASES, Memory, Part, head_bytes, layer_activations, memory
from rlvr_lab.plan.shapes import shape_from
from rlvr_lab.tasks import registry as tasks
from rlvr_lab.train.config import load_config

HALF = "model.path=Qwen/Qwen2.5-0.5B"
CPU = processor(64 * GIB)


def job(*overrides: str, gpu: str = "A100-80", ranks: int = 1) -> Job:
    return job_of(load_config("grpo/math", [HALF, *overrides]), device(gpu), ranks, prompt_tokens=100)


def part(found: Job, name: str) -> Part:
    return next(p for p in memory(found).parts if p.name == name)


def test_weights_gradients_and_moments_by_hand() -> None:
    n = 494_032_768
    assert part(job(), "weights").bytes == dict.fromkeys(PHASES, 4 * n)
    assert part(job(), "gradients").largest == 4 * n
    assert part(job(), "Adam moments").largest == 8 * n
    assert part(job(), "AdamW's temporaries").bytes == {"optimizer": 4 * n}
    half = job("model.dtype=bfloat16")
    assert part(half, "weights").largest + part(half, "Adam moments").largest == 6 * n


def test_shards_divide_what_training_keeps() -> None:
    whole, eighth = job(ranks=8), job("parallel.shard=fsdp2", ranks=8)
    for name in ("weights", "gradients", "Adam moments"):
        assert part(eighth, name).largest == part(whole, name).largest // 8
    # what samples is whole on every rank, in the type of the passes
    assert part(eighth, "replica that samples").largest == 4 * 494_032_768


def test_offloading_moves_the_state_to_main_memory() -> None:
    shards = memory(job("parallel.shard=fsdp2", ranks=4))
    off = memory(job("parallel.shard=fsdp2", "parallel.offload=true", ranks=4))
    assert off.on_host == sum(p.largest for p in shards.parts if p.name in ("weights", "gradients", "Adam moments"))
    assert off.peak < shards.peak - off.on_host + 1


def test_a_reference_is_a_copy_and_with_adapters_it_is_none() -> None:
    assert part(job("methods.kl_reference.beta=0.1"), "reference policy").largest == 4 * 494_032_768
    adapters = memory(job("methods.kl_reference.beta=0.1", "model.lora.rank=8"))
    assert "reference policy" not in {p.name for p in adapters.parts}


def test_adapters_train_alone() -> None:
    found = job("model.lora.rank=16", "model.lora.targets=[q_proj]", "model.dtype=bfloat16")
    trained = 24 * 16 * (896 + 896)
    assert found.trained == trained
    assert part(found, "gradients").largest == 4 * trained  # peft keeps adapters in float32
    assert part(found, "weights").largest == 2 * 494_032_768 + 4 * trained


def test_replayed_responses_are_part_of_the_record() -> None:
    plain, replays = job(), job("methods.spear={buffer: 300}")
    assert (plain.replayed, replays.replayed) == (0, 300)
    assert job("methods.spear={buffer: 300, schedule: never}").replayed == 0
    each = part(job("methods.spear={schedule: never}"), "rollout record").largest / plain.responses
    assert part(replays, "rollout record").largest == pytest.approx(each * (plain.responses + 300))
    packed = [replace(j, packed_tokens=10**9, minibatches=1) for j in (plain, replays)]
    assert packed[1].pass_tokens - packed[0].pass_tokens == 300 * plain.longest


@pytest.mark.parametrize("task", ["countdown", "instructions", "triples", "maze", "feedback"])
def test_prompts_of_the_tiny_lab_are_counted(task: str) -> None:
    """Against those a run would sample, in the words of the tiny vocabularies."""
    found = job_of(load_config("grpo/tiny", [f"data.task={task}"]), device("L4"))
    which = tasks.task(task)
    lengths = {len(which.prompt_ids(p, None)) for p in tasks.entry(task).problems(which, 64, 0)}
    assert found.prompt_tokens == max(lengths) < 100
    assert found.padded == (len(lengths) > 1)
    assert found.turns == getattr(which, "max_turns", 1)


def test_prompts_of_a_real_tokenizer_are_assumed() -> None:
    """A chat model is told what an environment is; Countdown's words are the same for every model."""
    found = {
        task: job_of(load_config("grpo/math", ["data.file=null", f"data.task={task}"]), device("L4"))
        for task in ("triples", "countdown", "reasoning_gym")
    }
    assert [(j.prompt_tokens, j.padded) for j in found.values()] == [(512, True), (8, False), (512, True)]


def test_the_cache_of_rows_in_flight_by_hand() -> None:
    found = part(
        job("rollout.rows=10", "rollout.max_tokens=50", "data.task=countdown", "data.file=null"), "KV cache and draw"
    )
    cache = 10 * 150 * 2 * 24 * 128 * 4
    drawing = 6 * 10 * 151_936 * 4
    assert cache + drawing <= found.bytes["rollout"] <= 1.03 * (cache + drawing)


def test_kept_logits_are_capped() -> None:
    small, large = (head_bytes(job(f"update.micro_batch_rows={n}", "update.minibatches=1"))[0] for n in (1, 64))
    logits = 64 * 512 * 151_936 * 4
    assert small < KEEP_BYTES < large < logits / 8


def test_a_sleeping_engine_gives_its_share_back() -> None:
    base = replace(job(), engine="vllm", engine_share=0.5)
    awake, asleep = replace(base, engine_sleeps=False), replace(base, engine_sleeps=True)
    share = int(0.5 * DEVICES["A100-80"].memory)
    assert part(awake, "vLLM: weights and cache").bytes == dict.fromkeys(PHASES, share)
    assert part(asleep, "vLLM: weights and cache").bytes == {"rollout": share}
    assert "KV cache and draw" not in {p.name for p in memory(asleep).parts}


def test_an_engine_share_below_its_weights_does_not_count_as_enough() -> None:
    config = load_config("grpo/math", ["model.path=Qwen/Qwen2.5-32B"])
    tight = replace(job_of(config, device("A100-80")), engine="vllm", engine_share=0.1)
    assert part(tight, "vLLM: weights and cache").largest > 32_763_876_352 * 4


def test_every_part_shows_its_formula() -> None:
    found = memory(job("parallel.shard=fsdp2", "methods.kl_reference.beta=0.1", ranks=2))
    assert all(p.formula for p in found.parts)
    assert found.peak == max(found.phase(name) for name in PHASES)
    assert found.lacking(found.peak) == 0 < found.lacking(found.peak - 1)


# -- against autograd -------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
}


def kept_by_autograd(family: str, extra: dict[str, Any], padded: bool, rows: int, length: int) -> tuple[int, Job]:
    """Bytes that the backward pass of two layers holds beyond those of one, and the job they belong to."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    } | extra  # fmt: skip
    total = []
    for layers in (1, 2):
        config = AutoConfig.for_model(family, num_hidden_layers=layers, **sizes)
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.arange(rows * length).view(rows, length) % 64
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(input_ids=ids, attention_mask=mask if padded else None, use_cache=False).last_hidden_state
        total.append(sum(kept.values()))
        del out
    tree = {"data.task": "math" if padded else "countdown", "data.file": "x.jsonl" if padded else "null"}
    settings = [f"{k}={v}" for k, v in tree.items()]
    run = load_config("grpo/math", [*settings, f"rollout.max_tokens={length - 8}", f"update.micro_batch_rows={rows}"])
    shape = shape_from(config.to_dict(), family, "a test")
    return total[1] - total[0], job_of(run, CPU, prompt_tokens=8, shape=shape)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_a_layer_are_what_autograd_keeps(family: str, padded: bool) -> None:
    measured, found = kept_by_autograd(family, FAMILIES[family], padded, rows=4, length=40)
    assert layer_activations(found, 4 * 40) == pytest.approx(measured, rel=0.03)


# -- directions -------------------------------------------------------------------------------------------------------

RUNS = st.fixed_dictionaries(
    {
        "update.micro_batch_rows": st.integers(1, 32),
        "rollout.rows": st.integers(1, 128),
        "rollout.max_tokens": st.integers(16, 4096),
        "model.precision": st.sampled_from(["same", "bfloat16"]),
        "parallel.shard": st.sampled_from(["none", "fsdp2"]),
        "parallel.activation_checkpointing": st.booleans(),
        "update.packing": st.booleans(),
    }
)


@given(RUNS, st.sampled_from(["update.micro_batch_rows", "rollout.rows", "rollout.max_tokens"]), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_more_of_anything_never_takes_less(run: dict[str, Any], grown: str, ranks: int) -> None:
    more = run | {grown: 2 * run[grown]}
    small, large = (memory(job(*(f"{k}={v}" for k, v in r.items()), ranks=ranks)) for r in (run, more))
    assert all(large.phase(name) >= small.phase(name) for name in PHASES)


@given(RUNS, st.integers(1, 16))
@settings(max_examples=20, deadline=None)
def test_checkpointing_and_more_shards_never_take_more(run: dict[str, Any], ranks: int) -> None:
    def peak(settings: dict[str, Any], ranks: int) -> int:
        return memory(job(*(f"{k}={v}" for k, v in settings.items()), ranks=ranks)).phase("optimizer")

    sharded = run | {"parallel.shard": "fsdp2"}
    # from two ranks on: the collectives' own buffers are there in either case
    assert peak(sharded, 2 * ranks + 2) <= peak(sharded, ranks + 1)
    without, with_ = (
        memory(job(*(f"{k}={v}" for k, v in (run | {"parallel.activation_checkpointing": flag}).items())))
        for flag in (False, True)
    )
    assert part_bytes(with_, "activations") <= part_bytes(without, "activations")


def part_bytes(found: Memory, name: str) -> int:
    return next(p.largest for p in found.parts if p.name == name)


def test_the_table_of_gpus() -> None:
    assert set(DEVICES) == {"T4", "L4", "A100-40", "A100-80", "H100", "H200"}
    assert DEVICES["T4"].memory == 15360 * MIB
    assert "bfloat16" not in DEVICES["T4"].peak
    assert DEVICES["T4"].throughput("bfloat16") == DEVICES["T4"].peak["float32"]


def test_prefixes_are_kept_where_responses_grow_from_them() -> None:
    assert all(p.name != "remembered prefixes" for p in memory(job()).parts)
    tree = ("methods.cure={}", "rollout.engine=transformers")
    assert part(job(*tree), "remembered prefixes").bytes == {"rollout": 256 << 20}
    assert part(job(*tree, "rollout.prefix_memory=8"), "remembered prefixes").largest == 8 << 20
    for other in (
        (*tree, "rollout.prefix_memory=0"),
        ("methods.cure={}", "rollout.engine=vllm", "update.recompute_old_logprob=true"),
    ):
        assert all(p.name != "remembered prefixes" for p in memory(job(*other)).parts)


def test_classp_keeps_one_number_a_weight_and_works_tensor_by_tensor() -> None:
    n, head = 494_032_768, 151_936 * 896
    classp = job("optimizer.name=classp")
    assert part(classp, "CLASSP's history").bytes == dict.fromkeys(PHASES, 4 * n)
    assert part(classp, "CLASSP's temporaries").bytes == {"optimizer": 9 * head}
    assert not [p for p in memory(classp).parts if "Adam" in p.name]
    assert memory(job()).phase("update") - memory(classp).phase("update") == 4 * n
    half = job("optimizer.name=classp", "parallel.shard=fsdp2", ranks=2)
    assert part(half, "CLASSP's history").largest == 2 * n
    adapters = job("optimizer.name=classp", "model.lora.rank=8")
    assert part(adapters, "CLASSP's history").largest == 4 * adapters.trained
    assert part(adapters, "CLASSP's temporaries").largest == 9 * 8 * 4864
    assert memory(job("optimizer.name=classp", "parallel.shard=fsdp2", "parallel.offload=true")).on_host == 12 * n
