"""One run of RlvrGRPOTrainer on recorded responses, alone or as one of several ranks; rank 0 writes the parameters.

python trl_two_ranks.py OUT.safetensors ROWS_PER_PASS
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from trl import GRPOConfig

from rlvr_lab.integrations.trl import RlvrGRPOTrainer
from rlvr_lab.policy.load import load_policy
from rlvr_lab.tasks import countdown

# a filter with refill, choices over the minibatch, a reference policy, a sampler that is not the policy
METHODS = {
    "clip_cov": {"preset": "released", "ratio": 0.2},
    "kl_reference": {"beta": 0.01},
    "dynamic_sampling": {"metric": "reward", "max_batches": 4},
    "truncated_importance_sampling": {},
}
GROUP, ROWS, STEPS, RATE = 4, 16, 4, 0.1


def recorded(prompts: list[list[int]], trainer: Any) -> dict[str, Any]:
    """Responses by rank and place, the same however rows are spread: of several lengths, a part of them from a tool."""
    ids, logprobs, masks = [], [], []
    first = trainer.accelerator.process_index * len(prompts)
    for i, prompt in enumerate(prompts):
        g = torch.Generator().manual_seed(1000 * trainer.state.global_step + 31 * (first + i) + sum(prompt))
        n = int(torch.randint(3, 13, (), generator=g))
        ids.append(torch.randint(5, 60, (n,), generator=g).tolist())
        logprobs.append((-torch.rand(n, generator=g) * 3).tolist())
        masks.append([1, 0, *[1] * (n - 2)])
    return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logprobs, "env_mask": masks}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some groups agree, so that dynamic sampling has something to refill."""
    return [float(sum(ids) % 5 == 0) for ids in completion_ids]


def main(out: Path, rows: int) -> None:
    policy = load_policy("tiny/S", device="cpu")
    problems = list(countdown.problems(32, 0))
    data = Dataset.from_dict({"prompt": [list(p.prompt_ids) for p in problems], "problem_id": list(range(32))})
    with tempfile.TemporaryDirectory() as folder:
        ranks = max(1, int(os.environ.get("WORLD_SIZE", "1")))
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=ROWS // 2 // rows // ranks,
            steps_per_generation=ROWS // rows // ranks,
            num_generations=GROUP,
            max_completion_length=16,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            logging_steps=2,
        )
        trainer = RlvrGRPOTrainer(
            policy.model,
            reward,
            config,
            data,
            processing_class=policy.tokenizer,
            optimizers=(torch.optim.SGD(policy.model.parameters(), lr=RATE), None),
            rollout_func=recorded,
            methods=METHODS,
        )
        trainer.train()
    if trainer.accelerator.is_main_process:
        tensors = {name: p.detach().clone().contiguous() for name, p in trainer.model.named_parameters()}
        logged = [row for row in trainer.state.log_history if "ratio_mean" in row][-1]
        names = ("loss", "ratio_mean", "clip_high", "regularise_kl_reference", "rows_skipped", "tokens")
        tensors["metrics"] = torch.tensor([float(logged[name]) for name in names])
        save_file(tensors, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
