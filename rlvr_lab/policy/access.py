"""Access to the inside of a transformers decoder: its streams, what each part writes, its attention; and patching.

Layers are counted from 1, as papers do; 0 is the embedding stream. With H^l the residual stream after layer l, and A^l,
F^l what the attention and the feed-forward part of layer l add to it,

    H^l = H^0 + sum_{i <= l} A^i + sum_{j <= l} F^j        [B, S, d].

Everything is read by PyTorch's own module hooks, which are there while a `with` block lasts: a model nobody looks into
runs as it always does. Gradients go through what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.lens import Kind, Lens
from ..errors import UserError

__all__ = ["SUPPORTED", "Kind", "Lens", "Parts", "Seen", "What", "attention_matrices", "lens_hidden", "lens_logits"]
__all__ += ["parts", "patched", "record", "unembed"]

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""`model.config.model_type` of the decoders whose layout is known: pre-norm blocks with `self_attn` and `mlp`."""

What = Literal["residual", "attention_write", "ffn_write", "attention_input", "ffn_input"]
"""`residual`: H^l, layers 0 to L, before any norm. `*_write`: A^l and F^l. `*_input`: the normed stream that a part
reads. All [B, S, d]."""


@dataclass(frozen=True)
class Parts:
    """Where the parts of a decoder lie."""

    model: Any
    layers: Sequence[nn.Module]
    embedding: nn.Module
    final_norm: nn.Module
    head: nn.Linear

    @property
    def depth(self) -> int:
        """Layers L."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return int(self.head.weight.shape[1])

    def layer(self, number: int) -> nn.Module:
        """Block `number`, from 1. Raises UserError where there is none."""
        self.check(number, least=1)
        return self.layers[number - 1]

    def attention(self, number: int) -> Any:
        """The attention of a block, output projection included."""
        return self.layer(number).self_attn

    def ffn(self, number: int) -> Any:
        """The feed-forward part of a block."""
        return self.layer(number).mlp

    def check(self, number: int, least: int = 0) -> None:
        """Raises UserError for a layer that the model does not have."""
        if not least <= number <= self.depth:
            raise UserError(f"layer {number} is out of range: this model has layers {least} to {self.depth}")


def parts(model: Any) -> Parts:
    """The parts of a causal LM, bare or inside an adapter of peft.

    Raises UserError for an architecture whose layout is not known.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)
    if kind not in SUPPORTED:
        raise UserError(f"cannot look into a model of type '{kind}'; supported are {', '.join(SUPPORTED)}")
    decoder = inner.get_decoder()
    return Parts(inner, decoder.layers, decoder.embed_tokens, decoder.norm, inner.get_output_embeddings())


@dataclass(frozen=True)
class Seen:
    """What the latest forward pass said, by layer; of a part that was not asked for, nothing."""

    residual: dict[int, Tensor] = field(default_factory=dict)
    attention_write: dict[int, Tensor] = field(default_factory=dict)
    ffn_write: dict[int, Tensor] = field(default_factory=dict)
    attention_input: dict[int, Tensor] = field(default_factory=dict)
    ffn_input: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def record(model: Any, what: Sequence[What] = ("residual",), layers: Sequence[int] | None = None) -> Iterator[Seen]:
    """While the block lasts, every forward pass of `model` leaves what was asked for in the `Seen` it gives.

    `layers`: which, all without it; the embedding stream is layer 0 of `residual`. The tensors carry gradient and are
    not copied. Raises UserError for a layer out of range and a name that is none of `What`.
    """
    found, seen = parts(model), Seen()
    for name in what:
        if name not in get_args(What):
            raise UserError(f"cannot record '{name}'; there are {', '.join(get_args(What))}")
    for number in layers or ():
        found.check(number)
    wanted = range(found.depth + 1) if layers is None else layers
    with ExitStack() as hooks:
        for name in what:
            into = getattr(seen, name)
            for number in wanted:
                if number or name == "residual":
                    hooks.callback(_listen(found, name, number, into).remove)
        yield seen


