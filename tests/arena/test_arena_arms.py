"""Arms by name or written in place; digests that see code and nothing else."""

from __future__ import annotations

import pytest

from rlvr_lab.arena import CATALOGUE, REFERENCE, Arm, changed_since, method_digests, resolve
from rlvr_lab.arena.contest import Contest
from rlvr_lab.arena.digests import code_digest
from rlvr_lab.errors import UserError


def names(*asked: str, controls: bool = False) -> list[str]:
    return [arm.name for arm in resolve(asked, controls=controls)]


def test_grpo_is_always_there_and_once() -> None:
    assert names() == ["grpo"]
    assert names("kl_cov", "grpo", "kl_cov") == ["grpo", "kl_cov"]


def test_controls_come_with_their_method() -> None:
    assert names("steer", controls=True) == ["grpo", "steer", "steer_shuffled", "steer_constant"]
    assert "grpo_wide_clip" in names("lp_reg", controls=True)
    assert names("clip_higher", controls=True) == ["grpo", "clip_higher"]


def test_a_composition_is_written_in_place() -> None:
    (_, preset) = resolve(["kl_cov:released"])
    assert preset.settings == ("methods.kl_cov={preset: released}",)
    (_, own) = resolve(["kl_cov:beta=3"])
    assert (own.name, own.method, own.role) == ("kl_cov:beta=3", "kl_cov", "method")
    assert own.settings == ("methods.kl_cov={preset: tiny, beta: 3}",)
    (_, both) = resolve(["siren: tiny , coefficient=0.1"])
    assert both.settings[0] == "methods.siren={preset: tiny, coefficient: 0.1}"
    assert "update.recompute_old_logprob=true" in both.settings  # what siren needs of the loop comes with it
    assert "update.recompute_old_logprob=true" not in own.settings
    assert Contest().config(own, 0).methods["kl_cov"]["beta"] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl_cob", r"no arm 'kl_cob'.*kl_cov"),
        ("steerr:paper", r"no arm 'steerr'.*steer"),
        ("kl_cov:tinny", r"tinny.*tiny"),
        ("kl_cov:tiny,paper", r"two presets: tiny and paper"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve([name])


@pytest.mark.parametrize("arm", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_arm_of_the_catalogue_is_a_valid_run(arm: Arm) -> None:
    from rlvr_lab.methods import build, compose

    methods = Contest().config(arm, 0).methods
    assert arm.method in methods
    compose([build(slug, settings) for slug, settings in methods.items()])
    assert arm.uses(arm.method)
    assert arm.uses(REFERENCE)
    assert Arm.from_dict(arm.as_dict()) == arm
    if arm.role == "control":
        assert CATALOGUE[arm.control_of].role == "method"
        assert arm.settings != CATALOGUE[arm.control_of].settings
        assert arm.note


def test_an_arm_uses_what_its_settings_name() -> None:
    arm = Arm("x", ("methods.kl_cov={preset: tiny}", "methods.steer.lowest=0.5"), method="kl_cov")
    assert [slug for slug in ("kl_cov", "steer", "kl_co", "siren") if arm.uses(slug)] == ["kl_cov", "steer"]


CODE = '''"""A module."""
import math

RATE = 0.25


def move(x: float, *, name: str = "a b") -> float:
    """Moves it."""
    y = x + RATE
    if y > 1:
        y = y - 1
        y = y * 2
    return math.sqrt(y)
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', '"""Another\n\nmodule."""\n'),
        ('    """Moves it."""\n', ""),
        ("RATE = 0.25", "RATE = 0.25  # why"),
        ("import math\n", "# first\nimport math\n\n"),
        ("y = x + RATE", "y = x  +  RATE"),
        ('x: float, *, name: str = "a b"', 'x: float,\n         *, name: str = "a b"'),
    ],
)
def test_comments_docstrings_and_layout_are_not_code(old: str, new: str) -> None:
    assert old in CODE
    assert code_digest(CODE.replace(old, new)) == code_digest(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.25", "RATE = 0.26"),
        ("x + RATE", "x - RATE"),
        ("y > 1", "y >= 1"),
        ('"a b"', '"a c"'),
        ('"a b"', '"ab"'),
        ("        y = y * 2\n", "    y = y * 2\n"),
        ("        y = y - 1\n        y = y * 2\n", "        y = y * 2\n        y = y - 1\n"),
        ("y = x + RATE", "z = x + RATE"),
    ],
)
def test_what_changes_the_code_changes_the_digest(old: str, new: str) -> None:
    assert old in CODE
    assert code_digest(CODE.replace(old, new)) != code_digest(CODE)


def test_changed_modules_are_named() -> None:
    now = method_digests(["grpo", "kl_cov"])
    assert changed_since(now) == []
    assert changed_since(now | {"kl_cov": "0" * 16, "gone": "1" * 16}) == ["kl_cov", "gone"]
