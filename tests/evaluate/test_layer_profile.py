"""The entropy profile of layers: both lenses, changes, cosines; and the artefact that the raw lens has."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from builders import make_rollout, sampled_rollout

from rlvr_lab.core.reduce import masked_mean
from rlvr_lab.errors import UserError
from rlvr_lab.evaluate.layer_profile import entropy_profile
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy


def test_the_normed_lens_of_the_last_layer_is_the_policy(tiny_s: Policy) -> None:
    rollout = sampled_rollout(tiny_s)
    profile = entropy_profile(tiny_s.model, rollout)
    own = float(masked_mean(scored(tiny_s.model, rollout, 16)[1], rollout.mask))
    assert [row.layer for row in profile] == [0, 1, 2, 3]
    assert profile[-1].normed_entropy == pytest.approx(own, abs=1e-4)
    assert profile[-1].cosine_to_last == pytest.approx(1.0, abs=1e-5)
    assert math.isnan(profile[0].ffn_change)
    for before, row in pairwise(profile):
        assert row.layer_change == pytest.approx(row.raw_entropy - before.raw_entropy, abs=1e-4)


def test_a_longer_stream_alone_lowers_the_raw_entropy_and_not_the_normed_one(tiny_s: Policy) -> None:
    rollout = sampled_rollout(tiny_s)
    longer = copy.deepcopy(tiny_s.model)
    with torch.no_grad():  # everything that is added to the stream, twice as long; norms undo it inside
        longer.model.embed_tokens.weight.mul_(2)
        for layer in longer.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for p in module.parameters():
                    p.mul_(2)
    for before, after in zip(entropy_profile(tiny_s.model, rollout), entropy_profile(longer, rollout), strict=True):
        assert after.stream_rms == pytest.approx(2 * before.stream_rms, rel=1e-3)
        assert after.normed_entropy == pytest.approx(before.normed_entropy, abs=5e-3)
        assert after.raw_entropy < 0.9 * before.raw_entropy


def test_padding_is_inert_and_no_token_is_refused(tiny_s: Policy) -> None:
    rollout = make_rollout([3, 5, 1])
    padded = rollout.with_(response_ids=rollout.response_ids.masked_fill(~rollout.mask, 7))
    for a, b in zip(entropy_profile(tiny_s.model, rollout), entropy_profile(tiny_s.model, padded), strict=True):
        assert a.raw_entropy == pytest.approx(b.raw_entropy, abs=1e-6)
    empty = torch.zeros_like(rollout.mask)
    nothing = rollout.with_(response_mask=empty, action_mask=empty)
    with pytest.raises(ValueError, match="no response token"):
        entropy_profile(tiny_s.model, nothing)


def test_an_unknown_architecture_is_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(UserError, match="'gpt2'"):
        entropy_profile(model, make_rollout([3]))
