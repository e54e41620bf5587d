"""Spectra of states: golden replay, both definitions of RankMe, ranks of the fit, states under either padding."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlvr_lab.errors import UserError
from rlvr_lab.evaluate import representation_geometry as rg
from rlvr_lab.policy import tiny
from rlvr_lab.policy.load import load_policy
from rlvr_lab.testing.golden import Case, find_rule, read_cases, replay, replay_file

WORDS = 40


def states(rows: int = 60, width: int = 8, seed: int = 0, decay: float = 1.0) -> torch.Tensor:
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * scale + 3.0


def law_of(width: int, alpha: float) -> torch.Tensor:
    return torch.arange(1, width + 1, dtype=torch.float64) ** -alpha


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "representation_geometry.json")}
    assert len(problems) == 4
    assert not any(problems.values()), problems


def test_a_golden_case_with_other_ranks_and_eps_follows_its_parameters() -> None:
    case = read_cases(GOLDEN / "representation_geometry.json")[1]
    f, spectrum = case.tensor("activations"), rg.eigenspectrum(case.tensor("activations"))
    other = {"trange_zero_based": [4, 9], "eps": 1e-3}
    outputs = {
        "rankme_official": rg.rankme(spectrum, 1e-3),
        "alpha_req": rg.alpha_req(spectrum, (5, 9)).alpha,
        "rankme_singular_values_uncentered": rg.rankme(rg.singular_values(f, centred=False), 1e-3),
    }
    changed = Case(**{**vars(case), "params": other, "outputs": outputs})
    assert find_rule(changed) is not None
    assert replay(changed).problem is None
    assert replay(Case(**{**vars(changed), "params": case.params})).problem is not None


def test_rankme_by_hand() -> None:
    assert rg.rankme(torch.ones(4), eps=0.0) == pytest.approx(4)
    assert rg.rankme(torch.tensor([1.0, 0.0, 0.0]), eps=0.0) == pytest.approx(1)
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert rg.spectral_entropy(torch.tensor([3.0, 1.0])) == pytest.approx(expected)
    assert rg.participation_ratio(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)


def test_the_two_definitions_of_the_card() -> None:
    # card, section 6: spectra i^-alpha of 64 eigenvalues
    for alpha, eigen, singular in ((1.0, 29.1, 55.0), (2.0, 4.7, 29.1)):
        assert rg.rankme(law_of(64, alpha)) == pytest.approx(eigen, abs=0.05)
        assert rg.rankme(law_of(64, alpha / 2)) == pytest.approx(singular, abs=0.05)


@given(st.integers(0, 999), st.integers(2, 40), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_rankme_stays_in_its_bounds_and_ignores_what_it_must(seed: int, rows: int, width: int) -> None:
    f = states(rows, width, seed)
    found = rg.geometry(f, (1, 2))
    assert found.rankme is not None
    assert found.spectral_entropy is not None
    assert 1 - 1e-9 <= math.exp(found.spectral_entropy) <= found.most + 1e-9
    assert found.participation_ratio is not None
    assert found.participation_ratio <= math.exp(found.spectral_entropy) + 1e-9
    turned = torch.linalg.qr(states(width, width, seed + 1))[0]
    for same in (f.flip(0), f * 7, f - 100, f @ turned):
        assert rg.geometry(same, (1, 2)).rankme == pytest.approx(found.rankme, rel=1e-6)
    assert int((rg.eigenspectrum(f) > 0).sum()) <= found.most


def test_uncentred_rankme_sees_the_mean_and_the_default_does_not() -> None:
    f = states(200, 8, decay=0.0)
    near, far = rg.geometry(f - 3.0, (1, 2)), rg.geometry(f + 100.0, (1, 2))
    assert near.rankme == pytest.approx(far.rankme)
    assert near.rankme_singular == pytest.approx(far.rankme_singular)
    assert near.rankme_uncentred is not None
    assert far.rankme_uncentred is not None
    assert far.rankme_uncentred < 1.5 < 7 < near.rankme_uncentred


@given(st.floats(0.1, 3.0), st.booleans(), st.integers(100, 700))
@settings(deadline=None, max_examples=25)
def test_an_exact_power_law_is_found(alpha: float, weighted: bool, width: int) -> None:
    law = rg.alpha_req(law_of(width, alpha), weighted=weighted)
    assert law.alpha == pytest.approx(alpha, abs=1e-9)
    assert law.r2_fit == pytest.approx(1)
    assert law.at(torch.arange(1, 6)).numpy() == pytest.approx(law_of(5, alpha).numpy())


def test_weights_matter_and_equal_a_weighted_polyfit() -> None:
    bent = torch.cat([law_of(40, 0.5), 40**1.5 * law_of(120, 2.0)[40:]])
    i = np.arange(12, 101)
    for weighted in (True, False):
        w = 1 / np.sqrt(i) if weighted else None  # polyfit squares its weights
        slope = np.polyfit(np.log(i), np.log(bent[11:100].numpy()), 1, w=w)[0]
        assert rg.alpha_req(bent, weighted=weighted).alpha == pytest.approx(-slope)
    assert rg.alpha_req(bent).alpha != pytest.approx(rg.alpha_req(bent, weighted=False).alpha, abs=0.05)


def test_a_spectrum_without_the_ranks_has_no_alpha_and_says_why() -> None:
    short = rg.alpha_req(law_of(63, 1.0))
    assert short.alpha is None
    assert short.r2 is None
    assert short.reason == "the fit needs eigenvalues 12 to 100, and there are 63"
    assert str(short) == f"alpha undefined over ranks 12-100: {short.reason}"
    assert bool(short.at(torch.arange(1, 4)).isnan().all())
    few = rg.geometry(states(50, 128), rg.small_ranks(128))  # 50 rows have 49 directions
    assert few.power_law.alpha is None
    assert few.power_law.reason == "the fit needs eigenvalues 7 to 64, and there are 50"
    flat = rg.alpha_req(torch.cat([law_of(30, 1.0), torch.zeros(90)]))
    assert flat.reason == "only 30 eigenvalues are above zero, and the fit needs those up to 100"
    with pytest.raises(ValueError, match="1 <= first < last, not 5 to 5"):
        rg.alpha_req(law_of(63, 1.0), (5, 5))


def test_ranks_of_narrow_models() -> None:
    assert rg.small_ranks(64) == (4, 32)
    assert rg.small_ranks(96) == (5, 48)
    assert rg.small_ranks(32) == (2, 16)
    assert rg.alpha_req(law_of(64, 1.3), rg.small_ranks(64)).alpha == pytest.approx(1.3)


def test_calling_twice_shifts_nothing() -> None:
    ranks = (12, 100)
    assert rg.alpha_req(law_of(200, 1.0) + 1e-3, ranks) == rg.alpha_req(law_of(200, 1.0) + 1e-3, ranks)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (torch.full((30, 6), 0.1), "the rows are constant, so they have no variance"),
        (torch.full((30, 6), 1e8) + torch.arange(6) / 3, "the rows are constant, so they have no variance"),
        (torch.randn(1, 6), "one row has no variance"),
    ],
)
def test_states_without_variance_are_undefined(f: torch.Tensor, reason: str) -> None:
    found = rg.geometry(f)
    assert found.reason == reason
    assert found.rankme is None
    assert found.spectral_entropy is None
    assert found.rankme_singular is None
    assert found.participation_ratio is None
    assert found.power_law.alpha is None
    assert found.rankme_uncentred == pytest.approx(1, abs=1e-4)


def test_zero_states_have_no_uncentred_rank_either() -> None:
    assert rg.geometry(torch.zeros(5, 3)).rankme_uncentred is None


def test_bad_activations() -> None:
    with pytest.raises(ValueError, match=r"\[rows, width\] and not empty, not \(0, 4\)"):
        rg.geometry(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"not \(2, 3, 4\)"):
        rg.geometry(torch.zeros(2, 3, 4))
    broken = states()
    broken[3, 2] = math.inf
    with pytest.raises(FloatingPointError, match="nan or infinity"):
        rg.geometry(broken)
    with pytest.raises(ValueError, match="no negative values"):
        rg.rankme(torch.tensor([1.0, -0.5]))


def test_only_the_largest_eigenvalues_are_kept_and_shares_are_of_all() -> None:
    f = states(400, 30)
    whole, cut = rg.eigenspectrum(f), rg.eigenspectrum(f, most=10)
    assert torch.equal(cut, whole[:10])
    assert float(cut.sum()) < 1
    assert float(whole.sum()) == pytest.approx(1)
    assert whole.numpy() == pytest.approx(
        np.sort(np.linalg.eigvalsh(np.cov(f.T)))[::-1] / np.var(f.numpy(), 0, ddof=1).sum()
    )


def laws(*alphas: float) -> list[rg.PowerLaw]:
    return [rg.PowerLaw((4, 32), alpha=alpha) for alpha in alphas]


def test_phases_by_the_signs_of_change() -> None:
    ranks = [10.0, 6.0, 4.0, 6.0, 8.0, 9.0, 7.0, 5.0]
    alphas = laws(0.5, 0.9, 1.2, 1.0, 0.7, 0.6, 0.8, 1.0)
    found = rg.phases(ranks, alphas)
    assert found[0] == "compression-seeking"
    assert found[3] == "entropy-seeking"
    assert found[-1] == "compression-seeking"
    assert rg.phases([1.0, 2.0], laws(1.0, 1.0)) == ["mixed"]
    assert rg.phases([1.0, 2.0], laws(1.0, 1.1)) == ["mixed"]


def test_one_noisy_checkpoint_makes_no_phase() -> None:
    ranks, alphas = [1.0, 2.0, 9.0, 4.0, 5.0], laws(1.0, 0.9, 0.2, 0.7, 0.6)
    assert "compression-seeking" not in rg.phases(ranks, alphas)
    assert rg.phases(ranks[2:4], alphas[2:4]) == ["compression-seeking"]  # ends are not smoothed


def test_phases_refuse_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different ranks or weights"):
        rg.phases([1.0, 2.0], [rg.PowerLaw((4, 32), alpha=1.0), rg.PowerLaw((5, 32), alpha=0.9)])
    with pytest.raises(ValueError, match="2 values of RankMe and 1 fits"):
        rg.phases([1.0, 2.0], laws(1.0))
    gone = [rg.PowerLaw((4, 32)), *laws(0.9, 0.8)]
    assert rg.phases([1.0, 2.0, 3.0], gone) == [None, "entropy-seeking"]


@given(st.integers(0, 99), st.integers(0, 8))
@settings(deadline=None, max_examples=20)
def test_what_is_kept_and_what_is_removed_make_the_state(seed: int, k: int) -> None:
    f = states(50, 8, seed)
    space = rg.principal_subspace(f)
    kept, left = space.keep(f, k), space.remove(f, k)
    assert torch.allclose(kept + left - space.mean, f)
    assert torch.linalg.matrix_rank(kept - kept.mean(0), atol=1e-9) == k
    spectrum = rg.eigenspectrum(f)
    share = float((kept - f.mean(0)).square().sum() / (f - f.mean(0)).square().sum())
    assert share == pytest.approx(float(spectrum[:k].sum()), abs=1e-9)


def test_a_subspace_has_only_its_directions() -> None:
    space = rg.principal_subspace(states(50, 8))
    with pytest.raises(ValueError, match=r"k must lie in 0\.\.8, not 9"):
        space.keep(states(), 9)


SMALL = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **shape, num_key_value_heads=1, max_position_embeddings=64))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def pythia() -> GPTNeoXForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **shape, max_position_embeddings=64))


def opt() -> OPTForCausalLM:
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**SMALL, **shape, max_position_embeddings=64, word_embed_proj_dim=16))


MODELS = [llama, gpt2, pythia, opt]


def sequences(n: int = 11, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, WORDS, rng.integers(1, 20)).tolist() for _ in range(n)]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_states_are_those_of_the_last_token_under_either_padding(make: type) -> None:
    torch.manual_seed(0)
    model, texts = make(), sequences()
    model.eval()
    with torch.no_grad():
        # the last of the hidden states that transformers returns has passed the final norm
        alone = [model(input_ids=torch.tensor([t]), output_hidden_states=True).hidden_states[-1][0, -1] for t in texts]
    for left in (False, True):
        for rows in (1, 4, 64):
            found = rg.last_token_states(model, texts, rows=rows, left=left)
            assert torch.allclose(found, torch.stack(alone), atol=1e-5)


def test_states_have_passed_the_final_norm() -> None:
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    root_mean_square = rg.last_token_states(model, sequences()).square().mean(1).sqrt()
    assert root_mean_square.numpy() == pytest.approx(3.0, abs=0.05)


def test_extraction_leaves_the_model_as_it_was_and_uses_no_dropout() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5))
    model.train()
    first, again = (rg.last_token_states(model, sequences()) for _ in range(2))
    assert torch.equal(first, again)
    assert model.training
    assert not first.requires_grad


def test_passes_are_no_larger_than_asked_and_form_no_logits() -> None:
    model, widths = llama(), []
    model.model.register_forward_pre_hook(
        lambda module, arguments, given: widths.append(given["input_ids"].shape), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda *call: pytest.fail("logits were formed"))
    rg.last_token_states(model, [[5] * 30] * 7, rows=3, max_tokens=12)
    assert widths == [(3, 12), (3, 12), (1, 12)]


def test_texts_without_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="at least one token"):
        rg.last_token_states(llama(), [[3, 4], []])
    with pytest.raises(UserError, match="at least one text"):
        rg.last_token_states(llama(), [])
    with pytest.raises(UserError, match="Linear names no decoder"):
        rg.last_token_states(torch.nn.Linear(2, 2), [[3]])
    with pytest.raises(ValueError, match="all padding"):
        rg.at_last_token(torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_a_shipped_policy_from_texts() -> None:
    policy = load_policy("tiny/S", device="cpu")
    texts = ["<bos> _ 10 1 4 to 44 <think>", "<bos> _ 10 1 4 to 44 <think> 10 + 1"]
    by_text = rg.text_states(policy.model, policy.tokenizer, texts)
    by_ids = rg.last_token_states(policy.model, [policy.encode(text) for text in texts], left=True)
    assert torch.allclose(by_text, by_ids, atol=1e-4)
    assert by_text.shape == (2, tiny.SHAPES["tiny"].hidden)


def test_the_subspace_test_acts_on_what_the_head_reads() -> None:
    torch.manual_seed(0)
    model, ids = llama().eval(), torch.tensor([[5, 6, 7]])
    space = rg.principal_subspace(rg.last_token_states(model, sequences(60)))
    with torch.no_grad():
        plain = model(input_ids=ids)
        with rg.changed_states(model, lambda h: space.keep(h, 16)):
            assert torch.allclose(model(input_ids=ids).logits, plain.logits, atol=1e-5)
        with rg.changed_states(model, lambda h: space.keep(h, 0)):
            constant = model(input_ids=ids).logits
            tokens = model.generate(ids, max_new_tokens=3, do_sample=False)[0, 3:]
        assert torch.allclose(constant, model.lm_head(space.mean.float()).expand_as(constant), atol=1e-5)
        assert set(tokens.tolist()) == {int(constant[0, 0].argmax())}
        assert torch.equal(model(input_ids=ids).logits, plain.logits)


def test_half_precision_flattens_alpha() -> None:
    f = states(2000, 120, decay=3.0) - 3.0  # the mean is 0, and the eigenvalues fall as i^-6
    f, ranks = f @ torch.linalg.qr(states(120, 120, 1))[0], (20, 100)
    exact, rounded = rg.geometry(f, ranks).power_law.alpha, rg.geometry(f.half(), ranks).power_law.alpha
    assert exact is not None
    assert rounded is not None
    assert rounded < exact - 0.1


def test_a_slower_decay_is_a_smaller_alpha_and_a_larger_rank() -> None:
    found = [rg.geometry(states(800, 60, decay=decay), rg.small_ranks(60)) for decay in (0.3, 0.6, 0.9)]
    for slow, fast in pairwise(found):
        assert None not in (slow.rankme, fast.rankme, slow.power_law.alpha, fast.power_law.alpha)
        assert slow.rankme > fast.rankme  # type: ignore[operator]
        assert slow.power_law.alpha < fast.power_law.alpha  # type: ignore[operator]
