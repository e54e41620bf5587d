"""Sizes of a policy, read from its `config.json` alone: parameter counts and what an activation of it takes.

Names: V vocabulary, H hidden units, F units of the feed-forward part, L layers, n_q query heads, n_k key and value
heads, D width of a head. Counted families are those whose layer is

    h += o(attention(q, k, v of norm(h)));    h += down(silu(gate) * up of norm(h))

without experts: Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..policy.load import resolve

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class NoPlan(UserError):
    """The model cannot be planned for: its family is not counted, or its config is not to be had."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `source` says where they were read."""

    name: str
    source: str
    family: str
    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalised (Qwen3)."""
        return self.family == "qwen3"

    @property
    def query_width(self) -> int:
        """n_q D."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """n_k D."""
        return self.kv_heads * self.head_width

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Linear maps of a layer, (inputs, outputs)."""
        h, q, k, f = self.hidden, self.query_width, self.kv_width, self.feed_forward
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: its matrices, biases and norms."""
        bias = 0
        if self.attention_bias:
            bias += self.query_width + 2 * self.kv_width
        if self.output_bias:
            bias += self.hidden
        if self.mlp_bias:
            bias += 2 * self.feed_forward + self.hidden
        norms = 2 * self.hidden + (2 * self.head_width if self.head_norms else 0)
        return sum(a * b for a, b in self.matrices.values()) + bias + norms

    @property
    def embedding_parameters(self) -> int:
        """V H; once more where the output head has a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters: embeddings, layers, final norm."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: without the embedding table, which is looked up."""
        layers = self.layers * sum(a * b for a, b in self.matrices.values())
        return layers + self.vocabulary * self.hidden

    def lora_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Parameters of rank-r adapters, r (inputs + outputs) a matrix; on all linear maps of the layers by default."""
        chosen = self.matrices if targets is None else {n: s for n, s in self.matrices.items() if n in targets}
        return self.layers * sum(rank * (a + b) for a, b in chosen.values())

    def kv_bytes(self, element: int) -> int:
        """Cache of one token: keys and values of every layer."""
        return 2 * self.layers * self.kv_width * element


def shape_from(config: Mapping[str, Any], name: str, source: str) -> Shape:
    """Sizes from the keys of a `config.json`. Raises NoPlan for a family that is not counted."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise NoPlan(f"no plan for model type '{family}' of '{name}': the planner counts {', '.join(FAMILIES)}")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    bias = bool(config.get("attention_bias", False))
    return Shape(
        name=name,
        source=source,
        family=family,
        vocabulary=int(config["vocab_size"]),
        hidden=hidden,
        feed_forward=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


@lru_cache
def published() -> dict[str, dict[str, Any]]:
    """Configs of published models by hub name, from the table in the package."""
    text = (resources.files("rlvr_lab.plan") / "shapes.json").read_text(encoding="utf-8")
    return {name: model for model in json.loads(text)["models"] for name in model["names"]}


def shape_of(path: str) -> Shape:
    """Sizes of `model.path`: a local directory, a shipped base, a model of the table, else a config from the hub.

    No weights are read. Raises NoPlan where there is no config, or one of another family; UserError for a shipped base
    that does not exist.
    """
    where = resolve(path)
    if (Path(where) / "config.json").is_file():
        return shape_from(_local(where), path, "its config.json")
    if where in published():
        return shape_from(published()[where], path, "the table of published sizes in the package")
    if where.count("/") != 1 or where.startswith(("/", ".", "~")):
        raise NoPlan(f"no plan for model.path '{path}': there is no config.json")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(where).to_dict()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = nearest(path, published())
        raise NoPlan(f"no plan for model.path '{path}': no config found ({reason[:120]}); {hint}") from None
    return shape_from(config, path, "its config.json on the hub")


def _local(where: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(where, local_files_only=True).to_dict())
    except (OSError, ValueError, KeyError) as error:
        raise NoPlan(f"no plan for model.path '{where}': its config.json cannot be read: {error}") from None
