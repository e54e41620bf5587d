"""Fine-tuning on responses: what each objective counts, resuming, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.methods.light_if import entropy_sft_loss
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.tasks import countdown
from rlvr_lab.train import sft as module
from rlvr_lab.train.sft import Example, SFTSettings, fine_tune, measure, objective_loss, passes, supervised

SETTINGS = SFTSettings(epochs=2, batch=4, rows=4, lr=1e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy() -> Policy:
    return load_policy("tiny/S", device="cpu")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Ten attempts of different lengths; prompts of eight tokens and one of three."""
    import numpy as np

    rows = list(countdown.traces(10, countdown.SINGLE, np.random.default_rng(0)))
    found: list[Example] = [(row[:8], row[8:]) for row in rows]
    found[3] = (found[3][0][-3:], found[3][1][:5])
    return found


def test_passes_mark_responses_only(examples: list[Example]) -> None:
    parts = list(passes(examples, 4))
    assert [len(ids) for ids, _ in parts] == [4, 4, 2]
    ids, mask = parts[0]
    assert mask.sum(1).tolist() == [len(response) for _, response in examples[:4]]
    assert ids[3][mask[3]].tolist() == list(examples[3][1])
    assert not mask[:3, :8].any()
    assert mask[3, 3]


def test_tokens_are_scored_as_one_by_one(policy: Policy, examples: list[Example]) -> None:
    with torch.no_grad():
        nll, entropy = supervised(policy, *next(passes(examples, 4)))
    one = [supervised(policy, *part) for part in passes(examples[:4], 1)]
    assert torch.allclose(nll, torch.cat([n for n, _ in one]), atol=1e-5)
    assert torch.allclose(entropy, torch.cat([e for _, e in one]), atol=1e-5)
    found = measure(policy, examples[:4], rows=3)
    assert found["nll"] == pytest.approx(float(nll.mean()), abs=1e-5)
    assert found["token_entropy"] == pytest.approx(float(entropy.mean()), abs=1e-5)


def test_each_objective_counts_its_own_tokens() -> None:
    nll, entropy = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.zeros(5)
    settings = SFTSettings(ratio=0.4)
    assert objective_loss(nll, entropy, replace(settings, objective="plain"), 10, generator()) == 3.1
    chosen = objective_loss(nll, entropy, settings, 10, generator())
    assert chosen == entropy_sft_loss(nll, entropy, 0.8, 0.4, 10) == 6.0
    drawn = replace(settings, objective="random")
    random = {float(objective_loss(nll, entropy, drawn, 10, generator(i))) * 4 for i in range(40)}
    pairs = {3.0, 5.0, 9.0, 17.0, 6.0, 10.0, 18.0, 12.0, 20.0, 24.0}
    assert random <= pairs
    assert len(random) > 5
    for objective in ("plain", "entropy", "random"):  # a batch of one token counts it
        found = objective_loss(nll[:1], entropy[:1], replace(settings, objective=objective), 1, generator())
        assert found == 1.0


@pytest.mark.parametrize("objective", ["plain", "entropy", "random"])
def test_passes_that_are_smaller_change_nothing_for_plain(
    policy: Policy, examples: list[Example], objective: str
) -> None:
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}
    ends = []
    for rows in (4, 1):
        policy.model.load_state_dict(start)
        fine_tune(policy, examples, replace(SETTINGS, objective=objective, rows=rows, epochs=1))  # type: ignore[arg-type]
        ends.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    difference = float((ends[0] - ends[1]).abs().max())
    assert difference > 1e-4 if objective != "plain" else difference < 1e-4


def test_it_learns_and_measures_what_was_held_out(policy: Policy, examples: list[Example]) -> None:
    before = measure(policy, examples)
    history = fine_tune(policy, examples, replace(SETTINGS, objective="plain", epochs=4), held_out=examples)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["nll"] < before["nll"]
    assert history[-1]["nll"] == pytest.approx(measure(policy, examples)["nll"], abs=1e-5)
    assert fine_tune(policy, examples, replace(SETTINGS, epochs=1))[0]["nll"] != history[-1]["nll"]


def test_an_interrupted_fine_tuning_goes_on_as_if_nothing_had_happened(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(policy: Policy) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in policy.model.parameters()])

    straight = load_policy("tiny/S", device="cpu")
    history = fine_tune(straight, examples, replace(SETTINGS, objective="random", epochs=3))
    broken = load_policy("tiny/S", device="cpu")
    state, settings = tmp_path / "state.pt", replace(SETTINGS, objective="random", epochs=3)
    steps: list[int] = []

    def stop(n: int) -> None:
        steps.append(n)
        if len(steps) == 6:  # the announcement, three steps of the first epoch, two of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(broken, examples, settings, state=state, report=stop)
    resumed, done = load_policy("tiny/S", device="cpu"), []
    found = fine_tune(resumed, examples, settings, state=state, report=done.append)
    assert done[0] == 3
    assert sum(done) == 9
    assert [row["loss"] for row in found] == [row["loss"] for row in history]
    assert torch.equal(weights(resumed), weights(straight))
    with pytest.raises(UserError, match="other settings; choose another --out"):
        fine_tune(resumed, examples, replace(settings, lr=1.0), state=state)


def test_nothing_to_learn_and_a_broken_loss_are_errors(
    policy: Policy, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="nothing to learn from"):
        fine_tune(policy, [], SETTINGS)
    monkeypatch.setattr(module, "objective_loss", lambda nll, *rest: nll.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="lower --lr"):
        fine_tune(policy, examples, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"objective": "entrpy"}, "did you mean 'entropy'"), ({"ratio": 0.0}, "--ratio"), ({"ratio": 1.2}, "--ratio"),
     ({"epochs": 0}, "--epochs"), ({"batch": 0}, "--batch"), ({"lr": 0.0}, "--lr")],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTSettings(**change)  # type: ignore[arg-type]
