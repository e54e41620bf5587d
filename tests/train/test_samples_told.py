"""Transcripts of episodes: what the environment said is marked and has no figures of the policy."""

from __future__ import annotations

import torch
from builders import sampled_rollout

from rlvr_lab.policy.load import Policy
from rlvr_lab.train.samples import sample_rows


def test_told_tokens_are_marked_and_bare(tiny_s: Policy) -> None:
    graded = {"correct": torch.ones(16, dtype=torch.bool), "answer": (None,) * 16}
    rollout = sampled_rollout(tiny_s).with_(**graded)
    plain = sample_rows(rollout, list(range(100)), tiny_s, 2)[0]
    assert "token_told" not in plain
    action = rollout.action_mask.clone()
    action[0, 1] = False
    row = sample_rows(rollout.with_(action_mask=action), list(range(100)), tiny_s, 2)[0]
    told = row["token_told"]
    assert told == [i == 1 for i in range(len(told))]
    for name in ("token_logprob", "token_entropy"):
        assert row[name][1] is None
        assert row[name][0] == plain[name][0]
    assert torch.equal(rollout.response_ids[0, : len(told)], torch.tensor(row["token_ids"]))
