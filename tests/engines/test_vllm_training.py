"""Training with vLLM for real: three steps of the tiny lab in one process, and one step against a `vllm serve`.

Run by `nox -s vllm`; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("RLVR_LAB_ENGINE") == "vllm":
    importlib.import_module("vllm")
else:
    pytest.importorskip("vllm")

import torch
from safetensors.torch import load_file

from rlvr_lab.core.paths import Path as ResponsePath
from rlvr_lab.core.paths import to_rollout
from rlvr_lab.errors import UserError
from rlvr_lab.policy.forward import scored
from rlvr_lab.policy.load import load_policy
from rlvr_lab.policy.tiny import shipped
from rlvr_lab.rollout.engine import Sampling
from rlvr_lab.rollout.vllm import VllmEngine
from rlvr_lab.rollout.vllm_server import serve
from rlvr_lab.rollout.vllm_settings import VllmSection
from rlvr_lab.tasks import countdown
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

SETTINGS = (
    "rollout.engine=vllm",
    "rollout.vllm.eager=true",
    "update.recompute_old_logprob=true",
    "methods={grpo: {preset: tiny}, truncated_importance_sampling: {}}",
    "steps=3",
    "data.pool=48",
    "rollout.prompts=8",
    "rollout.group_size=8",
    "rollout.temperature=0.9",
    "rollout.max_tokens=28",
    "optimizer.lr=1e-3",
    "optimizer.warmup=0",
    "update.minibatches=2",
    "evaluation.problems=8",
    "evaluation.samples=4",
    "checkpoint.every=3",
    "logging.tensorboard=false",
    "model.device=cpu",
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(out: Path, *more: str) -> list[dict[str, Any]]:
    Trainer(load_config(None, [*SETTINGS, *more]), out).run()
    return read(out / "metrics.jsonl")


def test_three_steps_with_vllm(tmp_path: Path) -> None:
    rows = train(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["sync_mismatch"] < 1e-5
        # two programs, so never quite the same, and with synced weights never far apart
        assert 0 < row["mismatch"] < 1e-4
        assert row["importance_weight_mean"] == pytest.approx(1, abs=1e-4)
        assert row["importance_weight_ess"] > 0.999
        assert row["importance_weight_truncated"] == 0
        assert row["staleness"] == 0
        assert row["grad_norm"] > 0
        assert row["token_entropy"] > 0.1  # scored by the trainer
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    start = load_file(shipped("S") / "model.safetensors")
    assert max(float((trained[name] - start[name]).abs().max()) for name in start) > 1e-3
    again = train(tmp_path / "again", "evaluation.problems=0", "steps=1")
    assert again[0]["reward"] == rows[0]["reward"]
    assert again[0]["behaviour_logprob"] == pytest.approx(rows[0]["behaviour_logprob"], abs=1e-6)


def extended(engine: VllmEngine, prompts: list[list[int]]) -> None:
    """Ragged prefixes and a stop text of two tokens, over HTTP."""
    text = "yes </think>"
    paths = [ResponsePath(i // 2, i // 2, i // 2, i % 2, prompts[i // 2]) for i in range(12)]
    for most, seed in ((4, 0), (28, 1)):
        starts = [p.start(most - i % 3) for i, p in enumerate(paths)]
        pieces = engine.extend(starts, Sampling(0.7, 1), torch.Generator().manual_seed(seed), stops=(text,))
        for path, piece in zip(paths, pieces, strict=True):
            assert piece.stopped == (text in engine.policy.decode(list(piece.ids)))
            assert text not in engine.policy.decode(list(piece.ids[:-1]))
            path.add(piece)
    assert sum(piece.stopped for piece in pieces) >= 3
    assert worst(engine.policy, to_rollout(paths, pad_id=engine.policy.pad_id, version=0)) < 5e-5


def test_a_server(tmp_path: Path) -> None:
    """Samples, a port in use, new weights, and one training step, all against one server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = VllmSection(dtype="float32", eager=True, max_model_len=128)
    with serve(str(shipped("S")), port, options, tmp_path / "server.log"):
        with (
            pytest.raises(UserError, match=f"port {port}.*choose another port"),
            serve(str(shipped("S")), port, options, tmp_path / "second.log"),
        ):
            pass
        folder = tmp_path / "weights"
        folder.mkdir()
        policy = load_policy("tiny/S", device="cpu")
        engine = VllmEngine(policy, VllmSection(server=url, sync_folder=folder))
        prompts = [list(p.prompt_ids) for p in countdown.problems(6, 0, evaluation=True)]
        settings = Sampling(0.7, 28)
        first = engine.sample(prompts, 4, settings, torch.Generator().manual_seed(0))
        again = engine.sample(prompts, 4, settings, torch.Generator().manual_seed(0))
        assert torch.equal(first.response_ids, again.response_ids)
        assert worst(policy, first) < 5e-5
        extended(engine, prompts)
        with torch.no_grad():
            policy.model.lm_head.weight += 0.05 * torch.randn(
                policy.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
            )
        assert worst(policy, engine.sample(prompts, 4, settings, torch.Generator().manual_seed(0))) > 0.05
        assert engine.sync(list(policy.model.named_parameters()), 1).mismatch < 1e-5
        assert worst(policy, engine.sample(prompts, 4, settings, torch.Generator().manual_seed(0))) < 5e-5
        server = f"rollout.vllm={{server: '{url}', sync_folder: '{folder}'}}"
        (row,) = train(tmp_path / "run", server, "steps=1", "evaluation.problems=0", "checkpoint.every=1")
        assert row["sync_mismatch"] < 1e-5  # the run's start, not the weights of above
        assert 0 < row["mismatch"] < 1e-4
        assert list(folder.iterdir()) == []


def worst(policy: Any, rollout: Any) -> float:
    difference = scored(policy.model, rollout, 64)[0] - rollout.behaviour_logprob
    return float(difference[rollout.mask].abs().max())
