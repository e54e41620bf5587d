"""A logits processor of vLLM 0.32 that gives every token a temperature of its own (`core.temperature`).

vLLM asks it after it has divided logits by the request's temperature and before it takes the log-probs it returns
(`processed_logprobs`), so that these are of the distribution that was sampled from. The rule travels with the request,
as plain numbers in `extra_args`. What vLLM has no way to return, each token's factor, is left in a list of this module:
whoever reads it must share the process with the sampler, as `vllm_colocated` does and a server does not.

Imports vLLM.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ..core.temperature import TemperatureRule
from .engine import entropy_of

KEY = "rlvr_lab_temper"


class _Row(NamedTuple):
    """A request in the batch; vLLM lengthens `written` as tokens come."""

    number: int
    rule: TemperatureRule
    written: list[int]


_record: list[tuple[list[int], list[int], Tensor]] = []
"""Requests, places of the tokens in their responses, factors; one entry per pass."""


def request_arguments(rule: TemperatureRule, number: int) -> dict[str, Any]:
    """`extra_args` of the request `number`."""
    return {KEY: {"number": number, "log_entropy": list(rule.log_entropy), "factor": list(rule.factor)}}


def take_factors(count: int) -> list[dict[int, float]]:
    """Factors of the requests 0 to `count` - 1 by place in the response, since the last call.

    A place may have been sampled more than once, where a prompt came in parts or a request gave way: the last counts.
    """
    found: list[dict[int, float]] = [{} for _ in range(count)]
    for numbers, places, factors in _record:
        for number, place, factor in zip(numbers, places, factors.tolist(), strict=True):
            found[number][place] = factor
    _record.clear()
    return found


class EntropyTemper(LogitsProcessor):  # type: ignore[misc]
    """Divides each row's logits by the factor that its request's rule gives for the row's entropy."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """A positive factor leaves the largest logit the largest: greedy requests are not concerned."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they come, move and go."""
        process_dict_updates(self.rows, batch_update, _new_row)

    def apply(self, logits: Tensor) -> Tensor:
        """`logits` [rows, V], divided in place."""
        by_rule: dict[TemperatureRule, list[int]] = {}
        for place, row in self.rows.items():
            by_rule.setdefault(row.rule, []).append(place)
        for rule, places in by_rule.items():
            index = torch.tensor(places, device=logits.device)
            log_p = torch.log_softmax(logits[index], -1)
            factor = rule.factors(entropy_of(log_p.exp(), log_p))
            logits[index] = log_p / factor[:, None]
            mine = [self.rows[place] for place in places]
            _record.append(([row.number for row in mine], [len(row.written) for row in mine], factor))
        return logits


def _new_row(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
    told = (params.extra_args or {}).get(KEY)
    if told is None:
        return None
    return _Row(told["number"], TemperatureRule(tuple(told["log_entropy"]), tuple(told["factor"])), output_ids)
