"""Replays invisible_leash.json: support counts, thresholds, pass@k, entropies by kind, the exponential tilt."""

from __future__ import annotations

from typing import Any

import torch

from ...core import entropy as kinds
from ...evaluate import support
from ...evaluate.passk import pass_at_k
from ..golden import Case, Replay, Rule


def _ratios(c: support.SupportCounts) -> dict[str, Any]:
    return {
        "P": c.preserved,
        "E": c.expanded,
        "S": c.shrunk,
        "O": c.out_of_support,
        "SRR": c.support_retention,
        "NDR": c.net_discovery,
        "SDS": c.dynamic_score,
        "NSCR": c.net_change,
        "pass_base": c.pass_base,
        "pass_rl": c.pass_trained,
    }


def _dynamics(case: Case) -> Replay:
    hits = case.params.get("min_hits", 1)
    return Replay(_ratios(support.support_counts(case.inputs["base_correct"], case.inputs["rl_correct"], hits)))


def _counts(case: Case) -> Replay:
    return Replay(_ratios(support.SupportCounts(*(case.inputs[key] for key in ("P", "E", "S", "O")))))


def _threshold(case: Case) -> Replay:
    k, zeta = case.inputs["k"], case.inputs["zeta"]
    bounds = {name: support.detection_threshold(k, zeta, exact) for name, exact in (("log", False), ("exact", True))}
    return Replay({"eps_log_bound": bounds["log"], "eps_exact": bounds["exact"]})


def _pass(case: Case) -> Replay:
    n, c, ks = case.inputs["n"], case.inputs["c"], case.inputs["k"]
    plug_in = [float(support.pass_at_k_plug_in(n, [c], k)[0]) for k in ks]
    unbiased = [float(pass_at_k(n, [c], k)[0]) if k <= n else None for k in ks]
    return Replay({"unbiased": unbiased, "plug_in": plug_in})


def _entropies(case: Case) -> Replay:
    sequences = [torch.tensor(s, dtype=case.dtype) for s in case.inputs["logits_per_sequence"]]
    values = [kinds.softmax_entropy(s) if s.numel() else torch.zeros(0, dtype=case.dtype) for s in sequences]
    entropy_BT = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    lengths = torch.tensor([len(v) for v in values])
    mask_BT = torch.arange(entropy_BT.shape[1])[None] < lengths[:, None]
    means = [float(v.mean()) for v in values if len(v)]
    if len(case.outputs.get("token_entropy_per_sequence", [])) == len(values):
        means = [float(v.mean()) for v in values]  # an empty sequence is recorded as undefined rather than left out
    # the recorder writes a missing answer as the class "NA"
    answers = [None if answer == "NA" else answer for answer in case.inputs["answers"]]
    return Replay(
        {
            "token_entropy_per_sequence": means,
            "token_entropy": kinds.sequence_mean_token_entropy(entropy_BT, mask_BT),
            "token_entropy_pooled_variant": kinds.pooled_token_entropy(entropy_BT, mask_BT),
            "answer_entropy": kinds.answer_entropy(answers),
            "answer_entropy_excluding_NA": kinds.answer_entropy(answers, count_missing=False),
        }
    )


def _tilt(case: Case) -> Replay:
    rows = []
    for beta in case.inputs["beta"]:
        tilt = support.exponential_tilt(case.inputs["q"], case.inputs["R"], float(beta))
        row = {"pi": tilt.pi, "H_pi": tilt.entropy, "KL_pi_q": tilt.kl, "cross_entropy_pi_q": tilt.cross_entropy}
        row |= {"identity_H_pi": tilt.cross_entropy - tilt.kl, "claimed_H_pi": tilt.claimed_entropy}
        row |= {"entropy_fell": tilt.entropy_fell, "support_of_pi_in_q": tilt.inside_base}
        rows.append({"beta": float(beta), "expected_reward": tilt.expected_reward, **row})
    return Replay({"H_q": tilt.entropy_base, "rows": rows})


RULES = [
    Rule("invisible_leash", {"base_correct", "rl_correct"}, {"P", "E", "S", "O"}, _dynamics),
    Rule("invisible_leash", {"P", "E", "S", "O"}, {"SRR"}, _counts),
    Rule("invisible_leash", {"k", "zeta"}, {"eps_log_bound"}, _threshold),
    Rule("invisible_leash", {"n", "c", "k"}, {"unbiased"}, _pass),
    Rule("invisible_leash", {"logits_per_sequence", "answers"}, {"token_entropy"}, _entropies),
    Rule("invisible_leash", {"q", "R", "beta"}, {"H_q", "rows"}, _tilt),
]
