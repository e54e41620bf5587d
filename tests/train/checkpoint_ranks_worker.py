"""One rank of `test_checkpoint_ranks`: run as a script with RANK and WORLD_SIZE set. Prints a JSON object."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.train import sharded
from rlvr_lab.train.checkpoint import DiskError, TrainerState, newest, restore, save
from rlvr_lab.train.parallel import RankLost, World


def optimizer_of(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-3, foreach=True)


def step(policy: Policy, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    """Updates with made-up gradients that depend on the parameter, so that a mix-up of parameters shows. AdamW works
    number by number: sharded or not, the result is the same to the bit."""
    for turn in range(count):
        for i, p in enumerate(policy.model.parameters()):
            p.grad = torch.full_like(p, 0.01 * (i + 1) * (-1) ** turn)
        optimizer.step()


def shard(policy: Policy) -> Policy:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy.model, mesh=mesh)
    return policy


def fresh(sharded_: bool) -> tuple[Policy, torch.optim.Optimizer]:
    policy = load_policy("tiny/S", device="cpu")
    if sharded_:
        shard(policy)
    return policy, optimizer_of(policy)


def local(value: Any) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def same(one: tuple[Policy, torch.optim.Optimizer], other: tuple[Policy, torch.optim.Optimizer]) -> bool:
    weights = zip(one[0].model.parameters(), other[0].model.parameters(), strict=True)
    states = [t[1].state_dict()["state"] for t in (one, other)]
    return all(torch.equal(local(a), local(b)) for a, b in weights) and all(
        torch.equal(local(states[0][i][k]), local(states[1][i][k])) for i in states[0] for k in states[0][i]
    )


def write_and_read(root: Path, by_one: Path, world: World) -> dict[str, Any]:
    """Save, read back, and read what one process wrote, sharded and replicated."""
    found: dict[str, Any] = {}
    state = TrainerState(1, {"grpo": {"seen": 3, "mean": torch.arange(3.0)}})
    for name in ("plain", "fsdp2"):
        trained = fresh(name == "fsdp2")
        step(*trained)
        export = torch.bfloat16 if name == "fsdp2" else None
        where = save(root / name, *trained, state, 2, world, export=export)
        step(*trained, 2)
        again = fresh(name == "fsdp2")
        back = restore(where, *again, world)
        found[f"{name} parts"] = [back.step, back.parts["grpo"]["seen"], back.parts["grpo"]["mean"].tolist()]
        step(*again, 2)
        found[f"{name} goes on"] = same(trained, again)
        restore(by_one, *again, world)
        one = fresh(name == "fsdp2")
        step(*one)
        found[f"{name} reads one"] = same(one, again)
    return found


def full_disk_on_rank_1(root: Path, world: World) -> dict[str, Any]:
    trained = fresh(True)
    step(*trained)
    save(root / "full", *trained, TrainerState(1, {}), 2, world)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    message = ""
    try:
        save(root / "full", *trained, TrainerState(2, {}), 2, world)
    except DiskError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    world.barrier()
    where, refused = newest(root / "full", world)
    after = save(root / "full", *trained, TrainerState(2, {}), 2, world)  # the ranks still work together
    return {"message": message, "found": str(where), "refused": refused, "after": after.name}


def killed_during_the_write(root: Path, world: World) -> dict[str, Any]:
    trained = fresh(True)
    step(*trained)
    save(root / "killed", *trained, TrainerState(1, {}), 2, world)
    if world.rank == 1:
        real = sharded.HuggingFaceStorageWriter.write_data

        def write_half(self: Any, *rest: Any) -> Any:
            done = real(self, *rest)
            path = next(Path(self.path).glob("shard-00002*"))
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
            return done

        sharded.HuggingFaceStorageWriter.write_data = write_half  # type: ignore[method-assign]
    try:
        save(root / "killed", *trained, TrainerState(2, {}), 2, world)
    except RankLost as error:
        return {"lost": str(error), "left": sorted(p.name for p in (root / "killed").iterdir())}
    return {}


def unseen_disk(root: Path, world: World) -> dict[str, Any]:
    """Every rank writes to a disk of its own, as on machines without a shared one."""
    trained = fresh(True)
    mine = root / f"disk{world.rank}"
    try:
        save(mine, *trained, TrainerState(1, {}), 2, world)
    except DiskError as error:
        return {"unseen": str(error)}
    return {}


def main() -> None:
    torch.set_num_threads(1)
    root, by_one = Path(sys.argv[1]), Path(sys.argv[2])
    world = World.from_environment(timeout=60)
    found = write_and_read(root, by_one, world)
    found["full disk"] = full_disk_on_rank_1(root, world)
    found |= unseen_disk(root, world)
    found |= killed_during_the_write(root, world)
    print(json.dumps(found), flush=True)
    os._exit(0)  # the process group is broken by now


if __name__ == "__main__":
    main()
