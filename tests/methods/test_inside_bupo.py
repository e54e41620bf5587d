"""BuPO: the policy of a layer, entropy changes, schedule, choice of layer; settings and compositions; refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import GOLDEN, make_rollout

from rlvr_lab.core.lens import Lens
from rlvr_lab.errors import UserError
from rlvr_lab.integrations import exchange
from rlvr_lab.integrations.verl_support import obstacles
from rlvr_lab.methods import Method, build, compose
from rlvr_lab.methods.bupo import (
    BuPO,
    BuPOConfig,
    LayerStates,
    entropy_changes,
    internal_policy,
    is_internal,
    layer_entropy,
    rms_norm,
    target_layer,
    write_cosines,
)
from rlvr_lab.testing.golden import gradient, read_cases
from rlvr_lab.testing.minibatch import minibatch_loss, record

LOSSES = [case for case in read_cases(GOLDEN / "bupo.json") if case.kind == "intergrpo_loss"]


def model(layers: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(num_hidden_layers=layers))


# -- golden values through the class, as in training ----------------------------------------------------------------


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_composition_has_the_recorded_loss_and_gradient(case: Any, dtype: torch.dtype) -> None:
    reduction = {"token-mean": "token_mean"}.get(case.params["loss_agg_mode"], "sequence_mean_of_token_mean")
    pipeline = compose([build("grpo", {"preset": "released"}), build("bupo", {"preset": "released",
                                                                              "reduction": reduction})])  # fmt: skip
    mask, ids, tau = case.mask("response_mask"), case.ids("response_tokens"), case.params["temperature"]
    old_stream, stream = (case.tensor(f"hidden_layer_l_{name}").to(dtype) for name in ("old", "new"))
    old_weight, weight = (case.tensor(f"unembedding_{name}").to(dtype) for name in ("old", "new"))
    stream.requires_grad_()
    weight.requires_grad_()
    old, _ = internal_policy(old_stream, old_weight, ids, tau)
    new, _ = internal_policy(stream, weight, ids, tau)
    batch = record(mask, old, group_id=case.ids("group_id"), reward=case.tensor("rewards").to(dtype))
    loss = minibatch_loss(pipeline, batch, new, pipeline.advantage(batch))
    tolerance = 1e-6 if dtype is torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(case.outputs["loss"], abs=tolerance)
    for name, leaf in (("hidden_layer_l_new", stream), ("unembedding_new", weight)):
        recorded = torch.tensor(case.grad[name], dtype=dtype)
        torch.testing.assert_close(gradient(loss, leaf), recorded, rtol=10 * tolerance, atol=tolerance)


def test_presets_differ_where_paper_and_release_do() -> None:
    case = next(case for case in LOSSES if not case.mask("response_mask").all())
    mask, ids = case.mask("response_mask"), case.ids("response_tokens")
    old, _ = internal_policy(case.tensor("hidden_layer_l_old"), case.tensor("unembedding_old"), ids)
    new, _ = internal_policy(case.tensor("hidden_layer_l_new"), case.tensor("unembedding_new"), ids)
    batch = record(mask, old, group_id=case.ids("group_id"), reward=case.tensor("rewards"))
    losses = {}
    for preset in ("paper", "released"):
        pipeline = compose([build("grpo", {"preset": "released"}), build("bupo", {"preset": preset})])
        losses[preset] = float(minibatch_loss(pipeline, batch, new, pipeline.advantage(batch)))
    assert abs(losses["paper"] - losses["released"]) > 1e-3


def test_the_dual_clip_caps_what_a_wrong_answer_can_cost() -> None:
    batch = record(torch.ones(1, 1, dtype=torch.bool), torch.tensor([[-9.0]]), reward=torch.tensor([-1.0]))
    new, advantage = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-1.0]])
    base = build("grpo", {"preset": "released"})
    capped = minibatch_loss(compose([base, build("bupo", {"preset": "released"})]), batch, new, advantage)
    bare = minibatch_loss(compose([base, build("bupo", {"preset": "paper"})]), batch, new, advantage)
    assert float(capped.detach()) == pytest.approx(10.0)
    assert float(bare.detach()) == pytest.approx(math.exp(8.0), rel=1e-5)
    assert not gradient(capped, new).any()


# -- properties -----------------------------------------------------------------------------------------------------


def states(seed: int = 0, size: float = 1.0) -> tuple[LayerStates, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    stream, attention, ffn, ones = drawn(7, 6), drawn(7, 6), drawn(7, 6), torch.ones(6, dtype=torch.float64)
    found = LayerStates(stream, rms_norm(stream, ones), attention, rms_norm(stream + attention, ones), ffn)
    return found, torch.randn(11, 6, generator=generator, dtype=torch.float64)


def test_entropy_changes_have_their_definition_and_cosines_their_range() -> None:
    found, weight = states()
    change = entropy_changes(found, weight)

    def entropy(hidden: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(hidden @ weight.T, -1)
        return -(p * p.log()).sum(-1)

    torch.testing.assert_close(change.layer, entropy(found.stream_out) - entropy(found.stream_in))
    torch.testing.assert_close(change.attention, entropy(found.attention_write) - entropy(found.attention_input))
    torch.testing.assert_close(change.ffn, entropy(found.ffn_write) - entropy(found.ffn_input))
    torch.testing.assert_close(found.stream_out, found.stream_in + found.attention_write + found.ffn_write)
    for cosine in write_cosines(found):
        assert bool((cosine.abs() <= 1).all())
    silent = LayerStates(*(torch.zeros_like(getattr(found, name)) for name in vars(found)))
    assert not any(bool(cosine.any()) for cosine in write_cosines(silent))


def test_a_norm_undoes_the_length_that_the_raw_lens_sees() -> None:
    (small, weight), (large, _) = states(), states(size=8.0)
    ones = torch.ones(6, dtype=torch.float64)
    assert bool((layer_entropy(large.stream_in, weight) < layer_entropy(small.stream_in, weight)).all())
    normed = [layer_entropy(rms_norm(x.stream_in, ones, eps=0.0), weight) for x in (small, large)]
    torch.testing.assert_close(*normed)


def test_a_saturated_lens_stays_finite_with_its_gradient() -> None:
    hidden, weight = (1e4 * torch.ones(2, 3)).requires_grad_(), torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])
    logprob, entropy = internal_policy(hidden, weight, torch.tensor([0, 2]))
    (logprob.sum() + entropy.sum()).backward()
    assert bool(logprob.isfinite().all())
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
    assert float(entropy.detach().max()) == pytest.approx(0.0, abs=1e-6)


def test_the_temperature_divides_the_logits() -> None:
    found, weight = states()
    ids = torch.arange(7)
    cold, _ = internal_policy(found.stream_in, weight, ids, 0.5)
    torch.testing.assert_close(cold, internal_policy(2 * found.stream_in, weight, ids)[0])


@pytest.mark.parametrize(
    ("changes", "tolerance", "layer"),
    [
        ([0.9, 0.2, -0.1, 0.01], 0.05, 2),
        ([0.9, 0.2, -0.1, 0.01], 0.0, 4),
        ([0.05, 0.04], 0.05, None),
        ([], 0.05, None),
        ([math.nan, 0.3, math.nan], 0.05, 2),
        ([-1.0, -1.0, 0.2], 0.05, 3),
    ],
)
def test_the_target_layer_is_the_last_that_widens(changes: list[float], tolerance: float, layer: int | None) -> None:
    assert target_layer(changes, tolerance) == layer


# -- the phases -----------------------------------------------------------------------------------------------------


def test_the_first_steps_are_a_layers_and_the_rest_the_models() -> None:
    method = BuPO(BuPOConfig(layer=2, s_inter=3))
    assert math.isnan(method.metrics()["layer"])
    assert [method.lens(step, 4) for step in range(5)] == [Lens(2)] * 3 + [None] * 2
    assert [is_internal(step, 3) for step in (1, 3, 4)] == [True, True, False]
    method.lens(0, 4)
    assert method.metrics() == {"layer": 2.0}


@pytest.mark.parametrize("settings", [{"layer": "last"}, {"layer": 4}, {"s_inter": 0}])
def test_controls_never_look_through_a_lens(settings: dict[str, Any]) -> None:
    pipeline = compose([build("bupo", {"preset": "tiny", **settings})])
    assert [pipeline.lens(step, model(4)) for step in range(10)] == [None] * 10


def test_without_the_hook_nothing_is_asked_of_the_model() -> None:
    assert compose([build("grpo", {})]).lens(0, None) is None


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, r"methods\.bupo\.layer must be at least 1, or 'last', not 0"),
        ({"layer": -2}, r"methods\.bupo\.layer must be at least 1"),
        ({"layer": "top"}, r"methods\.bupo\.layer must be a number or 'last', not 'top'"),
        ({"layer": True}, r"methods\.bupo\.layer must be a number"),
        ({"layer": 1.5}, r"methods\.bupo\.layer must be a number"),
        ({"s_inter": -1}, r"methods\.bupo\.s_inter must be a number of steps from 0, not -1"),
        ({"s_inter": 2.5}, r"methods\.bupo\.s_inter must be a number of steps"),
        ({"dual_clip": 1.0}, r"methods\.bupo\.dual_clip must be above 1 or null"),
        ({"reduction": "token_sum"}, r"methods\.bupo\.reduction must be one of token_mean"),
        ({"layers": 3}, r"unknown setting methods\.bupo\.layers; did you mean 'layer'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build("bupo", settings)
    assert "\n" not in str(error.value)


def test_a_layer_may_be_written_as_text() -> None:
    assert BuPO(BuPOConfig(layer="2", s_inter=1)).lens(0, 3) == Lens(2)


def test_a_layer_that_the_model_lacks_is_refused_with_its_depth() -> None:
    with pytest.raises(UserError, match=r"methods\.bupo\.layer is 6, but the model has 3 layers: choose 1 to 3"):
        compose([build("bupo", {"preset": "paper"})]).lens(0, model(3))


def test_a_first_phase_as_long_as_the_run_is_said_once() -> None:
    method = BuPO(BuPOConfig(s_inter=30))
    method.check_run(vocabulary=100, steps=30)
    (text,) = method.notices()
    assert "methods.bupo.s_inter is 30 and the run has 30 steps" in text
    assert method.notices() == []
    method.check_run(vocabulary=100, steps=31)
    assert method.notices() == []


@pytest.mark.parametrize(
    ("slug", "why"),
    [
        ("kl_reference", "compares with the log-probs of a reference model"),
        ("truncated_importance_sampling", "corrects from the sampler to the policy"),
    ],
)
def test_what_compares_with_the_real_policy_cannot_stand_beside_a_lens(slug: str, why: str) -> None:
    other = build(slug, {})
    with pytest.raises(UserError, match=f"'bupo' trains the policy of a layer, and '{slug}' {why}"):
        compose([other, BuPO()])


def test_earlier_responses_cannot_stand_beside_a_lens() -> None:
    class Buffer(Method):
        slug = "buffer"

        def replay(self, rollout: Any, advantage_BT: Any) -> None:
            return None

    with pytest.raises(UserError, match="'bupo' trains the policy of a layer, and 'buffer' learns from earlier"):
        compose([Buffer(), BuPO()])


def test_sampling_time_log_probs_do_not_serve() -> None:
    from rlvr_lab.train.config import load_config

    with pytest.raises(UserError, match=r"method 'bupo' .*update\.recompute_old_logprob=true"):
        load_config("bupo/tiny", ["update.recompute_old_logprob=false"])


def test_other_engines_refuse_it_by_name() -> None:
    pipeline = compose([build("bupo", {})])
    assert "TRL cannot carry 'bupo': it trains the policy of one layer" in str(exchange.unsupported(pipeline))
    for tier in ("a", "b"):
        assert "'bupo' trains the policy of one layer" in obstacles(pipeline.methods, tier)[0]  # type: ignore[arg-type]


def test_all_equal_rewards_and_a_group_of_one() -> None:
    pipeline = compose([build("grpo", {"preset": "released"}), build("bupo", {"preset": "released"})])
    rollout = make_rollout([3, 4, 2]).with_(group_id=torch.tensor([0, 0, 1]), reward=torch.tensor([1.0, 1.0, 0.5]))
    advantage = pipeline.advantage(rollout)
    assert not advantage[:2].any()
    assert float(advantage[2, 0]) == pytest.approx(0.5, abs=1e-5)
