r"""V-Reason, text only: steer the entropy of a frozen model by a controller in its last layer's value cache.

    from rlvr_lab.inference.v_reason import VReason
    method = VReason(model, tokenizer, evidence=lambda text: text.split("Question:")[0])
    print(method.run(problems, verify=verify, generator=generator))

A change dV, one block [kv heads, |C|, d_h] per prompt, starts at 0 and is added to the last layer's cached values at
the controlled positions C, here those of the evidence in the prompt (`policy.value_cache`). Per token: cached forward
pass, H_t, EMA, phase and sign; every k tokens, gradient steps on dV; then the token is drawn from the updated logits
(`inference.entropy_switch` has the formulas). dV persists to later tokens; each row has its own dV, EMA and phase. The
sampling temperature stays out of H_t. |C| = 0 is plain sampling, to the token.

Source: Video Reasoning without Training, arXiv 2510.17045, no code. In the paper C are the video tokens of a vision
model; that text evidence can stand in for them is our construction, card papers/v_reason.md, 4c [inferred]. Carries
over: frozen weights, an objective without labels, the controller's place, EMA switching. Does not: video tokens (many,
redundant), grounding, pruning, every published number, and traces of hundreds of tokens with an entropy peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..core.entropy import softmax_entropy
from ..core.rollout import pad
from ..errors import UserError, nearest
from ..rollout.engine import draw
from ..rollout.streams import PromptNoise, keyed_seeds
from .entropy_switch import Settings, Switch, steer
from .lm import Response, Verify, as_policy, as_questions, prompt_ids, respond, verified
from .report import Report
from .temperature_match import final_entropy, match_temperature, mean, pooled_entropy

Evidence = Callable[[str], str]
"""The part of a problem's text that is controlled; "" for none."""


@dataclass
class Trace:
    """What happened at each token of one response, in nats; lists over tokens."""

    ids: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    """H_t before the inner steps, at temperature 1."""
    drawn_entropy: list[float] = field(default_factory=list)
    """Entropy of the distribution that the token was drawn from: after the steps, at the sampling temperature."""
    ema: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    exploit: list[bool] = field(default_factory=list)

    @property
    def final_entropy(self) -> float:
        """See `final_entropy`, of the distributions that tokens were drawn from."""
        return final_entropy(self.drawn_entropy)