def _listen(found: Parts, name: str, number: int, into: dict[int, Tensor]) -> Any:
    """A hook at the module whose result is `name` of layer `number`."""
    if name == "residual" and number == 0:
        # what the first block is given, not what the embedding returns: adapters and packed inputs may lie between
        return found.layers[0].register_forward_pre_hook(lambda _, args, kwargs: into.update({0: _first(args, kwargs)}),
                                                         with_kwargs=True)  # fmt: skip
    block: Any = found.layer(number)
    module = {
        "residual": lambda: block,
        "attention_write": lambda: block.self_attn,
        "ffn_write": lambda: block.mlp,
        "attention_input": lambda: block.input_layernorm,
        "ffn_input": lambda: block.post_attention_layernorm,
    }[name]()
    return module.register_forward_hook(lambda _, args, out: into.update({number: _tensor(out)}))


def _tensor(output: Any) -> Tensor:
    """The stream of what a module returned: attention returns its weights beside it."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def unembed(model: Any, hidden: Tensor, kind: Kind) -> Tensor:
    """Logits [..., V] of a hidden state [..., d]: `raw` times the unembedding, `normed` through the final norm first.

    What the softmax of a raw stream says depends on the stream's length, which grows with depth in most models.
    """
    found = parts(model)
    logits: Tensor = found.head(found.final_norm(hidden) if kind == "normed" else hidden)
    return logits


class _Enough(Exception):
    """Thrown by a hook to end a forward pass whose rest nobody wants."""


def lens_hidden(model: Any, lens: Lens, **inputs: Any) -> Tensor:
    """What the lens's policy multiplies with the unembedding [B, S, d]; only layers up to `lens.layer` run.

    Of the last layer it is the stream through the final norm, whatever `lens.kind` says. Raises UserError for a layer
    out of range.
    """
    found = parts(model)
    found.check(lens.layer)
    decoder = found.model.get_decoder()
    if lens.layer == found.depth:
        hidden: Tensor = decoder(**inputs).last_hidden_state
        return hidden

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # what enters block l + 1 is H^l
        raise _Enough(_first(args, kwargs))

    hook = found.layers[lens.layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(**inputs)
    except _Enough as end:
        stream: Tensor = end.args[0]
        return found.final_norm(stream) if lens.kind == "normed" else stream
    finally:
        hook.remove()
    raise RuntimeError(f"the forward pass of {type(decoder).__name__} never reached block {lens.layer + 1}")


def lens_logits(model: Any, lens: Lens, **inputs: Any) -> Tensor:
    """Logits [B, S, V] of a layer's policy, with gradient for the layers up to it, embedding and unembedding."""
    logits: Tensor = parts(model).head(lens_hidden(model, lens, **inputs))
    return logits


@contextmanager
def patched(model: Any, layer: int, position: int | Tensor, value: Tensor) -> Iterator[None]:
    """While the block lasts, the state that enters block `layer` (from 1) at `position` is `value` [B, d].

    `position` is one for all rows or [B]; negative ones count from the end. Later layers read the patched state, and
    gradient reaches `value`. Raises UserError for a layer out of range, a position outside the sequence, or a value of
    another shape.
    """
    block = parts(model).layer(layer)

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = _first(args, kwargs)
        changed = _put(hidden, position, value)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    hook = block.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _put(hidden: Tensor, position: int | Tensor, value: Tensor) -> Tensor:
    rows, length, width = hidden.shape
    if value.shape != (rows, width):
        raise UserError(f"the value to patch in is {tuple(value.shape)}, the stream wants {(rows, width)}")
    at = torch.as_tensor(position, device=hidden.device).expand(rows)
    if not bool(((-length <= at) & (at < length)).all()):
        raise UserError(f"position {position} is outside a sequence of {length} tokens")
    changed = hidden.clone()
    changed[torch.arange(rows, device=hidden.device), at] = value.to(hidden.dtype)
    return changed


def attention_matrices(model: Any, **inputs: Any) -> list[Tensor]:
    """Attention [B, heads, S, S] of every layer, rows over keys, with gradient.

    Fused attention never forms them, so the pass runs with the library's eager attention, and the model has its own
    again afterwards.
    """
    with _eager(parts(model).model) as eager:
        output = eager(**inputs, output_attentions=True, use_cache=False, logits_to_keep=1)
    return list(output.attentions)


@contextmanager
def _eager(model: Any) -> Iterator[Callable[..., Any]]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
