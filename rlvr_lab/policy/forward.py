"""One forward pass of a policy over recorded responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.entropy import entropy_of_log
from ..core.head import head_statistics
from ..core.lens import Lens
from ..core.rollout import Rollout
from .access import lens_hidden, parts

LARGE = 4096  # vocabulary from which the tiled head pays; below it one softmax over all logits is faster
LEAST = -1e4  # of log p where squares of it are formed: p is 0 far above it, and the square must stay finite
FORWARD = "token_tensors"  # the method of a sharded model that stands for its forward pass (policy.shard)


READ_ROWS = 512  # tokens whose whole distribution is held at a time while a large vocabulary is read

RAW = ("sampled_logit", "token_certainty")
"""Statistics of the logits z that `score` records where it is asked for them: z of the recorded token before the
temperature, which log-probs do not hold; and -mean_v log p_v = logsumexp(z / T) - mean_v z_v / T, for which a large
vocabulary need not be formed again."""

LAYER_LOGPROB, LAYER_ENTROPY = "layer_logprob", "layer_entropy"
"""Statistics of a layer's policy that `score_layer` records beside those of the model's own."""

Reader = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""Token statistics by name from the log-probabilities [..., V] of all tokens and the recorded ids [...]."""


class Division(Protocol):
    """Several processes that share a piece of work; see `train.parallel.World`."""

    def deal(self, items: Sequence[Any]) -> list[Any | None]:
        """This process's items, as many as every other's; None where it has fewer."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""


@dataclass(frozen=True)
class Moments:
    """Sums [B, T] over the vocabulary that first-order entropy changes need, without gradient."""

    entropy: Tensor
    collision: Tensor
    """Sum of p^2."""
    cross: Tensor
    """Sum of p^2 log p."""
    slope_square: Tensor
    """Sum of (dH/dz)^2 = sum of p^2 (log p + H)^2, with z the logits divided by the temperature; nan where the tiled
    head was used, which does not sum it."""


@dataclass(frozen=True)
class TokenView:
    """What one forward pass says of the recorded tokens [B, T]. `logprob` and `entropy` carry gradient."""

    logprob: Tensor
    entropy: Tensor | None
    moments: Moments | None
    read: Mapping[str, Tensor] = field(default_factory=dict)
    """What a `Reader` found, with gradient, and the statistics `RAW` that were asked for."""


def response_statistics(model: Any, rollout: Rollout, want_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy [B, T] of the recorded response tokens, at each row's behaviour temperature.

    Differentiable. Right padding needs no attention mask under causal attention; left padding of prompts does. Rows
    must share one temperature. Entries outside the mask are finite but mean nothing.
    """
    view = token_view(model, rollout, want_entropy)
    return view.logprob, view.entropy


def token_view(
    model: Any,
    rollout: Rollout,
    want_entropy: bool = True,
    want_moments: bool = False,
    live: Tensor | None = None,
    packed: bool = False,
    read: Reader | None = None,
    raw: Sequence[str] = (),
    lens: Lens | None = None,
) -> TokenView:
    """Log-probability, and where asked for entropy and moments, from one pass; see `response_statistics`.

    A large vocabulary goes through the head of `core.head`, which never holds [B, T, V]; `live` [B, T] then names the
    tokens that reach the loss, and no backward runs for the others. `packed`: all rows as one sequence without
    padding, which attention must keep apart (`packing_error`). `read` is asked for statistics that need the whole
    distribution; a large vocabulary is then formed a second time, some tokens at once. `raw`: names of `RAW`. `lens`:
    everything is of that layer's policy, and only the layers up to it run; None is the model's own. Raises
    `core.head.NotFinite` where the tiled head does, UserError for a layer or an architecture that has no lens.
    """
    sharded = getattr(model, FORWARD, None)
    arguments = (rollout, want_entropy, want_moments, live, packed, read, raw, lens)
    logprob, entropy, moments, found = sharded(*arguments) if sharded else token_tensors(model, *arguments)
    if sharded:
        # FSDP gathers weights for the backward pass when a gradient reaches these tensors, which one taken with respect
        # to them, as for the ledger, must not set off
        logprob, entropy = logprob.clone(), None if entropy is None else entropy.clone()
        found = {name: value.clone() for name, value in found.items()}
    return TokenView(logprob, entropy, None if moments is None else Moments(*moments), found)


