"""vLLM generates from the shipped policies on a CPU, and its log-probabilities are those of transformers.

Run by `nox -s vllm`; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib
import os

import pytest

# read when vllm is imported: no worker process (3-6 s to start instead of 30), and 1 GiB of cache, its smallest unit
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# under nox a missing vLLM is an error of collection
under_nox = os.environ.get("RLVR_LAB_ENGINE") == "vllm"
vllm = importlib.import_module("vllm") if under_nox else pytest.importorskip("vllm")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from rlvr_lab.policy import tiny  # noqa: E402
from rlvr_lab.tasks import countdown, instructions  # noqa: E402

PROBLEMS, SAMPLES = 8, 4
TOLERANCE = 5e-5
"""Nats. Twice the rounding of transformers itself: its float32 is up to 2e-5 from its float64 on such responses."""


def score(model: torch.nn.Module, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probability of each response token, in nats, by one forward pass of transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("base", list(tiny.BASES))
def test_vllm_samples_with_the_log_probabilities_of_transformers(base: str) -> None:
    path = str(tiny.shipped(base))
    llm = vllm.LLM(
        path, dtype="float32", enforce_eager=True, max_model_len=tiny.POSITIONS, seed=0,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    own = instructions if base == "I" else countdown
    problems = own.problems(PROBLEMS, 0, evaluation=True)
    settings = vllm.SamplingParams(
        n=SAMPLES, temperature=1.0, max_tokens=tiny.BASES[base].max_tokens + 3, logprobs=0, seed=1
    )
    outputs = llm.generate([{"prompt_token_ids": list(p.prompt_ids)} for p in problems], settings)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    worst, responses = 0.0, []
    for problem, output in zip(problems, outputs, strict=True):
        for sample in output.outputs:
            ids = list(sample.token_ids)
            theirs = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
            ours = score(model, list(problem.prompt_ids), ids)
            worst = max(worst, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
            responses.append(ids)
    print(f"{base}: {len(responses)} responses, {sum(map(len, responses))} tokens, largest difference {worst:.1e} nats")
    assert worst < TOLERANCE
    assert len({tuple(ids) for ids in responses}) > PROBLEMS  # sampled, not one answer again and again
    # a wrong model agrees with itself: one that knows the format ends nearly every response
    assert sum(ids[-1] == countdown.EOS for ids in responses) > 0.8 * len(responses)
