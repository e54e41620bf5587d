"""vLLM generates from the shipped policies on a CPU, and its log-probabilities are those of transformers.

Run by `nox -s vllm`; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

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
from rlvr_lab.tasks.agents import triples  # noqa: E402

PROBLEMS, SAMPLES = 8, 4
ENDS = {"A": list(triples.TriplesTask().stops)}
"""What ends a response of a base that acts in turns: its first turn is looked at."""
TOLERANCE = 5e-5
"""Nats. Twice the rounding of transformers itself: its float32 is up to 2e-5 from its float64 on such responses."""


def score(model: torch.nn.Module, prompt: list[int], response: list[int]) -> list[float]:
    """Log-probability of each response token, in nats, by one forward pass of transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()


def prompts_of(base: str) -> list[list[int]]:
    """Held-out problems of the base's task; of base A's, questions."""
    own: Any = {"I": instructions, "A": triples.TriplesTask()}.get(base, countdown)
    problems = own.problems(PROBLEMS, 0, evaluation=True)
    return [own.prompt_ids(p) if base == "A" else list(p.prompt_ids) for p in problems]


@pytest.mark.parametrize("base", list(tiny.BASES))
def test_vllm_samples_with_the_log_probabilities_of_transformers(base: str) -> None:
    path = str(tiny.shipped(base))
    llm = vllm.LLM(
        path, dtype="float32", enforce_eager=True, max_model_len=tiny.lexicon(base).positions, seed=0,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    prompts = prompts_of(base)
    settings = vllm.SamplingParams(
        n=SAMPLES, temperature=1.0, max_tokens=tiny.BASES[base].max_tokens + 3, logprobs=0, seed=1,
        stop=ENDS.get(base), include_stop_str_in_output=True,
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    worst, responses = 0.0, []
    for prompt, output in zip(prompts, outputs, strict=True):
        for sample in output.outputs:
            ids = list(sample.token_ids)
            theirs = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
            ours = score(model, prompt, ids)
            worst = max(worst, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
            responses.append(ids)
    print(f"{base}: {len(responses)} responses, {sum(map(len, responses))} tokens, largest difference {worst:.1e} nats")
    assert worst < TOLERANCE
    assert len({tuple(ids) for ids in responses}) > PROBLEMS  # sampled, not one answer again and again
    # a wrong model agrees with itself: one that knows the format ends nearly every response
    ends = {tiny.lexicon(base).words.index(word) for word in ENDS.get(base, ["<eos>"])}
    assert sum(ids[-1] in ends for ids in responses) > 0.8 * len(responses)
