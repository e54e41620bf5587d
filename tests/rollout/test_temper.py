"""Tokens sampled at temperatures of their own: what is drawn, what is recorded, and what stays the policy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN
from torch import Tensor

from rlvr_lab.core.paths import Path as ResponsePath
from rlvr_lab.core.paths import to_rollout
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.core.temperature import TemperatureRule
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build
from rlvr_lab.methods.arbitrary_entropy import EXTRA
from rlvr_lab.methods.hapo import HAPO, HAPOConfig
from rlvr_lab.policy.forward import response_log_p
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine, draw, draw_tempered
from rlvr_lab.rollout.vllm import VllmEngine, make_backend
from rlvr_lab.rollout.vllm_backend import Request, Sample
from rlvr_lab.rollout.vllm_settings import VllmSection
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.metrics import sampler_metrics

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(4, 0, evaluation=True)]
RULE = TemperatureRule((-6.0, -2.0, 0.0), (0.5, 1.0, 1.8))
BASE = Sampling(1.3, 24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at_own_temperature(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-prob of each token at the recorded temperature and at the policy's, by a forward pass of raw logits."""
    with torch.no_grad():
        log_p = response_log_p(policy.model, rollout.with_(policy_temperature=1.0))

    def of(temperature: Tensor) -> Tensor:
        own = torch.log_softmax(log_p / temperature[..., None], -1)
        return own.gather(-1, rollout.response_ids[..., None]).squeeze(-1)

    return of(rollout.behaviour_temperature), of(torch.full_like(rollout.behaviour_temperature, 1.3))


# -- the rule -------------------------------------------------------------------------------------------------------


def test_a_rule_is_linear_in_log_entropy_and_constant_outside() -> None:
    entropy = torch.tensor([0.0, -1e-9, math.exp(-7), math.exp(-6), math.exp(-4), math.exp(-2), math.exp(-1), 1.0, 3.0])
    expected = [0.5, 0.5, 0.5, 0.5, 0.75, 1.0, 1.4, 1.8, 1.8]
    assert RULE.factors(entropy).tolist() == pytest.approx(expected, abs=1e-6)
    assert RULE.factors(entropy.view(3, 3)).shape == (3, 3)


def test_two_knots_at_one_place_are_a_step() -> None:
    rule = TemperatureRule((-1.0, -1.0), (0.5, 2.0))
    assert rule.factors(torch.tensor([0.1, 0.5])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("knots", "factors"),
    [((), ()), ((0.0,), (1.0, 2.0)), ((1.0, 0.0), (1.0, 1.0)), ((0.0,), (0.0,)), ((math.nan,), (1.0,))],
)
def test_a_rule_that_says_nothing_sensible_is_refused(knots: Any, factors: Any) -> None:
    with pytest.raises(ValueError, match=r"knots|factors"):
        TemperatureRule(knots, factors)


# -- the transformers engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["step", "prompt"])
def test_every_token_is_recorded_at_its_own_temperature(tiny_s: Policy, streams: Any) -> None:
    sampling = replace(BASE, temper=RULE, streams=streams)
    rollout = TransformersEngine(tiny_s).sample(PROMPTS, 6, sampling, seeded())
    mask, temperature = rollout.mask, rollout.behaviour_temperature
    own, base = at_own_temperature(tiny_s, rollout)
    torch.testing.assert_close(rollout.behaviour_logprob[mask], own[mask], rtol=0, atol=1e-4)
    assert rollout.old_logprob is not None
    torch.testing.assert_close(rollout.old_logprob[mask], base[mask], rtol=0, atol=1e-4)
    assert float((own - base)[mask].abs().max()) > 0.1
    expected = 1.3 * RULE.factors(rollout.statistics["token_entropy"])
    torch.testing.assert_close(temperature[mask], expected[mask], rtol=0, atol=1e-6)
    assert float(temperature[mask].min()) < 1.0 < 1.5 < float(temperature[mask].max())
    assert bool((temperature[~mask] == 1.3).all())
    assert rollout.policy_temperature == 1.3


