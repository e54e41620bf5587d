"""What test-time methods share: a pair (model, tokenizer) as a policy, problems, sampled responses, hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.paths import Piece, Start
from ..core.rollout import pad
from ..errors import UserError
from ..policy.load import Policy, end_tokens
from ..rollout.engine import Sampling, TransformersEngine
from ..tasks.registry import encode_prompt

Verify = Callable[[str, Any], bool]
"""Whether a response text is right for an answer, or for the problem's text where there is no answer."""


@dataclass(frozen=True)
class Question:
    """A problem's text, and what `verify` is given beside the response: its answer, or the text itself."""

    text: str
    answer: Any


@dataclass(frozen=True)
class Response:
    """One sampled response. `text` is without the end token; `entropy` is per token, in nats, at the temperature that
    it was sampled at; `finished`: it ended by itself."""

    ids: Sequence[int]
    text: str
    entropy: Sequence[float]
    finished: bool

    def __len__(self) -> int:
        return len(self.ids)


def as_policy(model: Any, tokenizer: Any) -> Policy:
    """The pair as the `Policy` that engines take; the model is put in evaluation mode (no dropout).

    Raises UserError where neither names an end token, or the tokenizer has more words than the model embeds.
    """
    eos_ids = end_tokens(model, tokenizer, type(model).__name__)
    embedded = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedded:
        raise UserError(f"the tokenizer has {len(tokenizer)} words, the model embeds {embedded}: wrong pair?")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return Policy(model.eval(), tokenizer, eos_ids, pad_id, type(model).__name__)


def as_questions(problems: Sequence[str | tuple[str, Any]]) -> list[Question]:
    """Texts or (text, answer) pairs as questions. Raises UserError for none, and for anything else."""
    if isinstance(problems, str) or not len(problems):
        raise UserError("problems must be a list with at least one text or (text, answer) pair")
    found = []
    for i, problem in enumerate(problems):
        text, answer = (problem, problem) if isinstance(problem, str) else _pair(problem, i)
        found.append(Question(text, answer))
    return found


def _pair(problem: Any, place: int) -> tuple[str, Any]:
    if not isinstance(problem, (tuple, list)) or len(problem) != 2 or not isinstance(problem[0], str):
        raise UserError(f"problems[{place}] is neither a text nor a (text, answer) pair but {type(problem).__name__}")
    return problem[0], problem[1]


def prompt_ids(policy: Policy, texts: Sequence[str], max_tokens: int = 0) -> list[list[int]]:
    """Each text as the user's turn of the chat template, or as it stands where there is none.

    Raises UserError for a text without a token, and where a prompt with `max_tokens` more exceeds the model's context.
    """
    prompts = [encode_prompt(text, policy.tokenizer) for text in texts]
    longest = getattr(policy.model.config, "max_position_embeddings", None)
    for i, ids in enumerate(prompts):
        if not ids:
            raise UserError(f"problems[{i}] has no token: {texts[i][:40]!r}")
        if longest is not None and len(ids) + max_tokens > longest:
            raise UserError(
                f"max_tokens {max_tokens} after the {len(ids)} tokens of problems[{i}] exceeds the model's context of "
                f"{longest}; lower max_tokens to at most {longest - len(ids)}"
            )
    return prompts


def respond(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    generator: torch.Generator,
    rows: int = 64,
) -> list[Response]:
    """One response to each prompt, with one limit and temperature for all or one for each.

    A prompt's random numbers are those of its place, whatever else is in flight: two calls with generators in the same
    state differ only where limits, temperatures or prompts do. The generator is advanced once a call.
    """
    n = len(prompts)
    limits = [max_tokens] * n if isinstance(max_tokens, int) else list(max_tokens)
    own = [float(temperature)] * n if isinstance(temperature, (int, float)) else list(temperature)
    starts = [Start(list(p), m, t) for p, m, t in zip(prompts, limits, own, strict=True)]
    sampling = Sampling(max_tokens=max(limits, default=1), rows=rows, streams="prompt")
    return [_response(policy, piece) for piece in TransformersEngine(policy).extend(starts, sampling, generator)]


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], samples: int, max_tokens: int, generator: torch.Generator,
    rows: int = 64,
) -> list[list[Response]]:  # fmt: skip
    """`samples` responses to each prompt at temperature 1, of which entropies are those of the model.

    Raises UserError for fewer than one sample.
    """
    if samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}")
    repeated = [p for p in prompts for _ in range(samples)]
    found = respond(policy, repeated, max_tokens=max_tokens, temperature=1.0, generator=generator, rows=rows)
    return [found[i : i + samples] for i in range(0, len(found), samples)]


def _response(policy: Policy, piece: Piece) -> Response:
    ids = list(piece.ids)
    said = ids[:-1] if piece.finished else ids
    return Response(ids, policy.decode(said), list(piece.entropy or ()), piece.finished)


def verified(responses: Sequence[Response], questions: Sequence[Question], verify: Verify | None) -> list[float] | None:
    """Correctness of each response, 1 or 0; None without `verify`."""
    if verify is None:
        return None
    pairs = zip(responses, questions, strict=True)
    return [float(bool(verify(response.text, question.answer))) for response, question in pairs]


@torch.no_grad()
def prompt_states(policy: Policy, prompts: Sequence[Sequence[int]], layer: int = -1, rows: int = 64) -> Tensor:
    """Hidden state of each prompt's last token, float32 on the CPU [N, d].

    `layer` -1: after the final norm; 0: the embeddings; l: after block l.
    """
    found = []
    for first in range(0, len(prompts), rows):
        some = prompts[first : first + rows]
        ids = pad(some, policy.pad_id, torch.long, left=True).to(policy.device)
        mask = pad([[1] * len(p) for p in some], 0, torch.long, left=True).to(policy.device)
        out = policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            output_hidden_states=True,
            use_cache=False,
        )
        found.append(out.hidden_states[layer][:, -1].float().cpu())
    return torch.cat(found)
