"""Golden cases of papers/baselines.md: verl's advantages, losses and reductions, TRL's loss, controllers, DAPO's rules.

The recorded verl is volcengine/verl @ b178a3cd5, TRL is huggingface/trl @ f2cd57710. All losses of verl have the same
keys; the recorded name of the function tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core import losses
from ...core.advantages import (
    Std,
    group_advantage,
    opo_advantage,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo_advantage,
)
from ...core.controllers import SignStepController
from ...core.entropy import softmax_entropy
from ...core.groups import informative_groups, overlong_reward
from ...core.losses import Surrogate
from ...core.reduce import Reduction, masked_mean, reduce
from ..golden import Case, Replay, Rule, gradient

SLUG = "baselines"

VERL_REDUCTIONS: Mapping[str, Reduction] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum_over_constant",
    "seq-mean-token-mean": "sequence_mean_of_token_mean",
    "seq-mean-token-sum": "sequence_mean_of_token_sum",
    "seq-mean-token-sum-norm": "token_sum_over_constant",
}


def verl_reduce(values_BT: Tensor, mask_BT: Tensor, mode: str, scale: float | None = None) -> Tensor:
    """verl's `agg_loss`; the constant of its norm mode is `loss_scale_factor`, or else the padded length."""
    constant = float(scale or mask_BT.shape[1]) if mode == "seq-mean-token-sum-norm" else 1.0
    return reduce(values_BT, mask_BT, VERL_REDUCTIONS[mode], constant)


def reductions(case: Case) -> Replay:
    """A matrix under every recorded mode."""
    values, mask = case.leaf("loss_mat"), case.mask("loss_mask")
    scale = case.params.get("loss_scale_factor")
    reduced = {mode: verl_reduce(values, mask, mode, scale) for mode in case.outputs}
    return Replay(reduced, _as_recorded(case, {mode: gradient(loss, values) for mode, loss in reduced.items()}))


def _as_recorded(case: Case, grads: dict[str, Tensor]) -> Any:
    """Gradients by mode, or the only one where the recorder left the mode out."""
    return grads if isinstance(case.grad, dict) or len(grads) != 1 else next(iter(grads.values()))


# Advantages.


def verl_advantages(case: Case) -> Replay:
    """All outcome advantages of verl from token rewards; a group of one keeps its raw reward there."""
    token_reward, mask, group = case.tensor("token_level_rewards"), case.mask("response_mask"), case.ids("group_index")
    reward, length = token_reward.sum(1), mask.sum(1)
    eps = case.params.get("epsilon", 1e-6)
    per_response: dict[str, Callable[[], Tensor]] = {
        "grpo": lambda: group_advantage(reward, group, "sample", eps, "raw"),
        "dr_grpo_no_std": lambda: group_advantage(reward, group, "none", eps, "raw"),
        "rloo": lambda: rloo_advantage(reward, group),
        "opo": lambda: opo_advantage(reward, length, group),
    }
    outputs = {}
    for key in case.outputs:
        if key in per_response:
            outputs[key] = per_response[key]()[:, None] * mask
        elif key == "reinforce_plus_plus_baseline":
            outputs[key] = reinforce_plus_plus_baseline(reward, group, mask)
        elif key.startswith("reinforce_plus_plus"):
            gamma = key.removeprefix("reinforce_plus_plus").removeprefix("_gamma")
            outputs[key] = reinforce_plus_plus(token_reward, mask, float(gamma or case.params.get("gamma", 1.0)))
    return Replay(outputs)


