"""Training a small decoder from scratch on a world of two-hop facts (explicit CoT, arXiv 2502.04667).

Facts and chains are shuffled together; the loss is the mean cross-entropy, in nats, over a batch's response tokens.
`paper`: AdamW at 1e-4, weight decay 0.1 without biases and norms, 2,000 steps of warm-up, then constant; 8 layers of
width 768 (a Qwen2 here, a GPT-2 there). `tiny`: Muon on the hidden matrices and a linear decay, which learns the facts
of a small world in hundreds of steps rather than thousands [inferred]. Card: papers/explicit_cot.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.rollout import pad
from ..errors import UserError
from ..evaluate.explicit_cot import five_groups
from ..policy import tiny
from ..policy.load import Policy
from ..policy.muon import Muon
from ..tasks.explicit_cot import Chain, Encoder, Fact, Form, World
from .seeds import torch_generator

POSITIONS = 10


@dataclass(frozen=True)
class TwoHopTraining:
    """Settings of one training. Raises UserError for values that make no sense."""

    steps: int = 150
    batch: int = 128
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 4e-3
    """Of AdamW; Muon's is three times as high, as in the tiny lab."""
    weight_decay: float = 0.0
    warmup: int = 20
    decay_share: float = 0.4
    shape: tiny.Shape = field(default_factory=lambda: tiny.Shape(64, 3, 4, 128))
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "warmup"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.optimizer not in ("muon", "adamw"):
            raise UserError(f"optimizer '{self.optimizer}' does not exist; choose one of: adamw, muon")


PRESETS = {
    "paper": TwoHopTraining(20_000, 512, "adamw", 1e-4, 0.1, 2_000, 0.0, tiny.Shape(768, 8, 12, 3072)),
    "tiny": TwoHopTraining(),
}


def new_policy(world: World, settings: TwoHopTraining) -> Policy:
    """An untrained decoder over the world's words; `</a>` ends a response."""
    encoder = Encoder(world.config)
    lexicon = tiny.Lexicon(encoder.words, POSITIONS)
    model = tiny.build_model(settings.seed, settings.shape, lexicon)
    return Policy(model, tiny.build_tokenizer(lexicon), (encoder.end,), encoder.pad, "explicit_cot")


def train(
    world: World,
    form: Form,
    settings: TwoHopTraining = PRESETS["tiny"],
    *,
    measure_at: Collection[int] = (),
    most: int = 3000,
    report: Callable[[int], None] = lambda step: None,
) -> tuple[Policy, list[dict[str, float]]]:
    """A trained policy, and at every step of `measure_at` and the last: loss and the accuracies of the five groups,
    exact and (`*.answer`) of the last word, over at most `most` items each. Raises FloatingPointError for a loss that
    is not finite.
    """
    policy, encoder = new_policy(world, settings), Encoder(world.config)
    ids, labels = _rows([*world.facts, *world.train], encoder, form)
    optimizers = _optimizers(policy.model, settings)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    history: list[dict[str, float]] = []
    policy.model.train()
    for step, rows in zip(range(1, settings.steps + 1), _deal(len(ids), settings), strict=False):
        factor = _factor(step, settings)
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * factor
        loss = _step(policy.model, optimizers, ids[rows], labels[rows])
        report(step)
        if step in measure_at or step == settings.steps:
            policy.model.eval()
            found = five_groups(policy.model, world, encoder, form, most)
            row = {"step": float(step), "loss": loss} | {name: value.exact for name, value in found.items()}
            history.append(row | {f"{name}.answer": value.answer for name, value in found.items()})
            policy.model.train()
    policy.model.eval()
    return policy, history


def _rows(items: list[Fact | Chain], encoder: Encoder, form: Form) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that are -100 on the prompt and the padding."""
    pairs = [encoder.example(item, form) for item in items]
    ids = pad([p + r for p, r in pairs], encoder.pad, torch.long)
    return ids, pad([[-100] * len(p) + r for p, r in pairs], -100, torch.long)


def _deal(rows: int, settings: TwoHopTraining) -> Iterator[Tensor]:
    """Batches without end: every pass over the rows in a new order, its last batch smaller."""
    number = 0
    while True:
        generator = torch_generator(settings.seed, "two-hop facts", number, torch.device("cpu"))
        order = torch.randperm(rows, generator=generator)
        yield from (order[i : i + settings.batch] for i in range(0, rows, settings.batch))
        number += 1


def _factor(step: int, settings: TwoHopTraining) -> float:
    if step < settings.warmup:
        return step / settings.warmup
    decay = settings.decay_share * settings.steps
    return min(1.0, (settings.steps - step + 1) / decay) if decay else 1.0


def _optimizers(model: Any, settings: TwoHopTraining) -> list[torch.optim.Optimizer]:
    hidden, rest, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:  # biases and norms: no weight decay
            plain.append(parameter)
        elif settings.optimizer == "muon" and "embed_tokens" not in name and "lm_head" not in name:
            hidden.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": rest, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)
    muon: list[torch.optim.Optimizer] = [Muon(hidden, lr=3 * settings.lr)] if hidden else []
    return [*muon, adamw]


def _step(model: Any, optimizers: list[torch.optim.Optimizer], ids: Tensor, labels: Tensor) -> float:
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss of the training on two-hop facts is {float(loss)}; lower lr")
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
