"""The one record that flows through training: sampled responses and everything that is known about them.

Shapes: B responses, P prompt tokens (padded on the left), T response tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

# what to switch on when a method needs a field that the record lacks
PROVIDED_BY = {
    "old_logprob": "update.recompute_old_logprob: true, or a sampling engine that records log-probs",
    "reward": "a task with a verifier (data.task)",
    "correct": "a task with a verifier (data.task)",
    "answer": "a task with a verifier (data.task)",
    "difficulty": "a method that sorts prompts by difficulty, such as ares",
    "bundle_id": "a method with a `select` hook that forms bundles",
    "path_id": "a method with a `sample` hook that branches, or a multi-turn environment (data.task)",
    "parent_id": "a method with a `sample` hook that branches",
    "branch_position": "a method with a `sample` hook that branches",
    "prefix_length": "a method with a `sample` hook that branches",
    "turn_id": "a multi-turn environment (data.task)",
    "segment_id": "a multi-turn environment (data.task)",
    "cluster_id": "a task that reads answers without their labels (data.task)",
    "thought_label": "a judge of thoughts (data.judge)",
    "thought_step": "a judge of thoughts (data.judge)",
    "ref_logprob": "the training loop, which keeps a copy of the starting policy for methods that require it",
    "token_entropy": "a sampling engine that records entropies, or update.recompute_old_logprob: true",
}

_PER_RESPONSE = (
    "prompt_id", "group_id", "finished", "policy_version", "bundle_id", "path_id", "parent_id",
    "branch_position", "prefix_length", "difficulty", "reward", "correct", "cluster_id", "replayed",
)  # fmt: skip
_PER_TOKEN = (
    "response_ids", "response_mask", "action_mask", "behaviour_logprob", "behaviour_temperature", "turn_id",
    "segment_id", "old_logprob",
)  # fmt: skip
_BOOLEAN = ("response_mask", "action_mask", "prompt_mask", "finished", "correct", "replayed")


@dataclass(frozen=True, eq=False)
class Rollout:
    """Sampled responses. Validated when made; every change makes a new record (`with_`).

    A field that is `None` is absent. `require` turns its use into an error that names the setting which provides it,
    so that no method ever reads a zero in place of something unknown.

    Raises ValueError where shapes, types or masks disagree, and names the field.
    """

    # per response [B]
    prompt_id: Tensor
    """Index of the problem in its pool."""
    group_id: Tensor
    """Responses that share a baseline carry one id."""
    finished: Tensor
    """True where the response ended by itself, False where the length limit cut it."""
    policy_version: Tensor
    """Optimizer step of the policy that sampled the response."""
    # per prompt token [B, P]
    prompt_ids: Tensor
    prompt_mask: Tensor
    # per response token [B, T]
    response_ids: Tensor
    response_mask: Tensor
    """True on tokens of the response, its end token included."""
    action_mask: Tensor
    """True on tokens that the policy chose; tool output is not an action."""
    behaviour_logprob: Tensor
    """Log-probability under the sampling distribution, in nats, at `behaviour_temperature`."""
    behaviour_temperature: Tensor
    policy_temperature: float | None = None
    """Temperature of the distribution that is trained; None where that is `behaviour_temperature`, one for all."""
    # known later, or only to some methods
    old_logprob: Tensor | None = None
    """Log-probability under the policy before this step's updates; the denominator of the importance ratio."""
    turn_id: Tensor | None = None
    """Turn of each token [B, T]: what the policy said, and what it was told in answer to it."""
    segment_id: Tensor | None = None
    """Piece of each token [B, T]: one run of sampled tokens, or of told ones."""
    bundle_id: Tensor | None = None
    path_id: Tensor | None = None
    """Number of each response in its group, which `parent_id` refers to."""
    parent_id: Tensor | None = None
    """`path_id` of the response that the first `prefix_length` tokens were copied from; -1 for a root."""
    branch_position: Tensor | None = None
    """Token of the parent's response at which a method branched; -1 for a root. Where a limit cut the prefix short, it
    lies beyond `prefix_length`."""
    prefix_length: Tensor | None = None
    """Tokens taken over from the parent. Sampled tokens begin here."""
    replayed: Tensor | None = None
    """True for a response of an earlier step, from a replay buffer; None where there is none."""
    difficulty: Tensor | None = None
    reward: Tensor | None = None
    correct: Tensor | None = None
    answer: tuple[str | None, ...] | None = None
    """Canonical form of each answer; None where none could be read."""
    cluster_id: Tensor | None = None
    """Answers of one group that mean the same carry one id, found without labels; -1 where none could be read."""
    reward_components: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Token statistics [B, T] by name, such as `token_entropy` in nats."""

    def __post_init__(self) -> None:
        if self.response_ids.ndim != 2 or self.prompt_ids.ndim != 2:
            raise ValueError("response_ids and prompt_ids must be [B, T] and [B, P]")
        self._check_shapes()
        for name in _BOOLEAN:
            value = getattr(self, name)
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"{name} must be boolean, not {value.dtype}")
        if bool((self.action_mask & ~self.response_mask).any()):
            raise ValueError("action_mask marks a token outside response_mask")
        if self.response_mask.shape[1] and bool((self.response_mask[:, 1:] & ~self.response_mask[:, :-1]).any()):
            raise ValueError("response_mask must be a prefix: responses are padded on the right")
        for name in ("behaviour_logprob", "old_logprob"):
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value[self.mask]).all()):
                raise ValueError(f"{name} is not finite on a response token")

    def _check_shapes(self) -> None:
        b, t = self.response_ids.shape
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(_PER_RESPONSE, (b,))
        expected |= dict.fromkeys(_PER_TOKEN, (b, t))
        expected |= dict.fromkeys(("prompt_ids", "prompt_mask"), (b, self.prompt_ids.shape[1]))
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        for name, value in self.reward_components.items():
            if tuple(value.shape) != (b,):
                raise ValueError(f"reward component '{name}' has shape {tuple(value.shape)}, expected {(b,)}")
        for name, value in self.statistics.items():
            if tuple(value.shape) != (b, t):
                raise ValueError(f"statistic '{name}' has shape {tuple(value.shape)}, expected {(b, t)}")
        if self.answer is not None and len(self.answer) != b:
            raise ValueError(f"answer has {len(self.answer)} entries, expected {b}")

    @property
    def mask(self) -> Tensor:
        """The canonical mask [B, T]: tokens of the response that the policy chose."""
        return self.response_mask & self.action_mask

    @property
    def lengths(self) -> Tensor:
        """Response lengths in tokens [B]."""
        return self.response_mask.sum(1)

    @property
    def sampled(self) -> Tensor:
        """Tokens that were sampled for this response [B, T]: actions, without those copied from a parent."""
        if self.prefix_length is None:
            return self.mask
        place = torch.arange(self.response_ids.shape[1], device=self.response_ids.device)
        return self.mask & (place >= self.prefix_length[:, None])

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    def require(self, name: str, by: str) -> Tensor:
        """The field or statistic `name`; raises UserError naming the method `by` and the setting that provides it."""
        value = self.statistics.get(name, getattr(self, name, None))
        if value is None:
            hint = PROVIDED_BY.get(name, "update.recompute_old_logprob: true, the pass that records it")
            raise UserError(f"method '{by}' needs '{name}', which this rollout lacks; it comes with {hint}")
        return value

    def with_(self, **changes: Any) -> Rollout:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def with_statistics(self, **statistics: Tensor) -> Rollout:
        """A copy with token statistics added or replaced."""
        return replace(self, statistics={**self.statistics, **statistics})

    def rows(self, index: Tensor) -> Rollout:
        """The responses `index` (integers [b]), trimmed to their own longest response."""
        longest = max(1, int(self.lengths[index].max())) if len(index) else 1
        return self._map(lambda value, per_token: value[index][:, :longest] if per_token else value[index], index)

    def to(self, device: torch.device | str) -> Rollout:
        """The same record on another device."""
        return self._map(lambda value, per_token: value.to(device), None)

    def _map(self, change: Any, index: Tensor | None) -> Rollout:
        new: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                new[f.name] = change(value, f.name in _PER_TOKEN)
            elif isinstance(value, Mapping):
                per_token = f.name == "statistics"
                new[f.name] = {k: change(v, per_token) for k, v in value.items()}
            elif f.name == "answer" and value is not None and index is not None:
                new[f.name] = tuple(value[i] for i in index.tolist())
            else:
                new[f.name] = value
        return Rollout(**new)


def pad(rows: Sequence[Sequence[float]], value: float, dtype: torch.dtype, left: bool = False) -> Tensor:
    """Ragged rows as one tensor [B, longest], padded with `value` on the right, or on the left."""
    longest = max(1, max((len(r) for r in rows), default=1))
    full = torch.full((len(rows), longest), value, dtype=dtype)
    for i, row in enumerate(rows):
        if len(row):
            span = slice(longest - len(row), None) if left else slice(0, len(row))
            full[i, span] = torch.as_tensor(row, dtype=dtype)
    return full