Tensors = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor, Tensor] | None, dict[str, Tensor]]


def token_tensors(
    model: Any,
    rollout: Rollout,
    want_entropy: bool,
    want_moments: bool,
    live: Tensor | None,
    packed: bool,
    read: Reader | None = None,
    raw: Sequence[str] = (),
    lens: Lens | None = None,
    call: Any = None,
) -> Tensors:
    """The fields of a `TokenView` and of its `Moments` as plain tensors, which sharding can follow.

    `call` runs a sharded model's forward pass in place of `model`. Then nothing is raised for logits that are not
    finite, because the other processes would wait for this one's backward pass: the values are nan.
    """
    line = _packed(rollout) if packed and bool(rollout.response_mask.any()) else _padded(rollout)
    if _has_plain_head(model):
        hidden = line.hidden_of_tokens(_hidden(model, line, lens))
        raises = call is None
        return _head_tensors(model, rollout, line, hidden, want_entropy, want_moments, live, read, raw, raises)
    logits = _logits(model, line, lens, call or model).float()
    log_p = torch.log_softmax(logits / _one_temperature(rollout), -1)
    logprob = log_p.gather(-1, line.ids.unsqueeze(-1)).squeeze(-1)
    entropy = line.spread(entropy_of_log(log_p)) if want_entropy else None
    moments = tuple(map(line.spread, _moments(log_p))) if want_moments else None
    found = dict(read(log_p, line.ids)) if read else {}
    found |= _raw(logits, log_p, line.ids, raw)
    return line.spread(logprob), entropy, moments, {name: line.spread(value) for name, value in found.items()}  # type: ignore[return-value]


def _hidden(model: Any, line: _Line, lens: Lens | None) -> Tensor:
    """What the head is given, at all positions [B, S, d]."""
    if lens is not None:
        return lens_hidden(model, lens, **line.inputs)
    hidden: Tensor = model.get_decoder()(**line.inputs).last_hidden_state
    return hidden


def _logits(model: Any, line: _Line, lens: Lens | None, call: Any) -> Tensor:
    """Logits at the tokens, [B, T, V] or [n, V]."""
    if lens is None:
        return line.of_tokens(call(**line.inputs, logits_to_keep=line.keep).logits)
    logits: Tensor = model.get_output_embeddings()(line.hidden_of_tokens(_hidden(model, line, lens)))
    return logits


def untouched(model: Any, lens: Lens) -> list[Tensor]:
    """Parameters without influence on the policy of `lens`: layers above it, and the final norm of a raw one. Empty
    for the last layer."""
    own = parts(model)
    if lens.layer == own.depth:
        return []
    modules = [*own.layers[lens.layer :], *([own.final_norm] if lens.kind == "raw" else [])]
    return [p for module in modules for p in module.parameters()]


