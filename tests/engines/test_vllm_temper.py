"""Tokens of vLLM at temperatures of their own: log-probs, recorded temperatures, seeds. Run by `nox -s vllm`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

if os.environ.get("RLVR_LAB_ENGINE") == "vllm":
    importlib.import_module("vllm")
else:
    pytest.importorskip("vllm")

import torch

from rlvr_lab.core.temperature import TemperatureRule
from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import response_log_p, scored
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_settings import VllmSection
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

TOLERANCE = 5e-5
"""Nats; the rounding of two float32 programs, see test_vllm_opens_shipped."""
PROMPTS = [list(p.prompt_ids) for p in countdown.problems(6, 0, evaluation=True)]
RULE = TemperatureRule((-6.0, -2.0, 0.0), (0.5, 1.0, 1.8))
BASE = Sampling(1.3, 28)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    it = VllmEngine(load_policy("tiny/S"), VllmSection(eager=True), tempers=True)
    yield it
    it.close()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("group", [8, 64], ids=["all in flight", "more than fit"])
def test_logprobs_and_temperatures_are_those_the_token_was_sampled_at(engine: VllmEngine, group: int) -> None:
    rollout = engine.sample(PROMPTS, group, replace(BASE, temper=RULE), seeded())
    mask, temperature = rollout.mask, rollout.behaviour_temperature
    model = engine.policy.model
    _, entropy = scored(model, rollout, 64)
    expected = 1.3 * RULE.factors(entropy)
    assert float((temperature - expected)[mask].abs().max()) < TOLERANCE
    assert float(temperature[mask].min()) < 0.8 < 2.0 < float(temperature[mask].max())
    with torch.no_grad():
        log_p = response_log_p(model, rollout.with_(policy_temperature=1.0))
    own = torch.log_softmax(log_p / temperature[..., None], -1)
    own = own.gather(-1, rollout.response_ids[..., None]).squeeze(-1)
    assert float((own - rollout.behaviour_logprob)[mask].abs().max()) < TOLERANCE
    assert float((scored(model, rollout, 64)[0] - rollout.behaviour_logprob)[mask].abs().max()) > 0.1


def test_a_rule_of_ones_draws_what_no_rule_draws(engine: VllmEngine) -> None:
    plain = engine.sample(PROMPTS, 4, BASE, seeded(5))
    same = engine.sample(PROMPTS, 4, replace(BASE, temper=TemperatureRule((0.0,), (1.0,))), seeded(5))
    assert torch.equal(plain.response_ids, same.response_ids)
    assert float((plain.behaviour_logprob - same.behaviour_logprob).abs().max()) < 1e-5
    assert plain.policy_temperature is None
    assert same.policy_temperature == 1.3


def test_greedy_requests_know_no_temperature(engine: VllmEngine) -> None:
    found = [engine.sample(PROMPTS, 2, Sampling(0.0, 28, temper=rule), seeded()) for rule in (None, RULE)]
    assert torch.equal(found[0].response_ids, found[1].response_ids)


def test_a_vllm_started_for_one_temperature_says_so() -> None:
    engine = VllmEngine(load_policy("tiny/S"), VllmSection(eager=True))
    try:
        with pytest.raises(UserError, match="started for sampling at one temperature"):
            engine.sample(PROMPTS, 2, replace(BASE, temper=RULE), seeded())
    finally:
        engine.close()


def test_training_tempers_from_the_second_step_on(tmp_path: Path) -> None:
    settings = ["rollout.engine=vllm", "rollout.vllm.eager=true", "update.recompute_old_logprob=true", "data.pool=12",
                "rollout.prompts=4", "rollout.group_size=4", "update.minibatches=2", "evaluation.problems=0", "steps=3",
                "methods={grpo: {preset: tiny}, hapo: {preset: paper}}", "logging.tensorboard=false"]  # fmt: skip
    history = Trainer(load_config(None, settings), tmp_path / "run").run().history
    assert history[0]["hapo.temperature"] == 1.0
    assert all(0.899 < row["hapo.temperature_min"] < 1.0 for row in history[1:])
    assert all(row["sync_mismatch"] < 1e-4 for row in history)