class VReason:
    """The controller on any supported causal LM (`policy.access.SUPPORTED`) with its tokenizer.

    `evidence(text)` names the part of a problem to control; without it, all prompt positions but the first are. Further
    keywords are fields of `entropy_switch.Settings`. `rows` prompts are in flight at once.
    Raises UserError for an unsupported architecture, a last layer without full attention, weights made under inference
    mode, or an unknown setting.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        evidence: Evidence | None = None,
        temperature: float = 1.0,
        max_tokens: int = 256,
        rows: int = 32,
        **settings: Any,
    ) -> None:
        from ..policy.value_cache import ControlledCache  # transformers is slow to import: here, not above

        known = [f.name for f in fields(Settings)]
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"VReason has no setting '{unknown[0]}'; {nearest(unknown[0], known)}")
        if temperature < 0 or max_tokens < 1 or rows < 1:
            raise UserError(
                f"temperature {temperature}, max_tokens {max_tokens}, rows {rows}: the first must be at least 0, the "
                "others at least 1"
            )
        ControlledCache(model)
        self.policy, self.evidence, self.settings = as_policy(model, tokenizer), evidence, Settings(**settings)
        self.temperature, self.max_tokens, self.rows = temperature, max_tokens, rows
        self._eos = torch.tensor(self.policy.eos_ids, device=self.policy.device)

    def run(
        self,
        problems: Sequence[str | tuple[str, Any]],
        *,
        verify: Verify | None = None,
        generator: torch.Generator,
        baseline: Sequence[Response] | None = None,
    ) -> Report:
        """One response to each problem, beside the same model without a controller, drawn with the same random numbers.

        `baseline` replaces the latter, for instance by `temperature_matched`. The notes hold mean and final entropy, in
        nats, and the share of tokens in the exploit phase.
        """
        questions = as_questions(problems)
        texts = [q.text for q in questions]
        again = torch.Generator(device=generator.device)
        again.set_state(generator.get_state())
        traces = self.traces(texts, generator)
        found = [self.response(trace) for trace in traces]
        if baseline is None:
            baseline = self.plain(texts, again)
        notes: dict[str, list[float]] = {
            "mean_entropy": [mean(t.drawn_entropy) for t in traces],
            "final_entropy": [t.final_entropy for t in traces],
            "baseline_entropy": [mean(r.entropy) for r in baseline],
            "exploit_share": [mean(t.exploit) for t in traces],
        }
        return Report(
            "v_reason", texts, [r.text for r in found], [len(r) for r in found], [len(r) for r in baseline],
            verified(found, questions, verify), verified(baseline, questions, verify), notes=notes,
        )  # fmt: skip

    def plain(
        self, texts: Sequence[str], generator: torch.Generator, temperature: float | None = None
    ) -> list[Response]:
        """Responses without a controller, at the method's temperature or another."""
        return respond(
            self.policy, prompt_ids(self.policy, texts, self.max_tokens), max_tokens=self.max_tokens,
            temperature=self.temperature if temperature is None else temperature, generator=generator, rows=self.rows,
        )  # fmt: skip

    def temperature_matched(
        self, texts: Sequence[str], generator: torch.Generator, entropy: float
    ) -> tuple[float, list[Response]]:
        """The temperature at which plain sampling has this mean token entropy, and responses at it: the control.

        Entropies are pooled over tokens, of the distribution that they are drawn from. Every trial has the same random
        numbers. Raises UserError where no temperature between 0.05 and 5 gives this entropy.
        """
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))

        def at(temperature: float) -> list[Response]:
            return self.plain(texts, torch.Generator().manual_seed(seed), temperature)

        temperature = match_temperature(lambda t: pooled_entropy([r.entropy for r in at(t)]), entropy)
        return temperature, at(temperature)

    def traces(self, texts: Sequence[str], generator: torch.Generator) -> list[Trace]:
        """Every token of every response. May be called inside `torch.no_grad` or `torch.inference_mode`.

        A response depends on its prompt, its place and the generator's state, not on the prompts beside it.
        """
        prompts = prompt_ids(self.policy, texts, self.max_tokens)
        places = [self.positions(text, ids) for text, ids in zip(texts, prompts, strict=True)]
        seeds = keyed_seeds(generator, range(len(prompts)))
        found: list[Trace] = []
        for first in range(0, len(prompts), self.rows):
            some = slice(first, first + self.rows)
            with torch.inference_mode(False), torch.no_grad():
                found += self._batch(prompts[some], places[some], seeds[some])
        return found

    def positions(self, text: str, ids: Sequence[int]) -> list[int]:
        """Controlled positions of a prompt's tokens `ids`.

        Raises UserError where the evidence is not a part of the text, or the tokenizer gives no offsets.
        """
        if self.evidence is None:
            return list(range(1, len(ids)))
        part = self.evidence(text)
        return evidence_positions(self.policy.tokenizer, text, part, ids) if part else []

    def _batch(self, prompts: list[list[int]], places: list[list[int]], seeds: list[int]) -> list[Trace]:
        from ..policy.value_cache import ControlledCache, tail_of

        device, rows = self.policy.device, len(prompts)
        ids = pad(prompts, self.policy.pad_id, torch.long, left=True).to(device)
        mask = pad([[1] * len(p) for p in prompts], 0, torch.long, left=True).to(device)
        slots = [[ids.shape[1] - len(p) + place for place in row] for p, row in zip(prompts, places, strict=True)]
        # the signs of the rule 'random' have a stream of their own: tokens are drawn alike under every rule
        noise, coins = (PromptNoise([s ^ own for s in seeds], 1, self.max_tokens).rows(0, rows).to(device)
                        for own in (0, 1))  # fmt: skip
        cache = ControlledCache(self.policy.model)
        traces, running = [Trace() for _ in prompts], torch.ones(rows, dtype=torch.bool, device=device)
        with tail_of(self.policy.model, cache) as tail:
            logits = self._prefill(ids, mask, cache)
            delta = cache.control(slots)
            optimizer = self.settings.optimizer_of(delta) if delta.numel() else None
            switch = Switch(self.settings, rows, logits.dtype, str(device))
            for step in range(self.max_tokens):
                entropy = softmax_entropy(logits)
                alpha = switch.update(entropy, coins[:, step])
                if optimizer is not None and step % self.settings.every == 0:
                    logits, _ = steer(tail.logits, delta, alpha * running, optimizer, self.settings.inner_steps)
                tokens, _, drawn = draw(logits.float(), self.temperature, noise[:, step])
                _write(traces, running, tokens, entropy, drawn, alpha, switch)
                running = running & ~torch.isin(tokens, self._eos)
                if not bool(running.any()) or step + 1 == self.max_tokens:
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                logits = self._forward(tokens[:, None], mask, cache)
        return traces

    def _prefill(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """The last prompt token goes apart, so that the tail of the first token is one position long, too."""
        if ids.shape[1] > 1:
            self._forward(ids[:, :-1], mask[:, :-1], cache)
        return self._forward(ids[:, -1:], mask, cache)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        attention = None if bool(mask.all()) else mask
        out = self.policy.model(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def response(self, trace: Trace) -> Response:
        """A trace as a response; its entropies are those of the distributions that the tokens were drawn from."""
        finished = trace.ids[-1] in self.policy.eos_ids
        said = trace.ids[:-1] if finished else trace.ids
        return Response(trace.ids, self.policy.decode(said), trace.drawn_entropy, finished)


def evidence_positions(tokenizer: Any, text: str, part: str, ids: Sequence[int]) -> list[int]:
    """Places in a prompt's tokens `ids` that write `part` of `text`, the prompt being as `lm.prompt_ids` makes it.

    A token that straddles an end of the part belongs to it. Raises UserError where `part` is no part of the text, or
    the tokenizer cannot say which characters a token writes.
    """
    if part not in text:
        raise UserError(f"evidence {part[:40]!r} is no part of the problem {text[:40]!r}: return a substring of it")
    written, template = text, bool(getattr(tokenizer, "chat_template", None))
    if template:
        messages = [{"role": "user", "content": text}]
        written = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    begin = written.find(part, max(0, written.find(text[: text.index(part)] + part)))
    try:
        coded = tokenizer(written, return_offsets_mapping=True, add_special_tokens=not template)
    except NotImplementedError:
        raise UserError("evidence needs a fast tokenizer, one that knows which characters a token writes") from None
    if list(coded["input_ids"]) != list(ids) or begin < 0:
        raise UserError("evidence cannot be located: the chat template changes the text; leave evidence out")
    return [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < begin + len(part) and b > begin]


def _write(
    traces: Sequence[Trace],
    running: Tensor,
    tokens: Tensor,
    entropy: Tensor,
    drawn: Tensor,
    alpha: Tensor,
    switch: Switch,
) -> None:
    columns = [x.tolist() for x in (tokens, entropy, drawn, switch.ema, alpha, switch.exploit, running)]
    for trace, (token, before, after, ema, sign, late, live) in zip(traces, zip(*columns, strict=True), strict=True):
        if live:
            trace.ids.append(token)
            trace.entropy.append(before)
            trace.drawn_entropy.append(after)
            trace.ema.append(ema)
            trace.alpha.append(sign)
            trace.exploit.append(late)
