"""Several processes as one run.

Every process ("rank") holds the whole graded rollout and computes all that spans a minibatch from it, identically.
Sampling, grading, scoring and the forward and backward passes are divided. Gradients are summed, because a loss is a
sum over tokens whose weights were made over the whole minibatch. So methods know nothing of ranks, and the number of
ranks changes speed and rounding, never the mathematics.

    torchrun --standalone --nproc-per-node 8 -m rlvr_lab.cli train RECIPE --out runs/eight
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.rollout import Rollout
from ..core.rows import concatenate
from ..errors import UserError

T = TypeVar("T")
BUCKET = 2**26  # numbers summed in one message; 256 MiB of float32


class RankLost(RuntimeError):
    """Another process of the run is gone, so that this one cannot go on."""


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them. `single()` needs no process group: all its operations
    return at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place on this machine; picks the GPU."""

    @staticmethod
    def single() -> World:
        """One process."""
        return World()

    @staticmethod
    def from_environment(timeout: float = 1800.0, device: str = "auto") -> World:
        """The world that torchrun (or any launcher which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) made;
        `single()` without one. Joins the process group: NCCL for tensors on GPUs, gloo for all others.

        `device`: the run's (`model.device`); every process takes a GPU of its own unless it is "cpu".
        `timeout`: seconds that an operation waits for a rank that is alive but late. Raises UserError where the
        processes cannot meet.
        """
        if not dist.is_initialized():
            if "WORLD_SIZE" not in os.environ:
                return World.single()
            _join(timeout, torch.cuda.is_available() and device != "cpu")
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return World(dist.get_rank(), dist.get_world_size(), local)

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and talks."""
        return self.rank == 0

    @property
    def has_group(self) -> bool:
        """Whether there is a process group, which sharding needs even for one process."""
        return dist.is_available() and dist.is_initialized()

    # -- dividing work ------------------------------------------------------------------------------------------

    def share(self, count: int) -> range:
        """This rank's part of `count` things: contiguous, in the order of ranks, sizes equal up to one."""
        small, more = divmod(count, self.size)
        first = self.rank * small + min(self.rank, more)
        return range(first, first + small + (self.rank < more))

    def deal(self, items: Sequence[Any]) -> list[Any | None]:
        """This rank's items when they are dealt round by round. All ranks get equally many; None fills up the last
        round, so that every rank makes the same number of passes."""
        rounds = -(-len(items) // self.size)
        mine = [items[i] for i in range(self.rank, len(items), self.size)]
        return [*mine, *[None] * (rounds - len(mine))]

    # -- bringing results together ------------------------------------------------------------------------------

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.watch():
            dist.all_gather_object(found, value)
        return found

    def gather_rollout(self, rollout: Rollout | None) -> Rollout:
        """Every rank's rollout as one, on every rank; groups are renumbered in the order of ranks. None where a rank
        has no rows. Raises ValueError where no rank has any."""
        if self.size == 1 and rollout is not None:
            return rollout
        parts = self.gather_objects(None if rollout is None else rollout.to("cpu"))
        joined = concatenate([part for part in parts if part is not None and len(part)])
        return joined if rollout is None else joined.to(rollout.response_ids.device)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.watch():
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns the tensor."""
        if self.size > 1:
            with self.watch():
                dist.all_reduce(tensor)
        return tensor

    def sum_floats(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of every entry over ranks; a rank that lacks an entry counts as 0 for it."""
        return self._combine(values, sum)

    def max_floats(self, values: Mapping[str, float]) -> dict[str, float]:
        """Largest of every entry over ranks; a nan anywhere is nan."""
        return self._combine(values, lambda some: float(torch.tensor(list(some), dtype=torch.float64).max()))

    def _combine(self, values: Mapping[str, float], how: Any) -> dict[str, float]:
        if self.size == 1:
            return dict(values)
        parts = self.gather_objects(dict(values))
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: how(part[name] for part in parts if name in part) for name in names}

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank; its UserError too."""
        found, problem = None, None
        if self.is_main:
            try:
                found = work()
            except UserError as error:
                problem = error
        found, text = self.broadcast_object((found, None if problem is None else str(problem)))
        if text is not None:
            raise problem or UserError(text)
        return found  # type: ignore[no-any-return]

    def agree(self, problem: BaseException | None) -> str | None:
        """The first rank's problem as text on every rank, None where no rank has one."""
        found = self.gather_objects(None if problem is None else str(problem))
        return next((text for text in found if text is not None), None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather_objects(bool(flag)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum `grad` of unsharded parameters over ranks, a bucket of tensors per message. Every rank must hold the
        same parameters with a gradient."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for grad in [p.grad for p in parameters if p.grad is not None]:
            if bucket and (grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + grad.numel() > BUCKET):
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(grad)
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, grads: list[Tensor]) -> None:
        # sums in float32, also of bfloat16 gradients
        flat = self.sum_(torch.cat([g.flatten().float() for g in grads]))
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with self.watch():
                dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.has_group:
            dist.destroy_process_group()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Turn the error of a broken connection into RankLost, which says what it means."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RankLost) or not _is_lost_connection(error):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size} lost the connection to another process of this run, which ended or "
                "no longer answers; its own output says why. The last checkpoint is intact: start again with --resume "
                f"({_first_line(error)})"
            ) from error


def _join(timeout: float, gpu: bool) -> None:
    if gpu:
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"process {local} of this machine finds {there} GPUs; start at most {there} "
                            "(--nproc-per-node), or set model.device=cpu")  # fmt: skip
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise UserError(
                f"port in use: {where} is taken by another program; start with torchrun --standalone, or choose "
                "another --master-port"
            ) from error
        raise UserError(
            f"the processes of this run cannot meet at {where} (MASTER_ADDR:MASTER_PORT): {text.splitlines()[0]}"
        ) from error


_LOST = ("connection closed by peer", "connection reset", "connection refused", "socket", "broken pipe", "timed out",
         "timeout", "nccl", "gloo")  # fmt: skip


def _first_line(error: RuntimeError) -> str:
    """torch's reason without the place in its sources."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition(".cc:")[2].lstrip("0123456789] ")[:160]


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST)
