"""A policy of few words is refused for a task that is written in others."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import TINY_RUN

from rlvr_lab.errors import UserError
from rlvr_lab.policy.load import check_words, load_policy
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer


@pytest.mark.parametrize(("model", "task"), [("tiny/A", "triples"), ("tiny/A", "math"), ("tiny/S", "instructions")])
def test_words_that_fit_pass(model: str, task: str) -> None:
    check_words(load_policy(model, device="cpu"), task)


def test_training_with_the_wrong_words_is_refused_before_it_begins(tmp_path: Path) -> None:
    told = "words of model 'tiny/A' are not those of task 'countdown': take tiny/S; the policy has the words of triples"
    with pytest.raises(UserError, match=told):
        Trainer(load_config("grpo/tiny", [*TINY_RUN, "model.path=tiny/A"]), tmp_path)
    with pytest.raises(UserError, match="not those of task 'maze': take tiny/A"):
        check_words(load_policy("tiny/R", device="cpu"), "maze")
