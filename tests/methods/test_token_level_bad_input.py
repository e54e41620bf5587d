"""What the nine token-level methods say to settings and data that cannot work: one line that names the setting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import TINY_RUN, make_rollout

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.methods.arbitrary_entropy import ArbitraryEntropy, ArbitraryEntropyConfig
from rlvr_lab.methods.bapo import BAPO, BAPOConfig
from rlvr_lab.methods.base import Method, Pipeline
from rlvr_lab.methods.entropy_mechanism import ClipCov, ClipCovConfig
from rlvr_lab.methods.epo import EPO, EPOConfig
from rlvr_lab.methods.grpo import GRPO
from rlvr_lab.methods.hapo import HAPO, HAPOConfig
from rlvr_lab.methods.high_entropy_tokens import HighEntropyTokens, HighEntropyTokensConfig
from rlvr_lab.methods.lp_reg import LpReg, LpRegConfig
from rlvr_lab.methods.negative_reinforcement import NegativeReinforcement
from rlvr_lab.methods.siren import Siren, SirenConfig
from rlvr_lab.methods.steer import Steer, SteerConfig
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

CLASSES: tuple[Any, ...] = (
    Steer, HighEntropyTokens, NegativeReinforcement, BAPO, HAPO, Siren, EPO, ArbitraryEntropy, LpReg,
)  # fmt: skip


def base() -> Method:
    return GRPO(GRPO.presets["released"])


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- targets that cannot be reached ---------------------------------------------------------------------------------


def test_a_target_above_the_entropy_of_a_uniform_choice_is_refused_before_the_first_step() -> None:
    method = ArbitraryEntropy(ArbitraryEntropyConfig(target=4.7))
    with pytest.raises(UserError) as error:
        Pipeline([base(), method]).check_run(vocabulary=100, steps=5)
    assert "methods.arbitrary_entropy.target is 4.7 nats, but 4.605" in one_line(error)
    method.check_run(vocabulary=111, steps=5)


@pytest.mark.parametrize("target", [-0.01, math.inf, math.nan])
def test_a_target_that_is_no_entropy_is_refused(target: float) -> None:
    with pytest.raises(UserError, match=r"methods\.arbitrary_entropy\.target must"):
        ArbitraryEntropyConfig(target=target)


def test_a_run_with_an_unreachable_target_leaves_no_folder_behind(tmp_path: Any) -> None:
    settings = "methods={grpo: {preset: tiny}, arbitrary_entropy: {preset: tiny, target: 9.0}}"
    config = load_config(None, [*TINY_RUN, settings, "update.recompute_old_logprob=true"])
    with pytest.raises(UserError, match=r"arbitrary_entropy\.target is 9\.0 nats"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- histories longer than what exists --------------------------------------------------------------------------------


def test_a_horizon_beyond_the_run_is_said_once() -> None:
    pipeline = Pipeline([base(), EPO(EPOConfig(horizon=150))])
    pipeline.check_run(vocabulary=100, steps=80)
    (text,) = pipeline.notices()
    assert "methods.epo.horizon=80" in text
    assert "\n" not in text
    assert pipeline.notices() == []
    pipeline.check_run(vocabulary=100, steps=150)
    assert pipeline.notices() == []


def test_without_a_history_there_is_no_corridor() -> None:
    method = EPO(EPOConfig())
    assert math.isnan(method.metrics()["reference"])
    assert method.metrics()["weight"] == 0
    method.observe({"token_entropy": math.nan})
    assert method.history == []
    method.observe({"token_entropy": 0.5})
    assert method.metrics()["reference"] == 0.5
    assert method.metrics()["weight"] > 1


# -- choices that select nothing --------------------------------------------------------------------------------------


def batch_of(entropy: torch.Tensor | None = None) -> tuple[Rollout, torch.Tensor]:
    """Four responses of 5, 5, 1, 4 tokens whose entropies fall along the response; advantages of both signs."""
    rollout = make_rollout([5, 5, 1, 4])
    shape = rollout.response_ids.shape
    entropy = torch.linspace(1.0, 0.1, shape[1]).expand(shape) if entropy is None else entropy.expand(shape)
    logprob = torch.linspace(-0.5, -3.0, shape[1]).expand(shape)
    statistics = {
        "current_entropy": entropy, "current_logprob": logprob, "siren.entropy": entropy, "siren.chooser": entropy,
        "lp_reg.proxy": logprob + 0.1,
    }  # fmt: skip
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(shape).masked_fill(~rollout.mask, 0.0)
    return rollout.with_statistics(**statistics), advantage


def dead(value: torch.Tensor) -> torch.Tensor:
    """Only the last, least uncertain token of each response keeps its advantage."""
    return value * (torch.arange(value.shape[1]) == 3)


EMPTY: list[tuple[Callable[[], Any], torch.Tensor | None, Callable[[Any], Any], str]] = [
    (lambda: HighEntropyTokens(HighEntropyTokensConfig(ratio=0.2)), None, dead, "methods.high_entropy_tokens.ratio"),
    (lambda: Siren(SirenConfig()), torch.tensor(0.3), lambda a: a, "methods.siren.quantile"),
    (lambda: LpReg(LpRegConfig(share=0.01)), None, lambda a: a, "methods.lp_reg.share"),
    (lambda: ClipCov(ClipCovConfig(low=50.0, high=60.0)), None, lambda a: a, "methods.clip_cov.low"),
]


@pytest.mark.parametrize(("make", "entropy", "change", "setting"), EMPTY)
def test_an_empty_choice_is_said_once_counted_and_goes_on(
    make: Callable[[], Any], entropy: torch.Tensor | None, change: Callable[[Any], Any], setting: str
) -> None:
    method = make()
    pipeline = Pipeline([base(), method])
    batch, advantage = batch_of(entropy)
    name = f"{method.slug}.empty_choices"
    for _ in range(3):
        prepared = pipeline.prepare(batch, change(advantage), torch.Generator().manual_seed(0))
        assert all(bool(torch.isfinite(w[batch.mask]).all()) for w in pipeline.weights(prepared, advantage).values())
    (text,) = pipeline.notices()
    assert setting in text
    assert name in text
    assert "\n" not in text
    assert pipeline.metrics()[name] == 3
    pipeline.prepare(batch, change(advantage), torch.Generator().manual_seed(0))
    assert pipeline.notices() == []
    assert pipeline.metrics()[name] == 1  # per step, not in all


FULL: list[Callable[[], Any]] = [
    lambda: HighEntropyTokens(HighEntropyTokensConfig(ratio=0.2)),
    lambda: Siren(SirenConfig()),
    lambda: LpReg(LpRegConfig(share=0.5)),
    lambda: ClipCov(ClipCovConfig(low_quantile=0.5, high_quantile=1.0, closed=True, ratio=0.2)),
]


@pytest.mark.parametrize("make", FULL)
def test_a_choice_that_is_not_empty_is_not_counted(make: Callable[[], Any]) -> None:
    method = make()
    pipeline = Pipeline([base(), method])
    batch, advantage = batch_of()
    pipeline.prepare(batch, advantage, torch.Generator().manual_seed(0))
    assert pipeline.notices() == []
    assert pipeline.metrics()[f"{method.slug}.empty_choices"] == 0


def test_a_minibatch_in_which_nothing_could_be_chosen_is_no_empty_choice() -> None:
    method = LpReg(LpRegConfig(share=0.01))
    batch, advantage = batch_of()
    method.prepare(batch, advantage.clamp_min(0.0), torch.Generator())
    assert method.metrics() == {"empty_choices": 0.0}


def test_the_share_of_selected_tokens_is_reported() -> None:
    method = HighEntropyTokens(HighEntropyTokensConfig(ratio=0.4))
    assert math.isnan(method.metrics()["selected"])
    batch, advantage = batch_of()
    method.prepare(batch, advantage, torch.Generator())
    assert method.metrics()["selected"] == pytest.approx(6 / 15)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: SirenConfig(quantile=1.0), "siren.quantile"),
        (lambda: LpRegConfig(share=1.5), "lp_reg.share"),
        (lambda: HighEntropyTokensConfig(ratio=20.0), "high_entropy_tokens.ratio"),
        (lambda: HAPOConfig(tau=1.0), "hapo.tau"),
        (lambda: EPOConfig(horizon=1), "epo.horizon"),
        (lambda: EPOConfig(low=2.0, high=1.0), "epo.low"),
        (lambda: ArbitraryEntropyConfig(share=0.0), "arbitrary_entropy.share"),
        (lambda: ArbitraryEntropyConfig(low=1.1), "arbitrary_entropy.low"),
        (lambda: SteerConfig(least=0.0), "steer.least"),
    ],
)
def test_settings_outside_their_range_are_named(make: Callable[[], Any], setting: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert f"methods.{setting}" in one_line(error)


# -- settings that contradict each other or the loop ------------------------------------------------------------------


def owners(cls: Any) -> set[str]:
    method = cls()
    return {hook for hook in ("sample", "temper", "advantage", "clip", "surrogate") if method.has(hook)}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(CLASSES, 2)))
def test_two_methods_that_own_one_hook_are_refused_by_name_and_others_are_not(one: Any, other: Any) -> None:
    shared = owners(one) & owners(other)
    both_reduce = one().has("reduction") and other().has("reduction")
    if not shared and not both_reduce:
        Pipeline([base(), one(), other()])
        return
    if not shared and (one().has("surrogate") or other().has("surrogate")):
        Pipeline([base(), one(), other()])  # a loss is written for its own reduction, which wins
        return
    with pytest.raises(UserError) as error:
        Pipeline([base(), one(), other()])
    text = one_line(error)
    assert f"'{one.slug}' and '{other.slug}' both own the hook" in text


def test_two_owners_of_the_clip_range_are_both_named() -> None:
    with pytest.raises(UserError, match="'bapo' and 'lp_reg' both own the hook 'clip'"):
        Pipeline([base(), BAPO(BAPOConfig()), LpReg(LpRegConfig())])


def test_two_methods_that_temper_are_refused() -> None:
    class Other(Method):
        """Tempers as well."""

        slug = "other"

        def temper(self) -> None:
            return None

    with pytest.raises(UserError, match="'hapo' and 'other' both own the hook 'temper'"):
        Pipeline([base(), HAPO(), Other()])
    Pipeline([base(), HAPO(HAPOConfig(tau=0.0)), Other()])


@pytest.mark.parametrize("slug", ["arbitrary_entropy", "siren", "lp_reg"])
def test_methods_that_need_a_scored_rollout_say_so_with_the_settings(slug: str) -> None:
    methods = f"methods={{grpo: {{preset: tiny}}, {slug}: {{preset: tiny}}}}"
    with pytest.raises(UserError) as error:
        load_config(None, [methods])
    assert f"method '{slug}' needs" in one_line(error)
    assert "update.recompute_old_logprob=true" in one_line(error)
    load_config(None, [methods, "update.recompute_old_logprob=true"])


def test_a_proxy_of_the_current_policy_needs_no_scored_rollout() -> None:
    load_config(None, ["methods={grpo: {preset: tiny}, lp_reg: {preset: paper}}"])


def test_a_vllm_server_cannot_temper() -> None:
    vllm = ["rollout.engine=vllm", "update.recompute_old_logprob=true", "rollout.vllm.server=http://localhost:1",
            "rollout.vllm.sync_folder=/tmp/x"]  # fmt: skip
    with pytest.raises(UserError) as error:
        load_config(None, [*vllm, "methods={grpo: {preset: tiny}, hapo: {preset: paper}}"])
    assert "method 'hapo': rollout.vllm.server cannot sample at a temperature per token" in one_line(error)
    load_config(None, [*vllm, "methods={grpo: {preset: tiny}, hapo: {preset: tiny}}"])


# -- missing entropies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HAPO, ArbitraryEntropy])
def test_a_rollout_without_entropies_names_the_setting(make: Any) -> None:
    bare = make_rollout([3, 2]).with_(statistics={}, correct=torch.ones(2, dtype=torch.bool))
    with pytest.raises(UserError) as error:
        Pipeline([base(), make()]).check(bare)
    assert f"method '{make.slug}' needs 'token_entropy'" in one_line(error)
    assert "update.recompute_old_logprob: true" in one_line(error)


def test_an_anchor_without_its_entropies_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"'siren' needs 'siren\.entropy'.*update\.recompute_old_logprob: true"):
        Siren(SirenConfig()).filter(make_rollout([3, 2]))
