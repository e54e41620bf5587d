"""Pre-training of the tiny lab's base policies, from scratch, on traces that are generated while training.

Muon on the two-dimensional hidden weights, AdamW on embeddings, norms and biases; 64 sequences per step, sorted by
length within pools; linear warm-up, a flat stretch, linear decay over the last 40 %; the loss counts response tokens
only. A base may then be broadened: some more steps, with fresh optimizers and a smaller rate, on traces of which fewer
are goal-directed. That moves weight from the good mode to the broad one without unlearning either. Resumable: the
training state is written every `save_every` steps and picked up again by the same command.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..tasks import countdown, instructions, instructions_demos
from ..tasks.agents import demos
from . import tiny
from .muon import Muon


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pre-training run. `steps` optimizer steps of `batch` sequences."""

    base: str = "S"
    shape: str = "tiny"
    """Size of the network, by name in `tiny.SHAPES`."""
    steps: int = 15_000
    batch: int = 64
    muon_lr: float = 3e-3
    adamw_lr: float = 3e-3
    warmup: int = 50
    decay_share: float = 0.4
    clip: float = 1.0
    goal_directed: float = 0.4
    give_up: float = 0.3
    attention: float = 0.35
    """Of base I: the share of rules that a demonstration minds."""
    broaden_steps: int = 0
    """Steps of the second phase, its share of goal-directed attempts, and its first learning-rate factor."""
    broaden_goal_directed: float = 0.25
    broaden_factor: float = 0.2
    seed: int = 0
    shard: int = 64 * 400
    save_every: int = 500

    @property
    def prompt_tokens(self) -> int:
        """Length of every prompt of the base's task; of base A's, which differ, the shortest."""
        return {"I": instructions.PROMPT_TOKENS, "A": demos.PROMPT_TOKENS}.get(self.base, countdown.PROMPT_TOKENS)

    def learned(self, sequence: list[int]) -> list[bool]:
        """Which tokens count in the loss: the response, without what an environment said."""
        if self.base == "A":
            return demos.learned(sequence)
        return [False] * self.prompt_tokens + [True] * (len(sequence) - self.prompt_tokens)

    @property
    def traces(self) -> countdown.Traces:
        """How traces of Countdown are written. Raises UserError for a base of another task."""
        style = tiny.BASES[self.base]
        if not isinstance(style, countdown.Traces):
            raise UserError(f"base {self.base} does not learn from Countdown traces")
        return replace(style, goal_directed=self.goal_directed, give_up=self.give_up)

    @property
    def total_steps(self) -> int:
        """Steps of both phases."""
        return self.steps + self.broaden_steps

    def traces_at(self, step: int) -> countdown.Traces:
        """How the traces of a step are written."""
        return self.traces if step < self.steps else replace(self.traces, goal_directed=self.broaden_goal_directed)

    def sequences(self, step: int, seed: list[int], rng: np.random.Generator) -> list[list[int]]:
        """A shard of full token sequences for the steps from `step` on; `rng` was made from `seed`."""
        if self.base == "I":
            style = instructions_demos.Demonstrations(self.attention)
            return list(instructions_demos.demonstrations(self.shard, style, seed))
        if self.base == "A":
            return list(demos.demonstrations(self.shard, demos.HASTY, seed))
        return list(countdown.traces(self.shard, self.traces_at(step), rng))


# how the shipped checkpoints were made
SHIPPED = {
    "S": PretrainConfig(base="S", steps=15_000, broaden_steps=1_000),
    "R": PretrainConfig(base="R", steps=12_000),
    "I": PretrainConfig(base="I", steps=1_200),
    "A": PretrainConfig(base="A", steps=1_200),
}

Progress = Callable[[int, float, float], None]