def test_without_a_rule_nothing_changes(tiny_s: Policy) -> None:
    engine = TransformersEngine(tiny_s)
    plain = engine.sample(PROMPTS, 4, BASE, seeded())
    same = engine.sample(PROMPTS, 4, replace(BASE, temper=TemperatureRule((0.0,), (1.0,))), seeded())
    assert plain.policy_temperature is None
    assert torch.equal(plain.response_ids, same.response_ids)
    torch.testing.assert_close(plain.behaviour_logprob, same.behaviour_logprob)


def test_the_most_likely_token_knows_no_temperature(tiny_s: Policy) -> None:
    engine = TransformersEngine(tiny_s)
    found = [engine.sample(PROMPTS, 2, Sampling(0.0, 24, temper=rule), seeded()) for rule in (None, RULE)]
    assert torch.equal(found[0].response_ids, found[1].response_ids)
    assert bool((found[1].behaviour_logprob == 0).all())


def test_tempered_draws_have_the_tempered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    n = 20_000
    drawn = draw_tempered(logits.expand(n, -1), 1.0, seeded(), RULE)
    p = torch.softmax(logits / drawn.temperature[0], 0)
    chi_square = float(((torch.bincount(drawn.tokens, minlength=4) - n * p).square() / (n * p)).sum())
    assert chi_square < 21.1  # 99.99 % quantile for 3 degrees of freedom
    untempered = torch.softmax(logits, 0)
    assert float(((torch.bincount(drawn.tokens, minlength=4) - n * untempered).square() / (n * untempered)).sum()) > 100
    torch.testing.assert_close(drawn.logprob, p.log()[drawn.tokens])
    torch.testing.assert_close(drawn.old, untempered.log()[drawn.tokens])


def test_a_nan_is_refused_with_a_rule_as_without() -> None:
    logits = torch.tensor([[0.0, math.nan]])
    for broken in (lambda: draw(logits, 1.0, seeded()), lambda: draw_tempered(logits, 1.0, seeded(), RULE)):
        with pytest.raises(FloatingPointError, match="weights are broken"):
            broken()


def test_a_temperature_that_is_meant_is_no_mismatch(tiny_s: Policy) -> None:
    engine = TransformersEngine(tiny_s)
    tempered = engine.sample(PROMPTS, 4, replace(BASE, temper=RULE), seeded())
    assert math.isnan(sampler_metrics(tempered, 0, 100)["mismatch"])
    assert sampler_metrics(tempered.with_(policy_temperature=None), 0, 100)["mismatch"] > 0.1


# -- the vLLM engine over a backend of transformers -----------------------------------------------------------------


class Backend:
    """Samples with transformers what vLLM would; records what it was asked."""

    dtype, longest = "float32", 128

    def __init__(self, policy: Policy) -> None:
        self.engine = TransformersEngine(policy)
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        self.requests += requests
        return [[self._one(r, r.seed + i) for i in range(r.n)] for r in requests]

    def _one(self, r: Request, seed: int) -> Sample:
        sampling = Sampling(r.temperature, r.max_tokens, temper=r.temper)
        found = self.engine.sample([r.prompt], 1, sampling, seeded(seed))
        own = None if r.temper is None else found.behaviour_temperature[0].tolist()
        ids, logprob = found.response_ids[0].tolist(), found.behaviour_logprob[0].tolist()
        return Sample(ids, logprob, bool(found.finished), own)


