"""Contexts that are not read twice: the same draws and log-probs as with reading them again."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlvr_lab.core.paths import Path, to_rollout
from rlvr_lab.core.rollout import Rollout
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.memory import Memory
from rlvr_lab.tasks import countdown

PROMPTS = [list(p.prompt_ids) for p in countdown.problems(8, 0)]


def grow(engine: TransformersEngine, paths: list[Path], room: int, generator: torch.Generator) -> None:
    sampling = Sampling(1.0, 1, rows=40, streams="prompt")
    for path, piece in zip(paths, engine.extend([p.start(room) for p in paths], sampling, generator), strict=True):
        path.add(piece)


def tree(engine: TransformersEngine, most_bytes: int | None) -> Rollout:
    """Roots, branches at every third token, some told something, and a further piece of those that go on."""
    generator = torch.Generator().manual_seed(0)
    with nullcontext() if most_bytes is None else engine.remembering(most_bytes):
        roots = [Path(i // 4, i // 4, i // 4, i % 4, PROMPTS[i // 4]) for i in range(32)]
        grow(engine, roots, 28, generator)
        branches = [p.branch(10 + 10 * n + p.number, n) for p in roots for n in range(0, len(p), 5)]
        for branch in branches[::5]:
            branch.tell([5, 6, 7])
        grow(engine, branches, 12, generator)
        later = [p.branch(1000 + p.number) for p in branches if p.open and len(p)]
        grow(engine, later, 6, generator)
    return to_rollout([*roots, *branches, *later], pad_id=0, version=0)


@pytest.mark.parametrize("most_bytes", [256 << 20, 1 << 20, 0], ids=["all fits", "a part fits", "nothing fits"])
def test_remembering_changes_no_draw(tiny_s: Policy, most_bytes: int) -> None:
    engine = TransformersEngine(tiny_s)
    again, known = tree(engine, None), tree(engine, most_bytes)
    assert torch.equal(again.response_ids, known.response_ids)
    assert torch.equal(again.finished, known.finished)
    assert float((again.behaviour_logprob - known.behaviour_logprob).abs().max()) < 1e-4
    error = (scored(tiny_s.model, known, 64)[0] - known.behaviour_logprob)[known.sampled].abs().max()
    assert float(error) < 1e-4
    assert engine.memory is None  # over with the block: the weights may change now


def test_what_is_known_is_not_read(tiny_s: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, read = TransformersEngine(tiny_s), []
    whole = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda ids, *rest: read.append(tuple(ids.shape)) or whole(ids, *rest))
    generator = torch.Generator().manual_seed(0)
    with engine.remembering():
        paths = [Path(i, i, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
        grow(engine, paths, 6, generator)
        read.clear()
        forks = [p.branch(1, 4) for p in paths]
        grow(engine, forks, 1, generator)
    assert read == [(8, 1)]  # one token each: the last, for what follows it


def test_a_context_is_found_by_its_longest_known_beginning() -> None:
    memory = Memory()
    assert memory.find([1, 2, 3]) is None

    class Cache:
        layers = ()

    memory.keep([[1, 2, 3, 4], [1, 2, 9]], Cache(), torch.ones(2, 4, dtype=torch.bool), torch.arange(2))
    assert memory.find([1, 2, 3, 4]) == (0, 0, 3)  # the last token is read in any case
    assert memory.find([1, 2, 9, 9, 9]) == (0, 1, 3)
    assert memory.find([7, 2, 3]) is None


def test_a_batch_that_leaves_whole_is_not_copied_and_a_part_of_one_is() -> None:
    class Layer:
        keys, values = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 5)

    class Cache:
        layers = (Layer(),)

    memory = Memory()
    mask = torch.ones(3, 4, dtype=torch.bool)
    memory.keep([[1, 2, 3, 4], [1, 2, 9, 9], [5, 6, 7, 8]], Cache(), mask, torch.arange(3))
    assert memory.blocks[0].layers[0][0] is Layer.keys
    memory.keep([[4, 4, 4, 4]], Cache(), mask[:1], torch.tensor([2]))
    assert memory.blocks[1].layers[0][0].shape == (1, 2, 4, 5)
    assert memory.blocks[1].layers[0][0].data_ptr() != Layer.keys.data_ptr()


def test_what_is_found_has_the_keys_of_its_tokens_whatever_blocks_hold_them() -> None:
    """Keys that name their token: contexts of two blocks and two lengths, in an order that mixes the blocks."""

    def block(contexts: list[list[int]]) -> tuple[Any, torch.Tensor]:
        keys = torch.tensor(contexts, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3).clone()
        layer = SimpleNamespace(keys=keys, values=-keys)
        return SimpleNamespace(layers=(layer, layer)), torch.ones(len(contexts), len(contexts[0]), dtype=torch.bool)

    memory = Memory()
    for contexts in ([[1, 2, 3, 4], [1, 2, 9, 8]], [[5, 6, 7, 8]]):
        cache, mask = block(contexts)
        memory.keep(contexts, cache, mask, torch.arange(len(contexts)))
    starts = [[1, 2, 9, 0], [5, 6, 7, 8, 0], [1, 2, 3, 4, 0]]
    found, mask = memory.cache([place for s in starts if (place := memory.find(s))], LlamaConfig(num_hidden_layers=2))
    for row, start in enumerate(starts):
        kept = mask[row].bool()
        for layer in found.layers:
            assert layer.keys[row, 1, kept, 2].tolist() == start[:-1]
            assert layer.values[row, 0, kept, 0].tolist() == [-token for token in start[:-1]]
