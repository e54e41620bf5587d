"""Weights and optimizer state of a policy on any number of ranks: written by torch.distributed.checkpoint into
safetensors, and read back on any other number.

torch's own storage keeps its index and everything that is no tensor as pickles. Here its safetensors storage is used
instead, which holds tensors only; the few plain numbers an optimizer may keep come back as a dictionary for JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import UserError
from ..policy.lora import is_lora
from .parallel import World

MODEL, OPTIMIZER = "model.", "optimizer."
STATE, GROUPS = "state.", "param_groups."


def write_state(where: Path, model: Any, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Write weights and optimizer state under `where`, every rank its own shards into its own file (collective).

    Weights are in the precision of training, whatever the export is in; of a LoRA policy only the adapters. Returns
    the optimizer's entries that are no tensors. Raises the OSError of the rank that could not write, on all ranks.
    """
    tensors, plain = _model_state(model), dict[str, Any]()
    if optimizer.state:  # else nothing was updated yet, and torch would make state by a step
        own, plain = _optimizer_state(model, optimizer)
        tensors |= own
    with _as_os_error(world):
        writer = HuggingFaceStorageWriter(str(where), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=world.size == 1)
    return plain


def read_state(
    where: Path, model: Any, optimizer: torch.optim.Optimizer, plain: Mapping[str, Any], world: World
) -> None:
    """Read what `write_state` wrote into `model` and `optimizer`, whatever number of ranks wrote it (collective).

    The optimizer keeps its settings (learning rate, betas). Raises UserError for the state of another model.
    """
    stored = _stored(where)
    tensors = _model_state(model)
    optimizer.zero_grad(set_to_none=True)
    if plain or any(name.startswith(OPTIMIZER) for name in stored):
        _optimizer_state(model, optimizer)  # torch makes the state of all parameters
        _forget_unstored(model, optimizer, {*stored, *(OPTIMIZER + name for name in plain)})
        tensors |= _optimizer_state(model, optimizer)[0]
    else:
        optimizer.state.clear()  # written before the first update
    _refuse_other(where, stored, tensors)
    try:
        with _as_os_error(world):
            load(tensors, storage_reader=HuggingFaceStorageReader(str(where)), no_dist=world.size == 1)
    except OSError as error:
        raise UserError(f"cannot read {where}: {error}") from error
    # not strict: frozen and tied names are left out, and all others were compared above
    set_model_state_dict(model, _under(MODEL, tensors), options=StateDictOptions(strict=False))
    state = _under(OPTIMIZER, tensors)
    if state:
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        groups = get_optimizer_state_dict(model, optimizer, options=flat)
        settings = {name: value for name, value in groups.items() if name.startswith(GROUPS)}
        set_optimizer_state_dict(model, optimizer, settings | state, options=flat)
    parameters = {_clean(name): parameter for name, parameter in model.named_parameters()}
    for name, value in plain.items():  # torch only takes entries that a new optimizer has, too
        owner, _, key = name.removeprefix(STATE).rpartition(".")
        optimizer.state[parameters[owner]][key] = value


def _forget_unstored(model: Any, optimizer: torch.optim.Optimizer, stored: set[str]) -> None:
    """Drop the optimizer's state of parameters that were never updated, such as layers above one that is trained alone:
    their counts start with their first update, in a resumed run as in any other."""
    known = {name.rpartition(".")[0] for name in stored}
    for name, parameter in model.named_parameters():
        if OPTIMIZER + STATE + _clean(name) not in known:
            optimizer.state.pop(parameter, None)


def weights_of(model: Any, trained_only: bool = False) -> dict[str, Any]:
    """Weights by name, each rank's shards, sharing memory with the model."""
    return dict(get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=trained_only)))


def _tied_names(model: Any) -> dict[str, str]:
    """For every further name of a parameter that has several (tied embeddings), its first."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), _clean(name))
        if known != _clean(name):
            tied[_clean(name)] = known
    return tied


def _clean(name: str) -> str:
    """A parameter's name without what activation checkpointing and torch.compile put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _model_state(model: Any) -> dict[str, Any]:
    tied = _tied_names(model)
    weights = weights_of(model, trained_only=is_lora(model))
    return {MODEL + name: value for name, value in weights.items() if name not in tied}


def _optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by name, which share memory with the optimizer, and what it keeps besides tensors."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    entries: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options))
    own = {name: value for name, value in entries.items() if name.startswith(STATE)}
    tensors = {OPTIMIZER + name: value for name, value in own.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in own.items() if not isinstance(value, Tensor)}


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _stored(where: Path) -> dict[str, TensorStorageMetadata]:
    """Names, shapes and types of the tensors under `where`, from the headers of its files."""
    metadata = HuggingFaceStorageReader(str(where)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _refuse_other(where: Path, stored: Mapping[str, TensorStorageMetadata], wanted: Mapping[str, Tensor]) -> None:
    def refuse(difference: str) -> None:
        raise UserError(
            f"{where} was written for another model or optimizer: {difference}. Resume with the settings of the run "
            "that wrote it, or start a new run from its weights (model.path)"
        )

    for name, value in wanted.items():
        if name not in stored:
            refuse(f"it lacks '{name}'")
        shape, dtype = tuple(stored[name].size), stored[name].properties.dtype
        if shape != tuple(value.shape):
            refuse(f"'{name}' has shape {shape} there and {tuple(value.shape)} here")
        if dtype != value.dtype:
            refuse(f"'{name}' is {dtype} there and {value.dtype} here")
    for name in stored:
        if name not in wanted:
            refuse(f"it holds '{name}', which this run has not")


@contextmanager
def _as_os_error(world: World) -> Iterator[None]:
    """The first rank's reason out of torch's collected failures, which are no ordinary exceptions."""
    with world.watch(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as failed:
            rank, (error, _) = min(failed.failures.items())
            if not isinstance(error, Exception):
                raise error from failed
            note = f" (rank {rank})" if world.size > 1 else ""
            number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
            raise OSError(number, text + note) from failed
