"""Settings: where they come from, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.train.config import describe_settings, load_config, packaged_recipes, parse_config, recipe_path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1e-4", "unknown setting 'optimiser'; did you mean 'optimizer'"),
        ("lr=1e-4", "unknown setting 'lr'; did you mean 'optimizer.lr'"),
        ("rollout.group_sise=8", "unknown setting 'rollout.group_sise'; did you mean 'rollout.group_size'"),
        ("optimizer.learning_rate=1", "unknown setting 'optimizer.learning_rate'"),
        ("step=3", "unknown setting 'step'; did you mean 'steps'"),
        ("temperature=0.7", "unknown setting 'temperature'; did you mean '(rollout|evaluation).temperature'"),
        ("zzz=1", "unknown setting 'zzz'; choose one of: checkpoint, data"),
        ("steps=many", r"setting 'steps': .*valid integer.* \(got 'many'\)"),
        ("steps=0", "setting 'steps': .*greater than 0"),
        ("steps=1.5", "setting 'steps': .*integer"),
        ("optimizer.lr=-1", "setting 'optimizer.lr': .*greater than 0"),
        ("optimizer.lr=fast", "setting 'optimizer.lr': .*valid number"),
        ("optimizer.betas=[0.9, 2]", "setting 'optimizer.betas.1': .*less than or equal to 1"),
        ("optimizer.schedule=cosin", "setting 'optimizer.schedule': .*'constant', 'linear' or 'cosine'"),
        ("rollout.group_size=1", "setting 'rollout.group_size': a group of one has no baseline"),
        ("rollout.temperature=0", "setting 'rollout.temperature': .*greater than 0"),
        ("rollout=3", "setting 'rollout'"),
        ("model.dtype=float23", "setting 'model.dtype': did you mean 'float32'"),
        ("data.task=math", "task 'math' needs data.file"),
        ("data.file=x.jsonl", "data.file is set, but task 'countdown' makes its own problems"),
        ("update.minibatches=9999", "update.minibatches is 9999, but a step has 168 responses"),
        ("methods.grpo.clip_hihg=0.3", "unknown setting methods.grpo.clip_hihg; did you mean 'clip_high'"),
        ("methods.grop.preset=tiny", "no method 'grop' in methods; did you mean 'grpo'"),
        ("methods.grpo.preset=smal", "methods.grpo.preset 'smal' does not exist"),
        ("methods.grpo=3", "setting 'methods.grpo'"),
        ("steps", "override 'steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form"),
        ("seed.x=3", "override 'seed.x=3': 'seed' is a value, not a section"),
        ("optimizer.betas=[0.9", r"override 'optimizer.betas=\[0.9'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("grpo/tiny", [override])
    assert "\n" not in str(caught.value)


def test_two_mistakes_are_reported_together() -> None:
    with pytest.raises(UserError, match=r"setting 'steps'.*; unknown setting 'rollout\.group_sise'"):
        load_config("grpo/tiny", ["rollout.group_sise=3", "steps=-1"])


def test_values_are_read_as_yaml_and_yaml_11s_exponents_are_numbers() -> None:
    config = load_config(
        "grpo/tiny", ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.9]", "logging.tensorboard=false", "seed=7",
                      "methods.grpo.eps=1e-5", "methods.grpo.dual_clip=null"],
    )  # fmt: skip
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.logging.tensorboard is False
    assert config.seed == 7
    assert config.methods == {"grpo": {"preset": "tiny", "eps": "1e-5", "dual_clip": None}}


def test_a_later_override_wins_and_an_equals_sign_may_stand_in_a_value() -> None:
    config = load_config(None, ["steps=3", "steps=4", "data.task=math", "data.file=a=b.jsonl"])
    assert config.steps == 4
    assert config.data.file == Path("a=b.jsonl")


def test_a_method_without_settings_takes_its_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("methods: {grpo: }\n")
    assert load_config(str(recipe)).methods == {"grpo": {}}


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_is_valid(name: str) -> None:
    assert load_config(name).methods


def test_a_config_survives_its_own_file() -> None:
    config = load_config("grpo/math", ["evaluation.file=other.jsonl"])
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold settings .key: value., not list"),
        ("", "must hold settings .key: value., not NoneType"),
        ("steps: [1\n", "cannot read recipe"),
        ("steps: 3\nrollouts: {}\n", "unknown setting 'rollouts'; did you mean 'rollout'"),
    ],
)
def test_a_broken_recipe_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(recipe))
    assert "\n" not in str(caught.value)


def test_a_recipe_with_binary_junk_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "junk.yaml"
    recipe.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="cannot read recipe"):
        load_config(str(recipe))


def test_unknown_recipes() -> None:
    with pytest.raises(UserError, match="no recipe 'grpo/tinny'; did you mean 'grpo/tiny'"):
        recipe_path("grpo/tinny")
    with pytest.raises(UserError, match=r"recipe file 'none\.yaml' does not exist"):
        recipe_path("none.yaml")


def test_every_setting_is_described() -> None:
    rows = dict(describe_settings())
    assert rows["optimizer.lr"] == "0.0001"
    assert rows["steps"] == "80"
    assert "tiny" in rows["methods.grpo.*"]
