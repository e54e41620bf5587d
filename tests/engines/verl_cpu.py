"""verl on CPU, through its own plug-in points: a platform (`VERL_PLATFORM=cpu`) and its FSDP engine registered for it.

verl 0.9.1 ships CUDA, ROCm and NPU only. Nothing of verl is patched here: the platform answers its questions about the
device, and the worker opens the gloo group and adds a method that reads parameters.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module() -> ModuleType:
    module = ModuleType("rlvr_cpu_device")
    module.__dict__.update(vars(torch.cpu))
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *_: 0)
    module.empty_cache = module.set_device = module.reset_peak_memory_stats = lambda *_: None
    module.get_device_name = lambda *_: "CPU"
    module.mem_get_info = lambda *_: (1 << 33, 1 << 34)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """A process of its own is a device."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "RLVR_VISIBLE_CPUS"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def register_engine() -> None:
    """verl's FSDP engine for language models on CPU; its own registration names cuda and npu."""
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    registered = EngineRegistry._engines["language_model"]["fsdp2"]
    if "cpu" not in registered:
        EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
            FSDPEngineWithLMHead
        )


def worker_class() -> Any:
    """verl's actor worker, with a way to read its parameters."""
    from verl.single_controller.base.decorator import Dispatch, register
    from verl.workers.engine_workers import ActorRolloutRefWorker

    class Worker(ActorRolloutRefWorker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            register_engine()
            # verl would ask for the backends "cpu:gloo,cpu:gloo", which torch refuses; a group that is there it keeps
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
            super().__init__(*args, **kwargs)

        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def parameters(self) -> dict[str, torch.Tensor]:
            module = self.actor.engine.module
            return {
                name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for name, p in module.named_parameters()
            }

    return Worker
