"""Builders that several test folders use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.tasks import countdown

GOLDEN = Path(__file__).parent / "golden"

# small enough for a fraction of a second; every section that a run needs is still exercised
TINY_RUN = (
    "data.pool=12",
    "rollout.prompts=2",
    "rollout.group_size=4",
    "rollout.max_tokens=16",
    "update.minibatches=2",
    "update.micro_batch_rows=4",
    "evaluation.problems=0",
    "checkpoint.every=2",
    "logging.tensorboard=false",
)


def golden_case(name: str, file: str = "baselines") -> dict[str, Any]:
    """One case of a golden file by name."""
    cases = json.loads((GOLDEN / f"{file}.json").read_text())["cases"]
    found: dict[str, Any] = next(c for c in cases if c["name"] == name)
    return found


def ragged_mask(lengths: list[int], width: int | None = None) -> torch.Tensor:
    """Boolean prefix mask [B, T]."""
    width = width or max(lengths)
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def make_rollout(lengths: list[int], group_size: int = 2, width: int | None = None, seed: int = 0) -> Rollout:
    """A random record without any model: word ids, log-probs, entropies, rewards."""
    generator = torch.Generator().manual_seed(seed)
    mask = ragged_mask(lengths, width)
    b, t = mask.shape
    logprob = -torch.rand(b, t, generator=generator)
    return Rollout(
        prompt_id=torch.arange(b) // group_size,
        group_id=torch.arange(b) // group_size,
        finished=torch.ones(b, dtype=torch.bool),
        policy_version=torch.zeros(b, dtype=torch.long),
        prompt_ids=torch.randint(28, 100, (b, 8), generator=generator),
        prompt_mask=torch.ones(b, 8, dtype=torch.bool),
        response_ids=torch.randint(28, 100, (b, t), generator=generator),
        response_mask=mask,
        action_mask=mask.clone(),
        behaviour_logprob=logprob,
        behaviour_temperature=torch.ones(b, t),
        old_logprob=logprob.clone(),
        reward=torch.rand(b, generator=generator),
        statistics={"token_entropy": torch.rand(b, t, generator=generator)},
    )


def sampled_rollout(policy: Policy, prompts: int = 4, group_size: int = 4, seed: int = 0, **sampling: Any) -> Rollout:
    """Responses of a policy to Countdown problems, cut to 20, 17, ... tokens and the last one to none, so that they
    are ragged whatever the policy wrote. Random rewards of 0 and 1; group 0 is dead, the others are not.
    """
    problems = countdown.problems(prompts, seed)
    generator = torch.Generator().manual_seed(seed)
    settings = Sampling(**{"max_tokens": 20, **sampling})
    rollout = TransformersEngine(policy).sample([list(p.prompt_ids) for p in problems], group_size, settings, generator)
    cut = 20 - 3 * (torch.arange(len(rollout)) % 5)
    cut[-1] = 0
    mask = rollout.response_mask & (torch.arange(rollout.response_ids.shape[1])[None] < cut[:, None])
    reward = (torch.rand(len(rollout), generator=generator) < 0.5).float()
    reward[::group_size], reward[1::group_size] = 0.0, 1.0
    reward[:group_size] = 1.0
    return rollout.with_(reward=reward, response_mask=mask, action_mask=mask)