def _raw(logits: Tensor, log_p: Tensor, ids: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The statistics `names` of `RAW`."""
    ways = {
        "sampled_logit": lambda: logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "token_certainty": lambda: -log_p.mean(-1),
    }
    return {name: ways[name]() for name in names}


@dataclass(frozen=True)
class _Line:
    """How rows go through the model: padded to [B, P + T], or as one sequence [1, N]."""

    inputs: dict[str, Any]
    ids: Tensor
    """The response tokens: [B, T], or those of all rows in turn [n]."""
    keep: int | Tensor
    """`logits_to_keep` of transformers: the last positions, or these."""
    mask: Tensor | None = None
    """Where the packed tokens belong [B, T]."""

    def of_tokens(self, kept: Tensor) -> Tensor:
        """What the kept positions predict: the last one of padded rows predicts nothing recorded."""
        return kept[:, :-1] if self.mask is None else kept[0]

    def hidden_of_tokens(self, hidden: Tensor) -> Tensor:
        """Hidden states at the positions that predict the tokens."""
        return hidden[:, -int(self.keep) : -1] if self.mask is None else hidden[0, self.keep]

    def live(self, live: Tensor | None) -> Tensor | None:
        """Flags [B, T] in the order of the tokens."""
        return live if self.mask is None or live is None else live[self.mask]

    def spread(self, value: Tensor) -> Tensor:
        """Values of the tokens as [B, T], zero where a packed row has none."""
        if self.mask is None:
            return value
        return torch.zeros(self.mask.shape, dtype=value.dtype, device=value.device).masked_scatter(self.mask, value)


def _padded(rollout: Rollout) -> _Line:
    # the logits at position i predict token i + 1: keep those of the last prompt token up to the last but one
    return _Line(_model_inputs(rollout), rollout.response_ids, rollout.response_ids.shape[1] + 1)


def _packed(rollout: Rollout) -> _Line:
    """All tokens in one line. Positions start again with every row, by which transformers keeps rows apart."""
    mask = torch.cat([rollout.prompt_mask, rollout.response_mask], 1)
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
    place = (mask.flatten().long().cumsum(0) - 1).view_as(ids)
    keep = place[:, rollout.prompt_ids.shape[1] :][rollout.response_mask] - 1
    positions = (mask.long().cumsum(1) - 1)[mask]
    inputs = {"input_ids": ids[mask][None], "position_ids": positions[None], "use_cache": False}
    return _Line(inputs, rollout.response_ids[rollout.response_mask], keep, rollout.response_mask)


@torch.no_grad()
def packing_error(model: Any, rollout: Rollout) -> float:
    """Largest difference of log-probs between rows in one line and rows apart, in nats. Far above rounding where the
    model's attention does not keep packed rows apart."""
    apart, packed = (token_view(model, rollout, False, packed=value).logprob for value in (False, True))
    return float((apart - packed)[rollout.response_mask].abs().max())


def _has_plain_head(model: Any) -> bool:
    """A large vocabulary behind one linear map, with nothing between it and the logits."""
    changed = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    config = model.config
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = isinstance(head, torch.nn.Linear) and not any(getattr(config, name, None) for name in changed)
    return plain and config.vocab_size >= LARGE and hasattr(model, "get_decoder")


def _head_tensors(
    model: Any,
    rollout: Rollout,
    line: _Line,
    hidden: Tensor,
    want_entropy: bool,
    want_moments: bool,
    live: Tensor | None,
    read: Reader | None,
    raw: Sequence[str],
    raises: bool,
) -> Tensors:
    head = model.get_output_embeddings()
    flags, temperature = line.live(live), _one_temperature(rollout)
    try:
        stats = head_statistics(hidden, head.weight, line.ids, temperature=temperature, bias=head.bias, live=flags)
    except FloatingPointError:
        if raises:
            raise
        nan = line.spread(hidden.float().sum(-1) * float("nan"))  # with the gradient's path through all layers
        unknown = (nan.detach(),) * 4 if want_moments else None
        return nan, nan if want_entropy else None, unknown, dict.fromkeys(raw, nan)
    moments = None
    if want_moments:
        entropy, collision, cross = (line.spread(x.detach()) for x in (stats.entropy, stats.collision, stats.cross))
        moments = (entropy, collision, cross, torch.full_like(entropy, float("nan")))
    found = _read_head(hidden, head, line.ids, temperature, read) if read else {}
    certainty = stats.self_certainty + math.log(head.weight.shape[0])
    found |= {name: {"sampled_logit": stats.sampled_logit, "token_certainty": certainty}[name] for name in raw}
    spread = {name: line.spread(value) for name, value in found.items()}
    return line.spread(stats.logprob), line.spread(stats.entropy) if want_entropy else None, moments, spread


def _read_head(hidden: Tensor, head: Any, ids: Tensor, temperature: float, read: Reader) -> dict[str, Tensor]:
    """`read` over a large vocabulary, `READ_ROWS` tokens at a time; the backward pass forms their logits again."""

    def part(h: Tensor, i: Tensor) -> dict[str, Tensor]:
        return dict(read(torch.log_softmax(head(h).float() / temperature, -1), i))

    parts = [
        checkpoint(part, h, i, use_reentrant=False) if torch.is_grad_enabled() else part(h, i)
        for h, i in zip(
            torch.split(hidden.flatten(0, -2), READ_ROWS), torch.split(ids.flatten(), READ_ROWS), strict=True
        )
    ]
    return {name: torch.cat([p[name] for p in parts]).view(ids.shape) for name in parts[0]} if parts else {}


@torch.no_grad()
def _moments(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    finite = log_p.clamp_min(LEAST)
    p = finite.exp()
    weighted = p * finite
    entropy, collision = -weighted.sum(-1), p.square().sum(-1)
    cross, second = (p * weighted).sum(-1), weighted.square().sum(-1)
    return entropy, collision, cross, second + 2 * entropy * cross + entropy.square() * collision


def response_log_p(model: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities [B, T, V] of all tokens at every response position."""
    t = rollout.response_ids.shape[1]
    # the logits at position i predict token i + 1: keep those of the last prompt token up to the last but one
    logits = model(**_model_inputs(rollout), logits_to_keep=t + 1).logits[:, :-1]
    return torch.log_softmax(logits.float() / _one_temperature(rollout), -1)


def _model_inputs(rollout: Rollout) -> dict[str, Any]:
    inputs = {"input_ids": torch.cat([rollout.prompt_ids, rollout.response_ids], 1), "use_cache": False}
    if not bool(rollout.prompt_mask.all()):
        # right padding is attended to by nobody that counts, and full rows keep position ids simple
        mask = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.response_mask)], 1)
        inputs |= {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
    return inputs


def _one_temperature(rollout: Rollout) -> float:
    if rollout.policy_temperature is not None:
        return rollout.policy_temperature
    values = rollout.behaviour_temperature[rollout.mask]
    if not len(values):
        return 1.0
    first = float(values[0])
    if not bool((values == first).all()):
        raise ValueError("rows of different behaviour temperatures in one forward pass")
    return first if first > 0 else 1.0


def score(
    model: Any,
    rollout: Rollout,
    rows: int,
    tokens: int | None = None,
    world: Division | None = None,
    read: Reader | None = None,
    raw: Sequence[str] = (),
) -> Rollout:
    """Record `old_logprob`, `token_entropy`, `raw` (names of `RAW`) and what `read` finds of the current policy; see
    `scored`."""
    found = scored_statistics(model, rollout, ("logprob", "entropy", *raw), rows, tokens, world, read)
    logprob, entropy = found.pop("logprob"), found.pop("entropy")
    return rollout.with_(old_logprob=logprob).with_statistics(token_entropy=entropy, **found)


def score_layer(
    model: Any, rollout: Rollout, lens: Lens, rows: int, tokens: int | None = None, world: Division | None = None
) -> Rollout:
    """Record `LAYER_LOGPROB` and `LAYER_ENTROPY` [B, T] of the policy of `lens`, the old one of an update of it; see
    `scored`. `old_logprob` and `token_entropy` stay those of the model's own."""
    logprob, entropy = scored(model, rollout, rows, tokens, world, lens)
    return rollout.with_statistics(**{LAYER_LOGPROB: logprob, LAYER_ENTROPY: entropy})


def passes(rollout: Rollout, index: Tensor, rows: int, tokens: int | None = None) -> list[Tensor]:
    """The rows `index` cut into forward passes in their order: `rows` each, or where `tokens` is given as many as have
    at most so many prompt and response tokens together (a single one may have more)."""
    if tokens is None:
        return list(torch.split(index, rows)) if len(index) else []
    lengths = (rollout.prompt_mask.sum(1) + rollout.lengths)[index].tolist()
    sizes: list[int] = []
    room = 0
    for length in lengths:
        if not sizes or length > room:
            sizes.append(0)
            room = tokens
        sizes[-1] += 1
        room -= length
    return list(torch.split(index, sizes)) if sizes else []


def scored(
    model: Any,
    rollout: Rollout,
    rows: int,
    tokens: int | None = None,
    world: Division | None = None,
    lens: Lens | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, T] of the recorded tokens, zero outside the mask, without gradient.

    `rows` responses at a time, longest first; or packed, `tokens` tokens at a time. With a `world` its processes share
    the passes, and all of them get the whole. Raises FloatingPointError as `token_view` does, on all of them.
    """
    found = scored_statistics(model, rollout, ("logprob", "entropy"), rows, tokens, world, lens=lens)
    return found["logprob"], found["entropy"]


def scored_fields(
    model: Any,
    rollout: Rollout,
    fields: Sequence[str],
    rows: int,
    tokens: int | None = None,
    world: Division | None = None,
) -> list[Tensor]:
    """`scored` for any fields of a `TokenView`, of its `Moments`, such as `collision`, and of `RAW`."""
    return list(scored_statistics(model, rollout, fields, rows, tokens, world).values())


@torch.no_grad()
def scored_statistics(
    model: Any,
    rollout: Rollout,
    fields: Sequence[str],
    rows: int,
    tokens: int | None = None,
    world: Division | None = None,
    read: Reader | None = None,
    lens: Lens | None = None,
) -> dict[str, Tensor]:
    """`scored_fields` by name, and after them what `read` finds; of the policy of `lens`, see `token_view`."""
    shape, device = rollout.response_ids.shape, rollout.response_ids.device
    names = [*fields, *(_names(read, model.config.vocab_size, device) if read else ())]
    found = {name: torch.zeros(shape, device=device) for name in names}
    every = passes(rollout, rollout.lengths.argsort(descending=True), rows, tokens)
    for index in every if world is None else world.deal(every):
        # a process with one pass less runs along with one row: sharded weights are brought together by all
        part = rollout.rows(every[-1][-1:] if index is None else index)
        try:
            values = _fields(model, part, fields, tokens is not None, read, lens)
        except FloatingPointError:
            if world is None:
                raise
            values = dict.fromkeys(names, torch.full(part.mask.shape, float("nan"), device=device))
        for name in names if index is not None else ():
            own = values[name].float().masked_fill(~part.mask, 0.0)
            found[name][index, : own.shape[1]] = own
    if world is not None:
        found = {name: world.sum_(whole) for name, whole in found.items()}
        if bool(found[names[0]].isnan().any()):
            raise FloatingPointError("the policy's log-probs are not finite")
    return found


def _names(read: Reader, vocabulary: int, device: torch.device) -> list[str]:
    """What `read` will find, asked of one flat distribution: a process whose pass fails must know it too."""
    flat = torch.full((1, vocabulary), 1.0 / vocabulary, device=device).log()
    return list(read(flat, torch.zeros(1, dtype=torch.long, device=device)))


def _fields(
    model: Any, rollout: Rollout, fields: Sequence[str], packed: bool, read: Reader | None, lens: Lens | None
) -> dict[str, Tensor]:
    raw = [name for name in fields if name in RAW]
    plain = ("logprob", "entropy")
    moments = [name for name in fields if name not in (*plain, *RAW)]
    view = token_view(model, rollout, "entropy" in fields, bool(moments), None, packed, read, raw, lens)
    known = {name: getattr(view, name) for name in fields if name in plain}
    return known | {name: getattr(view.moments, name) for name in moments} | dict(view.read)