def test_vllm_records_what_its_tokens_were_sampled_at(tiny_s: Policy) -> None:
    backend: Any = Backend(tiny_s)
    engine = VllmEngine(tiny_s, backend=backend)
    rollout = engine.sample(PROMPTS, 3, replace(BASE, temper=RULE), seeded())
    own, _ = at_own_temperature(tiny_s, rollout)
    mask = rollout.mask
    torch.testing.assert_close(rollout.behaviour_logprob[mask], own[mask], rtol=0, atol=1e-4)
    assert rollout.policy_temperature == 1.3
    assert bool((rollout.behaviour_temperature[~mask] == 1.3).all())
    assert len(rollout.behaviour_temperature[mask].unique()) > 10
    assert {r.temper for r in backend.requests} == {RULE}
    engine.sample(PROMPTS, 1, Sampling(0.0, 24, temper=RULE), seeded())
    assert {r.temper for r in backend.requests[len(PROMPTS) :]} == {None}


def test_a_tempered_response_is_continued_at_the_same_base(tiny_s: Policy) -> None:
    engine = VllmEngine(tiny_s, backend=Backend(tiny_s))
    sampling = replace(BASE, temper=RULE)
    paths = [ResponsePath(i, i, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    for seed, room in ((0, 4), (3, 20)):
        starts = [path.start(room) for path in paths if path.open]
        pieces = engine.extend(starts, sampling, seeded(seed))
        for path, piece in zip([path for path in paths if path.open], pieces, strict=True):
            path.add(piece)
    joined = to_rollout(paths, pad_id=tiny_s.pad_id, version=0, policy_temperature=1.3)
    own, _ = at_own_temperature(tiny_s, joined)
    torch.testing.assert_close(joined.behaviour_logprob[joined.mask], own[joined.mask], rtol=0, atol=1e-4)
    assert len(joined.behaviour_temperature[joined.mask].unique()) > 10


def test_a_server_is_refused_before_it_is_asked(tiny_s: Policy, tmp_path: Path) -> None:
    settings = VllmSection(server="http://localhost:1", sync_folder=tmp_path)
    with pytest.raises(UserError, match=r"rollout\.vllm\.server cannot sample at a temperature per token"):
        make_backend(tiny_s, settings, tempers=True)


# -- in a run -------------------------------------------------------------------------------------------------------

HAPO_RUN = "methods={grpo: {preset: tiny}, hapo: {preset: paper}}"


def trainer(out: Path, *settings: str, **options: Any) -> Trainer:
    return Trainer(load_config(None, [*TINY_RUN, *settings]), out, **options)


def test_the_first_step_is_at_the_base_and_the_next_follows_the_rollout_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "run", HAPO_RUN, "steps=2")
    seen: list[Rollout] = []
    whole = run.collector._gather
    monkeypatch.setattr(run.collector, "_gather", lambda part: seen.append(whole(part)) or seen[-1])
    history = run.run().history
    assert [r.policy_temperature for r in seen] == [None, 1.0]
    assert bool((seen[0].behaviour_temperature == 1.0).all())
    method = HAPO(HAPOConfig())
    method.filter(seen[0])
    rule = method.temper()
    assert rule is not None
    second = seen[1]
    expected = rule.factors(second.statistics["token_entropy"])[second.mask]
    torch.testing.assert_close(second.behaviour_temperature[second.mask], expected)
    assert history[0]["hapo.temperature"] == 1.0
    assert history[1]["hapo.temperature_min"] < 1.0
    assert history[1]["hapo.temperature"] == pytest.approx(float(expected.mean()))


def test_a_tau_of_zero_is_no_rule_to_the_bit(tmp_path: Path) -> None:
    off = "methods={grpo: {preset: tiny}, hapo: {preset: paper, tau: 0.0}}"
    rest = ["steps=3", "rollout.max_tokens=24"]
    plain = trainer(tmp_path / "off", off, *rest).run()
    on = trainer(tmp_path / "on", HAPO_RUN, *rest)
    on.pipeline.methods[-1].temper = lambda: None  # type: ignore[attr-defined]
    same = on.run()
    assert [row["behaviour_logprob"] for row in plain.history] == [row["behaviour_logprob"] for row in same.history]
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in same.history]
    tempered = trainer(tmp_path / "tempered", HAPO_RUN, *rest).run()
    assert tempered.history[0]["behaviour_logprob"] == plain.history[0]["behaviour_logprob"]
    assert tempered.history[1]["behaviour_logprob"] != plain.history[1]["behaviour_logprob"]


