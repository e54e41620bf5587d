"""KappaTune: golden values, the choice with its controls, what is skipped or refused, and runs that train a part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import GOLDEN, TINY_RUN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from rlvr_lab.errors import UserError
from rlvr_lab.integrations import trl_export, verl_export
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.kappatune import (
    KappaTune,
    KappaTuneConfig,
    adapter_targets,
    choose,
    entropy_bound,
    linear_entropy,
    log_volume,
    scan,
)
from rlvr_lab.policy.freeze import train_only
from rlvr_lab.policy.load import Policy
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

PAPER, RELEASED, PEFT = (KappaTune.presets[name] for name in ("paper", "released", "peft"))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(weights: dict[str, Tensor], **changes: Any) -> list[str]:
    config = replace(KappaTuneConfig(), **changes)
    return [one.name for one in choose(scan(weights.items(), config), config)]


def a_model(layers: int = 6) -> dict[str, Tensor]:
    """Squares and long matrices of random weights, a bias for each."""
    found: dict[str, Tensor] = {}
    for i in range(layers):
        for name, shape in (("q", (16, 16)), ("o", (16, 16)), ("up", (48, 16)), ("down", (16, 48))):
            found[f"layers.{i}.{name}.weight"] = gaussian(*shape, seed=10 * i + len(found))
        found[f"layers.{i}.bias"] = gaussian(16, seed=i)
    return found


def test_golden_file_is_reproduced() -> None:
    problems = {r.case: r.problem for r in replay_file(GOLDEN / "kappatune.json")}
    assert len(problems) == 3
    assert not any(problems.values()), problems


# ------------------------------------------------------------------------------------------------------ the theory


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 999))
def test_entropy_is_below_its_bound_and_reached_by_an_isotropic_unit(m: int, more: int, seed: int) -> None:
    weight = gaussian(m, m + more, seed=seed)
    assert linear_entropy(weight) <= entropy_bound(weight) + 1e-9
    isotropic = torch.linalg.qr(weight.T).Q.T
    assert linear_entropy(isotropic) == pytest.approx(entropy_bound(isotropic))
    # a wider input: h of W S W^T against the definition with a factor of S
    factor = gaussian(m + more, m + more, seed=seed + 1) + 3 * torch.eye(m + more, dtype=torch.float64)
    assert linear_entropy(weight, factor @ factor.T) == pytest.approx(linear_entropy(weight @ factor), abs=1e-6)


def test_equal_kappa_can_mean_different_entropies_and_scale_moves_entropy_alone() -> None:
    a, b = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([4.0, 4.0, 1.0], [4.0, 1.0, 1.0]))
    kappas = [one.kappa for one in scan({"a": a, "b": b, "c": 3 * a}.items(), PAPER)]
    assert kappas == pytest.approx([4.0, 4.0, 4.0])
    assert linear_entropy(a) - linear_entropy(b) == pytest.approx(math.log(4))
    assert linear_entropy(3 * a) - linear_entropy(a) == pytest.approx(3 * math.log(3))
    assert linear_entropy(a) == pytest.approx(1.5 * math.log(2 * math.pi * math.e) + log_volume(a))


def test_a_unit_without_a_density_has_no_entropy() -> None:
    assert math.isnan(linear_entropy(gaussian(5, 3)))
    assert math.isnan(linear_entropy(torch.ones(3, 3, dtype=torch.float64)))
    assert entropy_bound(torch.zeros(2, 2)) == -math.inf


# ----------------------------------------------------------------------------------------------- what may be chosen


def test_vectors_integers_and_what_settings_leave_out_are_never_measured() -> None:
    weights = {
        "embed_tokens.weight": gaussian(40, 4), "norm": gaussian(4), "packed": torch.ones(4, 4, dtype=torch.int8),
        "q": gaussian(4, 4),
    }  # fmt: skip
    assert [one.name for one in scan(weights.items(), PAPER)] == ["embed_tokens.weight", "q"]
    assert [one.name for one in scan(weights.items(), PEFT)] == ["q"]
    assert [one.name for one in scan(weights.items(), replace(PAPER, max_dim=8))] == ["q"]


def test_tied_weights_stand_once_also_as_a_state_dict() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    both = [model.named_parameters(remove_duplicate=False), model.state_dict().items()]
    assert [[one.name for one in scan(named, PAPER)] for named in both] == [["embed.weight"]] * 2


def test_tensors_that_are_made_one_after_another_are_all_measured() -> None:
    """Their memory is used again, so that two of them may stand at one address."""
    found = scan(((f"w{i}", gaussian(64, 64, seed=i)) for i in range(8)), PAPER)
    assert len({one.kappa for one in found}) == 8


def test_tensors_of_more_dimensions_by_setting() -> None:
    fused = torch.stack([torch.diag(torch.tensor([k, 1.0, 1.0])) for k in (2.0, 4.0)])
    weights = {"experts": fused, "q": 5 * torch.eye(3)}
    flat = {one.name: one.kappa for one in scan(weights.items(), PAPER)}
    assert flat["experts"] == pytest.approx(float(torch.linalg.cond(fused.reshape(2, 9).double())), rel=1e-6)
    mean = {one.name: one.kappa for one in scan(weights.items(), PEFT)}
    assert mean["experts"] == pytest.approx(3.0, rel=1e-6)
    assert [one.name for one in scan(weights.items(), RELEASED)] == ["q"]
    with pytest.raises(UserError, match=r"'experts' has shape \(2, 3, 3\), no matrix; set methods\.kappatune\.tensors"):
        scan(weights.items(), replace(PAPER, tensors="refuse"))


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"'q' has no values \(device meta\)"):
        scan([("q", torch.empty(3, 3, device="meta"))], PAPER)


def test_a_singular_matrix_is_never_chosen_by_us_last_by_the_release_and_first_by_peft() -> None:
    weights = {
        "good": gaussian(4, 4),
        "dead": torch.zeros(4, 4),
        "lost": gaussian(4, 2, seed=1) @ gaussian(2, 4, seed=2),
    }
    assert names(weights, count=3) == ["good"]
    assert names(weights, count=3, singular="noise") == ["good", "lost", "dead"]
    assert names(weights, count=1, singular="added") == ["dead"]
    assert names(weights, count=3, singular="added")[-1] == "lost"


def test_bfloat16_weights_are_measured_in_float64() -> None:
    weights = {"q": gaussian(8, 8).bfloat16(), "k": gaussian(8, 8, seed=1).bfloat16()}
    expected = [float(torch.linalg.cond(w.double())) for w in weights.values()]
    assert [one.kappa for one in scan(weights.items(), PAPER)] == pytest.approx(expected)


def test_padding_by_zeros_does_not_change_the_class_of_a_matrix() -> None:
    padded = torch.zeros(24, 16, dtype=torch.float64)
    padded[:16] = gaussian(16, 16)
    wide, square = scan({"padded": padded, "q": gaussian(16, 16)}.items(), PAPER)
    assert wide.shape_class == square.shape_class == (16, 16)
    assert wide.matched == pytest.approx(square.matched)


# ------------------------------------------------------------------------------------------------------- the choice


def test_the_published_choice_takes_the_long_matrices_of_a_model_that_learned_nothing() -> None:
    chosen = names(a_model(), count=12)
    assert all("up" in name or "down" in name for name in chosen)
    matched = names(a_model(), count=12, measure="matched")
    assert any("q" in name or "o." in name for name in matched)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(0, 99), st.sampled_from(["shape", "kind"]))
def test_arms_of_one_experiment_have_equal_shapes(count: int, seed: int, within: str) -> None:
    config = KappaTuneConfig(count=count, within=within)  # type: ignore[arg-type]
    found = scan(a_model().items(), config)
    arms = {o: choose(found, replace(config, order=o, seed=seed)) for o in ("lowest", "highest", "random")}
    shapes = [sorted(one.shape_class for one in arm) for arm in arms.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(shapes[0]) == count
    assert len({one.name for one in arms["random"]}) == count
    kappa = {order: sum(math.log(one.kappa) for one in arm) for order, arm in arms.items()}
    assert kappa["lowest"] <= kappa["random"] + 1e-9
    assert kappa["random"] <= kappa["highest"] + 1e-9
    if within == "shape":
        assert choose(found, replace(config, measure="matched"))  # dividing a class by its median keeps its order
        rises = [one.name for one in arms["lowest"] if one.shape_class == (16, 16)]
        both = [one.name for one in choose(found, replace(config, measure="matched")) if one.shape_class == (16, 16)]
        assert rises == both


def test_random_tensors_have_the_shapes_of_the_lowest_over_all() -> None:
    found = scan(a_model().items(), KappaTuneConfig(count=9))
    lowest, drawn = (choose(found, KappaTuneConfig(count=9, order=order)) for order in ("lowest", "random"))
    assert sum(one.size for one in lowest) == sum(one.size for one in drawn)
    assert {one.name for one in lowest} != {one.name for one in drawn}
    again = choose(found, KappaTuneConfig(count=9, order="random"))
    assert [one.name for one in again] == [one.name for one in drawn]
    other = choose(found, KappaTuneConfig(count=9, order="random", seed=1))
    assert [one.name for one in other] != [one.name for one in drawn]


def test_kinds_are_names_without_the_number_of_their_layer() -> None:
    chosen = names(a_model(), count=8, within="kind")
    assert sorted(name.split(".")[2] for name in chosen) == ["down"] * 2 + ["o"] * 2 + ["q"] * 2 + ["up"] * 2


def test_how_many_by_count_share_or_threshold() -> None:
    weights = {f"w{k}": torch.diag(torch.tensor([float(k), 1.0])) for k in (5, 2, 4, 3, 1)}
    assert names(weights) == ["w1", "w2", "w3", "w4", "w5"]  # fewer than 20
    assert names(weights, count=None, top_p=0.5) == ["w1", "w2"]
    assert names(weights, count=None, top_p=0.01) == ["w1"]
    assert names(weights, count=None, threshold=3.0) == ["w1", "w2", "w3"]
    assert names(weights, count=2, order="highest") == ["w5", "w4"]


def test_ties_keep_their_order() -> None:
    weights = {name: torch.eye(3) for name in ("z", "a", "m")}
    assert names(weights, count=2) == ["z", "a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, r"methods\.kappatune\.count must be at least 1"),
        ({"top_p": 0.2}, r"methods\.kappatune must have one of count, top_p and threshold"),
        ({"count": None}, r"methods\.kappatune must have one of count, top_p and threshold"),
        ({"count": None, "top_p": 1.5}, r"methods\.kappatune\.top_p must lie in \(0, 1\]"),
        ({"count": None, "threshold": -1.0}, r"methods\.kappatune\.threshold must be positive"),
        ({"count": None, "threshold": 9.0, "order": "random"}, r"kappatune\.threshold must go with order lowest"),
        ({"max_dim": 0}, r"methods\.kappatune\.max_dim must be at least 1"),
        ({"eps": -1.0}, r"methods\.kappatune\.eps must not be negative"),
        ({"order": "lowst"}, r"methods\.kappatune\.order must be one of .*did you mean 'lowest'"),
        ({"within": "class"}, r"methods\.kappatune\.within must be one of"),
        ({"measure": "x"}, r"methods\.kappatune\.measure must be one of"),
        ({"singular": "x"}, r"methods\.kappatune\.singular must be one of"),
        ({"tensors": "x"}, r"methods\.kappatune\.tensors must be one of"),
        ({"leave_out": "lm_head"}, r"methods\.kappatune\.leave_out must be a list of texts"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("kappatune", settings)


def test_an_empty_choice_says_why() -> None:
    weights = {"w": torch.diag(torch.tensor([5.0, 1.0]))}
    with pytest.raises(UserError, match=r"threshold is 2\.0, but the lowest kappa is 5; raise it"):
        names(weights, count=None, threshold=2.0)
    with pytest.raises(UserError, match=r"no tensor may be chosen; change max_dim, leave_out or tensors"):
        names({"norm": torch.ones(4)})
    with pytest.raises(UserError, match=r"all 1 tensors are singular or not finite"):
        names({"w": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"all 1 tensors are singular or not finite"):
        names({"w": torch.full((2, 2), math.nan)})


# ---------------------------------------------------------------------------------------------- freezing, and LoRA


def test_only_named_parameters_train_and_a_wrong_name_is_refused(fresh_s: Callable[[], Policy]) -> None:
    model = fresh_s().model
    name = "model.layers.1.mlp.up_proj.weight"
    train_only(model, [name])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [name]
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [name]
    with pytest.raises(UserError, match=r"no parameter 'model.layers.1.mlp.up.weight'; did you mean"):
        train_only(model, ["model.layers.1.mlp.up.weight"])
    with pytest.raises(UserError, match=r"no parameter would train"):
        train_only(model, [])


def test_adapter_targets_are_linear_layers_without_the_head(tiny_s: Policy) -> None:
    targets = adapter_targets(tiny_s.model, PEFT)
    linear = [n for n, m in tiny_s.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert set(targets) <= set(linear)
    assert len(targets) == len(linear) // 5
    assert adapter_targets(tiny_s.model, PEFT) == targets  # a set would come in another order in another process


def test_adapters_go_where_kappa_says(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = [
        "model.lora.rank=2",
        "model.lora.kappa={preset: peft, top_p: 0.1, order: highest}",
        *TINY_RUN,
        "steps=1",
    ]
    trainer = Trainer(load_config("grpo/tiny", settings), tmp_path / "run")
    adapted = {n.split(".lora_")[0] for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    plain = trainer.policy.model.get_base_model()
    config = replace(PEFT, top_p=0.1, order="highest")
    weights = {n.replace(".base_layer.weight", ".weight"): p for n, p in plain.named_parameters() if "lora_" not in n}
    expected = [one.name for one in choose(scan(weights.items(), replace(config, leave_out=("embed", "head"))), config)]
    assert adapted == {f"base_model.model.{name.removesuffix('.weight')}" for name in expected}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.kappatune={preset: tiny}", "model.lora.rank=4"], r"method 'kappatune' chooses which weights train"),
        (["model.lora.kappa={preset: peft}"], r"kappa chooses layers for adapters, but rank is 0"),
        (["model.lora.kappa={preset: pft}", "model.lora.rank=4"], r"did you mean 'peft'"),
        (["model.lora.kappa={preset: peft}", "model.lora.rank=4", "model.lora.targets=[q_proj]"], r"set one of them"),
    ],
)
def test_combinations_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("grpo/tiny", overrides)


def test_an_export_does_not_forget_the_choice(tmp_path: Path) -> None:
    settings = ["model.lora.rank=4", "model.lora.kappa={preset: peft}"]
    for recipe, engine in (("grpo/tiny", trl_export), ("grpo/math", verl_export)):
        with pytest.raises(UserError, match=r"model\.lora\.kappa chooses layers by their weights"):
            engine.export(load_config(recipe, settings), tmp_path / "out")


def test_a_composition_of_ones_own_comes_too_late(tmp_path: Path) -> None:
    trainer = Trainer(load_config("grpo/tiny", [*TINY_RUN, "steps=1"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"method 'kappatune' chooses what trains, for which it is too late"):
        trainer.use(compose([KappaTune()]))


# --------------------------------------------------------------------------------------------------------- training


def run(out: Path, *overrides: str, **options: Any) -> Trainer:
    settings = [*TINY_RUN, "steps=4", "ledger.rows=2", "methods.entropy_bonus={preset: paper}", *overrides]
    trainer = Trainer(load_config("kappatune/tiny", settings), out, **options)
    trainer.run()
    return trainer


def test_a_run_moves_what_was_chosen_and_nothing_else(tmp_path: Path, tiny_s: Policy) -> None:
    trainer = run(tmp_path / "run", "model.path=tiny/S")
    (method,) = (m for m in trainer.pipeline.methods if isinstance(m, KappaTune))
    before = dict(tiny_s.model.named_parameters())
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name].detach())}
    assert moved == set(method.chosen)
    assert len(moved) == 5
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kappatune.tensors"] == 5
    assert rows[-1]["kappatune.head"] == 0
    assert rows[-1]["kappatune.parameters"] == sum(before[name].numel() for name in moved)
    assert math.isfinite(rows[-1]["ledger_measured"])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_choice(tmp_path: Path) -> None:
    large = "optimizer.lr=0.05"  # so that trained weights would be ranked otherwise
    run(tmp_path / "straight", large)
    run(tmp_path / "cut", large, stop=iter([False, True]).__next__)
    resumed = run(tmp_path / "cut", large, resume=True)
    straight, cut = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("straight", "cut"))
    assert straight == cut
    (method,) = (m for m in resumed.pipeline.methods if isinstance(m, KappaTune))
    config = method.config
    ranked = [one.name for one in choose(scan(resumed.policy.model.named_parameters(), config), config)]
    assert ranked != method.chosen  # the choice of the trained weights would have been another one
