"""`VllmEngine` on vLLM itself, in this process, on a CPU: samples, seeds, weight syncs, prefixes, adapters.

Run by `nox -s vllm`; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path as FilePath

import pytest

if os.environ.get("RLVR_LAB_ENGINE") == "vllm":
    importlib.import_module("vllm")
else:
    pytest.importorskip("vllm")

import torch

from rlvr_lab.core.paths import Path, Start, to_rollout
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.episodes import EpisodeEngine, actions_of
from rlvr_lab.rollout.grading import grade
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_settings import VllmSection
from rlvr_lab.tasks import countdown, registry

TOLERANCE = 5e-5
"""Nats; the rounding of two float32 programs, see test_vllm_opens_shipped."""
PROMPTS = [list(p.prompt_ids) for p in countdown.problems(6, 0, evaluation=True)]
HOT = Sampling(temperature=0.7, max_tokens=28)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    """One vLLM for the tests of this file that leave its weights as they are, or put them back."""
    it = VllmEngine(load_policy("tiny/S"), VllmSection(eager=True))
    yield it
    it.close()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worst(policy: Policy, rollout: Rollout) -> float:
    """Largest difference between recorded and transformers' log-probs, in nats."""
    difference = scored(policy.model, rollout, 64)[0] - rollout.behaviour_logprob
    return float(difference[rollout.mask].abs().max())


def weights(policy: Policy) -> list[tuple[str, torch.Tensor]]:
    return list(policy.model.state_dict().items())


