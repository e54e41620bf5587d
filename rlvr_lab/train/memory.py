"""How much memory a run has taken so far."""

from __future__ import annotations

import sys

import torch

GIB = 2.0**30


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peaks since the start, in GiB: of this process in main memory, and of torch's tensors on its GPU.

    What cannot be measured here is left out.
    """
    found: dict[str, float] = {}
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found["memory_process_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    if device.type == "cuda":
        found["memory_device_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return found
