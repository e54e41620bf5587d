r"""DiffAdapt: a probe reads how hard a prompt is and picks one of three decoding settings (arXiv 2510.19669).

    h = state of the prompt's last token, under the normal template, after the final norm [inferred]
    class = argmax probe(h)        response ~ model(style_class(question), temperature_class, floor(fraction_class max))

| class  | temperature | fraction of max tokens | style |
|--------|-------------|------------------------|-------|
| easy   | 0.5         | 0.4                    | solve directly, then verify |
| normal | 0.8         | 1.0                    | step by step |
| hard   | 0.4         | 0.5                    | resource-aware outline, fail fast |

Hard gets fewer tokens than normal on purpose: failing is cheaper early. The class is decided once. The language model
is frozen; the probe learns labels that the model gives itself (`difficulty.proxy_labels`). Where the style of a class
differs from the normal one, its prompt is read a second time; the paper's latency does not discuss this, our report
counts it as `extra_tokens`. Temperatures differ between classes, so compare with every fixed class and with
`difficulty.matched_random`, not with normal alone. No official code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .difficulty import Thresholds, measure, proxy_labels, tercile_thresholds
from .lm import Response, Verify, as_policy, as_questions, prompt_ids, prompt_states, respond, sample, verified
from .probe import Assessment, Probe, ProbeSettings, assess, fit_probe
from .report import Report
from .strategies import PAPER, PLAIN, Strategy, Table, check_table

__all__ = ["PAPER", "PLAIN", "DiffAdapt", "Fit", "Labelled", "Strategy", "Table"]

WEIGHTS, SETTINGS = "probe.safetensors", "diffadapt.json"


@dataclass(frozen=True)
class Labelled:
    """What the model's own samples at temperature 1 say of problems, in their order: share correct, entropy in nats,
    label."""

    correct_rate: tuple[float, ...]
    entropy: tuple[float, ...]
    label: tuple[str, ...]
    thresholds: Thresholds


@dataclass(frozen=True)
class Fit:
    """How a probe came about. `held_out` assesses it on problems that it did not see, `training` on those it saw."""

    labelled: Labelled
    training: Assessment
    held_out: Assessment


class DiffAdapt:
    """The method over one model; `fit` makes one, or give a trained probe.

    Raises UserError where the table lacks a class, a budget has no token, or the probe is of another width.
    """

    def __init__(
        self, model: Any, tokenizer: Any, probe: Probe, *, max_tokens: int = 1024, table: Table = PAPER,
        rows: int = 64, fitted: Fit | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.probe, self.rows, self.fitted = as_policy(model, tokenizer), probe, rows, fitted
        self.table, self.max_tokens = check_table(table, max_tokens), max_tokens
        width = self.policy.model.config.hidden_size
        if probe.width != width:
            raise UserError(
                f"the probe reads states of width {probe.width}, the model has {width}: fit it on this model"
            )

    @classmethod
    def fit(
        cls, model: Any, tokenizer: Any, problems: Sequence[str | tuple[str, Any]], verify: Verify, *,
        generator: torch.Generator, max_tokens: int = 1024, samples: int = 10, thresholds: Thresholds | None = None,
        table: Table = PAPER, settings: ProbeSettings | None = None, held_out: float = 0.2, rows: int = 64,
    ) -> DiffAdapt:  # fmt: skip
        """Sample each problem, label it, and train the probe on all but the share `held_out` of the problems.

        `thresholds` of None are chosen from the problems trained on (`tercile_thresholds`).
        Raises UserError for fewer than two problems to train on, and where all labels are one class.
        """
        table, policy, questions = check_table(table, max_tokens), as_policy(model, tokenizer), as_questions(problems)
        order = torch.randperm(len(questions), generator=generator).tolist()
        train = len(questions) - int(held_out * len(questions))
        if not 0 <= held_out < 1 or train < 2:
            raise UserError(f"held_out {held_out} of {len(questions)} problems leaves {train} to train on, not 2")
        seen, new = order[:train], order[train:]
        prompts = prompt_ids(policy, [table["normal"].prompt(q.text) for q in questions], max_tokens)
        rate, entropy = measure(sample(policy, prompts, samples, max_tokens, generator, rows), questions, verify)
        at = thresholds or tercile_thresholds([rate[i] for i in seen], [entropy[i] for i in seen])
        labels, states = proxy_labels(rate, entropy, at), prompt_states(policy, prompts, rows=rows)
        probe = fit_probe(states[seen], [labels[i] for i in seen], generator, settings)
        called = probe.predict(states)
        own, other = (assess([called[i] for i in part], [labels[i] for i in part]) for part in (seen, new))
        fitted = Fit(Labelled(tuple(rate), tuple(entropy), tuple(labels), at), own, other)
        return cls(model, tokenizer, probe, max_tokens=max_tokens, table=table, rows=rows, fitted=fitted)

    def states(self, texts: Sequence[str]) -> Tensor:
        """What the probe reads [N, d]: states under the normal template."""
        prompts = prompt_ids(self.policy, [self.table["normal"].prompt(text) for text in texts])
        return prompt_states(self.policy, prompts, rows=self.rows)

    def choose(self, texts: Sequence[str]) -> list[str]:
        """The class of each problem, before anything is generated."""
        return self.probe.predict(self.states(texts).to(self.probe.first.weight))

    def respond(self, texts: Sequence[str], choice: Sequence[str], generator: torch.Generator) -> list[Response]:
        """One response to each problem with the strategy of its class; the same generator state and class give the
        same response, whatever the others are."""
        chosen = [self.table[name] for name in choice]
        prompts = prompt_ids(self.policy, [s.prompt(t) for s, t in zip(chosen, texts, strict=True)], self.max_tokens)
        limits, temperatures = [s.max_tokens(self.max_tokens) for s in chosen], [s.temperature for s in chosen]
        return respond(
            self.policy, prompts, max_tokens=limits, temperature=temperatures, generator=generator, rows=self.rows
        )

    def run(
        self,
        problems: Sequence[str | tuple[str, Any]],
        *,
        verify: Verify | None = None,
        generator: torch.Generator,
        baseline: Sequence[Response] | None = None,
        choice: Sequence[str] | None = None,
    ) -> Report:
        """Answer each problem with the strategy that the probe picks, beside the normal strategy for all.

        Both use the same random numbers, so a problem that is called normal has one response. `choice` replaces the
        probe's classes, for controls; `baseline` replaces the normal responses. Raises UserError for no problem, and
        for a choice of other classes or length.
        """
        questions = as_questions(problems)
        texts = [q.text for q in questions]
        again = generator.clone_state()
        called = list(choice) if choice is not None else self.choose(texts)
        if len(called) != len(texts) or not set(called) <= set(self.table):
            raise UserError(f"choice must name one of {', '.join(self.table)} for each of the {len(texts)} problems")
        own = self.respond(texts, called, generator)
        plain = list(baseline) if baseline is not None else self.respond(texts, ["normal"] * len(texts), again)
        return Report(
            method="diffadapt",
            problem=texts,
            text=[r.text for r in own],
            tokens=[len(r) for r in own],
            baseline_tokens=[len(r) for r in plain],
            correct=verified(own, questions, verify),
            baseline_correct=verified(plain, questions, verify),
            extra_tokens=self._second_prefill(texts, called),
            notes={"strategy": called},
        )

    def _second_prefill(self, texts: Sequence[str], choice: Sequence[str]) -> list[int]:
        """Tokens of each prompt that were read only to choose: those of the normal template, where another is used."""
        normal = self.table["normal"]
        prompts = prompt_ids(self.policy, [normal.prompt(text) for text in texts])
        same = [self.table[name].style == normal.style for name in choice]
        return [0 if equal else len(ids) for ids, equal in zip(prompts, same, strict=True)]

    def save(self, folder: Path | str) -> None:
        """Write the probe's weights (safetensors) and the settings (JSON) to `folder`."""
        from safetensors.torch import save_file

        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.probe.state_dict().items()}, where / WEIGHTS)
        thresholds = asdict(self.fitted.labelled.thresholds) if self.fitted else None
        table = {name: asdict(strategy) for name, strategy in self.table.items()}
        settings = {"max_tokens": self.max_tokens, "table": table, "thresholds": thresholds}
        (where / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, model: Any, tokenizer: Any, folder: Path | str, *, rows: int = 64) -> DiffAdapt:
        """What `save` wrote, for the same model. Raises UserError where a file is missing or holds something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        where = Path(folder)
        try:
            weights = load_file(where / WEIGHTS)
            settings = json.loads((where / SETTINGS).read_text(encoding="utf-8"))
            probe = Probe(weights["first.weight"].shape[1], weights["first.weight"].shape[0])
            probe.load_state_dict(weights)
            table = {name: Strategy(**strategy) for name, strategy in settings["table"].items()}
            most = int(settings["max_tokens"])
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{where} holds no DiffAdapt probe: {_reason(error)}") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{where / SETTINGS} is no JSON: {error}") from error
        return cls(model, tokenizer, probe.eval(), max_tokens=most, table=table, rows=rows)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