def step(policy: Policy, rollout: Rollout, lr: float = 1e-2) -> None:
    """One optimizer step on the likelihood of some responses: every parameter moves, by about lr."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr)
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    policy.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(engine: VllmEngine, temperature: float) -> None:
    rollout = engine.sample(PROMPTS, 4, Sampling(temperature, 28), seeded(), problem_ids=range(10, 16), version=3)
    assert len(rollout) == 24
    assert worst(engine.policy, rollout) < TOLERANCE
    assert rollout.prompt_id.tolist() == [i for i in range(10, 16) for _ in range(4)]
    assert rollout.policy_version.unique().tolist() == [3]
    assert rollout.old_logprob is None
    assert "token_entropy" not in rollout.statistics
    ends = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1).squeeze(1)
    assert torch.equal(ends == countdown.EOS, rollout.finished)
    assert rollout.finished.float().mean() > 0.8
    assert len({tuple(row) for row in rollout.response_ids.tolist()}) > len(PROMPTS)


def test_temperature_zero_is_a_point_mass(engine: VllmEngine) -> None:
    rollout = engine.sample(PROMPTS, 3, Sampling(0.0, 28), seeded())
    assert bool((rollout.behaviour_logprob == 0).all())
    rows = rollout.response_ids.view(len(PROMPTS), 3, -1)
    assert torch.equal(rows[:, 0], rows[:, 1])
    scores, _ = scored(engine.policy.model, rollout.with_(behaviour_temperature=rollout.mask.float()), 64)
    assert float(scores[rollout.mask].exp().min()) > 1 / len(countdown.VOCABULARY)  # the most likely of all words


def test_seeds_reproduce_whatever_is_in_flight(engine: VllmEngine) -> None:
    whole = engine.sample(PROMPTS, 4, HOT, seeded(5))
    again = engine.sample(PROMPTS, 4, HOT, seeded(5))
    other = engine.sample(PROMPTS, 4, HOT, seeded(6))
    assert torch.equal(whole.response_ids, again.response_ids)
    assert not torch.equal(whole.response_ids[:, :8], other.response_ids[:, :8])
    # the second half of the step, as another process would draw it
    half = engine.sample(PROMPTS[3:], 4, Sampling(0.7, 28, first=3), seeded(5))
    width = half.response_ids.shape[1]
    assert torch.equal(half.response_ids, whole.response_ids[12:, :width])


def test_every_prompt_may_have_its_own_settings(engine: VllmEngine) -> None:
    each = [Sampling(0.5 + 0.1 * i, 4 + i) for i in range(len(PROMPTS))]
    rollout = engine.sample(PROMPTS, 2, HOT, seeded(), each=each)
    assert [round(t, 1) for t in rollout.behaviour_temperature[::2, 0].tolist()] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    for i, own in enumerate(each):
        rows = rollout.rows(torch.tensor([2 * i, 2 * i + 1]))
        assert int(rows.lengths.max()) <= own.max_tokens
        assert worst(engine.policy, rows) < TOLERANCE


def test_stop_tokens_end_a_response(engine: VllmEngine) -> None:
    rollout = engine.sample(PROMPTS, 4, HOT, seeded())
    stop = int(rollout.response_ids[0, 3])
    engine.stop_ids = (*engine.policy.eos_ids, stop)
    try:
        stopped = engine.sample(PROMPTS, 4, HOT, seeded())
    finally:
        engine.stop_ids = engine.policy.eos_ids
    assert int(stopped.lengths[0]) <= 4
    assert int(stopped.response_ids[0, stopped.lengths[0] - 1]) == stop
    body = stopped.response_ids.masked_fill(~stopped.mask, -1)
    ends = stopped.lengths - 1
    assert bool(((body == stop).sum(1) <= 1).all())
    assert bool(stopped.finished[(body.gather(1, ends[:, None]).squeeze(1) == stop)].all())


# -- prefixes ---------------------------------------------------------------------------------------------------------


def grown(engine: VllmEngine, paths: list[Path], most: int = 28, seed: int = 0, stops: tuple[str, ...] = ()) -> None:
    """Every path by one piece."""
    pieces = engine.extend([p.start(most - len(p)) for p in paths], Sampling(0.7, 1), seeded(seed), stops=stops)
    for path, piece in zip(paths, pieces, strict=True):
        path.add(piece)


def roots(count: int = 12) -> list[Path]:
    """Empty paths, two of each prompt."""
    return [Path(i // 2, i // 2, i // 2, i % 2, PROMPTS[i // 2]) for i in range(count)]


def rollout_of(engine: VllmEngine, paths: list[Path]) -> Rollout:
    return to_rollout(paths, pad_id=engine.policy.pad_id, version=0)


def test_branches_from_ragged_prefixes_have_the_logprobs_of_whole_sequences(engine: VllmEngine) -> None:
    paths = roots()
    grown(engine, paths)
    branches = [p.branch(2 + p.number, min(i % 7, len(p))) for i, p in enumerate(paths)]
    grown(engine, branches, seed=9)
    rollout = rollout_of(engine, [*paths, *branches])
    assert worst(engine.policy, rollout) < TOLERANCE  # what follows was sampled behind its prefix
    for i, (path, branch) in enumerate(zip(paths, branches, strict=True)):
        n = branch.prefix_length
        assert n == min(i % 7, len(path))
        assert branch.ids[:n] == path.ids[:n]
        assert branch.logprob[:n] == path.logprob[:n]
    assert sum(b.ids != p.ids for b, p in zip(branches, paths, strict=True)) > 4
    assert int(rollout.sampled.sum()) == sum(p.generated for p in [*paths, *branches])


def test_a_key_decides_the_draw_whatever_is_in_flight(engine: VllmEngine) -> None:
    starts = [Start([*PROMPTS[i % 6], *PROMPTS[0][: i % 5]], 10, 0.6 + 0.1 * (i % 4), key=i) for i in range(24)]
    together = engine.extend(starts, HOT, seeded())
    for i in (0, 7, 23):
        (alone,) = engine.extend([starts[i]], HOT, seeded())
        assert alone.ids == together[i].ids
        assert alone.logprob == pytest.approx(together[i].logprob, abs=TOLERANCE)
    assert engine.extend(starts[::-1], HOT, seeded())[0].ids == together[-1].ids
    assert all(p.temperature == [s.temperature] * len(p.ids) for p, s in zip(together, starts, strict=True))


@pytest.mark.parametrize("text", ["</think>", "yes </think>"], ids=["one token", "several tokens"])
def test_a_stop_text_ends_a_piece_with_exactly_its_tokens(engine: VllmEngine, text: str) -> None:
    decode, whole, cut = engine.policy.decode, roots(), roots()
    grown(engine, whole)
    grown(engine, cut, stops=("never said", text))
    assert sum(not p.finished for p in cut) >= 4
    for path, full in zip(cut, whole, strict=True):
        n = next((n for n in range(1, len(full) + 1) if text in decode(full.ids[:n])), len(full))
        assert path.ids == full.ids[:n]  # the same numbers up to the token that completes the text
        assert len(path.logprob) == n
    assert worst(engine.policy, rollout_of(engine, cut)) < TOLERANCE
    again = engine.extend([p.start(28) for p in cut], Sampling(0.7, 1), seeded(1), stops=(text,))
    assert sum(p.finished and not p.stopped for p in again) >= 4
    assert [p.stopped for p in again] == [text in decode(list(p.ids)) for p in again]


def test_a_stop_text_may_be_a_special_token(engine: VllmEngine) -> None:
    end = engine.policy.tokenizer.eos_token
    engine.stop_ids = ()  # what remains is the text
    try:
        pieces = engine.extend([p.start(28) for p in roots()], HOT, seeded(), stops=(end,))
    finally:
        engine.stop_ids = engine.policy.eos_ids
    ended = [p for p in pieces if p.ids[-1] == countdown.EOS]
    assert len(ended) >= 6
    assert all(p.stopped or p.finished for p in ended)


def test_entropies_of_what_vllm_sampled_come_from_the_trainer(engine: VllmEngine) -> None:
    paths = roots(4)
    grown(engine, paths)
    assert all(p.entropy is None for p in paths)
    engine.with_entropy(paths)
    expected = scored(engine.policy.model, rollout_of(engine, paths), 64)[1]
    for path, row in zip(paths, expected, strict=True):
        assert path.entropy == pytest.approx(row[: len(path)].tolist(), abs=1e-5)


def test_equal_beginnings_are_read_once(tmp_path: FilePath) -> None:
    """vLLM shares whole blocks of its cache, which have 128 tokens on a CPU: the model needs a wider window."""
    policy = load_policy("tiny/S")
    policy.model.config.max_position_embeddings = 512
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    engine = VllmEngine(load_policy(str(tmp_path)), VllmSection(eager=True))
    try:
        run, seen = engine.backend._run, []
        engine.backend._run = lambda *given: seen.append(run(*given)) or seen[-1]
        block = engine.backend.llm.llm_engine.vllm_config.cache_config.block_size
        context = (PROMPTS[0] * 60)[: 3 * block + 5]
        engine.extend([Start(context, 4)], HOT, seeded())
        engine.extend([Start([*context, 5], 4), Start(context[: block + 1], 4)], HOT, seeded())
        assert [o.num_cached_tokens for outputs in seen for o in outputs] == [0, 3 * block, block]
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["triples", "maze"])
def test_episodes_are_played_with_vllm(name: str) -> None:
    """Turns end at the environment's stops; what it says is no action; verdicts are those of a replay."""
    task = registry.task(name)
    problems = registry.entry(name).problems(task, 6, 0, evaluation=True)
    inner = VllmEngine(load_policy("tiny/A"), VllmSection(eager=True))
    try:
        engine = EpisodeEngine(inner, task, problems)
        prompts = [task.prompt_ids(p, inner.policy.tokenizer) for p in problems]
        rollout = engine.sample(prompts, 3, Sampling(1.0, 120), seeded(), problem_ids=range(6))
        again = engine.sample(prompts, 3, Sampling(1.0, 120), seeded(), problem_ids=range(6))
        assert torch.equal(rollout.response_ids, again.response_ids)
        assert worst(inner.policy, rollout) < TOLERANCE  # sampled behind what the environment had said
        told = rollout.response_mask & ~rollout.action_mask
        assert bool(told.any(1).any())
        assert bool((rollout.behaviour_logprob[told] == 0).all())
        graded = grade(rollout, task, problems, inner.policy)
        assert graded.correct is not None
        for i in range(len(rollout)):
            actions = actions_of(rollout, i, inner.policy)
            verdict = task.verdict(problems[i // 3], actions, bool(rollout.finished[i]))
            assert verdict.correct == bool(graded.correct[i])
            inside = [a for a in actions[:-1] if not a.endswith(tuple(task.stops))]
            assert all(len(inner.policy.encode(a)) <= task.turn_tokens for a in inside)
        assert sum(a.endswith(tuple(task.stops)) for a in actions_of(rollout, 0, inner.policy)) >= 1
    finally:
        inner.close()


def test_sync_after_a_real_step_agrees_and_forgets_cached_prefixes(engine: VllmEngine) -> None:
    before = weights(load_policy("tiny/S"))
    policy = engine.policy
    old = engine.sample(PROMPTS, 4, HOT, seeded())
    try:
        step(policy, old)
        stale = engine.sample(PROMPTS, 4, HOT, seeded())
        assert torch.equal(stale.response_ids, old.response_ids)  # vLLM has its own copy
        assert worst(policy, stale) > 0.1
        report = engine.sync(weights(policy), 1)
        assert report.mismatch < 1e-5
        assert report.tokens > 20
        fresh = engine.sample(PROMPTS, 4, HOT, seeded())
        assert worst(policy, fresh) < TOLERANCE
    finally:
        policy.model.load_state_dict(dict(before))
        engine.sync(before, 2)
    assert torch.equal(engine.sample(PROMPTS, 4, HOT, seeded()).response_ids, old.response_ids)


def test_a_sync_that_loses_weights_is_caught(engine: VllmEngine) -> None:
    policy = engine.policy
    before = [(name, value.clone()) for name, value in weights(policy)]
    step(policy, engine.sample(PROMPTS, 2, HOT, seeded()), lr=3e-2)
    try:
        with pytest.raises(UserError, match=r"sync_tolerance 0\.001.*tie_word_embeddings"):
            engine.sync([(n, w) for n, w in weights(policy) if "lm_head" not in n], 1)
    finally:
        policy.model.load_state_dict(dict(before))
        engine.sync(before, 2)


def test_an_overlong_prompt_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(UserError, match=r"rollout\.vllm\.max_model_len"):
        engine.sample([PROMPTS[0] * 20], 2, HOT, seeded())


def test_a_tied_head_follows_although_vllm_alone_would_keep_the_old_one(tmp_path: FilePath) -> None:
    """vLLM packs the head on a CPU. A trainer names tied weights once, by the embedding: the packed head stays."""
    tied = tied_policy(tmp_path)
    engine = VllmEngine(tied, VllmSection(eager=True))
    try:
        step(tied, engine.sample(PROMPTS, 2, HOT, seeded()))
        named = list(tied.model.named_parameters())
        assert not any("lm_head" in name for name, _ in named)
        engine.backend.load(named)
        with pytest.raises(UserError, match=r"sync_tolerance 0\.001.*tie_word_embeddings"):
            engine._checked(1, 0.0, "a weight sync")
        assert engine.sync(named, 1).mismatch < 1e-5
        assert worst(tied, engine.sample(PROMPTS, 2, HOT, seeded())) < TOLERANCE
    finally:
        engine.close()


def tied_policy(folder: FilePath) -> Policy:
    policy = load_policy("tiny/S")
    policy.model.config.tie_word_embeddings = True
    policy.model.set_output_embeddings(torch.nn.Linear(96, len(countdown.VOCABULARY), bias=False))
    policy.model.tie_weights()
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return load_policy(str(folder))


def test_an_adapter_is_served(tmp_path: FilePath) -> None:
    """A LoRA adapter on disk, as peft writes it, against the same low-rank change merged into the trainer's weights."""
    policy = load_policy("tiny/S")
    rank, alpha = 4, 8
    tensors = {}
    for i in range(3):
        target = policy.model.get_submodule(f"model.layers.{i}.self_attn.q_proj")
        a = torch.randn(rank, target.in_features, generator=seeded(i)) * 0.3
        b = torch.randn(target.out_features, rank, generator=seeded(10 + i)) * 0.3
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        with torch.no_grad():
            target.weight += alpha / rank * b @ a
    save_adapter(tmp_path, tensors, rank, alpha)
    engine = VllmEngine(policy, VllmSection(eager=True, lora_rank=rank))
    try:
        plain = engine.sample(PROMPTS, 2, HOT, seeded())
        assert worst(policy, plain) > 0.05
        assert engine.sync_adapter(tmp_path, 1).mismatch < 1e-5
        assert worst(policy, engine.sample(PROMPTS, 2, HOT, seeded())) < TOLERANCE
    finally:
        engine.close()


def save_adapter(folder: FilePath, tensors: dict[str, torch.Tensor], rank: int, alpha: int) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
