"""Does a grade made from the model's own text help DPO? A GRU of a few thousand weights; all choices are [inferred].

A prompt has four key tokens; a response is eight tokens, its quality the number of the prompt's keys in it. A GRU
language model learns responses of random quality, then DPO learns from pairs, with gamma times the degree loss on
copies of the preferred response. Measured on held-out responses: rank correlation of the implicit reward with quality,
and how often it puts the better of two responses, one key apart, first. Controls: gamma 0 on the same pairs and the
same start, and grades that are shuffled within each response, which say nothing. The prompt token is part of every copy
and of its mean.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..core.preference_losses import degree_loss, dpo_loss, implicit_reward, pool_hidden, sequence_logprob, spo_loss
from ..errors import UserError
from .spo import remove_content

PROMPTS, KEYS, FILLERS, LENGTH = 4, 4, 8, 8
VOCABULARY = 1 + PROMPTS + PROMPTS * KEYS + FILLERS  # 0 is padding


@dataclass(frozen=True)
class GradeSettings:
    """`pairs` are the labels that every arm gets, `degrees` the copies of each preferred response.

    `gammas` are the arms with true grades, `shuffled` those of the control.
    """

    gammas: Sequence[float] = (0.0, 0.1, 0.5, 2.0)
    shuffled: Sequence[float] = (2.0,)
    pairs: int = 30
    degrees: int = 3
    hidden: int = 48
    pretrain: int = 200
    steps: int = 60
    beta: float = 0.1
    learning_rate: float = 3e-3
    held_out: int = 300


@dataclass(frozen=True)
class Reached:
    """What one arm reached: rank correlation, accuracy one key apart, and the degree loss (nats).

    `degree` is that of the copies it trained on, in the last step, `fresh` that of held-out responses: ln D minus it is
    a lower bound of what the hidden state knows about the degree, where `degree` may be learned by heart.
    """

    spearman: float
    accuracy: float
    degree: float
    fresh: float


def keys_of(prompt: int) -> frozenset[int]:
    """The key tokens of a prompt, 0 to 3."""
    first = 1 + PROMPTS + prompt * KEYS
    return frozenset(range(first, first + KEYS))


def response(prompt: int, quality: int, draw: np.random.Generator) -> list[int]:
    """Eight tokens: `quality` different keys of the prompt, the rest fillers, shuffled."""
    if not 0 <= quality <= KEYS:
        raise UserError(f"quality must lie in 0 to {KEYS}, not {quality}")
    right = draw.permutation(sorted(keys_of(prompt)))[:quality]
    others = range(VOCABULARY - FILLERS, VOCABULARY)
    tokens = np.concatenate([right, draw.choice(others, LENGTH - quality)])
    return [int(t) for t in draw.permutation(tokens)]


class Model(nn.Module):
    """A GRU language model over prompt token and response; a linear head for degrees beside it."""

    def __init__(self, hidden: int, degrees: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.body = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, VOCABULARY)
        self.degree = nn.Linear(hidden, degrees)

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states after each token [B, T, H], and log-probabilities of each response token [B, T-1]."""
        hidden: Tensor = self.body(self.embed(ids_BT))[0]
        log_p = self.out(hidden[:, :-1]).log_softmax(-1)
        return hidden, log_p.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)

    def logprob(self, ids_BT: Tensor) -> Tensor:
        """Log-probability of each response [B]; no padding."""
        logprob = self(ids_BT)[1]
        return sequence_logprob(logprob, torch.ones_like(logprob, dtype=torch.bool))


