r"""What the doctor knows: one rule per fault, each from logged numbers to a finding with evidence and a setting.

Every rule reads a `History` and returns one `Finding` or None. The thresholds are stated beside the rules. They were
set on runs of the tiny lab in which the fault was planted (benchmarks/doctor.py) and on healthy runs of both bases;
where a scale comes from elsewhere, the comment says so. They are conventions, not laws.

"Early" and "late" are means over the first and the last fifth of the steps (`doctor_record.trend`).

**Sharpening or collapse.** Entropy falls in every RLVR run that learns: GRPO on the tiny lab loses 60 % of it in 80
steps while pass@1 rises by 30 points. A fall is therefore judged by what it buys. With H0 and H1 the early and late
token entropy and h = log2(H0 / H1) its halvings, a fall that leaves half of the entropy or less is a **collapse** if

- *unpaid*: accuracy gained less than 0.1 per halving (healthy runs of the lab: 0.2 to 0.3), or
- *spent*: in 70 % of the groups all rewards are equal, so that hardly any advantage is left (healthy runs of the lab:
  at most half of the groups), or
- *unopposed*: 60 % of the fall that the ledger predicts comes from likely tokens of positive advantage and is offset by
  no other token (healthy runs of the lab: below 0, rises and falls nearly balance).

It is healthy **sharpening** (a note) otherwise, and where accuracy has reached 0.9. Accuracy is the held-out pass@1
where it was evaluated before and after, because its problems stay the same, else that of the training problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .doctor_record import (
    Array,
    Finding,
    History,
    Severity,
    Trend,
    arrow,
    graded,
    late_half,
    latest,
    mean_of,
    one_digit,
    score,
    show,
    smooth,
    trend,
    window,
)

# -- entropy ----------------------------------------------------------------------------------------------------------

LEDGER = ("ledger_up_likely", "ledger_up_unlikely", "ledger_down_likely", "ledger_down_unlikely")
LEDGER_NAMES = {
    "ledger_up_likely": "likely tokens of positive advantage",
    "ledger_up_unlikely": "unlikely tokens of positive advantage",
    "ledger_down_likely": "likely tokens of negative advantage",
    "ledger_down_unlikely": "unlikely tokens of negative advantage",
}
PAID_PER_HALVING = 0.1
SPENT = 0.7
UNOPPOSED = 0.6
OTHER_CAUSE = 0.25


def ledger_shares(history: History, sign: int) -> dict[str, float]:
    """Share of each ledger class in the predicted fall (`sign` -1) or rise (+1) of entropy; empty if not measured."""
    if not history.has(*LEDGER):
        return {}
    flow = {name: max(0.0, sign * mean_of(history.column(name))) for name in LEDGER}
    total = sum(flow.values())
    return {name: value / total for name, value in flow.items()} if total > 0 else {}


def _ledger_line(shares: Mapping[str, float], what: str) -> str:
    if not shares:
        return f"which tokens the {what} comes from: not measured (no ledger_* columns)"
    parts = sorted(shares.items(), key=lambda item: -item[1])
    told = ", ".join(f"{share:.0%} {LEDGER_NAMES[name]}" for name, share in parts if share >= 0.05)
    return f"predicted {what} by token class (ledger): {told}"


@dataclass(frozen=True)
class Fall:
    """A fall of entropy and what it bought."""

    left: float
    """Lowest level (mean over a window) as a share of the early one."""
    gain: float
    halvings: float
    dead: float
    unopposed: float
    """Share of the predicted fall that likely tokens of positive advantage cause and nothing offsets; nan unknown."""
    accuracy: Trend

    @property
    def unpaid(self) -> bool:
        """Whether accuracy gained too little; False where it is unknown."""
        return self.gain < PAID_PER_HALVING * self.halvings

    @property
    def reason(self) -> str:
        """Why this is a collapse; empty where it is sharpening."""
        if self.left > 0.5 or self.accuracy.late >= 0.9:
            return ""
        if self.unpaid:
            return "accuracy rose too little in return"
        if self.dead >= SPENT:
            return "hardly any group has an advantage left"
        return "likely tokens only get likelier" if self.unopposed >= UNOPPOSED else ""


def collapse(history: History) -> Finding | None:
    """A fall of entropy: healthy sharpening (note) or collapse; the criterion is in the head of this module."""
    values = history.column("token_entropy")
    entropy, accuracy = trend(values), trend(history.column(history.accuracy))
    if not (entropy.fell() and entropy.late < 0.7 * entropy.early):
        return None
    left = max(float(smooth(values, window(len(values))).min()), 1e-12) / entropy.early
    held_out = _held_out(history)
    gain, halvings = held_out or (accuracy.change, -math.log2(left))
    fall = Fall(left, gain, halvings, late_half(history.column("dead_groups")), _unopposed(history), accuracy)
    source = f"held-out pass@1 {gain:+.3f}" if held_out else "held-out pass@1: not measured"
    evidence = (
        f"{arrow('token_entropy', entropy)} nats; at its lowest {left:.0%} left, {-math.log2(left):.1f} halvings",
        f"{arrow(history.accuracy, accuracy)}; {source}",
        f"accuracy per halving: {show(gain / halvings)}; below {PAID_PER_HALVING} the fall counts as unpaid",
        f"groups of equal reward in the second half: {show(fall.dead)}; from {SPENT} the exploration counts as spent",
        f"share of the fall by likely tokens of positive advantage that nothing offsets: {show(fall.unopposed)}; from "
        f"{UNOPPOSED} it counts as unopposed",
        _ledger_line(ledger_shares(history, -1), "fall"),
    )
    return _collapse(history, evidence, fall) if fall.reason else _sharpening(history, evidence, fall)


def _unopposed(history: History) -> float:
    """(fall by likely tokens of positive advantage - every rise) / whole fall, as predicted by the ledger."""
    falls, rises = (
        {name: max(0.0, sign * mean_of(history.column(name))) for name in LEDGER} if history.has(*LEDGER) else {}
        for sign in (-1, 1)
    )
    total = sum(falls.values())
    return (falls["ledger_up_likely"] - sum(rises.values())) / total if total > 0 else math.nan


def _held_out(history: History) -> tuple[float, float] | None:
    """Gain of held-out pass@1 and halvings of the entropy between the first and the last evaluation; None
    where there are not two, or entropy fell by less than a tenth."""
    pairs = [(row.get("pass@1"), row.get("token_entropy")) for row in history.evaluations if row.get("held_out", True)]
    known = [(float(p), float(h)) for p, h in pairs if isinstance(p, int | float) and isinstance(h, int | float)]
    if len(known) < 2 or not 0 < known[-1][1] < 0.9 * known[0][1]:
        return None
    return known[-1][0] - known[0][0], math.log2(known[0][1] / known[-1][1])


def _sharpening(history: History, evidence: tuple[str, ...], fall: Fall) -> Finding:
    known = math.isfinite(fall.gain)
    return Finding(
        fault="collapse",
        severity="note",
        likelihood=0.1,
        title="Entropy falls and pays for it (sharpening)" if known else "Entropy falls; what it buys is not measured",
        cause=f"Healthy{'' if known else ' if accuracy rose'}: the policy moves its probability to what works. A "
        f"collapse would leave less than half of the entropy and buy less than {PAID_PER_HALVING} of accuracy per "
        f"halving, or leave {SPENT:.0%} of the groups without advantage, or come from likely tokens alone. pass@k at "
        "large k may fall all the same: look at the evaluations.",
        evidence=evidence,
        steps=history.span(),
        setting="methods.kl_cov.preset",
        suggestion="paper",
        plots=(("token_entropy",), (history.accuracy,)),
    )


def _collapse(history: History, evidence: tuple[str, ...], fall: Fall) -> Finding:
    shares = ledger_shares(history, -1)
    likely = shares.get("ledger_up_likely", math.nan)
    cause = (
        "Tokens that were likely already get positive advantages and are made likelier still; probability gathers on "
        "one continuation before a better one was tried."
    )
    if likely < OTHER_CAUSE:
        main = max(shares, key=lambda name: shares[name])
        cause = f"Mostly {LEDGER_NAMES[main]}, not likely tokens of positive advantage, lower the entropy."
    harm = fall.left <= 0.25 and fall.unpaid
    return Finding(
        fault="collapse",
        severity=graded(float(harm or fall.accuracy.fell()), 1.0),
        likelihood=score(0.5 / fall.left, 1.0, 5.0) * (0.7 if likely < OTHER_CAUSE else 1.0),
        title=f"Entropy collapse: {fall.reason}",
        cause=cause,
        evidence=evidence,
        steps=history.span(),
        setting="methods.kl_cov.preset",
        suggestion="paper",
        plots=(("token_entropy",), (history.accuracy, "dead_groups"), LEDGER),
        explained_by=("learning_rate", "length_drift", "mismatch"),
    )


def bonus_of(history: History) -> tuple[str, float] | None:
    """The regulariser that rewards entropy, as (slug, coefficient); None where there is none.

    Recognised from the numbers: its value is a negative multiple of the token entropy in every step.
    """
    entropy = history.column("token_entropy")
    for name in history.columns:
        if not name.startswith("regularise_") or name.startswith("regularise_grad_"):
            continue
        value = history.column(name)
        known = np.isfinite(value) & np.isfinite(entropy) & (entropy > 0)
        if known.sum() < 3 or not (value[known] < 0).all():
            continue
        ratio = -value[known] / entropy[known]
        # the entropy moves while a step's minibatches are made, so the ratio is not constant to the digit
        if ratio.max() <= 2.5 * np.median(ratio) and ratio.min() >= 0.4 * np.median(ratio):
            return name.removeprefix("regularise_"), float(np.median(ratio))
    for slug in ("entropy_bonus", "adaptive_entropy"):
        if history.has_method(slug):
            return slug, history.number(f"methods.{slug}.coefficient", math.nan)
    return None


def explosion(history: History) -> Finding | None:
    """Entropy rises to 1.5 times its start or more, and by at least 2 % of ln V (0.1 nats where V is unknown).

    An explosion is exponential, so the last three steps count where they lie above the late window.
    """
    values = history.column("token_entropy")
    entropy, accuracy = latest(trend(values), values), trend(history.column(history.accuracy))
    vocabulary = np.nanmax(history.column("vocabulary")) if history.has("vocabulary") else math.nan
    most = math.log(vocabulary) if vocabulary > 1 else math.nan
    least = 0.02 * most if math.isfinite(most) else 0.1
    if not (entropy.rose(least) and entropy.late >= 1.5 * entropy.early):
        return None
    best = float(smooth(history.column(history.accuracy)).max()) if history.has(history.accuracy) else math.nan
    lost = accuracy.late <= 0.5 * best or entropy.late >= 0.5 * (most if math.isfinite(most) else math.inf)
    paid = accuracy.rose(0.02)
    bonus = bonus_of(history)
    evidence = (
        f"{arrow('token_entropy', entropy)} nats"
        + (f"; a uniform choice among {vocabulary:.0f} tokens has {most:.2f}" if math.isfinite(most) else ""),
        f"{arrow(history.accuracy, accuracy)}, best {show(best)}",
        _ledger_line(ledger_shares(history, +1), "rise"),
    )
    severity: Severity = "note" if paid and not lost else graded(float(lost), 1.0)
    cause, setting, value = _explosion_cause(history, bonus)
    likelihood = score(entropy.late / max(entropy.early, 1e-12), 1.5, 6.0) * (1.0 if bonus else 0.6)
    return Finding(
        fault="explosion",
        severity=severity,
        likelihood=0.1 if severity == "note" else likelihood,
        title="Entropy explodes",
        cause=cause,
        evidence=evidence,
        steps=history.span(),
        setting=setting,
        suggestion=value,
        plots=(("token_entropy",), (history.accuracy,)),
        explained_by=() if bonus else ("learning_rate", "mismatch", "sampler_truncation", "stale_data", "length_drift"),
    )


def _explosion_cause(history: History, bonus: tuple[str, float] | None) -> tuple[str, str, str]:
    if bonus is None:
        lr = history.number("optimizer.lr", math.nan)
        told = (
            "Entropy rises without an entropy bonus: updates are noise (learning rate), or push down likely tokens "
            "(negative advantages), or raise unlikely ones."
        )
        return told, "optimizer.lr", one_digit(lr / 3) if math.isfinite(lr) else "a third of the present value"
    slug, coefficient = bonus
    told = (
        f"The entropy bonus '{slug}' (about {show(coefficient)} per nat) outweighs the reward: its gradient stays "
        "where advantages vanish, so it wins once groups are dead."
    )
    lower = one_digit(coefficient / 10) if math.isfinite(coefficient) else "a tenth of the present value"
    return told, f"methods.{slug}.coefficient", lower


# -- the update -------------------------------------------------------------------------------------------------------

CLIPPED, CLIPPED_BADLY = 0.05, 0.2
SEQUENCE_CLIPS = ("gspo", "gmpo")  # whole sequences are clipped; published runs clip about 15 % of the tokens


def clip_saturation(history: History) -> Finding | None:
    """Clipped tokens: from 5 % a warning, from 20 % critical (three times that for sequence-level ratios)."""
    clipped = history.column("clip_low") + history.column("clip_high")
    share, kl = late_half(clipped), late_half(history.column("kl_old_new"))
    factor = 3.0 if history.has_method(*SEQUENCE_CLIPS) else 1.0
    if not share >= CLIPPED * factor:
        return None
    setting, value, cause = _clip_change(history)
    evidence = (
        f"clipped tokens in the second half: {share:.1%} (low {late_half(history.column('clip_low')):.1%}, high "
        f"{late_half(history.column('clip_high')):.1%}); healthy runs of the lab stay below 2 %",
        f"KL(old || new): {show(kl)} nats per token",
    )
    return Finding(
        fault="clip_saturation",
        severity=graded(share, CLIPPED_BADLY * factor),
        likelihood=score(share, CLIPPED * factor, CLIPPED_BADLY * factor),
        title="Clipping removes much of the gradient",
        cause=cause,
        evidence=evidence,
        steps=history.span(half=True),
        setting=setting,
        suggestion=value,
        plots=(("clip_low", "clip_high"),),
        explained_by=("stale_data", "mismatch", "sampler_truncation", "learning_rate", "explosion"),
    )


def _clip_change(history: History) -> tuple[str, str, str]:
    low, high = (history.number(f"methods.grpo.{name}", 0.2) for name in ("clip_low", "clip_high"))
    epochs, minibatches = (int(history.number(f"update.{name}", 1)) for name in ("epochs", "minibatches"))
    if min(low, high) < 0.05:
        name = "clip_low" if low <= high else "clip_high"
        told = f"The clip range is narrow ({show(min(low, high))}): ordinary steps leave it."
        return f"methods.grpo.{name}", "0.2", told
    told = f"{epochs * minibatches} updates on one rollout carry the policy far from the one that sampled."
    if epochs > 1:
        return "update.epochs", "1", told
    return "update.minibatches", str(max(1, minibatches // 4)), told


KL_HIGH, KL_EXTREME = 0.02, 0.2


def learning_rate(history: History) -> Finding | None:
    """Steps too large: mean KL(old || new) from 0.02 nats per token, together with damage; a median of 0.2 alone.

    The mean, because a few huge steps do the harm. Damage: accuracy clearly below its best, certain tokens getting
    fewer or entropy rising without a bonus (updates are noise), responses without answer or end. Damage of two kinds
    counts without the KL too.
    """
    values = history.column("kl_old_new")
    kl, extreme = mean_of(values[len(values) // 2 :]), late_half(values) >= KL_EXTREME
    damage = _damage(history)
    lost = any(name == "lost" for name, _ in damage)
    ruined = trend(history.column(history.accuracy)).late <= 0.5 * _best_accuracy(history)
    large = kl >= KL_HIGH
    if not (extreme or (large and damage) or (lost and len(damage) >= 2)):
        return None
    lr = history.number("optimizer.lr", math.nan)
    # the KL of a step grows with the square of its size; 0.005 is where healthy runs of the lab are
    factor = float(np.clip(math.sqrt(0.005 / kl), 0.05, 0.5)) if large else 1 / 3
    known = (
        f"mean KL(old || new) of the updates in the second half: {show(kl)} nats per token (healthy: below {KL_HIGH})"
    )
    peak = np.nanmax(history.column("ratio_max")) if history.has("ratio_max") else math.nan
    return Finding(
        fault="learning_rate",
        severity=graded(float(extreme or ruined), 1.0),
        likelihood=score(kl, KL_HIGH, KL_EXTREME) if large else 0.5,
        title="Learning rate too high",
        cause="Updates are larger than the surrogate's trust region; they overwrite what the policy knew, and noise "
        "takes its place.",
        evidence=(known, f"largest importance ratio: {show(peak)}", *(told for _, told in damage)),
        steps=history.span(),
        setting="optimizer.lr",
        suggestion=one_digit(lr * factor) if math.isfinite(lr) else "a third of the present value",
        plots=(("kl_old_new",), (history.accuracy, "certain_tokens")),
        explained_by=(
            "explosion",
            "stale_data",
            "mismatch",
            *(() if large else ("length_drift", "sampler_truncation")),
        ),
    )


def _damage(history: History) -> list[tuple[str, str]]:
    found = []
    accuracy, certain = trend(history.column(history.accuracy)), trend(history.column("certain_tokens"))
    best = _best_accuracy(history)
    if best - accuracy.late >= max(0.05, 0.3 * best) and best - accuracy.late > 2 * accuracy.error:
        found.append(("lost", f"{history.accuracy} {show(accuracy.late)} at the end, best {show(best)}"))
    entropy = trend(history.column("token_entropy"))
    noisy = certain.fell(0.07) or (entropy.rose() and entropy.late >= 1.3 * entropy.early)
    if noisy and bonus_of(history) is None:
        told = f"{arrow('certain_tokens', certain)} (share below 0.01 nats), {arrow('token_entropy', entropy)}"
        found.append(("noise", told))
    for name, what in (("truncated", "responses cut by the length limit"), ("no_answer", "responses without answer")):
        change = trend(history.column(name))
        if change.rose(0.15):
            found.append((name, f"{what}: {change.early:.0%} -> {change.late:.0%}"))
    return found


def _best_accuracy(history: History) -> float:
    """Best level over three steps, or the held-out pass@1 before training where that is higher."""
    values = smooth(history.column(history.accuracy))
    first = history.evaluations[0].get("pass@1") if history.evaluations else None
    start = float(first) if isinstance(first, int | float) else 0.0
    return max(start, float(values.max()) if len(values) else math.nan)


def dead_regulariser(history: History) -> Finding | None:
    """A term with a value whose gradient is exactly 0 in every step; one of value 0 throughout is a note.

    The gradient is that with respect to log-probs and entropies, before it meets the parameters.
    """
    prefix = "regularise_grad_"
    dead = [
        name.removeprefix(prefix)
        for name in sorted(history.columns)
        if name.startswith(prefix) and history.has(name) and not np.nan_to_num(history.column(name)).any()
    ]
    acting = [slug for slug in dead if np.nan_to_num(history.column(f"regularise_{slug}")).any()]
    return _dead(history, (acting or dead)[0], bool(acting)) if dead else None


def _dead(history: History, slug: str, acts: bool) -> Finding:
    if acts:
        title = f"The regulariser '{slug}' has no gradient"
        cause = (
            "Its value enters the loss, but nothing of it reaches the policy, as with detached tensors or numbers "
            "recorded while sampling. The run is what it would be without the term."
        )
    else:
        title = f"The regulariser '{slug}' has not acted yet"
        cause = "Value and gradient are 0 in every step: its condition was never met, or its coefficient is 0."
    value, gradient = f"regularise_{slug}", f"regularise_grad_{slug}"
    steps = int(np.isfinite(history.column(gradient)).sum())
    mean = mean_of(history.column(value))
    return Finding(
        fault="dead_regulariser",
        severity="warning" if acts else "note",
        likelihood=0.95 if acts else 0.2,
        title=title,
        cause=cause,
        evidence=(
            f"root mean square gradient: exactly 0 in all {steps} measured steps",
            f"value: mean {show(mean)} per token",
        ),
        steps=history.span(),
        setting=f"methods.{slug}.coefficient",
        suggestion="0",
        advice="or mend the term: compute it from LossInputs.logprob or LossInputs.entropy",
        plots=((value, gradient),),
    )


# -- sampling ---------------------------------------------------------------------------------------------------------

NUMERICS = {"float32": 0.01, "bfloat16": 1.0, "float16": 0.3}
"""Largest difference of log-probs that the number format alone brings about, in nats over a rollout; measured 1e-5 to
1e-4 for float32 in the lab, the others are what rollout engines report."""
REMEASURE = ("update.recompute_old_logprob", "true")
CORRECTION = ("methods.truncated_importance_sampling.preset", "paper")


def mismatch(history: History) -> Finding | None:
    """Recorded and recomputed log-probs differ by more than the number format explains, without a common sign.

    Where nothing was recomputed, a KL(old || new) that is there while warm-up steps are still tiny gives it away.
    """
    if not _recomputed(history):
        return _early_divergence(history)
    largest, mean = late_half(history.column("mismatch")), late_half(history.column("mismatch_mean"))
    allowed = NUMERICS.get(str(history.setting("model.dtype", "float32")), 0.01)
    if not largest >= allowed or _one_sided(history):
        return None
    bound = math.log(1 + history.number("methods.grpo.clip_high", 0.2))
    return Finding(
        fault="mismatch",
        severity=graded(largest, max(bound, 2 * allowed)),
        likelihood=score(largest, allowed, 20 * allowed),
        title="Sampler and trainer disagree on log-probs",
        cause="The engine that samples computes other probabilities than the policy that is trained (other kernels, "
        "precision, weights or temperature): importance ratios start away from 1.",
        evidence=(
            f"largest |sampled - recomputed| log-prob: {show(largest)} nats in a typical step; the number format "
            f"{allowed}, a ratio is clipped at {bound:.2f}",
            f"signed mean: {show(mean)} nats",
        ),
        steps=history.span(half=True),
        setting=CORRECTION[0],
        suggestion=CORRECTION[1],
        plots=(("mismatch",), ("mismatch_mean",)),
        explained_by=("stale_data", "sampler_truncation"),
    )


def _recomputed(history: History) -> bool:
    """Whether log-probs were compared at all: a difference of exactly 0 throughout is a number set against itself."""
    return history.has("mismatch") and bool(np.nan_to_num(history.column("mismatch")).any())


def _warm_up_steps(history: History) -> Array:
    """Marks the first steps, at a third of the largest learning rate or less; empty where a run has no warm-up."""
    lr = history.column("lr")
    if not history.has("lr") or len(history) < 6 or history.steps[0] != 0:
        return np.zeros(len(history), dtype=bool)
    small = np.cumprod(np.nan_to_num(lr, nan=np.inf) <= np.nanmax(lr) / 3).astype(bool)
    return small if small.any() else np.zeros(len(history), dtype=bool)


EARLY_KL = 2e-3


def _early_divergence(history: History) -> Finding | None:
    early = _warm_up_steps(history)
    kl, ratio = (mean_of(history.column(name)[early]) for name in ("kl_old_new", "ratio_mean"))
    if not kl >= EARLY_KL or ratio < 1 - RATIO_BIAS:
        return None
    return Finding(
        fault="mismatch",
        severity="warning",
        likelihood=0.5,
        title="Importance ratios are off before the policy has moved",
        cause="Sampler and trainer probably disagree on log-probs; nothing was recomputed, so this is inferred.",
        evidence=(
            f"KL(old || new) while the learning rate is at most a third of its maximum: {show(kl)} nats per token "
            f"(healthy: below {EARLY_KL})",
            f"mean importance ratio there: {show(ratio)}",
        ),
        steps=(int(history.steps[early][0]), int(history.steps[early][-1])),
        setting=REMEASURE[0],
        suggestion=REMEASURE[1],
        plots=(("kl_old_new",),),
        explained_by=("stale_data",),
    )


RATIO_BIAS = 0.004
ONE_SIDED = 0.02


def _one_sided(history: History) -> bool:
    """Whether recorded log-probs lie above the recomputed ones on average, by more than 2 % of the largest."""
    mean, largest = history.column("mismatch_mean"), history.column("mismatch")
    known = np.isfinite(mean) & np.isfinite(largest) & (largest > 0)
    return bool(
        known.sum() >= 3 and np.median(mean[known] / largest[known]) >= ONE_SIDED and (mean[known] > 0).mean() >= 0.9
    )


def sampler_truncation(history: History) -> Finding | None:
    """Recorded log-probs lie above those of the full distribution: top-p, top-k or min-p with renormalisation.

    The difference is -log of the kept mass, never negative. Where nothing was recomputed: the mean importance ratio
    of the first, tiny steps is the kept mass, below 1; under an honest sampler its expectation is exactly 1.
    """
    early = _warm_up_steps(history)
    found = _sampler_setting(history, ("top_p", "top_k", "min_p"))
    severity: Severity = "warning"
    evidence: tuple[str, ...]
    if _recomputed(history) and history.has("mismatch_mean"):
        mean, largest = late_half(history.column("mismatch_mean")), late_half(history.column("mismatch"))
        if not (_one_sided(history) and mean >= 1e-3):
            return None
        evidence = (
            f"sampled minus recomputed log-prob: mean {mean:+.3g}, largest {show(largest)} nats; numerical noise has "
            "mean 0",
            f"kept mass: {math.exp(-mean):.1%} on average, {math.exp(-largest):.0%} where most was cut",
        )
        likelihood, severity = 0.9, graded(mean, 0.1)
    else:
        ratio = mean_of(history.column("ratio_mean")[early])
        if not ratio < 1 - RATIO_BIAS:
            return None
        evidence = (
            f"mean importance ratio before the policy has moved: {ratio:.4f}; its expectation is 1 under an "
            "honest sampler, the kept mass under a truncated one",
        )
        likelihood = 0.6
    return Finding(
        fault="sampler_truncation",
        severity=severity,
        likelihood=likelihood,
        title="The sampler truncates the distribution",
        cause="Tokens outside top-p, top-k or min-p are never sampled, and the log-probs are those of what was kept: "
        "ratios start below 1, and unlikely tokens can only lose.",
        evidence=evidence,
        steps=history.span(),
        setting=found or REMEASURE[0],
        suggestion=("1" if found.endswith("top_p") else "0") if found else REMEASURE[1],
        advice="sample from the whole distribution: top_p=1, top_k and min_p off",
        plots=(("mismatch_mean",), ("ratio_mean",)),
        explained_by=("stale_data",),
    )


def _sampler_setting(history: History, names: Sequence[str]) -> str | None:
    """Dotted key of the first method setting with one of these names."""
    methods = history.setting("methods", {})
    for slug, own in methods.items() if isinstance(methods, Mapping) else ():
        for name in names:
            if isinstance(own, Mapping) and name in own:
                return f"methods.{slug}.{name}"
    return None


STALE, VERY_STALE = 1.5, 4.0


def stale_data(history: History) -> Finding | None:
    """Mean age of the sampling policy: a note below 1.5 steps (asynchronous by design), critical from 4."""
    age = late_half(history.column("staleness"))
    if not age > 0:
        return None
    kl, gap = late_half(history.column("kl_old_new")), late_half(history.column("mismatch"))
    severity: Severity = "note" if age < STALE else graded(age, VERY_STALE)
    found = _sampler_setting(history, ("lag", "delay", "staleness", "max_staleness", "replay", "buffer"))
    return Finding(
        fault="stale_data",
        severity=severity,
        likelihood=0.2 if severity == "note" else score(age, STALE, VERY_STALE),
        title="Responses come from an older policy",
        cause="The policy has moved since it sampled what it now learns from: ratios are far from 1, clipping grows, "
        "and the advantage describes another policy.",
        evidence=(
            f"age of the responses in the second half: {show(age)} steps (on-policy: 0)",
            f"KL(old || new): {show(kl)} nats per token; largest |sampled - recomputed| log-prob: {show(gap)}",
        ),
        steps=history.span(half=True),
        setting=found or CORRECTION[0],
        suggestion="0" if found else CORRECTION[1],
        advice=""
        if found
        else f"with {'='.join(REMEASURE)}; better: give the sampler new weights before every rollout",
        plots=(("staleness",), ("kl_old_new",)),
    )


# -- reward and data --------------------------------------------------------------------------------------------------

DEAD, ALL_DEAD = 0.75, 0.95
SOLVED = 0.9


def degenerate_groups(history: History) -> Finding | None:
    """Groups of equal reward, which have no advantage: from 75 % of the groups a warning, from 95 % critical.

    Healthy runs of the lab end at 25 to 50 %. Groups that are all solved are the business of `reward_saturation`.
    """
    dead, accuracy = late_half(history.column("dead_groups")), late_half(history.column(history.accuracy))
    if not dead >= DEAD or accuracy >= SOLVED:
        return None
    start = trend(history.column("dead_groups")).early
    size = int(history.number("rollout.group_size", 0))
    never = accuracy < 0.05
    cause = (
        "The policy never solves these problems: no response of a group is better than another."
        if never
        else "Each problem is either always or never solved: within a group all rewards are equal."
    )
    setting, value = "methods.dynamic_sampling.preset", "paper"
    if never or 0 < size < 8:
        setting, value = "rollout.group_size", str(4 * (size or 8))
    return Finding(
        fault="degenerate_groups",
        severity=graded(dead, ALL_DEAD),
        likelihood=score(dead / (1 - min(dead, 0.999)), 3, 19),
        title="Most groups have no advantage",
        cause=cause,
        evidence=(
            f"groups of equal reward: {dead:.0%} in the second half, {show(start)} in the first steps",
            f"{history.accuracy} in the second half: {show(accuracy)}" + (f"; group size {size}" if size else ""),
        ),
        steps=history.span(half=True),
        setting=setting,
        suggestion=value,
        advice="better: problems that the starting policy solves in 10 to 90 % of the samples (data.file)",
        plots=(("dead_groups", history.accuracy),),
        explained_by=("learning_rate", "explosion", "collapse", "length_drift"),
    )


def reward_saturation(history: History) -> Finding | None:
    """Accuracy from 0.9 and at least 60 % dead groups for half of the run or more.

    A run that got there from below 0.8 has succeeded: a note.
    """
    values = history.column(history.accuracy)
    accuracy, typical = trend(values), late_half(values)
    dead = late_half(history.column("dead_groups"))
    if not (typical >= SOLVED and dead >= 0.6):
        return None
    earned = accuracy.rose(0.1) and accuracy.early < 0.8
    return Finding(
        fault="reward_saturation",
        severity="note" if earned else graded(dead, ALL_DEAD),
        likelihood=0.2 if earned else score(dead / (1 - min(dead, 0.999)), 1.5, 19),
        title="The problems are solved" if earned else "The reward is saturated: nothing is left to learn",
        cause="Training reached the top of its reward; further steps only sharpen."
        if earned
        else "Nearly every response earns the full reward from the start: problems are too easy for this policy.",
        evidence=(
            f"{history.accuracy}: {show(typical)} in the second half, {show(accuracy.early)} in the first steps",
            f"groups of equal reward in the second half: {dead:.0%}",
        ),
        steps=history.span(half=True),
        setting="methods.dynamic_sampling.preset",
        suggestion="paper",
        advice="better: harder problems, those that the policy solves in 10 to 90 % of the samples (data.file)",
        plots=((history.accuracy, "dead_groups"),),
    )


def length_drift(history: History) -> Finding | None:
    """Mean length changes by 30 % or more without being paid for in accuracy.

    A longer response is healthy where accuracy rises with it (the lab's base R: 37 to 50 tokens, 0.4 to 0.8) and few
    responses hit the limit: a note. Unpaid means a gain below 0.05; cut responses from 30 % count in any case.
    """
    length, accuracy = trend(history.column("mean_tokens")), trend(history.column(history.accuracy))
    reward, cut = trend(history.column("reward")), trend(history.column("truncated"))
    if not (length.clear and min(length.early, length.late) > 0):
        return None
    ratio = length.late / length.early
    if not (ratio >= 1.3 or ratio <= 0.7):
        return None
    paid = accuracy.rose(0.05) and not cut.late >= 0.3
    bought = history.accuracy == "accuracy" and reward.rose(0.02) and not accuracy.rose(0.05)
    kl = late_half(history.column("kl_old_new"))
    grows = ratio > 1
    told = (
        "The reward pays for length: it rises while accuracy does not."
        if bought
        else "Responses grow without getting better: no term holds their length."
        if grows
        else "Responses shrink: short wrong answers are cheaper than long ones, or the loss favours short responses."
    )
    unknown = not math.isfinite(accuracy.change) and not cut.late >= 0.3
    severity: Severity = (
        "note" if paid or unknown else graded(max(ratio, 1 / ratio) if accuracy.fell() or cut.late >= 0.3 else 0, 1.3)
    )
    return Finding(
        fault="length_drift",
        severity=severity,
        likelihood=0.1 if severity == "note" else score(max(ratio, 1 / ratio), 1.3, 2.5) + (0.05 if bought else -0.1),
        title="Length changes and pays for it" if paid else "Length drifts",
        cause=told if not paid else "Healthy: longer responses are more often right.",
        evidence=(
            f"{arrow('mean_tokens', length)} ({ratio - 1:+.0%})",
            arrow(history.accuracy, accuracy),
            arrow("reward", reward),
            f"cut by the length limit: {show(cut.early)} -> {show(cut.late)}",
        ),
        steps=history.span(),
        setting="methods.overlong.preset",
        suggestion="paper",
        plots=(("mean_tokens",), (history.accuracy, "truncated")),
        explained_by=("explosion", *(() if bought or not kl >= KL_HIGH else ("learning_rate",))),
    )


@dataclass(frozen=True)
class Rule:
    """A fault, the columns without which it cannot be judged, and how to get them."""

    fault: str
    title: str
    needs: tuple[str, ...]
    judge: Callable[[History], Finding | None]
    remedy: str = "use a log that this version of rlvr-lab wrote"


_RECOMPUTE = "set update.recompute_old_logprob=true; until then only an indirect sign is looked for"
RULES = (
    Rule("collapse", "entropy collapse", ("token_entropy",), collapse),
    Rule("explosion", "entropy explosion", ("token_entropy",), explosion),
    Rule("clip_saturation", "clip saturation", ("clip_low", "clip_high"), clip_saturation),
    Rule("mismatch", "train/rollout log-prob mismatch", ("mismatch",), mismatch, _RECOMPUTE),
    Rule("degenerate_groups", "degenerate groups", ("dead_groups",), degenerate_groups),
    Rule("length_drift", "length drift", ("mean_tokens",), length_drift),
    Rule("reward_saturation", "reward saturation", ("dead_groups",), reward_saturation),
    Rule("learning_rate", "learning rate too high", ("kl_old_new",), learning_rate),
    Rule("stale_data", "stale off-policy data", ("staleness",), stale_data),
    Rule("sampler_truncation", "sampler truncation bias", ("mismatch_mean",), sampler_truncation, _RECOMPUTE),
    Rule("dead_regulariser", "dead regulariser", (), dead_regulariser),
)
