"""Which layer of a model speaks: a policy read off the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["raw", "normed"]
"""`raw`: softmax of the stream itself times the unembedding. `normed`: through the model's final norm first."""


@dataclass(frozen=True)
class Lens:
    """The policy of layer `layer`, counted from 1; 0 is the embedding. The last layer always means the model's real
    policy, whatever `kind` says. The depth is checked where a model is at hand.

    Raises ValueError for a negative layer or an unknown kind.
    """

    layer: int
    kind: Kind = "raw"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer is {self.layer}: layers are counted from 1, and 0 is the embedding")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, of {', '.join(get_args(Kind))}")
