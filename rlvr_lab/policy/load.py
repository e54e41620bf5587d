"""Opening a policy: a local transformers directory, a shipped base (`tiny/S`, ..., `tiny/A`), or a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, nearest
from ..tasks.registry import TASKS, entry
from . import tiny

SMALL = 1000
"""Words of a vocabulary that was made for certain tasks; a larger one can write any text."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Policy:
    """A causal language model with its tokenizer. `eos_ids` end a response; `pad_id` fills rows."""

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    source: str

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return torch.device(self.model.device)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Response text with special tokens kept, because verifiers look for them."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def resolve(path: str) -> str:
    """Turn `tiny/S` into the shipped directory; leave directories and hub names as they are."""
    if path.startswith("tiny/"):
        base = path.removeprefix("tiny/")
        if base not in tiny.BASES:
            raise UserError(f"no shipped policy '{path}'; {nearest(path, [f'tiny/{b}' for b in tiny.BASES])}")
        return str(tiny.shipped(base))
    return path


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises UserError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"model.device is '{name}', but torch sees no GPU here; set it to auto or cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device '{name}' is not a device: {error}") from None


def load_policy(path: str, *, device: str = "auto", dtype: str = "float32") -> Policy:
    """Load model and tokenizer in evaluation mode (no dropout, so that importance ratios start at exactly 1).

    Raises UserError for a missing directory, a directory without model or tokenizer, a tokenizer without an end
    token, and a tokenizer with more words than the model has embeddings.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    where = resolve(path)
    _check_directory(where)
    if dtype not in DTYPES:
        raise UserError(f"model.dtype '{dtype}' is unknown; {nearest(dtype, DTYPES)}")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load a causal language model from '{path}': {_first_line(error)}") from error
    model = model.to(pick_device(device)).eval()
    eos_ids = end_tokens(model, tokenizer, path)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"tokenizer of '{path}' has {len(tokenizer)} words, the model only embeds fewer; wrong pair?")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return Policy(model, tokenizer, eos_ids, pad_id, path)


def _check_directory(where: str) -> None:
    directory = Path(where)
    looks_local = where.startswith(("/", ".", "~")) or directory.exists() or where.count("/") != 1
    if not looks_local:
        return  # a hub name such as Qwen/Qwen2.5-0.5B: transformers fetches it
    if not directory.is_dir():
        raise UserError(f"model directory '{where}' does not exist")
    if not (directory / "config.json").exists():
        raise UserError(f"'{where}' holds no config.json: it is not a transformers model directory")
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).exists() for name in tokenizer_files):
        raise UserError(
            f"'{where}' holds no tokenizer (none of {', '.join(tokenizer_files)}); save one beside the model"
        )


def end_tokens(model: Any, tokenizer: Any, path: str) -> tuple[int, ...]:
    """Ids that end a response, those of the model's generation settings before the tokenizer's. Raises UserError where
    neither names one; `path` is what the message calls the model."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared, tokenizer.eos_token_id]
    found = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not found:
        raise UserError(f"neither model nor tokenizer of '{path}' names an end token; set eos_token in the tokenizer")
    return found


def check_words(policy: Policy, task: str) -> None:
    """Refuse a policy of few words for a task that is written in others. Raises UserError that names the tasks of this
    policy, and a policy for this task."""
    known = frozenset(policy.tokenizer.get_vocab())
    own = entry(task).vocabulary()
    if len(known) > SMALL or own <= known:
        return
    others = [name for name, other in TASKS.items() if other.words and other.vocabulary() <= known]
    able = "tiny/A" if own == frozenset(tiny.AGENTS.words) else "tiny/S"
    instead = f"; the policy has the words of {', '.join(others)}" if others else ""
    raise UserError(f"the words of model '{policy.source}' are not those of task '{task}': take {able}{instead}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