def pretrain(
    config: PretrainConfig,
    out: Path,
    progress: Progress = lambda step, loss, rate: None,
    device: str = "cpu",
) -> Path:
    """Train a base policy on a device and write it to `out` as a transformers directory; returns `out`.

    `progress(step, loss, learning-rate factor)` is called after every step. Loss is in nats per response token.
    Raises UserError where `out` holds a run with other settings, and FloatingPointError on a loss that is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    lexicon = tiny.lexicon(config.base)
    model = tiny.build_model(config.seed, tiny.SHAPES[config.shape], lexicon)
    model.to(torch.device(device))
    optimizers = _optimizers(model, config)
    history: list[float] = []
    first = _restore(out, config, model, optimizers, history)
    model.train()
    for step, sequences in enumerate(_batches(config, first), start=first):
        factor = _schedule(step, config)
        if step == config.steps:
            optimizers = _optimizers(model, config)
        loss = _step(model, optimizers, sequences, factor, config)
        if not np.isfinite(loss):
            raise FloatingPointError(f"pre-training loss is {loss} at step {step}; lower muon_lr or adamw_lr")
        history.append(loss)
        progress(step + 1, loss, factor)
        if (step + 1) % config.save_every == 0 or step + 1 == config.total_steps:
            _save_state(out, config, model, optimizers, history)
    model.eval()
    tiny.export(model.cpu(), out, lexicon)
    record = {"config": asdict(config), "loss_last_200": float(np.mean(history[-200:])), "written": time.strftime("%F")}
    (out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "state.pt").unlink(missing_ok=True)
    return out


def _optimizers(model: torch.nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        (hidden if is_hidden else rest).append(parameter)
    muon = Muon(hidden, lr=config.muon_lr)
    return [muon, torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)]


def _schedule(step: int, config: PretrainConfig) -> float:
    if step >= config.steps:
        return config.broaden_factor * (config.total_steps - step) / config.broaden_steps
    decay_from = int(config.steps * (1 - config.decay_share))
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 1.0 if step < decay_from else (config.steps - step) / (config.steps - decay_from)


def _batches(config: PretrainConfig, first: int) -> Iterator[list[list[int]]]:
    """Batches from step `first` on. Every shard has its own seed, so that resuming repeats nothing."""
    per_shard = config.shard // config.batch
    # a phase starts with a shard of its own, whether or not the one before it was used up
    phases = ((0, config.steps), (config.steps, config.total_steps))
    for phase, (begin, end) in enumerate(phases):
        for shard, start in enumerate(range(begin, end, per_shard)):
            stop = min(start + per_shard, end)
            if stop <= first:
                continue
            seed = [config.seed, shard] if phase == 0 else [config.seed, shard, phase]
            rng = np.random.default_rng(seed)
            sequences = config.sequences(start, seed, rng)
            order = _length_pools([len(s) for s in sequences], config.batch, rng)
            for rows in order[max(first - start, 0) : stop - start]:
                yield [sequences[r] for r in rows]


def _length_pools(lengths: list[int], batch: int, rng: np.random.Generator, pool: int = 8) -> list[np.ndarray]:
    shuffled = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(lengths), pool * batch):
        rows = shuffled[start : start + pool * batch]
        rows = rows[np.argsort([lengths[r] for r in rows], kind="stable")]
        batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    sequences: list[list[int]],
    factor: float,
    config: PretrainConfig,
) -> float:
    device = model.get_parameter("lm_head.weight").device
    tokens, mask = (part.to(device) for part in _pad(sequences, config.learned))
    logits = model(input_ids=tokens[:, :-1]).logits[:, config.prompt_tokens - 1 :]
    target, mask = tokens[:, config.prompt_tokens :], mask[:, config.prompt_tokens :]
    loss = torch.nn.functional.cross_entropy(logits[mask], target[mask])
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer, base in zip(optimizers, (config.muon_lr, config.adamw_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _pad(sequences: list[list[int]], learned: Callable[[list[int]], list[bool]]) -> tuple[Tensor, Tensor]:
    """Tokens, and which of them count in the loss."""
    width = max(map(len, sequences))
    tokens = torch.tensor([s + [countdown.PAD] * (width - len(s)) for s in sequences])
    return tokens, torch.tensor([learned(s) + [False] * (width - len(s)) for s in sequences])


def _save_state(
    out: Path,
    config: PretrainConfig,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    history: list[float],
) -> None:
    state = {
        "config": asdict(config),
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "history": torch.tensor(history),
    }
    temporary = out / "state.pt.partial"
    torch.save(state, temporary)
    os.replace(temporary, out / "state.pt")


def _restore(
    out: Path,
    config: PretrainConfig,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    history: list[float],
) -> int:
    if (out / "pretrain.json").exists():
        raise UserError(f"{out} already holds a finished base policy; choose another --out")
    if not (out / "state.pt").exists():
        return 0
    state = torch.load(out / "state.pt", weights_only=True)
    if state["config"] != asdict(config):
        raise UserError(f"{out} holds a pre-training run with other settings; choose another --out or remove it")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    history += state["history"].tolist()
    return len(history)
