"""What PEAR, CANON and UCAS say to settings and data that cannot work: one line that names the setting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import TINY_RUN, make_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods import build, compose
from rlvr_lab.methods.canon import CANON, CANONConfig, high_half
from rlvr_lab.methods.pear import PEAR, PEARConfig
from rlvr_lab.methods.ucas import UCAS, UCASConfig
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer


@pytest.mark.parametrize(
    ("slug", "settings", "message"),
    [
        ("pear", {"alpha": math.nan}, r"methods\.pear\.alpha must be finite"),
        ("pear", {"score": "much"}, r"methods\.pear\.score must be a number, not 'much'"),
        ("pear", {"marker": ""}, r"methods\.pear\.marker must be a text"),
        ("pear", {"marker": []}, r"methods\.pear\.marker must be a text"),
        ("pear", {"marker": 7}, r"methods\.pear\.marker must be a text, or a list of some, not 7"),
        ("pear", {"penalty": "shufled"}, r"methods\.pear\.penalty must be one of .*did you mean 'shuffled'"),
        ("canon", {"mu": 1.5}, r"methods\.canon\.mu must lie in \[0, 1\], not 1\.5"),
        ("canon", {"schedule": "cosine_inter"}, r"canon\.schedule must be one of .*did you mean 'cosine_inter_first'"),
        ("canon", {"scaled_half": "long"}, r"methods\.canon\.scaled_half must be one of low, high"),
        ("canon", {"period": 0.0}, r"methods\.canon\.period must be positive"),
        ("canon", {"max_length": 0}, r"methods\.canon\.max_length must be positive"),
        ("canon", {"reduction": "token-mean"}, r"methods\.canon\.reduction must be one of token_mean"),
        ("canon", {"metric": ""}, r"methods\.canon\.metric must name a field or a token statistic"),
        ("ucas", {"token_penalty": -0.1}, r"methods\.ucas\.token_penalty must not be negative"),
        ("ucas", {"confidence": "median"}, r"methods\.ucas\.confidence must be one of mean, sum"),
        ("ucas", {"degenerate": "drop"}, r"methods\.ucas\.degenerate must be one of keep, mask"),
        ("ucas", {"std": "population"}, r"methods\.ucas\.std must be one of sample, none"),
        ("ucas", {"eps": 0.0}, r"methods\.ucas\.eps must be positive"),
        ("ucas", {"posative": 0.1}, r"unknown setting methods\.ucas\.posative; did you mean 'positive'"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(slug: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(slug, settings)
    assert "\n" not in str(caught.value)


def test_pear_needs_its_marker_as_tokens() -> None:
    rollout = make_rollout([3, 2]).with_(correct=torch.tensor([True, False]))
    with pytest.raises(UserError, match=r"methods\.pear\.marker is not yet token ids: call bind"):
        PEAR().reward(rollout)
    with pytest.raises(UserError, match=r"methods\.pear\.marker holds '</think>', which has no token"):
        PEAR().bind(lambda text: [])
    with pytest.raises(UserError, match="has no token"):
        PEAR(PEARConfig(marker=["</think>", "???"])).bind(lambda text: [len(text)] if text != "???" else [])


def test_a_run_with_a_marker_that_the_vocabulary_lacks_leaves_no_folder(tmp_path: Any) -> None:
    config = load_config(None, [*TINY_RUN, "methods={grpo: {preset: tiny}, pear: {marker: 'Final answer:'}}"])
    with pytest.raises(UserError, match=r"pear\.marker holds 'Final answer:', with a word that this"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("slug", "lacking", "hint"),
    [
        ("pear", "token_entropy", "update.recompute_old_logprob: true"),
        ("pear", "correct", "a task with a verifier"),
        ("canon", "token_entropy", "update.recompute_old_logprob: true"),
        ("ucas", "token_certainty", "update.recompute_old_logprob: true"),
        ("ucas", "sampled_logit", "update.recompute_old_logprob: true"),
    ],
)
def test_what_is_missing_is_named_with_the_setting_that_provides_it(slug: str, lacking: str, hint: str) -> None:
    rollout = make_rollout([3, 2]).with_(correct=torch.tensor([True, False]))
    zeros = torch.zeros(rollout.response_ids.shape)
    statistics = dict.fromkeys(("token_entropy", "token_certainty", "sampled_logit"), zeros)
    statistics.pop(lacking, None)
    rollout = rollout.with_(statistics=statistics, correct=None if lacking == "correct" else rollout.correct)
    with pytest.raises(UserError, match=f"method '{slug}' needs '{lacking}'.*{hint}"):
        compose([build(slug, {})]).check(rollout)


def test_ucas_asks_for_the_scoring_pass_before_a_run() -> None:
    settings = [*TINY_RUN, "methods={grpo: {preset: tiny}, ucas: {}}"]
    with pytest.raises(UserError, match=r"method 'ucas' .*set update.recompute_old_logprob=true"):
        load_config(None, settings)
    load_config(None, [*settings, "update.recompute_old_logprob=true"])


def recorded(certainty: float) -> Rollout:
    rollout = make_rollout([4, 900], group_size=2).with_(reward=torch.tensor([1.0, 0.0]))
    value = torch.full(rollout.response_ids.shape, certainty)
    return rollout.with_statistics(token_certainty=value, sampled_logit=torch.zeros_like(value))


def test_a_weight_that_overflows_is_refused_and_never_becomes_an_advantage() -> None:
    rollout = recorded(12.0)
    with pytest.raises(UserError, match=r"a weight of stage 1 overflows.*confidence=mean and methods\.ucas\.std=s"):
        UCAS(UCASConfig(confidence="sum", std="none")).advantage(rollout)
    assert UCAS(UCASConfig(std="none")).advantage(rollout).isfinite().all()
    assert UCAS(UCASConfig(confidence="sum")).advantage(rollout).isfinite().all()


def test_a_vocabulary_with_forbidden_words_has_no_certainty() -> None:
    with pytest.raises(UserError, match=r"certainty is not finite: the model forbids some of its words"):
        UCAS().advantage(recorded(math.inf))


def test_a_metric_that_is_undefined_has_no_halves() -> None:
    rollout = make_rollout([3, 2, 4, 1])
    nan = rollout.with_statistics(token_entropy=torch.full((4, 4), math.nan))
    with pytest.raises(UserError, match=r"methods\.canon\.metric 'entropy' is undefined \(nan\)"):
        CANON().advantage(nan)
    with pytest.raises(ValueError, match="nan"):
        high_half(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(UserError, match="method 'canon' needs 'novelty'"):
        CANON(CANONConfig("novelty")).advantage(rollout)


def test_empty_responses_and_a_batch_of_nothing_but_them() -> None:
    rollout = make_rollout([0, 0, 3, 2]).with_(correct=torch.tensor([True, True, False, True]))
    zeros = torch.zeros(rollout.response_ids.shape)
    rollout = rollout.with_statistics(token_certainty=zeros + 2, sampled_logit=zeros)
    for slug in ("canon", "ucas"):
        assert build(slug, {}).advantage(rollout).isfinite().all()
    pear = build("pear", {})
    pear.bind(lambda text: [len(text)])
    assert pear.reward(rollout)["pear"].isfinite().all()
    assert pear.reward(rollout.rows(torch.tensor([0, 1])))["pear"].tolist() == [1, 1]