def _draws(n: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`n` prompts with a response of random quality: ids [n, 9] and quality [n]."""
    prompts, quality = draw.integers(0, PROMPTS, n), draw.integers(0, KEYS + 1, n)
    rows = [[1 + p, *response(p, q, draw)] for p, q in zip(prompts.tolist(), quality.tolist(), strict=True)]
    return torch.tensor(rows), torch.from_numpy(quality)


def _pairs(n: int, draw: np.random.Generator, apart: int | None = None) -> tuple[Tensor, Tensor]:
    """Better and worse responses to the same prompts [n, 9]; any difference of quality, or exactly `apart`."""
    better, worse = [], []
    for prompt in draw.integers(0, PROMPTS, n).tolist():
        low = int(draw.integers(0, KEYS if apart is None else KEYS + 1 - apart))
        high = int(draw.integers(low + 1, KEYS + 1)) if apart is None else low + apart
        better.append([1 + prompt, *response(prompt, high, draw)])
        worse.append([1 + prompt, *response(prompt, low, draw)])
    return torch.tensor(better), torch.tensor(worse)


def _copies(ids_BT: Tensor, degrees: int, draw: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Padded copies [B, D, T], their mask, and which responses had content [B]. The prompt token stays in front."""
    rows = [remove_content(r[1:], keys_of(r[0] - 1), degrees, draw) for r in ids_BT.tolist()]
    ids = torch.zeros(len(rows), degrees, ids_BT.shape[1], dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        for d, tokens in enumerate(row.copies):
            kept = [int(ids_BT[i, 0]), *tokens]
            ids[i, d, : len(kept)], mask[i, d, : len(kept)] = torch.tensor(kept), True
    return ids, mask, torch.tensor([row.has_content for row in rows])


def pretrained(settings: GradeSettings, seed: int) -> Model:
    """The start and reference of all arms: a language model of responses of every quality."""
    if min(settings.pairs, settings.steps, settings.hidden, settings.held_out) < 1 or settings.degrees < 2:
        raise UserError("pairs, steps, hidden and held_out must be at least 1, and degrees at least 2")
    draw = np.random.default_rng([seed, 0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(settings.hidden, settings.degrees)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for _ in range(settings.pretrain):
        optimizer.zero_grad()
        (-model.logprob(_draws(64, draw)[0]).mean() / LENGTH).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def _degree_losses(model: Model, copies: tuple[Tensor, Tensor]) -> Tensor:
    """Degree loss of each response [B] from padded copies and their mask."""
    ids, mask = copies
    hidden = model(ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2])
    return degree_loss(pool_hidden(hidden, mask), model.degree.weight, model.degree.bias)


def _shuffled(copies: tuple[Tensor, Tensor], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The copies of each response in random order: their place no longer says what was removed."""
    n, degrees, _ = copies[0].shape
    order = torch.from_numpy(draw.permuted(np.tile(np.arange(degrees), (n, 1)), axis=1))[..., None]
    return copies[0].gather(1, order.expand_as(copies[0])), copies[1].gather(1, order.expand_as(copies[1]))


def tune(start: Model, settings: GradeSettings, gamma: float, seed: int, shuffled: bool = False) -> Reached:
    """DPO with gamma times the degree loss, all pairs in each step; then the held-out measures."""
    draw = np.random.default_rng([seed, 1])  # the same pairs and held-out responses for every gamma
    better, worse = _pairs(settings.pairs, draw)
    held_out = _draws(settings.held_out, draw), _pairs(settings.held_out, draw, apart=1)
    *copies, content = _copies(better, settings.degrees, draw)
    *fresh, _ = _copies(_pairs(settings.held_out, draw)[0], settings.degrees, draw)
    grades, unseen = ((c[0], c[1]) if not shuffled else _shuffled((c[0], c[1]), draw) for c in (copies, fresh))
    model = copy.deepcopy(start)
    with torch.no_grad():
        ref = start.logprob(better), start.logprob(worse)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        pair = dpo_loss(model.logprob(better), model.logprob(worse), *ref, beta=settings.beta)
        degree = _degree_losses(model, grades)
        spo_loss(pair, degree, content, gamma).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        unseen_loss = float(_degree_losses(model, unseen).mean())
    # the better response of a pair has a key at least, so that every one has content
    return Reached(
        *_measured(model, start, settings.beta, *held_out), degree=float(degree.detach().mean()), fresh=unseen_loss
    )


@torch.no_grad()
def _measured(
    model: Model, start: Model, beta: float, graded: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Rank correlation of implicit reward and quality, and how often it puts the better of a pair first."""
    reward, better, worse = (
        implicit_reward(model.logprob(ids), start.logprob(ids), beta) for ids in (graded[0], *pairs)
    )
    return float(spearmanr(reward, graded[1]).statistic), float((better > worse).double().mean())


def arms(settings: GradeSettings, seeds: Sequence[int]) -> dict[str, list[Reached]]:
    """Every arm from the same start for each seed, by name: "0.1" is gamma, "2.0 shuffled" a control."""
    plan = [(f"{gamma}", gamma, False) for gamma in settings.gammas]
    plan += [(f"{gamma} shuffled", gamma, True) for gamma in settings.shuffled]
    found: dict[str, list[Reached]] = {name: [] for name, _, _ in plan}
    for seed in seeds:
        start = pretrained(settings, seed)
        for name, gamma, shuffled in plan:
            found[name].append(tune(start, settings, gamma, seed, shuffled))
    return found
