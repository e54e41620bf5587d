"""Every method that trains has a full-scale recipe that is read, names it and its source, and fits the machine that it
names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.methods import Entry, build, trainable
from rlvr_lab.plan.planner import plan
from rlvr_lab.plan.shapes import published
from rlvr_lab.train.config import load_config, packaged_recipes, recipe_path

COLAB = {"grpo/colab_t4": "T4", "grpo/colab_l4": "L4", "grpo/colab_a100": "A100-40"}
FULL = sorted({entry.recipe for entry in trainable().values() if entry.recipe})
PLAN = re.compile(r"rlvr-lab plan (\S+) --gpu (\S+) --gpus (\d+)")


def text(name: str) -> str:
    return recipe_path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("entry", trainable().values(), ids=lambda entry: entry.slug)
def test_a_method_has_a_full_scale_recipe(entry: Entry) -> None:
    assert entry.recipe in packaged_recipes()
    config = load_config(entry.recipe)
    assert entry.slug in config.methods
    assert config.model.path in published(), "the planner must count its model without a network"
    assert config.rollout.max_tokens >= 1024
    assert config.rollout.prompts * config.rollout.group_size >= 480
    assert entry.arxiv in text(entry.recipe)


@pytest.mark.parametrize("name", FULL)
def test_a_full_scale_recipe_says_what_it_is(name: str) -> None:
    words = " ".join(line.lstrip("# ") for line in text(name).splitlines() if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}", words)
    assert "Not run at scale by this project" in words
    settings = [line for line in text(name).splitlines() if line and not line.startswith("#")]
    assert any(line.startswith("parallel:") and "fsdp2" in line for line in settings)


@pytest.mark.parametrize("name", FULL)
def test_a_full_scale_recipe_fits_what_it_names(name: str) -> None:
    command = PLAN.search(text(name))
    assert command
    assert command[1] == name
    found = plan(load_config(name), command[2], int(command[3]))
    assert found.fits, found.memory.peak / 2**30


@pytest.mark.parametrize(("name", "gpu"), COLAB.items())
def test_a_colab_recipe_fits_one_gpu(name: str, gpu: str) -> None:
    config = load_config(name)
    assert plan(config, gpu).fits
    assert "0.5B" in config.model.path
    assert "Not run at scale by this project" in text(name)


@pytest.mark.parametrize("name", COLAB)
@pytest.mark.parametrize("slug", sorted(set(trainable()) - {"grpo"}))
def test_any_method_can_be_put_into_a_colab_recipe(name: str, slug: str) -> None:
    settings = [f"methods.{slug}={{}}"]
    method = build(slug, {})
    if method.rescored or method.has("read_old_logits"):
        with pytest.raises(UserError, match=f"method '{slug}' .*set update.recompute_old_logprob=true"):
            load_config(name, settings)
        settings.append("update.recompute_old_logprob=true")
    config = load_config(name, settings)
    assert {"grpo", slug} == set(config.methods)


def test_the_examples_in_the_comments_are_read() -> None:
    for name in COLAB:
        for command in re.findall(rf"rlvr-lab (?:train|plan) {name} (.*)", text(name)):
            words = re.findall(r'"[^"]*"|\S+', command)
            settings = [word.strip('"') for word in words if "=" in word]
            assert settings
            load_config(name, settings)


def test_recipes_lie_in_the_package() -> None:
    root = Path(__file__).parents[1] / "rlvr_lab" / "recipes"
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == {
        f"{name}.yaml" for name in packaged_recipes()
    }
