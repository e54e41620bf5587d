"""Does packing pay? CPU seconds of forward and backward passes over ragged responses, padded and packed.

    python benchmarks/packing.py --out benchmarks/results/packing.json

Same rows, same tokens per pass, interleaved; the ratio is above 1 where packing is faster. A packed pass on the CPU
builds a mask of all tokens against all (transformers' SDPA), so long lines cost more than the padding they save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.forward import passes, token_view
from rlvr_lab.policy.load import load_policy
from rlvr_lab.train.loop import machine


def rollout_of(lengths: list[int], prompt: int, vocabulary: int) -> Rollout:
    """Random tokens of these response lengths."""
    generator = torch.Generator().manual_seed(0)
    b, t = len(lengths), max(lengths)
    mask = torch.arange(t)[None] < torch.tensor(lengths)[:, None]
    return Rollout(
        prompt_id=torch.arange(b), group_id=torch.arange(b), finished=torch.ones(b, dtype=torch.bool),
        policy_version=torch.zeros(b, dtype=torch.long),
        prompt_ids=torch.randint(1, vocabulary, (b, prompt), generator=generator),
        prompt_mask=torch.ones(b, prompt, dtype=torch.bool),
        response_ids=torch.randint(1, vocabulary, (b, t), generator=generator), response_mask=mask,
        action_mask=mask, behaviour_logprob=torch.zeros(b, t), behaviour_temperature=torch.ones(b, t),
    )  # fmt: skip


def cost(model: Any, rollout: Rollout, rows: int, tokens: int | None) -> float:
    """CPU seconds of one pass over the rollout, gradients included."""
    start = time.process_time()
    for index in passes(rollout, rollout.lengths.argsort(descending=True), rows, tokens):
        part = rollout.rows(index)
        view = token_view(model, part, False, packed=tokens is not None)
        (view.logprob * part.mask).sum().backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - start


def models() -> dict[str, tuple[Any, list[int], int, int]]:
    """Name: model, response lengths, prompt length, rows per padded pass."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    generator = torch.Generator().manual_seed(1)
    short = torch.randint(8, 40, (64,), generator=generator).tolist()
    long = (torch.rand(32, generator=generator).square() * 448 + 32).long().tolist()
    torch.manual_seed(0)
    middle = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    ).eval()  # fmt: skip
    return {"tiny/S": (load_policy("tiny/S", device="cpu").model, short, 8, 16), "7M Qwen2": (middle, long, 32, 8)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, (model, lengths, prompt, rows) in models().items():
        rollout = rollout_of(lengths, prompt, model.config.vocab_size)
        total = sum(lengths) + prompt * len(lengths)
        # as many tokens per pass as a padded pass has on average
        tokens = total * rows // len(lengths)
        times = {"padded": [], "packed": []}  # type: dict[str, list[float]]
        for _ in range(arguments.repeats + 1):
            times["padded"].append(cost(model, rollout, rows, None))
            times["packed"].append(cost(model, rollout, rows, tokens))
        padded, packed = (statistics.median(times[k][1:]) for k in ("padded", "packed"))
        ratios = sorted(a / b for a, b in zip(times["padded"][1:], times["packed"][1:], strict=True))
        width = sum(max(lengths[i] for i in p.tolist()) * len(p) + prompt * len(p) for p in
                    passes(rollout, rollout.lengths.argsort(descending=True), rows))  # fmt: skip
        found[name] = {
            "responses": len(lengths), "tokens": total, "padding_share": 1 - total / width, "tokens_per_pass": tokens,
            "padded_cpu_seconds": padded, "packed_cpu_seconds": packed, "ratio": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
        }  # fmt: skip
    about = {"what": __doc__, "repeats": arguments.repeats, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    record = about | {"results": found}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
