r"""Where a two-hop answer comes from: logit-lens ranks and causal tracing by patching (explicit CoT, arXiv 2502.04667).

**Rank** of a token under the lens of layer l at position p, 0 = top, ties to the lower id:

    LN_f(h_{l,p}) W_U^T          MRR = mean 1 / (1 + rank)

The stream of the last layer is taken before its norm, so that LN_f acts once.

**Causal tracing**, on samples that are answered correctly: run the prompt with one token exchanged for another that
leads elsewhere, put its state at that one position into the clean run where it enters block l (from 1), finish the
pass, and take the rank again. Two stages, one for each word that the model writes:

    1  h r1 r2    reads the bridge b (a model without CoT: the answer t) at r2;   sites h, r1, r2
    2  h r1 r2 b  reads the answer t at b;                                        sites h, r1, r2, b

    effect of (site, l) = share of samples that were right and no longer have rank 0; or the fall of the MRR

An exchanged token must not lead to t (the official condition). Official code: chen123CtrlS/T-CotMechanism; its
first-stage script exchanges r1 and r2 together where it means r2, here one token is exchanged. Blocks are counted from
1, in the card from 0. Card: papers/explicit_cot.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..policy.access import parts, patched, record, unembed
from ..tasks.explicit_cot import Chain, Encoder, Fact, Form, World

Stage = Literal[1, 2]
SITES: dict[Stage, tuple[str, ...]] = {1: ("h", "r1", "r2"), 2: ("h", "r1", "r2", "b")}
"""Positions of each stage's input, in order."""


# -- ranks --------------------------------------------------------------------------------------------------------


def rank(scores: Tensor, token: int | Tensor, candidates: Sequence[int] | None = None) -> Tensor:
    """Place of `token` [...] by descending `scores` [..., V], from 0, ties to the lower id.

    With `candidates` only these compete, ties to the earlier one. Raises ValueError for nan, and for a token that is
    no candidate.
    """
    if bool(torch.isnan(scores).any()):
        raise ValueError("the scores hold nan, which has no rank")
    place = torch.as_tensor(token, device=scores.device)
    if candidates is not None:
        if int(place) not in candidates:
            raise ValueError(f"token {int(place)} is none of the candidates")
        scores, place = scores[..., list(candidates)], torch.tensor(list(candidates).index(int(place)))
    place = place.expand(scores.shape[:-1])[..., None]
    own = scores.gather(-1, place)
    earlier = torch.arange(scores.shape[-1], device=scores.device) < place
    return ((scores > own) | ((scores == own) & earlier)).sum(-1)


def lens_rank(
    hidden: Tensor,
    unembedding: Tensor,
    token: int | Tensor,
    metric: Literal["dot", "cos"] = "dot",
    candidates: Sequence[int] | None = None,
) -> Tensor:
    """Rank of a token by hidden [..., d] after the final norm and `unembedding` [V, d]; `cos` scales its rows to 1."""
    rows = torch.nn.functional.normalize(unembedding, dim=-1) if metric == "cos" else unembedding
    return rank(hidden @ rows.T, token, candidates)


def mrr(ranks: Tensor) -> Tensor:
    """Mean reciprocal rank over the last axis; nan where it is empty."""
    return (1 / (1 + ranks.double())).mean(-1)


@dataclass(frozen=True)
class Effect:
    """What a patch did. `changed` is nan where no sample was right before."""

    changed: float
    mrr_before: float
    mrr_after: float
    samples: int
    """Samples that were right before."""


def patching_effect(before: Tensor, after: Tensor) -> Effect:
    """Effect of one site from the ranks [n] before and after. `changed` is over samples of rank 0 before, the MRRs over
    all. Raises ValueError where the numbers of samples differ."""
    if before.shape != after.shape:
        raise ValueError(f"{len(before)} ranks before the patch and {len(after)} after it")
    right = before == 0
    changed = float((after[right] > 0).double().mean()) if bool(right.any()) else math.nan
    return Effect(changed, float(mrr(before)), float(mrr(after)), int(right.sum()))


