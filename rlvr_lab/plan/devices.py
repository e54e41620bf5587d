"""GPUs the planner knows: memory, bandwidth and dense peak throughput, from NVIDIA's data sheets.

Peaks are without sparsity. `memory` is what nvidia-smi reports, which is less than the advertised number where error
correction takes its share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import UserError, nearest

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """One GPU (or, for checks of main memory, the processor). Throughput in FLOP/s, bandwidth in bytes/s."""

    name: str
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    """Dense peak by the type of the products: bfloat16, float16, float32 (TF32 is not used by default)."""
    link: float
    """Bytes per second and direction between GPUs of one machine."""
    kind: str = "cuda"

    def throughput(self, dtype: str) -> float:
        """Peak for products of `dtype`; what a device lacks runs at its float32 rate."""
        return self.peak.get(dtype, self.peak["float32"])


_PCIE3, _PCIE4, _NVLINK3, _NVLINK4 = 12e9, 24e9, 300e9, 450e9
_TURING = {"float16": 65e12, "float32": 8.1e12}
_ADA = {"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12}
_AMPERE = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}
_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}

_TABLE = (
    Device("T4", 15360 * MIB, 320e9, _TURING, _PCIE3),
    Device("L4", 23034 * MIB, 300e9, _ADA, _PCIE4),
    Device("A100-40", 40960 * MIB, 1555e9, _AMPERE, _NVLINK3),
    Device("A100-80", 81920 * MIB, 2039e9, _AMPERE, _NVLINK3),
    Device("H100", 81559 * MIB, 3350e9, _HOPPER, _NVLINK4),
    Device("H200", 143771 * MIB, 4800e9, _HOPPER, _NVLINK4),
)
DEVICES: dict[str, Device] = {d.name: d for d in _TABLE}


def device(name: str) -> Device:
    """A GPU of the table. Raises UserError with the nearest name."""
    found = {known.lower(): d for known, d in DEVICES.items()}
    if name.lower() not in found:
        raise UserError(f"--gpu '{name}' is not in the planner's table; {nearest(name.upper(), DEVICES)}")
    return found[name.lower()]


def detected(name: str, memory: int) -> Device:
    """The device that torch sees: its own memory, and the rates of the GPU of the table whose name it bears.

    An unknown GPU gets the A100's rates, which matter for the time estimate only.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    alike = [d for d in DEVICES.values() if d.name.split("-")[0].lower() in words]
    like = min(alike or [DEVICES["A100-80"]], key=lambda d: abs(d.memory - memory))
    return replace(like, name=name, memory=memory)
