"""Builders that several test folders use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods.arbitrary_entropy import EXTRA
from rlvr_lab.methods.base import Pipeline
from rlvr_lab.policy.forward import LAYER_LOGPROB, RAW, score, score_layer
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


def ready_rollout(model: Any, rollout: Rollout, pipeline: Pipeline) -> Rollout:
    """A graded rollout with everything that a composition may ask for, filtered as before an update.

    Old log-probs are the model's own, moved at random, so that ratios lie on both sides of 1; the reference's too. The
    last quarter of the rows is marked as drawn at another temperature, as `arbitrary_entropy` draws them.
    """
    right = rollout.require("reward", by="ready_rollout") > 0
    generator = torch.Generator().manual_seed(5)
    extra = (torch.arange(len(rollout)) >= len(rollout) * 3 // 4).float()[:, None].expand(rollout.response_ids.shape)
    raw = [name for name in RAW if pipeline.needs(name)]
    rollout = score(model, rollout, 8, read=pipeline.reader(old=True), raw=raw)
    if (lens := pipeline.lens(0, model)) is not None:
        rollout = score_layer(model, rollout, lens, 8)
        layer = rollout.statistics[LAYER_LOGPROB]
        moved = (layer + 0.1 * torch.randn(layer.shape, generator=generator)).masked_fill(~rollout.mask, 0.0)
        rollout = rollout.with_statistics(**{LAYER_LOGPROB: moved})
    old, outside = rollout.require("old_logprob", by="ready_rollout"), ~rollout.mask
    moved, reference = (old + s * torch.randn(old.shape, generator=generator) for s in (0.1, 0.3))
    # answers of one cluster are neighbours, and one response in five has none
    clusters = torch.where(torch.arange(len(rollout)) % 5 == 4, -1, torch.arange(len(rollout)) // 2 % 3)
    ready = (
        (rollout if rollout.parent_id is not None else as_tree(rollout))
        .with_(
            old_logprob=moved.masked_fill(outside, 0.0),
            correct=right,
            policy_temperature=1.0,
            cluster_id=clusters if rollout.cluster_id is None else rollout.cluster_id,
            answer=rollout.answer or tuple(None if c < 0 else str(c) for c in clusters.tolist()),
        )
        .with_statistics(**step_labels(rollout, right))
        .with_statistics(ref_logprob=reference.masked_fill(outside, 0.0), **{EXTRA: extra})
    )
    pipeline.check(ready)
    return pipeline.filter(ready)


def as_tree(rollout: Rollout) -> Rollout:
    """The record of a tree: every second response of a group, in order, is a branch of the one before, from which it
    took two tokens, or all but one of its own."""
    same = rollout.group_id[:, None].eq(rollout.group_id)
    number = same.tril(-1).sum(1)
    branch = number % 2 == 1
    kept = torch.where(branch, (rollout.lengths - 1).clamp(0, 2), 0)
    return rollout.with_(
        path_id=number,
        parent_id=torch.where(branch, number - 1, -1),
        prefix_length=kept,
        branch_position=torch.where(branch, kept, -1),
    )


def step_labels(rollout: Rollout, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """Steps of three tokens, every second one labelled 0, the last one as the response is."""
    place = torch.arange(rollout.response_ids.shape[1]).expand(rollout.response_ids.shape)
    step = (place // 3).float()
    last = step == ((rollout.lengths[:, None] - 1) // 3).float()
    label = torch.where(last, right[:, None].float(), step % 2)
    return {"thought_step": step, "thought_label": label}


def byte_level_qwen2(where: Path) -> Path:
    """A transformers directory: two layers of width 32 with random weights over 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet + special)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(where)
    config = Qwen2Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=258, pad_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(where)
    return where
