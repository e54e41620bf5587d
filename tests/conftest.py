"""What every test shares: one torch thread, no hub, and policies that are loaded once."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

# before torch is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from rlvr_lab.policy.load import Policy, load_policy

torch.set_num_threads(1)
# the same examples everywhere, and no deadline: the first call into torch is slow on a busy machine
settings.register_profile("rlvr_lab", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("rlvr_lab")


@pytest.fixture(scope="session")
def tiny_s() -> Policy:
    """The shipped base S. Shared: a test that changes weights takes `fresh_s`."""
    return load_policy("tiny/S", device="cpu")


@pytest.fixture
def fresh_s(tiny_s: Policy) -> Callable[[], Policy]:
    """Makes independent copies of S that a test may train."""

    def copy_of() -> Policy:
        return Policy(copy.deepcopy(tiny_s.model), tiny_s.tokenizer, tiny_s.eos_ids, tiny_s.pad_id, tiny_s.source)

    return copy_of
