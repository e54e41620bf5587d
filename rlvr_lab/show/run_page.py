"""Pages about runs: self-contained HTML that needs no network, and its part with transcripts coloured by entropy.

A page holds its style sheet and its script, follows the reader's light or dark theme, and can be read with a keyboard
alone. Everything that comes from a run (problems, responses, names, settings) is text and is escaped. Colour is never
the only cue: a token of at least ln 2 nats is underlined, and its numbers stand in a tooltip and in a line of text.

This module must not import plotly, because training runs draw `samples.html` with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .transcript import HIGH, visible

__all__ = ["page", "samples_page", "table", "transcripts"]

LONGEST = 2000
"""Tokens shown of one response."""
MOST = 30_000
"""Tokens on one page; a browser stays quick with that many."""
SCALES = (2.0, 1.0, 0.5)
"""Entropies (nats) at which the colour can be made strongest; the first one at the start."""

_HERE = Path(__file__).parent / "pages"


def page(title: str, body: str, *, scripts: Sequence[str] = ()) -> str:
    """A whole page. `body` is HTML, `title` text; `scripts` go before the page's own."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    own = (_HERE / "page.js").read_text(encoding="utf-8")
    code = "".join(f"<script>{script}</script>" for script in (*scripts, own))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><button id="theme" type="button">Theme</button></header>\n'
        f"<main>{body}</main>\n{code}</body></html>\n"
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, keys: Sequence[str] | None = None
) -> str:
    """A table of text; the first column names the row. `keys`: one `data-arm` per row, for a page that marks rows."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    marks = [f' data-arm="{escape(key)}"' for key in keys] if keys is not None else [""] * len(rows)
    body = "".join(
        f'<tr{mark}><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(value)}</td>' for value in row[1:])
        + "</tr>"
        for mark, row in zip(marks, rows, strict=True)
    )
    label = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption class="muted">{label}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def samples_page(rows: Sequence[Mapping[str, Any]], run: str) -> str:
    """The page `samples.html` of a run from rows of its `samples.jsonl`, oldest first; the newest come first here."""
    return page(f"Transcripts of {run}", transcripts(list(reversed(rows))))


def transcripts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Responses with their tokens coloured by entropy, in the order given, with what is needed to choose and to read.

    A row has `step`, `problem`, `response`, `correct`, `answer`, and per token `tokens`, `token_logprob` and
    `token_entropy`, and where an environment spoke `token_told`; a row of an older log without `tokens` shows its text
    uncoloured. Rows beyond `MOST` tokens in all
    are left out, and the page says so.
    """
    if not rows:
        return "<p>No transcript was recorded yet.</p>"
    kept: list[str] = []
    tokens = 0
    for number, row in enumerate(rows, 1):
        tokens += min(len(row.get("tokens") or ()), LONGEST)
        if kept and tokens > MOST:
            break
        kept.append(_response(row, number))
    left = len(rows) - len(kept)
    note = f'<p class="muted">{left} more are in samples.jsonl.</p>' if left else ""
    return _controls(rows[: len(kept)]) + _legend() + "".join(kept) + note


def _controls(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = list(dict.fromkeys(str(row.get("step", "")) for row in rows))
    verdicts = (("true", "correct"), ("false", "wrong"))
    scale = "".join(f'<option value="{s:g}">{s:g} nats</option>' for s in SCALES)
    return (
        '<div class="controls">'
        f"<label>Step {_filter('step', 'all steps', [(s, s) for s in steps])}</label>"
        f"<label>Verdict {_filter('correct', 'all', verdicts)}</label>"
        f'<label>Full colour at <select id="scale">{scale}</select></label>'
        f'<output id="shown">{len(rows)} shown</output></div>'
    )


def _filter(name: str, everything: str, options: Sequence[tuple[str, str]]) -> str:
    choices = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<select data-filter="{name}"><option value="">{everything}</option>{choices}</select>'


def _legend() -> str:
    swatches = " ".join(f'<span class="swatch" style="--h:{h:g}">{h:g}</span>' for h in (0.0, 0.25, 0.5, 1.0, 2.0))
    return (
        f"<p>Entropy of the policy at each token, in nats: {swatches}. Underlined: at least {HIGH:.2f} nats, as "
        "undecided as a fair coin. Point at a token, or go to a response with Tab and through it with the arrow keys, "
        "for its probability and entropy.</p>"
    )


def _response(row: Mapping[str, Any], number: int) -> str:
    entropy = [math.nan if h is None else float(h) for h in row.get("token_entropy") or ()]
    correct = bool(row.get("correct"))
    facts = [f"step {row.get('step', '?')}", "correct" if correct else "wrong"]
    facts += [f"answer {row['answer']}" if row.get("answer") is not None else "no answer"]
    facts += [f"reward {row['reward']:.3g}"] if isinstance(row.get("reward"), int | float) else []
    facts += ["cut off"] if row.get("finished") is False else []
    known = [h for h in entropy if math.isfinite(h)]
    facts += [f"{len(entropy)} tokens, mean entropy {sum(known) / len(known):.3f} nats"] if known else []
    head = escape(" · ".join(facts))
    step = escape(str(row.get("step", "")))
    return (
        f'<article class="response" data-step="{step}" data-correct="{str(correct).lower()}"'
        f' aria-labelledby="r{number}"><h3 id="r{number}">{head}</h3>'
        f'<p class="problem">{escape(str(row.get("problem", "")))}</p>{_tokens(row, entropy, number)}</article>\n'
    )


def _tokens(row: Mapping[str, Any], entropy: Sequence[float], number: int) -> str:
    texts = row.get("tokens")
    if not texts or len(texts) != len(entropy):
        return f'<div class="tokens">{escape(str(row.get("response", "")))}</div>'
    logprob = row.get("token_logprob") or [math.nan] * len(texts)
    told = row.get("token_told") or [False] * len(texts)
    shown = zip(texts[:LONGEST], logprob, entropy, told, strict=False)
    spans = "".join(_token(str(text), math.nan if p is None else float(p), h, said) for text, p, h, said in shown)
    cut = f'<p class="muted">{len(texts) - LONGEST} more tokens are left out.</p>' if len(texts) > LONGEST else ""
    return (
        f'<div class="tokens" tabindex="0" role="group" aria-label="Tokens of response {number}; arrow keys move">'
        f'{spans}</div>{cut}<output class="status" aria-live="polite"></output>'
    )


def _token(text: str, logprob: float, entropy: float, told: bool = False) -> str:
    name = visible(text) if text else "part of a character"
    chance = f"probability {math.exp(logprob):.3g}, log-prob {logprob:.3f} nats, " if math.isfinite(logprob) else ""
    level = f"{entropy:.3f} nats" if math.isfinite(entropy) else "not measured"
    title = escape(f"{name.strip()}: " + ("said by the environment" if told else f"{chance}entropy {level}"))
    kind = "t told" if told else "t high" if entropy >= HIGH else "t"
    shown = escape(visible(text)) if text else "·"
    # a line break inside the token is drawn after its mark; otherwise the background would end in mid-air
    height = round(entropy, 3) if entropy > 0 else 0
    return f'<span class="{kind}" style="--h:{height:g}" title="{title}">{shown}</span>' + "\n" * text.count("\n")
