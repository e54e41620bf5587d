"""A checkpoint directory is one that vLLM opens, with its rounded export and the state to resume from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.checkpoint import TrainerState, save

PROMPT = list(range(30, 38))
# a process of its own: vLLM keeps global state, and other files of this folder start engines, too
GENERATE = f"""
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=64, max_num_seqs=2, enforce_eager=True, generation_config="vllm")
greedy = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
(answer,) = llm.generate([{{"prompt_token_ids": {PROMPT}}}], greedy, use_tqdm=False)
print("RESULT", json.dumps([answer.outputs[0].token_ids, str(llm.llm_engine.model_config.dtype)]))
"""


def test_vllm_opens_a_checkpoint_in_the_precision_of_its_export(tmp_path: Path) -> None:
    policy = load_policy("tiny/S", device="cpu")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for p in policy.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    where = save(tmp_path, policy, optimizer, TrainerState(1, {}), 1, export=torch.bfloat16)
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", GENERATE, str(where)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, dtype = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert dtype == "torch.bfloat16"
    model = load_policy(str(where), device="cpu", dtype="bfloat16").model
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    base = load_policy("tiny/S", device="cpu").model
    started = base.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert not torch.equal(expected, started)  # the step moved the weights
    assert tokens == expected[0, len(PROMPT) :].tolist()
