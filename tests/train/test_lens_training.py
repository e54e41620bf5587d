"""Training a layer's policy: what lies above it stays bit for bit, with weight decay and momentum; resuming across the
change of phase; what is logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY_RUN, ready_rollout, sampled_rollout

from rlvr_lab.core.lens import Lens
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import Pipeline, build, compose
from rlvr_lab.policy.forward import LAYER_LOGPROB, scored
from rlvr_lab.policy.freeze import train_only
from rlvr_lab.policy.load import Policy
from rlvr_lab.policy.muon import Muon
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.update import Updater


def two_phases(layer: int | str = 1, s_inter: int = 2) -> Pipeline:
    return compose([build("grpo", {"preset": "tiny"}),
                    build("bupo", {"preset": "tiny", "layer": layer, "s_inter": s_inter})])  # fmt: skip


def tied(model: Any) -> Any:
    """The same model with the input embedding as its head."""
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def run(updater: Updater, rollout: Rollout, step: int) -> None:
    updater.run(rollout, torch.Generator().manual_seed(step), Clock(torch.device("cpu")), step)


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def copy_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [lambda model: model, tied], ids=["untied", "tied"])
@pytest.mark.parametrize("layer", [1, 2])
def test_what_lies_above_the_layer_stays_bit_for_bit(
    make: Callable[[Any], Any], layer: int, fresh_s: Callable[[], Policy]
) -> None:
    """With a momentum from earlier steps of the whole model, which must not act in the first phase either."""
    policy = fresh_s()
    model, pipeline = make(policy.model), two_phases(layer)
    updater = Updater(model, adamw(model.parameters()), pipeline, minibatches=2)
    rollout = ready_rollout(model, sampled_rollout(policy), pipeline)
    run(updater, rollout, step=9)  # a step of the second phase
    before = copy_of(model)
    for step in range(2):
        run(updater, rollout, step)
    upper = {f"model.layers.{i}." for i in range(layer, 3)}
    found = changed(model, before)
    assert not any(name.startswith((*upper, "model.norm")) for name in found)
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith((*upper, "model.norm")))
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= found
    assert ("lm_head.weight" in found) == ("lm_head.weight" in before)
    run(updater, rollout, step=2)  # GRPO again
    assert any(name.startswith(tuple(upper)) for name in changed(model, before))
    assert "model.norm.weight" in changed(model, before)


def test_a_second_optimizer_leaves_them_alone_too(fresh_s: Callable[[], Policy]) -> None:
    policy = fresh_s()
    model, pipeline = policy.model, two_phases()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    updater = Updater(model, Muon(matrices, lr=1e-3, weight_decay=0.1), pipeline, minibatches=2)
    rollout, before = ready_rollout(model, sampled_rollout(policy), pipeline), copy_of(model)
    run(updater, rollout, 0)
    assert {name.split(".")[2] for name in changed(model, before) if ".layers." in name} == {"0"}


def test_the_last_layer_is_grpo_bit_for_bit(fresh_s: Callable[[], Policy]) -> None:
    weights = []
    for methods in ([build("bupo", {"preset": "tiny", "layer": "last", "dual_clip": None})], []):
        policy = fresh_s()
        pipeline = compose([build("grpo", {"preset": "tiny"}), *methods])
        rollout = ready_rollout(policy.model, sampled_rollout(policy), pipeline)
        updater = Updater(policy.model, adamw(policy.model.parameters()), pipeline, minibatches=2)
        run(updater, rollout, 0)
        weights.append(copy_of(policy.model))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_the_ratio_is_the_layers_own_and_starts_at_one(fresh_s: Callable[[], Policy]) -> None:
    policy, pipeline = fresh_s(), two_phases()
    rollout = ready_rollout(policy.model, sampled_rollout(policy), pipeline)
    updater = Updater(policy.model, torch.optim.SGD(policy.model.parameters(), lr=0.0), pipeline, minibatches=1)
    own = scored(policy.model, rollout, 16, lens=Lens(1))[0]
    ratios = {}
    for name, old in (("layer", own), ("sampler", rollout.behaviour_logprob)):
        with_old = rollout.with_statistics(**{LAYER_LOGPROB: old})
        clock, generator = Clock(torch.device("cpu")), torch.Generator().manual_seed(0)
        ratios[name] = updater.run(with_old, generator, clock, 0)["ratio_max"]
    assert ratios["layer"] == pytest.approx(1.0, abs=1e-4)
    assert ratios["sampler"] > 1.5


def test_a_rollout_without_the_layers_log_probs_is_refused(fresh_s: Callable[[], Policy]) -> None:
    policy = fresh_s()
    pipeline = two_phases()
    rollout = ready_rollout(policy.model, sampled_rollout(policy), compose([build("grpo", {})]))
    updater = Updater(policy.model, adamw(policy.model.parameters()), pipeline)
    with pytest.raises(UserError, match=r"hook 'lens'.*layer_logprob"):
        run(updater, rollout, 0)


# -- whole runs -----------------------------------------------------------------------------------------------------


def config(steps: int, *more: str) -> Any:
    settings = ["methods.bupo={preset: tiny, s_inter: 2}", "optimizer.weight_decay=0.1", "ledger.rows=4"]
    return load_config("bupo/tiny", [*TINY_RUN, *settings, f"steps={steps}", *more])


def rows(out: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "memory")
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: str(v) for k, v in row.items() if not k.startswith(timed)} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_resumed_before_at_or_after_the_change_of_phase_is_the_uninterrupted_one(
    stop_after: int, tmp_path: Path
) -> None:
    Trainer(config(4, "checkpoint.every=1"), tmp_path / "straight").run()
    stops = iter([False] * (stop_after - 1) + [True])
    Trainer(config(4, "checkpoint.every=1"), tmp_path / "cut", stop=stops.__next__).run()
    Trainer(config(4, "checkpoint.every=1"), tmp_path / "cut", resume=True).run()
    assert rows(tmp_path / "cut") == rows(tmp_path / "straight")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "straight")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_what_is_logged_is_of_the_policy_that_it_names(tmp_path: Path) -> None:
    result = Trainer(config(3), tmp_path / "run").run()
    first, _, third = result.history
    assert first["bupo.layer"] == 1.0
    assert third["bupo.layer"] is None
    assert first["layer_entropy"] != pytest.approx(first["token_entropy"], abs=1e-3)
    assert "layer_entropy" not in third
    # the sampler is compared with the model's own policy, not with the layer's
    assert first["mismatch"] < 1e-3
    assert "ledger_predicted" not in first
    assert {"ledger_measured", "ledger_probe"} <= first.keys()
    assert "ledger_predicted" in third


def test_a_layer_or_architecture_that_has_no_lens_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"methods\.bupo\.layer is 7, but the model has 3 layers"):
        Trainer(config(2, "methods.bupo.layer=7"), tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


def test_a_layer_below_everything_that_trains_is_refused(fresh_s: Callable[[], Policy]) -> None:
    policy = fresh_s()
    pipeline = two_phases(layer=1)
    rollout = ready_rollout(policy.model, sampled_rollout(policy), pipeline)
    train_only(policy.model, ["model.layers.2.mlp.up_proj.weight"])
    updater = Updater(policy.model, adamw(p for p in policy.model.parameters() if p.requires_grad), pipeline)
    with pytest.raises(
        UserError, match=r"the policy of layer 1 is trained, and all parameters that train lie above it"
    ):
        run(updater, rollout, 0)
