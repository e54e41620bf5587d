"""Replays representation_geometry.json: figures of activations, and power laws fitted to given spectra."""

from __future__ import annotations

import torch

from ...evaluate import representation_geometry as rg
from ..golden import Case, Replay, Rule


def _ranks(case: Case) -> tuple[int, int]:
    # recorded as numpy's arange(low, high) of places from 0; `ranks_fitted` stands beside the results
    if (places := case.params.get("trange_zero_based")) is not None:
        return places[0] + 1, places[1]
    first, last = case.outputs.get("ranks_fitted", rg.PUBLISHED_RANKS)
    return first, last


def _activations(case: Case) -> Replay:
    f, ranks = case.tensor("activations"), _ranks(case)
    found = rg.geometry(f, ranks, eps=case.params.get("eps", rg.EPS))
    spectrum, law = rg.eigenspectrum(f), found.power_law
    return Replay(
        {
            "eigenspectrum_explained_ratio": spectrum,
            "rankme_official": found.rankme,
            "rankme_eigen_exact_no_eps": rg.rankme(spectrum, eps=0.0),
            "spectral_entropy_nats": found.spectral_entropy,
            "rankme_singular_values_centered": found.rankme_singular,
            "rankme_singular_values_uncentered": found.rankme_uncentred,
            "participation_ratio": found.participation_ratio,
            "rankme_official_upper_bound": found.most,
            "alpha_req": law.alpha,
            "alpha_req_official_weighted": law.alpha,
            "alpha_unweighted_ols": rg.alpha_req(spectrum, ranks, weighted=False).alpha,
            "fit_r2_official": law.r2,
            "fit_r2_100_official": law.r2_100,
            "ranks_fitted": list(law.ranks),
        }
    )


def _spectrum(case: Case) -> Replay:
    spectrum, ranks = case.tensor("eigenspectrum"), _ranks(case)
    law = rg.alpha_req(spectrum, ranks)
    return Replay(
        {
            "alpha_req": law.alpha,
            "alpha_req_official_weighted": law.alpha,
            "alpha_unweighted_ols": rg.alpha_req(spectrum, ranks, weighted=False).alpha,
            "fit_r2_official": law.r2,
            "fit_r2_100_official": law.r2_100,
            "ranks_fitted": list(law.ranks),
            "rankme_official": rg.rankme(spectrum, case.params.get("eps", rg.EPS)),
            "rankme_eigen_exact_no_eps": rg.rankme(spectrum, 0.0),
            "spectral_entropy_nats": rg.spectral_entropy(spectrum),
            "participation_ratio": rg.participation_ratio(spectrum),
            "ypred_first5": law.at(torch.arange(1, 6)),
            # what the release leaves of the array of ranks after one call: its first and last
            "trange_after_call_first_last": list(law.ranks),
        }
    )


RULES = [
    Rule("representation_geometry", {"activations"}, {"rankme_official"}, _activations),
    Rule("representation_geometry", {"activations"}, {"alpha_req"}, _activations),
    Rule("representation_geometry", {"activations"}, {"eigenspectrum_explained_ratio"}, _activations),
    Rule("representation_geometry", {"eigenspectrum"}, {"alpha_req_official_weighted"}, _spectrum),
    Rule("representation_geometry", {"eigenspectrum"}, {"rankme_official"}, _spectrum),
]
