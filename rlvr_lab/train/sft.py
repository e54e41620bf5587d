"""Supervised fine-tuning on responses: plain, Entropy-SFT (Light-IF, arXiv 2508.03178), or a random token mask.

The loss is the mean negative log-likelihood, in nats, over the response tokens that the objective keeps: all of them;
the share `ratio` with the largest nll - weight x entropy (`methods.light_if.entropy_sft_loss`); or the same share drawn
at random, which is the control. Tokens are chosen within one pass of `rows` responses, as the release chooses within
one device's batch, so that `rows` changes the choice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.entropy import token_statistics
from ..core.rollout import pad
from ..errors import UserError, nearest
from ..methods.light_if import entropy_sft_loss
from ..policy.load import Policy
from .seeds import torch_generator
from .update import schedule

Objective = Literal["plain", "entropy", "random"]
Example = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of the response that is learned."""
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class SFTSettings:
    """Settings of a fine-tuning: `batch` responses per optimizer step, in passes of `rows`. AdamW, cosine to 0.

    Raises UserError that names the option for values that make no sense.
    """

    objective: Objective = "entropy"
    weight: float = 0.8
    ratio: float = 0.8
    epochs: int = 3
    batch: int = 32
    rows: int = 32
    lr: float = 1e-5
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(Objective)
        if self.objective not in known:
            raise UserError(f"--objective '{self.objective}' does not exist; {nearest(self.objective, known)}")
        if not 0 < self.ratio <= 1:
            raise UserError(f"--ratio must lie in (0, 1], not {self.ratio}")
        for name in ("epochs", "batch", "rows", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")


def passes(examples: Sequence[Example], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and the mask of response tokens, both [b, P + T], for `rows` examples at a time."""
    for start in range(0, len(examples), rows):
        part = examples[start : start + rows]
        ids = pad([[*p, *r] for p, r in part], 0, torch.long)
        mask = pad([[0] * len(p) + [1] * len(r) for p, r in part], 0, torch.bool)
        yield ids, mask


def supervised(policy: Policy, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and token entropy [N] of the N marked tokens, with gradient."""
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    logits = policy.model(input_ids=ids[:, :-1]).logits
    marked = mask[:, 1:]
    logprob, entropy = token_statistics(logits[marked][None], ids[:, 1:][marked][None])
    return -logprob[0], entropy[0]


@torch.no_grad()
def measure(policy: Policy, examples: Sequence[Example], rows: int = 64) -> dict[str, float]:
    """Mean nll and mean token entropy over the response tokens; nan where there are none."""
    found = [supervised(policy, *part) for part in passes(examples, rows)]
    if not found:
        return {"nll": math.nan, "token_entropy": math.nan}
    nll, entropy = (torch.cat(values) for values in zip(*found, strict=True))
    return {"nll": float(nll.mean()), "token_entropy": float(entropy.mean())}


def objective_loss(
    nll_N: Tensor, entropy_N: Tensor, settings: SFTSettings, total: int, generator: torch.Generator
) -> Tensor:
    """One pass's share of the loss of a batch with `total` supervised tokens."""
    if settings.objective == "plain":
        return nll_N.sum() / total
    if settings.objective == "entropy":
        # a batch of so few tokens that none would be counted still keeps one
        total = max(total, math.ceil(1 / settings.ratio))
        return entropy_sft_loss(nll_N, entropy_N, settings.weight, settings.ratio, total)
    n = max(int(settings.ratio * len(nll_N)), 1)
    kept = torch.randperm(len(nll_N), generator=generator)[:n].to(nll_N.device)
    return nll_N[kept].sum() / max(int(total * settings.ratio), 1)


def fine_tune(
    policy: Policy,
    examples: Sequence[Example],
    settings: SFTSettings,
    *,
    held_out: Sequence[Example] = (),
    state: Path | None = None,
    report: Callable[[int], None] = lambda steps: None,
) -> list[dict[str, float]]:
    """Train `policy` in place; per epoch its mean loss, and nll and token entropy on `held_out`.

    With `state` every epoch is saved there, and a call with the same settings goes on after the last one. `report(1)`
    is called after every step. Raises UserError without examples and for a state of other settings,
    FloatingPointError for a loss that is not finite.
    """
    if not examples:
        raise UserError("there is nothing to learn from: no response was kept")
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    history = _restore(state, policy, optimizer, settings, len(examples))
    per_epoch = math.ceil(len(examples) / settings.batch)
    total = settings.epochs * per_epoch
    report(len(history) * per_epoch)
    for epoch in range(len(history), settings.epochs):
        generator = torch_generator(settings.seed, "fine-tuning", epoch, torch.device("cpu"))
        order = torch.randperm(len(examples), generator=generator).tolist()
        losses = []
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            factor = schedule(step, total, max(1, round(WARMUP_SHARE * total)), "cosine")
            batch = [examples[j] for j in order[i * settings.batch : (i + 1) * settings.batch]]
            losses.append(_step(policy, optimizer, batch, settings, factor, generator))
            report(1)
        history.append({"epoch": epoch + 1.0, "loss": sum(losses) / len(losses)} | measure(policy, held_out))
        _save(state, policy, optimizer, settings, len(examples), history)
    policy.model.eval()
    return history


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    settings: SFTSettings,
    factor: float,
    generator: torch.Generator,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor
    total, value = sum(len(response) for _, response in batch), 0.0
    for ids, mask in passes(batch, settings.rows):
        loss = objective_loss(*supervised(policy, ids, mask), settings, total, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        value += float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of the fine-tuning is {value}; lower --lr")
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), settings.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def _save(
    state: Path | None,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    settings: SFTSettings,
    examples: int,
    history: list[dict[str, float]],
) -> None:
    if state is None:
        return
    partial = state.with_name(state.name + ".partial")
    torch.save(
        {
            "settings": asdict(settings) | {"examples": examples},
            "model": policy.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
        },
        partial,
    )
    os.replace(partial, state)


def _restore(
    state: Path | None, policy: Policy, optimizer: torch.optim.Optimizer, settings: SFTSettings, examples: int
) -> list[dict[str, float]]:
    if state is None or not state.exists():
        return []
    saved: dict[str, Any] = torch.load(state, weights_only=True)
    if saved["settings"] != asdict(settings) | {"examples": examples}:
        raise UserError(f"{state} holds a fine-tuning with other settings; choose another --out or remove it")
    policy.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    history: list[dict[str, float]] = saved["history"]
    return history