def _are_verl_advantages(case: Case) -> bool:
    names = {"grpo", "dr_grpo_no_std", "rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}
    return all(key.split("_gamma")[0] in names for key in case.outputs)


TRL_SCALES: Mapping[str, Std] = {"scale_group": "sample", "scale_batch": "batch", "scale_none": "none"}


def _are_trl_advantages(case: Case) -> bool:
    return case.outputs.keys() <= TRL_SCALES.keys()


def trl_advantages(case: Case) -> Replay:
    """`scale_rewards` of TRL; its groups lie one behind the other."""
    reward = case.tensor("rewards")
    group = torch.arange(len(reward)) // int(case.params["num_generations"])
    eps = case.params.get("epsilon", 1e-4)
    return Replay({key: group_advantage(reward, group, std, eps) for key, std in TRL_SCALES.items()})


# Losses of verl: (case, log-probability that carries the gradient, advantage, mask) -> surrogate.


def _bounds(case: Case) -> tuple[float, float]:
    return 1 - case.params["clip_low"], 1 + case.params["clip_high"]


def _clipped(dual_clip: float | None) -> Callable[[Case, Tensor, Tensor, Tensor], Surrogate]:
    def run(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
        return losses.clipped_surrogate(logprob, case.tensor("old_log_prob"), advantage, *_bounds(case), dual_clip)

    return run


def _gspo(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
    return losses.gspo_surrogate(logprob, case.tensor("old_log_prob"), advantage, mask, *_bounds(case))


def _cispo(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
    return losses.cispo_surrogate(logprob, case.tensor("old_log_prob"), advantage, *_bounds(case))


def _sapo(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
    tau = case.params.get("tau_pos", 1.0), case.params.get("tau_neg", 1.05)
    return losses.sapo_surrogate(logprob, case.tensor("old_log_prob"), advantage, *tau)


def _gmpo(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
    distances = case.params["clip_low"], case.params["clip_high"]
    return losses.gmpo_surrogate(logprob, case.tensor("old_log_prob"), advantage, mask, *distances)


def _gpg(case: Case, logprob: Tensor, advantage: Tensor, mask: Tensor) -> Surrogate:
    return losses.policy_gradient(logprob, advantage)


VERL_SURROGATES = {"gspo": _gspo, "cispo": _cispo, "sapo": _sapo, "geo_mean": _gmpo, "gpg": _gpg}


def _verl_name(case: Case) -> str:
    """`gspo` for `compute_policy_loss_gspo`; the bare name is the clipped loss."""
    return case.function.removeprefix("compute_policy_loss").removeprefix("_") or "vanilla"


def _is_verl_loss(case: Case) -> bool:
    known = _verl_name(case) in {*VERL_SURROGATES, "vanilla"}
    return case.function.startswith("compute_policy_loss") and known and case.outputs.keys() <= VERL_REDUCTIONS.keys()


def verl_loss(case: Case) -> Replay:
    """One loss of verl under every recorded mode, its gradient and its metrics."""
    outputs, grads = {}, {}
    logprob, advantage, mask = case.leaf("log_prob"), case.tensor("advantages"), case.mask("response_mask")
    name, dual_clip = _verl_name(case), case.params.get("clip_ratio_c", 3.0)
    surrogate = VERL_SURROGATES.get(name, _clipped(dual_clip))(case, logprob, advantage, mask)
    metrics = verl_metrics(case, name, surrogate, mask)
    for mode in case.outputs:
        loss = _verl_reduce_loss(name, surrogate.loss, mask, mode, case.params.get("loss_scale_factor"))
        outputs[mode] = {"loss": loss, **metrics}
        grads[mode] = gradient(loss, logprob)
    return Replay(outputs, _as_recorded(case, grads))


def _verl_reduce_loss(name: str, loss: Tensor, mask: Tensor, mode: str, scale: float | None) -> Tensor:
    """GSPO, SAPO and GMPO take the mean over sequences whatever mode is asked for; GMPO's counts empty ones too."""
    if name not in ("gspo", "sapo", "geo_mean"):
        return verl_reduce(loss, mask, mode, scale)
    return sequence_mean(loss, mask, count_empty=name == "geo_mean")


def sequence_mean(values_BT: Tensor, mask_BT: Tensor, count_empty: bool) -> Tensor:
    """Mean over sequences of token means, where an empty sequence may count as one of loss 0."""
    share = mask_BT.any(1).to(values_BT.dtype).mean() if count_empty else 1.0
    return reduce(values_BT, mask_BT, "sequence_mean_of_token_mean") * share


def verl_metrics(case: Case, name: str, surrogate: Surrogate, mask: Tensor) -> dict[str, Tensor]:
    """verl's metrics. Its KL is -log r, from the ratio that the loss used where that one is a token's own."""
    old, current, advantage = case.tensor("old_log_prob"), case.tensor("log_prob"), case.tensor("advantages")
    clipped, beyond = surrogate.clipped_low | surrogate.clipped_high, torch.zeros_like(mask)
    if name == "vanilla":
        # beyond the dual clip: where it lowered the loss
        beyond = surrogate.loss < _clipped(None)(case, current, advantage, mask).loss
    elif name == "geo_mean":
        # verl counts ratios outside either bound, whichever the advantage makes act
        ones = torch.ones_like(current)
        outside = _gmpo(case, current, ones, mask).clipped_high | _gmpo(case, current, -ones, mask).clipped_low
        clipped, beyond = outside & (advantage > 0), outside & (advantage < 0)
    own = name in ("vanilla", "cispo", "sapo")
    kl = losses.kl_estimate(old, current, "k1") if not own else -surrogate.ratio.log()
    found = {"pg_clipfrac": clipped, "ppo_kl": kl, "pg_clipfrac_lower": beyond}
    return {key: masked_mean(value.to(case.dtype), mask) for key, value in found.items()}


KL_NAMES: Mapping[str, losses.KLKind] = {
    **{"k1": "k1", "kl": "k1", "abs": "abs", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3"}
}


def kl_estimators(case: Case) -> Replay:
    """verl's `kl_penalty`, and the gradient of the sum of each estimate."""
    logprob, reference = case.leaf("log_prob"), case.tensor("ref_log_prob")
    estimates = {key: losses.kl_estimate(logprob, reference, KL_NAMES[key]) for key in case.outputs}
    return Replay(estimates, _as_recorded(case, {key: gradient(v.sum(), logprob) for key, v in estimates.items()}))


def entropy_bonus(case: Case) -> Replay:
    """Exact token entropies and the loss term that rewards them."""
    logits, mask = case.leaf("logits"), case.mask("response_mask")
    entropy = softmax_entropy(logits)
    mode, scale = case.params.get("loss_agg_mode", "token-mean"), case.params.get("loss_scale_factor")
    term = -case.params["entropy_coeff"] * verl_reduce(entropy, mask, mode, scale)
    return Replay({"entropy": entropy, "loss_term": term}, gradient(term, logits))


# TRL.

TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def _is_trl_loss(case: Case) -> bool:
    params = case.params
    single = params.get("world_size", 1) == 1 and params.get("gradient_accumulation", 1) == 1
    # a sequence's ratio on each token's KL has a gradient that no function of the library gives
    ratio_on_kl = params.get("use_bias_correction_kl", False) and params.get("is_level", "token") == "sequence"
    return params.get("loss_type") in TRL_LOSSES and single and not ratio_on_kl


def trl_surrogate(case: Case, logprob: Tensor, mask: Tensor) -> Surrogate:
    """The surrogate of a TRL loss type under token- or sequence-level importance sampling."""
    params, old = case.params, case.tensor("old_log_prob")
    advantage = case.tensor("advantages_per_sequence")[:, None].expand(mask.shape)
    if params.get("is_level", "token") == "sequence":
        old = _sequence_old_logprob(logprob, old, advantage, mask)
    high = params.get("eps_high", params["eps"])
    if params["loss_type"] == "cispo":  # the raw value bounds the ratio, from above only
        return losses.cispo_surrogate(logprob, old, advantage, 0.0, high)
    if params["loss_type"] == "sapo":
        tau = params.get("sapo_temperature_pos", 1.0), params.get("sapo_temperature_neg", 1.05)
        return losses.sapo_surrogate(logprob, old, advantage, *tau)
    return losses.clipped_surrogate(logprob, old, advantage, 1 - params["eps"], 1 + high, delta=params.get("delta"))


def _sequence_old_logprob(logprob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """What to take for the old log-probability so that each token's ratio is that of its sequence, as in GSPO."""
    sequence = losses.gspo_surrogate(logprob, old, advantage, mask, 0.0, float("inf"), log_limit=None)
    return (logprob - sequence.ratio.log()).detach()


def trl_reduce(values_BT: Tensor, mask_BT: Tensor, loss_type: str, max_length: float) -> Tensor:
    """TRL's normalisation of one micro-batch that is the whole batch; its sequence mean counts empty sequences."""
    if loss_type in ("grpo", "sapo"):
        return sequence_mean(values_BT, mask_BT, count_empty=True)
    if loss_type == "dr_grpo":
        return reduce(values_BT, mask_BT, "sequence_mean_of_token_sum_over_constant", max_length)
    return reduce(values_BT, mask_BT, "token_mean")


def trl_controller_of(params: Mapping[str, Any], initial: float) -> SignStepController:
    """TRL's adaptive entropy coefficient: `<=`, and the gate is closed on the first step."""
    return SignStepController(
        params["entropy_target"],
        params.get("entropy_coef_delta", 0.005),
        params.get("entropy_coef_min", 0.0),
        params.get("entropy_coef_max", 1.0),
        initial,
        strict=False,
        open_at_start=False,
    )


def _trl_kl(case: Case, logprob: Tensor) -> Tensor:
    """k3 without limits; TRL 1.16 by default weights it with the token's ratio, which carries gradient."""
    estimate = losses.kl_estimate(logprob, case.tensor("ref_log_prob"), "k3", limit=False)
    if not case.params.get("use_bias_correction_kl", False):
        return estimate
    return estimate * losses.importance_ratio(logprob, case.tensor("old_log_prob"))


def trl_loss(case: Case) -> Replay:
    """`GRPOTrainer._compute_loss` of TRL: surrogate, KL to the reference, reduction, entropy bonus, controller."""
    params, mask, logprob = case.params, case.mask("completion_mask"), case.leaf("log_prob")
    if "tool_mask" in case.inputs:
        mask = mask & case.mask("tool_mask")
    values = trl_surrogate(case, logprob, mask).loss
    if params.get("beta", 0.0):
        values = values + params["beta"] * _trl_kl(case, logprob)
    loss = trl_reduce(values, mask, params["loss_type"], params["max_completion_length"])
    coefficient = params.get("ent_coef", 0.0)
    entropy = masked_mean(case.tensor("entropy"), mask)
    if params.get("entropy_target") is None:
        return Replay(
            {"loss": loss - coefficient * entropy, "entropy_coef_after": coefficient}, gradient(loss, logprob)
        )
    controller = trl_controller_of(params, coefficient)
    loss = loss - controller.coefficient * entropy
    controller.update(float(entropy))
    return Replay({"loss": loss, "entropy_coef_after": controller.value}, gradient(loss, logprob))


# Controllers and rules without a gradient.


def _steps(controller: SignStepController, entropies: list[float], names: tuple[str, ...]) -> Replay:
    steps = []
    for entropy in entropies:
        applied = controller.coefficient
        controller.update(entropy)
        values = (entropy, applied, controller.value, controller.enabled)
        steps.append(dict(zip(names, values, strict=False)))
    return Replay({"steps": steps})


def skywork_controller(case: Case) -> Replay:
    """`EntController` of Skywork-OR1."""
    p = case.params
    limits = p["min_ent_coef"], p["max_ent_coef"], p["init_ent_coef"]
    controller = SignStepController(p["target_ent"], p["delta_ent_coef"], *limits)
    names = ("entropy", "coef_applied_this_step", "value_after", "enabled_after")
    return _steps(controller, case.inputs["entropy_sequence"], names)


def trl_controller(case: Case) -> Replay:
    """TRL's adaptive entropy coefficient over several optimizer steps."""
    controller = trl_controller_of(case.params, case.params["init_entropy_coef"])
    names = ("entropy", "coef_applied_this_step", "coef_after")
    return _steps(controller, case.inputs["entropy_sequence"], names)


def overlong(case: Case) -> Replay:
    """Soft overlong punishment as verl's DAPORewardManager computes it, without a floor."""
    p = case.params
    lengths = case.tensor("response_lengths")
    reward = overlong_reward(lengths, p["max_resp_len"], p["buffer_len"], p.get("penalty_factor", 1.0), floor=False)
    return Replay({"length_reward": reward})


def dynamic_sampling(case: Case) -> Replay:
    """Which groups are kept; the groups may differ in size."""
    groups = case.inputs["group_metrics"]
    sizes = torch.tensor([len(group) for group in groups])
    metric = torch.tensor([float(value) for group in groups for value in group], dtype=case.dtype)
    kept = informative_groups(metric, torch.arange(len(groups)).repeat_interleave(sizes))
    return Replay({"keep": kept[sizes.cumsum(0) - sizes]})


_VERL_INPUTS = {"log_prob", "old_log_prob", "advantages", "response_mask"}
_ADVANTAGE_INPUTS = {"token_level_rewards", "response_mask", "group_index"}
_TRL_INPUTS = {"log_prob", "old_log_prob", "entropy", "advantages_per_sequence", "completion_mask"}

RULES = [
    Rule(SLUG, {"loss_mat", "loss_mask"}, set(), reductions, when=lambda c: c.outputs.keys() <= VERL_REDUCTIONS.keys()),
    Rule(SLUG, _ADVANTAGE_INPUTS, set(), verl_advantages, when=_are_verl_advantages),
    Rule(SLUG, {"rewards"}, set(), trl_advantages, {"num_generations"}, _are_trl_advantages),
    Rule(SLUG, _VERL_INPUTS, set(), verl_loss, {"clip_low", "clip_high"}, _is_verl_loss),
    Rule(SLUG, {"log_prob", "ref_log_prob"}, set(), kl_estimators, when=lambda c: c.outputs.keys() <= KL_NAMES.keys()),
    Rule(SLUG, {"logits", "response_mask"}, {"entropy", "loss_term"}, entropy_bonus, {"entropy_coeff"}),
    Rule(SLUG, _TRL_INPUTS, {"loss"}, trl_loss, {"loss_type", "eps", "max_completion_length"}, _is_trl_loss),
    Rule(SLUG, {"entropy_sequence"}, {"steps"}, skywork_controller, {"target_ent", "delta_ent_coef"}),
    Rule(SLUG, {"entropy_sequence"}, {"steps"}, trl_controller, {"entropy_target", "init_entropy_coef"}),
    Rule(SLUG, {"response_lengths"}, {"length_reward"}, overlong, {"max_resp_len", "buffer_len"}),
    Rule(SLUG, {"group_metrics"}, {"keep"}, dynamic_sampling),
]