# -- answers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    """The most likely `tokens` words after prompts [B, P] of one length: [B, tokens]."""
    for _ in range(tokens):
        prompts = torch.cat([prompts, model(input_ids=prompts).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return prompts[:, prompts.shape[1] - tokens :]


def encoded(items: Sequence[Fact | Chain], encoder: Encoder, form: Form) -> tuple[Tensor, Tensor]:
    """Prompts [n, P] and responses [n, R] without the end word, of items of one kind."""
    pairs = [encoder.example(item, form) for item in items]
    return torch.tensor([p for p, _ in pairs]), torch.tensor([r[:-1] for _, r in pairs])


def right_words(model: Any, items: Sequence[Fact | Chain], encoder: Encoder, form: Form) -> Tensor:
    """Which words before the end a greedy response has right [n, R]."""
    prompts, gold = (part.to(model.device) for part in encoded(items, encoder, form))
    return greedy(model, prompts, gold.shape[1]) == gold


@dataclass(frozen=True)
class Accuracy:
    """`exact`: every word before the end is right. `answer`: the last one is. nan without items."""

    exact: float
    answer: float
    items: int


def accuracy(model: Any, items: Sequence[Fact | Chain], encoder: Encoder, form: Form) -> Accuracy:
    """Accuracy of greedy decoding; the end word is forgiven."""
    if not items:
        return Accuracy(math.nan, math.nan, 0)
    right = right_words(model, items, encoder, form).float()
    return Accuracy(float(right.amin(1).mean()), float(right[:, -1].mean()), len(items))


def five_groups(model: Any, world: World, encoder: Encoder, form: Form, most: int = 3000) -> dict[str, Accuracy]:
    """The paper's five groups, at most `most` items of each. Training chains are judged by what training showed."""
    groups: dict[str, Sequence[Fact | Chain]] = {
        "id_atomic": world.id_facts,
        "ood_atomic": world.ood_facts,
        "train_inferred": world.train,
        "test_inferred_iid": world.test_iid,
        "test_inferred_ood": world.test_ood,
    }
    return {name: accuracy(model, items[:most], encoder, form) for name, items in groups.items()}


# -- inside -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def lens_ranks(model: Any, ids: Tensor, token: Tensor) -> Tensor:
    """Ranks [L + 1, n, S] of one token [n] per prompt [n, S] at every layer, 0 the embedding, and position."""
    with record(model) as seen:
        model(input_ids=ids)
    depth = parts(model).depth
    return torch.stack(
        [rank(unembed(model, seen.residual[layer], "normed"), token[:, None]) for layer in range(depth + 1)]
    )


def exchanged(chain: Chain, site: str, world: World, generator: torch.Generator) -> Chain | None:
    """The chain's words with one exchanged at random so that they no longer lead to its answer; None if none does.

    `b` and `t` of the result are the clean ones unless `b` itself was exchanged: only the words count.
    Raises UserError for an unknown site.
    """
    if site not in SITES[2]:
        raise UserError(f"site '{site}' does not exist; choose one of: {', '.join(SITES[2])}")
    tails, config = world.tails, world.config
    number = config.relations if site.startswith("r") else config.entities
    for other in torch.randperm(number, generator=generator).tolist():
        new = chain._replace(**{site: other})
        bridge: int | None = new.b if site == "b" else tails.get((new.h, new.r1))
        if bridge is None or tails.get((bridge, new.r2)) != chain.t:
            return new
    return None


@dataclass(frozen=True)
class Trace:
    """Ranks of a stage's word in n samples that were right: after a patch at each site, one row per block [L, n].

    `samples[site]` says which of `chains` the columns are: a site lacks those that no exchange makes wrong.
    """

    stage: Stage
    chains: list[Chain]
    after: dict[str, Tensor]
    samples: dict[str, list[int]]

    def changed(self, site: str) -> list[float]:
        """Share of samples that lost rank 0, per block; nan without samples."""
        return [patching_effect(torch.zeros_like(row), row).changed for row in self.after[site]]

    def mrr(self, site: str) -> list[float]:
        """MRR after the patch, per block."""
        return [float(mrr(row)) for row in self.after[site]]


def trace(model: Any, chains: Sequence[Chain], world: World, form: Form, stage: Stage, seed: int = 0) -> Trace:
    """Causal tracing of one stage on the chains that the model answers correctly, bridge included.

    Raises UserError for a stage that the form does not have.
    """
    if stage not in SITES or (stage == 2 and form == "no_cot"):
        raise UserError(f"stage {stage} does not exist with form '{form}': stages are 1 and, with CoT, 2")
    encoder, generator = Encoder(world.config), torch.Generator().manual_seed(seed)
    right = right_words(model, chains, encoder, form).all(1).tolist() if chains else []
    kept = [chain for chain, good in zip(chains, right, strict=True) if good]
    after, samples = {}, {}
    for place, site in enumerate(SITES[stage]):
        pairs = [(i, exchanged(chain, site, world, generator)) for i, chain in enumerate(kept)]
        found = [(i, other) for i, other in pairs if other is not None]
        samples[site] = [i for i, _ in found]
        clean = _inputs([kept[i] for i, _ in found], encoder, stage).to(model.device)
        other = _inputs([new for _, new in found], encoder, stage).to(model.device)
        read = "b" if stage == 1 and form == "cot" else "t"
        target = torch.tensor([encoder.entity(getattr(kept[i], read)) for i, _ in found], device=model.device)
        after[site] = torch.stack(list(_patched_ranks(model, clean, other, place, target)))
    return Trace(stage, kept, after, samples)


def _inputs(chains: Sequence[Chain], encoder: Encoder, stage: Stage) -> Tensor:
    rows = [
        [encoder.entity(c.h), encoder.relation(c.r1), encoder.relation(c.r2), *([encoder.entity(c.b)] * (stage - 1))]
        for c in chains
    ]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), len(SITES[stage]))


@torch.no_grad()
def _patched_ranks(model: Any, clean: Tensor, other: Tensor, place: int, target: Tensor) -> Iterator[Tensor]:
    """Ranks [n] of `target` at the last position, for a patch entering each block in turn."""
    depth = parts(model).depth
    if not len(clean):
        yield from (torch.zeros(0, dtype=torch.long) for _ in range(depth))
        return
    with record(model) as seen:
        model(input_ids=other)
    states = {block: seen.residual[block - 1][:, place].clone() for block in range(1, depth + 1)}
    for block, state in states.items():
        with patched(model, block, place, state):
            logits = model(input_ids=clean).logits
        yield rank(logits[:, -1], target)
