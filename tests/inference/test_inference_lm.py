"""Any (model, tokenizer) pair as a policy: limits and temperatures per prompt, and one line where it cannot work."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlvr_lab.errors import UserError
from rlvr_lab.inference.lm import as_policy, as_questions, prompt_ids, prompt_states, respond, sample, verified
from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import Policy
from rlvr_lab.tasks import countdown


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair(tiny_s: Policy):
    return tiny_s.model, tiny_s.tokenizer


@pytest.fixture(scope="module")
def prompts(tiny_s: Policy) -> list[list[int]]:
    return prompt_ids(tiny_s, [p.prompt for p in countdown.problems(6, 0)], 32)


def test_a_pair_becomes_the_policy_that_loading_gives(tiny_s: Policy, pair) -> None:
    policy = as_policy(*pair)
    assert (policy.eos_ids, policy.pad_id) == (tiny_s.eos_ids, tiny_s.pad_id)
    assert policy.model is tiny_s.model


def test_a_model_in_training_mode_is_put_in_evaluation_mode() -> None:
    model = tiny.build_model(0)
    assert model.training
    model.generation_config.eos_token_id = countdown.EOS
    assert not as_policy(model, tiny.build_tokenizer()).model.training


def test_each_prompt_has_its_own_limit_and_temperature(tiny_s: Policy, prompts) -> None:
    limits, temperatures = [1, 2, 3, 40, 40, 40], [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    found = respond(tiny_s, prompts, max_tokens=limits, temperature=temperatures, generator=generator())
    assert [len(r) for r in found[:3]] == [1, 2, 3]
    assert all(h == 0 for h in found[3].entropy)
    assert any(h > 0 for h in found[5].entropy)
    other = respond(tiny_s, prompts, max_tokens=limits, temperature=temperatures, generator=generator(1))
    assert [r.ids for r in other[3:5]] == [r.ids for r in found[3:5]]  # temperature 0 draws nothing


def test_a_response_depends_on_its_place_and_nothing_in_flight(tiny_s: Policy, prompts) -> None:
    whole = respond(tiny_s, prompts, max_tokens=32, temperature=1.0, generator=generator())
    few = respond(tiny_s, prompts, max_tokens=32, temperature=1.0, generator=generator(), rows=2)
    assert [r.ids for r in whole] == [r.ids for r in few]
    short = respond(tiny_s, prompts, max_tokens=7, temperature=1.0, generator=generator())
    assert [r.ids for r in short] == [r.ids[:7] for r in whole]


def test_the_text_is_without_the_end_token(tiny_s: Policy, prompts) -> None:
    found = respond(tiny_s, prompts, max_tokens=32, temperature=0.0, generator=generator())
    ended = [r for r in found if r.finished]
    assert ended
    assert all(r.ids[-1] in tiny_s.eos_ids and "<eos>" not in r.text for r in ended)


def test_groups_keep_their_prompt(tiny_s: Policy, prompts) -> None:
    groups = sample(tiny_s, prompts, 3, 32, generator())
    assert [len(g) for g in groups] == [3] * 6
    assert len({tuple(r.ids) for r in groups[0]}) > 1
    with pytest.raises(UserError, match="samples must be at least 1, not 0"):
        sample(tiny_s, prompts, 0, 32, generator())


def test_states_are_those_of_the_last_token_whatever_the_padding(tiny_s: Policy, prompts) -> None:
    ragged = [prompts[0], prompts[1][:5], prompts[2][:3]]
    together = prompt_states(tiny_s, ragged)
    alone = torch.cat([prompt_states(tiny_s, [p]) for p in ragged])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = tiny_s.model(torch.tensor([prompts[0]])).logits[0, -1]
    torch.testing.assert_close(tiny_s.model.lm_head(together[0]), logits, atol=1e-4, rtol=1e-4)  # after the final norm
    embedded = tiny_s.model.get_input_embeddings()(torch.tensor([p[-1] for p in ragged]))
    torch.testing.assert_close(prompt_states(tiny_s, ragged, layer=0), embedded)


def test_problems_are_texts_or_pairs() -> None:
    found = as_questions(["2 + 2", ("3 + 3", 6)])
    assert [(q.text, q.answer) for q in found] == [("2 + 2", "2 + 2"), ("3 + 3", 6)]
    assert verified([], [], None) is None
    for bad in ([], "2 + 2", [3], [("a",)], [(1, "a")]):
        with pytest.raises(UserError, match="problems"):
            as_questions(bad)


def test_bad_pairs_and_prompts_are_named(tiny_s: Policy) -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="128 words, the model embeds 50"):
        as_policy(small, tiny_s.tokenizer)
    with pytest.raises(UserError, match=r"problems\[1\] has no token"):
        prompt_ids(tiny_s, ["1 2", ""])
    with pytest.raises(UserError, match="lower max_tokens to at most 126"):
        prompt_ids(tiny_s, ["1 2"], 200)
