"""V-Reason on whole responses: identity without positions, rows apart, the order of the card, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlvr_lab.core.entropy import softmax_entropy
from rlvr_lab.errors import UserError
from rlvr_lab.inference.lm import respond
from rlvr_lab.inference.temperature_match import pooled_entropy
from rlvr_lab.inference.v_reason import VReason, evidence_positions
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.tasks import countdown

STRONG: dict[str, Any] = {"every": 1, "inner_steps": 2, "lr": 100.0}
TOKENS = 24


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("tiny/S", device="cpu")


@pytest.fixture(scope="module")
def problems() -> list[countdown.Problem]:
    return countdown.problems(6, 5)


@pytest.fixture(scope="module")
def texts(problems: list[countdown.Problem]) -> list[str]:
    return [problem.prompt for problem in problems]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def method(policy: Policy, **settings: Any) -> VReason:
    return VReason(policy.model, policy.tokenizer, **({"max_tokens": TOKENS} | settings))


def numbers(text: str) -> str:
    return text.removeprefix("<bos> ").split(" to ")[0]


def test_no_controlled_position_is_plain_sampling_to_the_token(policy: Policy, texts: list[str]) -> None:
    traces = method(policy, evidence=lambda text: "", **STRONG).traces(texts, generator())
    prompts = [policy.encode(text) for text in texts]
    plain = respond(policy, prompts, max_tokens=TOKENS, temperature=1.0, generator=generator())
    for trace, response in zip(traces, plain, strict=True):
        assert trace.ids == list(response.ids)
        assert trace.drawn_entropy == pytest.approx(list(response.entropy), abs=1e-5)
        assert trace.entropy == pytest.approx(trace.drawn_entropy, abs=1e-6)


def test_a_run_without_positions_reports_no_change(policy: Policy, problems: list[countdown.Problem]) -> None:
    pairs = [(p.prompt, p) for p in problems]

    def verify(response: str, problem: countdown.Problem) -> bool:
        return countdown.verify(problem, response).correct

    report = method(policy, evidence=lambda text: "").run(pairs, verify=verify, generator=generator())
    assert report.tokens_saved.value == 0
    assert report.accuracy_change.value == 0
    assert report.notes["mean_entropy"] == pytest.approx(report.notes["baseline_entropy"], abs=1e-5)
    steered = method(policy, rule="exploit", **STRONG).run(pairs, verify=verify, generator=generator())
    assert list(steered.baseline_tokens) == list(report.baseline_tokens)
    assert sum(steered.notes["mean_entropy"]) < sum(report.notes["mean_entropy"])


def test_rate_zero_is_plain_sampling_too(policy: Policy, texts: list[str]) -> None:
    assert [t.ids for t in method(policy, lr=0.0).traces(texts, generator())] == [
        t.ids for t in method(policy, evidence=lambda text: "").traces(texts, generator())
    ]


def test_rows_have_their_own_controller_and_phase(policy: Policy, texts: list[str]) -> None:
    """Any batch gives what single prompts give, though their lengths and controlled positions differ."""
    some = [texts[0], texts[1].removeprefix("<bos> "), texts[2]]

    def evidence(text: str) -> str:
        return "" if text == some[2] else text.split(" to ")[0]

    together = method(policy, evidence=evidence, **STRONG).traces(some, generator())
    apart = method(policy, evidence=evidence, rows=1, **STRONG).traces(some, generator())
    for a, b in zip(together, apart, strict=True):
        assert a.ids == b.ids
        assert a.drawn_entropy == pytest.approx(b.drawn_entropy, abs=1e-3)
        assert a.alpha == b.alpha


@pytest.mark.parametrize("rule", ["mean_revert", "random"])
@pytest.mark.parametrize("optimizer", ["gradient", "adam"])
def test_the_loop_is_the_cards_pseudocode(policy: Policy, texts: list[str], rule: str, optimizer: str) -> None:
    """One prompt, token by token, without a cache: everything is recomputed under a changed value projection."""
    rate = {"gradient": 50.0, "adam": 0.1}[optimizer]
    own = method(policy, rule=rule, optimizer=optimizer, lr=rate, every=2, inner_steps=2, patience=4, temperature=0.0)
    (trace,) = own.traces(texts[:1], generator())
    model, prompt = policy.model, policy.encode(texts[0])
    places = own.positions(texts[0], prompt)
    delta = torch.zeros(len(places), 96 // 24 * 32, requires_grad=True)
    optimiser = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)([delta], lr=rate)
    ids = list(prompt)

    def logits() -> torch.Tensor:
        hook = model.model.layers[-1].self_attn.v_proj.register_forward_hook(
            lambda m, i, out: out.index_add(1, torch.tensor(places), delta[None])
        )
        try:
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            hook.remove()

    for t, token in enumerate(trace.ids):
        with torch.no_grad():
            assert float(softmax_entropy(logits())) == pytest.approx(trace.entropy[t], abs=2e-4)
        if t % 2 == 0:
            for _ in range(2):
                (delta.grad,) = torch.autograd.grad(-trace.alpha[t] * softmax_entropy(logits()), delta)
                optimiser.step()
        with torch.no_grad():
            assert int(logits().argmax()) == token
        ids.append(token)
    assert float(delta.detach().abs().max()) > 0.01
    assert len(set(trace.alpha)) == 2 or rule == "mean_revert"


def test_exploit_lowers_and_explore_raises_the_entropy_it_acts_on(policy: Policy, texts: list[str]) -> None:
    for rule, sign in (("exploit", -1.0), ("trend", 1.0)):
        for trace in method(policy, rule=rule, every=1, lr=5.0).traces(texts, generator()):
            change = trace.drawn_entropy[0] - trace.entropy[0]
            assert trace.alpha[0] == sign
            assert sign * change > 0


def test_the_temperature_stays_out_of_the_switch(policy: Policy, texts: list[str]) -> None:
    cold, warm = (method(policy, temperature=t, lr=0.0).traces(texts, generator()) for t in (0.5, 1.0))
    for a, b in zip(cold, warm, strict=True):
        assert a.entropy[0] == b.entropy[0]
        assert a.drawn_entropy[0] < b.drawn_entropy[0]


def test_random_signs_leave_the_random_numbers_of_tokens_alone(policy: Policy, texts: list[str]) -> None:
    a, b = (method(policy, rule=rule, lr=0.0).traces(texts, generator()) for rule in ("random", "exploit"))
    assert [t.ids for t in a] == [t.ids for t in b]
    assert {x for t in a for x in t.alpha} == {-1.0, 1.0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_around_it(policy: Policy, texts: list[str], mode: Any) -> None:
    outside = method(policy, rule="exploit", **STRONG).traces(texts[:2], generator())
    with mode():
        inside = method(policy, rule="exploit", **STRONG).traces(texts[:2], generator())
    assert [t.drawn_entropy for t in inside] == [t.drawn_entropy for t in outside]
    assert all(p.grad is None for p in policy.model.parameters())


def test_the_controller_is_new_for_every_prompt_and_nothing_stays_behind(policy: Policy, texts: list[str]) -> None:
    own = method(policy, rule="exploit", **STRONG)
    first, again = own.traces(texts[:2], generator()), own.traces(texts[:2], generator())
    assert [t.drawn_entropy for t in first] == [t.drawn_entropy for t in again]
    assert not policy.model.model.layers[-1]._forward_pre_hooks


@pytest.mark.slow
def test_the_matched_temperature_has_the_entropy_of_the_method(policy: Policy, texts: list[str]) -> None:
    own = method(policy, rule="exploit", **STRONG)
    target = pooled_entropy([t.drawn_entropy for t in own.traces(texts, generator())])
    temperature, responses = own.temperature_matched(texts, generator(), target)
    assert temperature < 1
    assert pooled_entropy([r.entropy for r in responses]) == pytest.approx(target, rel=0.15)
    report = own.run(texts, generator=generator(), baseline=responses)
    assert list(report.baseline_tokens) == [len(r) for r in responses]
    assert report.correct is None


def test_positions_of_the_evidence(policy: Policy, texts: list[str]) -> None:
    ids = policy.encode(texts[0])
    assert method(policy).positions(texts[0], ids) == list(range(1, len(ids)))
    found = method(policy, evidence=numbers).positions(texts[0], ids)
    assert found == [1, 2, 3, 4]
    assert policy.decode([ids[i] for i in found]) == numbers(texts[0])
    late = evidence_positions(policy.tokenizer, "1 2 to 1 2", "to 1", policy.encode("1 2 to 1 2"))
    assert late == [2, 3]


def test_positions_in_a_chat_template(policy: Policy) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(policy.tokenizer)
    tokenizer.chat_template = "<bos> 7 {{ messages[0]['content'] }}{% if add_generation_prompt %} <think>{% endif %}"
    own = VReason(policy.model, tokenizer, evidence=lambda text: "7 8")
    ids = own_prompt(own, "9 7 8 to 5")
    found = own.positions("9 7 8 to 5", ids)
    assert policy.decode([ids[i] for i in found]) == "7 8"
    assert found == [3, 4]


def own_prompt(own: VReason, text: str) -> list[int]:
    from rlvr_lab.inference.lm import prompt_ids

    return prompt_ids(own.policy, [text])[0]


def test_a_trace_says_what_happened(policy: Policy, texts: list[str]) -> None:
    for trace in method(policy, patience=2).traces(texts, generator()):
        columns = (trace.entropy, trace.drawn_entropy, trace.ema, trace.alpha, trace.exploit)
        assert {len(column) for column in columns} == {len(trace.ids)}
        assert trace.ema[0] == trace.entropy[0]
        late = trace.exploit.index(True)
        assert all(trace.exploit[late:])
        assert set(trace.alpha[late:]) == {-1.0}
        assert not math.isnan(trace.final_entropy)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_settings(policy: Policy) -> None:
    for settings, message in (
        ({"patiance": 3}, "no setting 'patiance'; did you mean 'patience'"),
        ({"rule": "trends"}, "did you mean 'trend'"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"rows": 0}, "rows 0"),
    ):
        with pytest.raises(UserError, match=message):
            method(policy, **settings)


def test_an_unsupported_architecture(policy: Policy) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        VReason(model, policy.tokenizer)


def test_evidence_that_is_not_there(policy: Policy, texts: list[str]) -> None:
    with pytest.raises(UserError, match="evidence 'seven' is no part of the problem"):
        method(policy, evidence=lambda text: "seven").traces(texts, generator())


def test_no_problem_and_too_long_a_response(policy: Policy, texts: list[str]) -> None:
    with pytest.raises(UserError, match="at least one"):
        method(policy).run([], generator=generator())
    with pytest.raises(UserError, match="exceeds the model's context"):
        method(policy, max_tokens=1000).traces(texts, generator())


def test_an_entropy_that_no_temperature_has(policy: Policy, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no temperature up to 5"):
        method(policy, max_tokens=2).temperature_matched(texts, generator(), 10.0)
