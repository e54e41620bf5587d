"""Random numbers of a rollout: one stream for a whole step, or one for every prompt.

With one stream per step a draw depends on everything drawn before it: on the prompts beside it, on the number of
responses in flight, on which rows were finished. With one stream per prompt a response depends on its prompt's place
in the step and its own place in the group only, so that prompts may be divided over processes in any way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Streams = Literal["step", "prompt"]


def prompt_seeds(generator: torch.Generator, first: int, count: int) -> list[int]:
    """Seeds of the prompts at places `first`, `first + 1`, ... of a step; see `keyed_seeds`."""
    return keyed_seeds(generator, range(first, first + count))


def keyed_seeds(generator: torch.Generator, keys: Sequence[int]) -> list[int]:
    """One seed for every key, which may be any number.

    One number is drawn from `generator`, on every process the same; every key is mixed with it (splitmix64), so that
    the seeds do not depend on what stands beside. The next call with the same generator gives others.
    """
    base = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return [_mix(base + 0x9E3779B97F4A7C15 * (key + 1)) for key in keys]


def _mix(x: int) -> int:
    mask = 2**64 - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1  # torch and vLLM take 63 bits


class PromptNoise:
    """Uniform numbers in [0, 1) for every response and token: `rows(a, b)` are those of responses a to b - 1 in the
    order of prompts, [b - a, T]. Drawn on the CPU, so that all devices see the same."""

    def __init__(self, seeds: Sequence[int], group_size: int, tokens: int) -> None:
        self.seeds, self.group_size, self.tokens = seeds, group_size, tokens

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, T] in float64. Token by token, so that a larger `tokens` extends and does not change them."""
        g = self.group_size
        groups = [self._group(i) for i in range(start // g, -(-stop // g))]
        return torch.cat(groups)[start % g :][: stop - start]

    def _group(self, prompt: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seeds[prompt])
        return torch.rand(self.tokens, self.group_size, generator=generator, dtype=torch.float64).T


def at_quantile(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token [B] at which the cumulative distribution passes `uniform_B`. Sums are in float64: an exact sample for
    any vocabulary."""
    cumulative = p_BV.cumsum(-1, dtype=torch.float64)
    # right: a token of probability 0 is never taken
    tokens = torch.searchsorted(cumulative, (uniform_B * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    return tokens.clamp_max(p_BV.shape[-1] - 1)
