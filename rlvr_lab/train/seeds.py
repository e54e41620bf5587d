"""Seeds derived from (run seed, purpose, step).

Every sampler gets a generator of its own for every step, so a run needs no random state in its checkpoints: step 57
draws the same numbers whether or not the run was interrupted before it.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """A 63-bit seed; different purposes and steps give unrelated streams."""
    entropy = (seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(purpose.encode()), step)
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def torch_generator(seed: int, purpose: str, step: int, device: torch.device) -> torch.Generator:
    """A torch generator on `device`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, step))


def numpy_generator(seed: int, purpose: str, step: int) -> np.random.Generator:
    """A numpy generator."""
    return np.random.default_rng(derive_seed(seed, purpose, step))
