"""Replays explicit_cot.json: splits of two-hop chains, exact match, logit-lens ranks, the effect of a patch.

Which chains went to the test, and which rows the noise hit, the official generators drew: their counts are taken as
recorded and checked for what must hold of any draw.
"""

from __future__ import annotations

from typing import Any

from ...evaluate import explicit_cot as inside
from ...tasks import explicit_cot as two_hop
from ..golden import Case, Replay, Rule


def _numbered(*lists: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of entities and relations that keep the order of their names."""
    rows = [row for rows in lists for row in rows]
    entities = sorted({name for h, _, t in rows for name in (h, t)})
    return {n: i for i, n in enumerate(entities)}, {n: i for i, n in enumerate(sorted({r for _, r, _ in rows}))}


def _split(case: Case) -> Replay:
    groups = [case.inputs[key] for key in ("id_atomic", "ood_atomic")]
    e, r = _numbered(*groups)
    id_facts, ood_facts = ([two_hop.Fact(e[h], r[x], e[t]) for h, x, t in rows] for rows in groups)
    chains = two_hop.find_chains(id_facts, ood_facts)
    names, relations = list(e), list(r)

    def rows(part: list[two_hop.Chain]) -> list[list[str]]:
        return [[names[c.h], relations[c.r1], relations[c.r2], names[c.b], names[c.t]] for c in part]

    outputs = {
        "id_two_hop_train_plus_iid_without_noise": None if case.params["train_noise"] else rows(chains.id),
        "ood_two_hop_test": rows(chains.ood),
        "n_train": len(chains.id) - case.outputs["n_test_iid"],
        "n_test_iid": len(chains.id) - case.outputs["n_train"],
        "n_test_ood": len(chains.ood),
        "n_dropped_mixed": len(chains.mixed),
        "n_all_chains": len(chains.id) + len(chains.ood) + len(chains.mixed),
        "n_train_rows_with_wrong_second_hop": _wrong(case),
        "example_item": _example(case.outputs["example_item"], rows(chains.id)),
    }
    return Replay(outputs)


def _wrong(case: Case) -> int | None:
    """The recorded count where its draw is likely, within five standard deviations; 0 without noise."""
    share = case.params["lambda_noise"] if case.params["train_noise"] else 0.0
    n, found = case.outputs["n_train"], int(case.outputs["n_train_rows_with_wrong_second_hop"])
    # the replacement may hit the right entity, so the mean lies a little below n x share
    expected = n * share * (1 - 1 / case.params["num_entities"])
    return found if abs(found - expected) <= 5 * (n * share * (1 - share)) ** 0.5 else None


def _example(recorded: Any, rows: list[list[str]]) -> dict[str, Any]:
    """The official strings of the recorded question; of a noisy row, whose answer was drawn, the question alone."""
    prompt = recorded["input_text"]
    row = next(row for row in rows if "".join(f"<{name}>" for name in row[:3]) == prompt)
    h, r1, r2, b, t = (int(name.split("_")[1]) for name in row)
    prompt, target = two_hop.texts(two_hop.Chain(h, r1, r2, b, t), "cot")
    noisy = bool(recorded["train_noise"])
    return {"input_text": prompt, "train_noise": int(noisy)} | (
        {"target_text": recorded["target_text"] if noisy and recorded["target_text"].startswith(prompt) else target}
    )


def _match(case: Case) -> Replay:
    pairs = case.inputs["pairs_prediction_gold"]
    return Replay({"correct": [int(two_hop.exact_match(*pair)) for pair in pairs]})


def _ranks(case: Case) -> Replay:
    token, metric, among = (case.params.get(key) for key in ("token", "metric", "token_list"))
    hidden, words = case.tensor("hidden_after_final_norm"), case.tensor("word_embedding")
    assert token is not None
    found = inside.lens_rank(hidden, words, token, "cos" if metric == "cos" else "dot", among)
    return Replay({"rank_per_layer_position": found, "mrr_per_layer": inside.mrr(found)})


def _effect(case: Case) -> Replay:
    before, sites = case.ids("rank_before"), {}
    for site, ranks in case.inputs["rank_after_by_site"].items():
        effect = inside.patching_effect(before, before.new_tensor(ranks))
        sites[site] = {"frac_top1_changed": effect.changed, "mrr_after": effect.mrr_after}
    return Replay({"mrr_before": inside.mrr(before), "sites": sites})


RULES = [
    Rule("explicit_cot", {"id_atomic", "ood_atomic"}, {"n_dropped_mixed"}, _split),
    Rule("explicit_cot", {"pairs_prediction_gold"}, {"correct"}, _match),
    Rule("explicit_cot", {"hidden_after_final_norm", "word_embedding"}, {"mrr_per_layer"}, _ranks),
    Rule("explicit_cot", {"rank_before", "rank_after_by_site"}, {"mrr_before", "sites"}, _effect),
]
