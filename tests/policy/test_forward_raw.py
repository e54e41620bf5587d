"""Statistics of raw logits, which log-probs do not hold: the same from all logits, the tiled head and packed rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import make_rollout, sampled_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.methods import build, compose
from rlvr_lab.policy import forward
from rlvr_lab.policy.forward import RAW, score, token_view
from rlvr_lab.policy.load import Policy
from rlvr_lab.policy.shard import shard


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=5000, num_hidden_layers=1, initializer_range=0.5, **shape)
        return Qwen2ForCausalLM(config).eval()


def definition(model: Any, rollout: Rollout, temperature: float) -> dict[str, torch.Tensor]:
    """Both statistics written out."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, rollout.prompt_ids.shape[1] - 1 : -1].double()
    scaled = logits / temperature
    return {
        "sampled_logit": logits.gather(-1, rollout.response_ids[..., None])[..., 0],
        "token_certainty": scaled.logsumexp(-1) - scaled.mean(-1),
    }


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_they_are_their_definitions_on_every_way_through(
    large: bool, packed: bool, temperature: float, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "LARGE", 4096 if large else 10_000)
    rollout = make_rollout([5, 3, 0, 4])
    rollout = rollout.with_(behaviour_temperature=torch.full(rollout.response_ids.shape, temperature))
    expected = definition(model, rollout, temperature)
    scored = score(model, rollout, 2, 12 if packed else None, raw=RAW).statistics
    for name in RAW:
        assert torch.allclose(scored[name][rollout.mask].double(), expected[name][rollout.mask], atol=1e-4), name
        assert not scored[name][~rollout.mask].any()


def test_they_are_recorded_where_they_are_asked_for_only(model: Any) -> None:
    rollout = make_rollout([5, 3])
    assert set(score(model, rollout, 2).statistics) == {"token_entropy"}
    assert set(score(model, rollout, 2, raw=["sampled_logit"]).statistics) == {"token_entropy", "sampled_logit"}
    assert not token_view(model, rollout).read


def test_a_run_that_needs_them_gets_them(tiny_s: Policy) -> None:
    pipeline = compose([build("ucas", {})])
    assert [name for name in RAW if pipeline.needs(name)] == list(RAW)
    rollout = sampled_rollout(tiny_s)
    scored = score(tiny_s.model, rollout, 8, raw=RAW)
    pipeline.check(scored)
    assert pipeline.advantage(scored).isfinite().all()
    # certainty is the cross entropy from the uniform distribution, so never below log V
    assert scored.statistics["token_certainty"][rollout.mask].min() >= torch.tensor(128.0).log() - 1e-4


def test_a_sharded_model_records_the_same(model: Any) -> None:
    rollout = make_rollout([5, 3, 0, 4])
    alone = score(model, rollout, 2, raw=RAW).statistics
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = shard(copy.deepcopy(model), torch.device("cpu"), 1, None, False)
        found = score(sharded, rollout, 2, raw=RAW).statistics
    finally:
        torch.distributed.destroy_process_group()
    for name in RAW:
        assert torch.allclose(found[name], alone[name], atol=1e-5), name
