"""FSDP2: a model whose weights, gradients and optimizer state are divided over processes (torch's `fully_shard`).

Every layer of the decoder is a unit: its weights are gathered for its own forward and backward pass and given back. The
weights that the optimizer sees stay in their own type, float32 as a rule; passes may run in bfloat16 on copies of them,
and gradients are summed in float32. They are summed and not averaged, as a loss is a sum over tokens whose weights
span all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .forward import FORWARD, Tensors, token_tensors


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers. Raises UserError for a model without a list of them."""
    for _, module in model.get_decoder().named_children():
        if isinstance(module, nn.ModuleList):
            return list(module)
    raise UserError(f"{type(model).__name__} has no list of decoder layers; set parallel.shard and "
                    "parallel.activation_checkpointing to their defaults")  # fmt: skip


def checkpoint_activations(model: Any) -> None:
    """Let every layer keep its inputs only, and compute the rest again in the backward pass.

    transformers' own switch acts in training mode alone, which would bring dropout with it. Without gradients (while
    sampling and scoring) a layer runs as before.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *arguments: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **settings)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **settings)


def shard(model: Any, device: torch.device, processes: int, precision: torch.dtype | None, offload: bool) -> Any:
    """Divide the model's weights over all processes of the default group, in place; returns it.

    `precision`: type of the passes, None for that of the weights. `offload` keeps the shards in main memory.
    `policy.forward.token_view` is the way in; the model's own forward pass works too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        # the root too: else scoring would leave it whole, and the next pass would not see the optimizer's step
        "reshard_after_forward": True,
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    setattr(model, FORWARD, MethodType(_token_tensors, model))
    register_fsdp_forward_method(model, FORWARD)
    return model


def _token_tensors(self: Any, *arguments: Any) -> Tensors:
    # not self(...): FSDP's hooks run around this method already
    rollout, want_entropy, want_moments, live, packed, read, raw, lens = arguments
    options = want_entropy, want_moments, live, packed, read, raw, lens
    logprob, *rest = token_tensors(self, rollout, *options, call=self.forward)
    return logprob.clone(), *rest  # type: ignore[return-value]  # a view would lose the hook that gathers weights again


def is_sharded(model: Any) -> bool:
    """Whether `shard` was applied."""
    return hasattr(model, FORWARD)


def in_one_piece(value: Any, device: torch.device | None = None) -> Tensor:
    """A weight or gradient in one piece (collective where it is divided)."""
    from torch.distributed.tensor import DTensor

    value = value.detach()
    if isinstance(value, DTensor):
        value = (value if device is None else value.to(device)).full_tensor()  # type: ignore[attr-defined]
    found: Tensor = value
    return found


def whole_weights(model: Any, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """All weights in one piece under their names in a checkpoint, tied ones once, adapters merged in (collective)."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for name, value in base.named_parameters():
        owner, adapted, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        found = in_one_piece(value, device)
        if adapted and leaf == "weight":
            layer = base.get_submodule(owner)
            for adapter in layer.active_adapters:
                delta = in_one_piece(layer.get_delta_weight(adapter), device)
                found = (found.float() + delta.float()).to(found.dtype)
        yield name.replace(".base_layer.", "."), found