@pytest.mark.parametrize("method", ["hapo: {preset: paper}", "arbitrary_entropy: {preset: tiny, target: 0.1}"])
def test_a_resumed_run_samples_as_if_it_had_not_stopped(tmp_path: Path, method: str) -> None:
    settings = [f"methods={{grpo: {{preset: tiny}}, {method}}}", "update.recompute_old_logprob=true", "ledger.rows=4"]
    whole = trainer(tmp_path / "whole", *settings, "steps=4").run()
    trainer(tmp_path / "cut", *settings, "steps=2").run()
    resumed = trainer(tmp_path / "cut", *settings, "steps=4", resume=True).run()
    for name in ("behaviour_logprob", "reward", "grad_norm"):
        assert [row[name] for row in resumed.history] == [row[name] for row in whole.history]


def test_the_extra_responses_are_counted_scored_and_kept_apart(tmp_path: Path) -> None:
    settings = "methods={grpo: {preset: tiny}, arbitrary_entropy: {preset: tiny, share: 0.25, target: 0.01}}"
    run = trainer(tmp_path / "run", settings, "update.recompute_old_logprob=true", "rollout.prompts=4", "steps=1")
    rollout = run.collect(0)
    extra = rollout.statistics[EXTRA][:, 0] > 0
    assert (len(rollout), int(extra.sum())) == (5 * 4, 4)  # a quarter of the prompts again
    assert rollout.behaviour_temperature[extra].unique().tolist() == [2.0]
    assert rollout.behaviour_temperature[~extra].unique().tolist() == [1.0]
    assert rollout.policy_temperature == 1.0
    assert run.collector.generated["generated_tokens"] == float(rollout.mask.sum())
    assert not set(rollout.group_id[extra].tolist()) & set(rollout.group_id[~extra].tolist())
    own, _ = at_own_temperature(run.policy, rollout.with_(behaviour_temperature=torch.ones_like(rollout.mask.float())))
    mask = rollout.mask
    assert rollout.old_logprob is not None
    torch.testing.assert_close(rollout.old_logprob[mask], own[mask], rtol=0, atol=1e-4)
    metrics = run.pipeline.metrics()
    entropy = rollout.statistics["token_entropy"][~extra][mask[~extra]].mean()
    assert metrics["arbitrary_entropy.entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert metrics["arbitrary_entropy.temperature"] == 2.0


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("preset", ["paper", "released", "tiny"])
def test_every_preset_trains(tmp_path: Path, preset: str, mode: str) -> None:
    settings = f"methods={{grpo: {{preset: tiny}}, arbitrary_entropy: {{preset: {preset}, mode: {mode}}}}}"
    result = trainer(tmp_path / "run", settings, "update.recompute_old_logprob=true", "steps=2").run()
    assert all(math.isfinite(row["loss"]) for row in result.history)


def test_other_engines_refuse_a_tempered_method_by_name() -> None:
    from rlvr_lab.integrations.exchange import unsupported
    from rlvr_lab.integrations.verl_support import obstacles
    from rlvr_lab.methods import compose

    warm = compose([build("grpo", {"preset": "tiny"}), HAPO(HAPOConfig())])
    assert "TRL cannot carry 'hapo'" in (unsupported(warm) or "")
    assert "methods.hapo.tau: 0" in (unsupported(warm) or "")
    assert "'hapo' sets the temperature of every token" in obstacles(warm.methods, "b")[0]
    cold = compose([build("grpo", {"preset": "tiny"}), HAPO(HAPOConfig(tau=0.0))])
    assert unsupported(cold) is None
    assert obstacles(cold.methods, "b") == []
