"""With one stream per prompt a response does not depend on the company it is sampled in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout import engine
from rlvr_lab.rollout.engine import Sampling, TransformersEngine, draw
from rlvr_lab.rollout.streams import PromptNoise, at_quantile, prompt_seeds
from rlvr_lab.tasks import countdown

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(5, 5)]
PROMPTS[1], PROMPTS[3] = PROMPTS[1][3:], PROMPTS[3][5:]


def sample(policy: Policy, prompts: list[list[int]], **settings: Any) -> Rollout:
    sampling = Sampling(**{"max_tokens": 24, "streams": "prompt", **settings})
    return TransformersEngine(policy).sample(prompts, 4, sampling, torch.Generator().manual_seed(0))


def responses(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def test_prompts_may_be_divided_in_any_way(tiny_s: Policy) -> None:
    whole = responses(sample(tiny_s, PROMPTS))
    parts = [responses(sample(tiny_s, PROMPTS[a:b], first=a)) for a, b in ((0, 2), (2, 3), (3, 5))]
    assert [row for part in parts for row in part] == whole
    assert len({tuple(row) for row in whole[:4]}) > 1  # a group is not four times the same


@pytest.mark.parametrize("rows", [1, 3, 6, 256])
@pytest.mark.parametrize("evict", [1e-9, 2.0], ids=["evicting always", "never"])
def test_chunks_and_eviction_change_no_response(
    tiny_s: Policy, monkeypatch: pytest.MonkeyPatch, rows: int, evict: float
) -> None:
    expected = responses(sample(tiny_s, PROMPTS[:3]))
    monkeypatch.setattr(engine, "EVICT_SHARE", evict)
    assert responses(sample(tiny_s, PROMPTS[:3], rows=rows)) == expected


def test_a_longer_limit_extends_responses_and_keeps_their_beginning(tiny_s: Policy) -> None:
    short, long = (responses(sample(tiny_s, PROMPTS[:2], max_tokens=n)) for n in (6, 24))
    assert [row[:6] for row in long] == short


def test_the_same_prompt_twice_gives_two_groups_and_two_calls_give_others(tiny_s: Policy) -> None:
    twice = responses(sample(tiny_s, [PROMPTS[0], PROMPTS[0]]))
    assert twice[:4] != twice[4:]
    generator, sampling = torch.Generator().manual_seed(0), Sampling(max_tokens=24, streams="prompt")
    one, two = (responses(TransformersEngine(tiny_s).sample(PROMPTS[:1], 4, sampling, generator)) for _ in range(2))
    assert one != two


def test_seeds_and_noise() -> None:
    seeds = prompt_seeds(torch.Generator().manual_seed(3), 0, 6)
    assert prompt_seeds(torch.Generator().manual_seed(3), 4, 2) == seeds[4:]
    assert len(set(seeds)) == 6
    assert all(0 <= s < 2**63 for s in seeds)
    noise = PromptNoise(seeds, group_size=3, tokens=5)
    assert torch.equal(noise.rows(4, 11), noise.rows(0, 18)[4:11])
    assert noise.rows(0, 18).shape == (18, 5)


def test_the_quantile_is_an_exact_sample() -> None:
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    edges = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    assert at_quantile(p.expand(6, -1), edges).tolist() == [1, 1, 3, 3, 4, 4]
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = p.log().expand(20_000, -1)
    tokens, logprob, entropy = draw(logits, 1.0, uniform)
    share = torch.bincount(tokens, minlength=6) / 20_000
    torch.testing.assert_close(share, p, rtol=0, atol=4 * 0.5 / 20_000**0.5)
    torch.testing.assert_close(logprob, p.log()[tokens])
    assert float(entropy[0]) == pytest.approx(-float((p[p > 0] * p[p > 0].log()).sum()), abs=1e-6)


def test_greedy_sampling_ignores_the_streams(tiny_s: Policy) -> None:
    greedy = [responses(sample(tiny_s, PROMPTS[:2], temperature=0, streams=s)) for s in ("step", "prompt")]
    assert greedy[0] == greedy[1]
