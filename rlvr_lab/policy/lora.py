"""Low-rank adapters through peft (`pip install 'rlvr-lab[lora]'`): W + (alpha / rank) B A with B = 0 at the start.

Only adapters are trained. With them switched off the model is the starting policy, so that a reference costs no copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UserError, nearest


def is_lora(model: Any) -> bool:
    """Whether peft wraps the model."""
    return hasattr(model, "peft_config")


def add_adapters(model: Any, rank: int, alpha: float, targets: Sequence[str], seed: int) -> Any:
    """The model with adapters on its linear layers `targets`, by full names or their last parts (none: all but the
    head); its own weights are frozen.

    `seed` decides A, so that all processes start alike. Raises UserError where peft is missing, or a target matches no
    linear layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("model.lora needs peft; install it with: pip install 'rlvr-lab[lora]'") from error
    import torch

    names = linear_names(model)
    whole = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target not in names and target not in whole:
            raise UserError(f"model.lora.targets: no linear layer is named '{target}'; {nearest(target, names)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets) or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear layers but the head."""
    head = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return sorted({name.rpartition(".")[2] for name in found})


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The starting policy, as long as the block lasts."""
    with model.disable_adapter():
        yield
