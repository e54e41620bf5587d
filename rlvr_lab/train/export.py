"""A policy as a directory that transformers and vLLM open: whole weights from all ranks, adapters merged in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..policy.load import Policy
from ..policy.lora import is_lora
from ..policy.shard import in_one_piece, whole_weights
from .parallel import World
from .sharded import weights_of


def export_policy(policy: Policy, dtype: torch.dtype | None, world: World) -> Callable[[Path], None]:
    """Gather the weights (collective) and return what writes them as a transformers directory, for the main rank.

    Floating weights are rounded to `dtype` (None: kept). One tensor at a time is gathered, so no GPU holds the whole
    model. Of a LoRA policy the weights have the adapters merged in, without peft's merge and unmerge, which would leave
    rounding in the frozen base; the adapters alone go to `adapter/`.
    """
    model = policy.model
    plain = model.get_base_model() if is_lora(model) else model
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    with world.watch():
        for name, value in whole_weights(model):
            if world.is_main:
                weights[name] = value.to("cpu", dtype)
        for name, value in weights_of(model, trained_only=True).items() if is_lora(model) else ():
            adapters[name] = in_one_piece(value).cpu()
    weights |= {name: value for name, value in _buffers(plain).items() if world.is_main}

    def write(where: Path) -> None:
        plain.save_pretrained(where, state_dict=weights)
        policy.tokenizer.save_pretrained(where)
        if dtype is not None:
            _declare(where / "config.json", dtype)
        if adapters:
            model.save_pretrained(where / "adapter", state_dict=adapters, save_embedding_layers=False)

    return write


def _buffers(model: Any) -> dict[str, Tensor]:
    """What a checkpoint holds besides parameters; few models have any."""
    kept = weights_of(model)
    return {name: kept[name].detach().cpu() for name, _ in model.named_buffers() if name in kept}


def _declare(config: Path, dtype: torch.dtype) -> None:
    """Engines load in the type that the configuration names; transformers wrote the type of training."""
    settings = json.loads(config.read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2) + "\n")
