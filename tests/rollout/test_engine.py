"""The sampling engine records what the policy itself would say about its tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import ragged_mask

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.forward import response_statistics, score
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout import engine
from rlvr_lab.rollout.engine import Sampling, TransformersEngine, draw
from rlvr_lab.tasks import countdown

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(3, 5)]
# the policy never saw such prompts, and that does not matter here: lengths 8, 5, 3
RAGGED = [PROMPTS[0], PROMPTS[1][3:], PROMPTS[2][5:]]


def sample(policy: Policy, prompts: list[list[int]], group_size: int = 4, seed: int = 0, **settings: Any) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(**{"max_tokens": 24, **settings})
    return TransformersEngine(policy).sample(prompts, group_size, sampling, generator)


@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_and_entropies_are_those_of_a_forward_pass(
    tiny_s: Policy, prompts: list[list[int]], temperature: float
) -> None:
    rollout = sample(tiny_s, prompts, temperature=temperature)
    with torch.no_grad():
        logprob, entropy = response_statistics(tiny_s.model, rollout)
    assert rollout.old_logprob is not None
    assert entropy is not None
    mask = rollout.mask
    torch.testing.assert_close(rollout.old_logprob[mask], logprob[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.statistics["token_entropy"][mask], entropy[mask], rtol=0, atol=1e-4)
    assert torch.equal(rollout.behaviour_logprob, rollout.old_logprob)
    assert (rollout.behaviour_temperature == temperature).all()


def test_the_temperature_matters_to_what_is_recorded(tiny_s: Policy) -> None:
    rollout = sample(tiny_s, PROMPTS, temperature=0.7)
    at_one = rollout.with_(behaviour_temperature=torch.ones_like(rollout.behaviour_logprob))
    with torch.no_grad():
        logprob, _ = response_statistics(tiny_s.model, at_one)
    assert float((rollout.behaviour_logprob - logprob)[rollout.mask].abs().max()) > 1e-2


def test_a_prompt_alone_has_the_log_probs_it_has_beside_longer_ones(tiny_s: Policy) -> None:
    """Left padding is inert: without its mask and position ids this fails."""
    together = sample(tiny_s, RAGGED, group_size=1)
    assert not together.prompt_mask.all()
    for i, prompt in enumerate(RAGGED):
        row = together.rows(torch.tensor([i]))
        alone = row.with_(prompt_ids=torch.tensor([prompt]), prompt_mask=torch.ones(1, len(prompt), dtype=torch.bool))
        with torch.no_grad():
            logprob, _ = response_statistics(tiny_s.model, alone)
        torch.testing.assert_close(row.behaviour_logprob[row.mask], logprob[row.mask], rtol=0, atol=1e-4)
        assert row.prompt_ids[row.prompt_mask].tolist() == prompt


def test_greedy_decoding_of_a_prompt_does_not_depend_on_its_neighbours(tiny_s: Policy) -> None:
    together = sample(tiny_s, RAGGED, group_size=1, temperature=0)
    for i, prompt in enumerate(RAGGED):
        alone = sample(tiny_s, [prompt], group_size=1, temperature=0)
        assert alone.response_ids[alone.mask].tolist() == together.response_ids[i][together.mask[i]].tolist()


@pytest.mark.parametrize("share", [1e-9, 0.1, 2.0], ids=["always", "as shipped", "never"])
def test_evicting_finished_rows_changes_no_response(
    tiny_s: Policy, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    expected = sample(tiny_s, RAGGED + PROMPTS, group_size=2, temperature=0, max_tokens=40)
    monkeypatch.setattr(engine, "EVICT_SHARE", share)
    found = sample(tiny_s, RAGGED + PROMPTS, group_size=2, temperature=0, max_tokens=40)
    assert torch.equal(found.response_ids, expected.response_ids)
    assert torch.equal(found.finished, expected.finished)


@pytest.mark.parametrize("share", [1e-9, 0.1, 2.0], ids=["always", "as shipped", "never"])
def test_lengths_ends_and_padding_agree(tiny_s: Policy, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(engine, "EVICT_SHARE", share)
    rollout = sample(tiny_s, RAGGED + PROMPTS, group_size=6, max_tokens=22, seed=3)
    assert torch.equal(rollout.response_mask, ragged_mask(rollout.lengths.tolist(), rollout.response_ids.shape[1]))
    assert int(rollout.lengths.max()) == rollout.response_ids.shape[1] <= 22
    for ids, length, finished in zip(
        rollout.response_ids.tolist(), rollout.lengths.tolist(), rollout.finished.tolist(), strict=True
    ):
        assert length >= 1
        assert set(ids[length:]) <= {tiny_s.pad_id}
        assert countdown.EOS not in ids[: length - 1]
        assert (ids[length - 1] == countdown.EOS) == finished
        assert finished or length == 22
    assert (rollout.behaviour_logprob[rollout.mask] <= 0).all()
    assert (rollout.statistics["token_entropy"][rollout.mask] >= 0).all()
    with torch.no_grad():
        logprob, _ = response_statistics(tiny_s.model, rollout)
    torch.testing.assert_close(rollout.behaviour_logprob[rollout.mask], logprob[rollout.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 5, 256])
def test_groups_may_be_split_over_chunks(tiny_s: Policy, rows: int) -> None:
    reports: list[int] = []
    generator = torch.Generator().manual_seed(0)
    rollout = TransformersEngine(tiny_s).sample(
        RAGGED, 4, Sampling(0.0, 12, rows), generator, problem_ids=[7, 3, 9], version=5, report=reports.append
    )
    assert rollout.group_id.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.prompt_id.tolist() == [7] * 4 + [3] * 4 + [9] * 4
    assert (rollout.policy_version == 5).all()
    assert sum(reports) == 12
    assert max(reports) <= rows
    expected = sample(tiny_s, RAGGED, group_size=1, temperature=0, max_tokens=12)
    assert torch.equal(rollout.response_ids, expected.response_ids.repeat_interleave(4, 0))
    for i, prompt in enumerate(p for p in RAGGED for _ in range(4)):
        assert rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist() == prompt


def test_temperature_0_is_a_point_mass(tiny_s: Policy) -> None:
    rollout = sample(tiny_s, PROMPTS, temperature=0)
    assert (rollout.behaviour_logprob == 0).all()
    assert (rollout.statistics["token_entropy"] == 0).all()
    with torch.no_grad():
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
        best = tiny_s.model(input_ids=ids).logits[:, countdown.PROMPT_TOKENS - 1 : -1].argmax(-1)
    assert torch.equal(best[rollout.mask], rollout.response_ids[rollout.mask])


def test_the_same_generator_state_gives_the_same_responses(tiny_s: Policy) -> None:
    a, b, c = (sample(tiny_s, PROMPTS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.response_ids, b.response_ids)
    assert a.response_ids.shape != c.response_ids.shape or not torch.equal(a.response_ids, c.response_ids)


def test_one_token_responses(tiny_s: Policy) -> None:
    rollout = sample(tiny_s, PROMPTS, max_tokens=1)
    assert rollout.response_ids.shape == (12, 1)
    assert rollout.mask.all()


def test_an_empty_prompt_is_named(tiny_s: Policy) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(tiny_s, [PROMPTS[0], []])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_samples_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf])
    n = 20_000
    tokens, logprob, entropy = draw(logits.expand(n, -1), temperature, torch.Generator().manual_seed(0))
    p = torch.softmax(logits / temperature, 0)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    chi_square = float(((counts - n * p)[:4].square() / (n * p)[:4]).sum())
    assert chi_square < 21.1  # 99.99 % quantile for 3 degrees of freedom
    torch.testing.assert_close(logprob, p.log()[tokens])
    torch.testing.assert_close(entropy[0], -(p[:4] * p[:4].log()).sum())


def test_draw_at_temperature_0_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -math.inf, 4.0]])
    tokens, logprob, entropy = draw(logits, 0.0, torch.Generator())
    assert tokens.tolist() == [1, 0]
    assert logprob.tolist() == entropy.tolist() == [0.0, 0.0]


def test_score_records_the_current_policy_for_any_number_of_rows(tiny_s: Policy) -> None:
    rollout = sample(tiny_s, RAGGED, temperature=0.7)
    bare = rollout.with_(old_logprob=None, statistics={})
    for rows in (1, 5, 100):
        scored = score(tiny_s.model, bare, rows)
        assert scored.old_logprob is not None
        assert rollout.old_logprob is not None
        mask = rollout.mask
        torch.testing.assert_close(scored.old_logprob[mask], rollout.old_logprob[mask], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            scored.statistics["token_entropy"][rollout.mask], rollout.statistics["token_entropy"][rollout.mask],
            rtol=0, atol=1e-4,
        )  # fmt: skip
        assert (scored.old_logprob[~rollout.mask] == 0).all()


def test_rows_of_different_temperatures_do_not_share_a_pass(tiny_s: Policy) -> None:
    rollout = sample(tiny_s, PROMPTS)
    temperature = rollout.behaviour_temperature.clone()
    temperature[0] = 0.5
    with pytest.raises(ValueError, match="different behaviour temperatures"):
        response_statistics(tiny_s.model, rollout.with_(behaviour_temperature=temperature))
