"""Replays siren.json: nucleus entropy, peak mask, aggregation, the anchored term and its gradient."""

from __future__ import annotations

from ...core.entropy import nucleus_entropy, softmax_entropy
from ...methods import siren
from ..golden import Case, Replay, Rule, gradient


def _siren(case: Case) -> Replay:
    logits, mask, p = case.leaf("logits"), case.mask("response_mask"), case.params
    entropy = nucleus_entropy(logits, p["top_p"], p.get("topk")) * mask
    peaks = siren.peak_mask(entropy, mask, p["tau_quantile"])
    mean = (siren.peak_weights(peaks, entropy.dtype) * entropy).sum()
    loss = p["coeff"] * (mean - p["anchor"]).square()
    outputs = {
        "top_p_entropy": entropy,
        "full_entropy": softmax_entropy(logits) * mask,
        "quantile_lower_bound": siren.row_quantile(entropy, mask, p["tau_quantile"]),
        "peak_mask_first_pass": peaks.long(),
        "peak_mask_second_pass": siren.peak_mask(entropy * peaks, mask, p["tau_quantile"]).long(),
        "masked_entropy": entropy * peaks,
        "aggregated_entropy": mean,
        "siren_reg_loss": loss,
    }
    return Replay(outputs, gradient(loss, logits))


RULES = [
    Rule("siren", {"logits", "response_mask"}, {"top_p_entropy", "siren_reg_loss"}, _siren,
         params={"top_p", "tau_quantile", "anchor", "coeff"}),
]  # fmt: skip
