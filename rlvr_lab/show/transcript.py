"""A response with each token marked by the policy's entropy at that position.

The output is one self-contained piece of HTML, because Colab and JupyterLab do not know the book's style sheet. It
must be readable on a light and on a dark page, so the text keeps the page's own colour and entropy is a translucent
amber behind it (contrast stays above 4.5:1 on both). Colour is not the only cue: tokens at or above ``high`` are
underlined and carry their entropy as a superscript, and a table lists every value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["TokenTranscript", "transcript_html", "visible"]

HIGH = math.log(2)
"""Default mark for a high-entropy token: as undecided as a fair coin between two tokens."""

FULL_SCALE = 2.0
"""Entropy in nats at which the background is strongest. Fixed, so that two transcripts can be compared by eye."""

_AMBER = "214, 150, 36"
_STRONGEST = 0.45  # background opacity; chosen so that ink stays readable on both themes

_STYLE = """<style>
.rlvr-transcript { margin: 1rem 0; color: inherit; }
.rlvr-transcript figcaption { color: inherit; font-weight: 600; text-align: start; margin: 0; }
.rlvr-transcript .rlt-text { font-family: ui-monospace, monospace; line-height: 2.1; white-space: pre-wrap; }
.rlvr-transcript .rlt-high { text-decoration: underline 2px; text-underline-offset: 3px; }
.rlvr-transcript sup { font-size: .7em; line-height: 0; }
.rlvr-transcript .rlt-legend { font-size: .9em; }
.rlvr-transcript .rlt-legend span { padding: 0 .5em; }
</style>"""


@dataclass(frozen=True)
class TokenTranscript:
    """Tokens with their entropies; shows itself as HTML in a notebook and as one stable line of text elsewhere."""

    tokens: tuple[str, ...]
    entropy: tuple[float, ...]
    kinds: tuple[str, ...] | None
    title: str
    high: float

    def __repr__(self) -> str:
        """A line that nbval can compare: counts and rounded means only."""
        marked = sum(h >= self.high for h in self.entropy)
        parts = [
            f"{len(self.tokens)} tokens",
            f"mean entropy {_mean(self.entropy):.3f} nats",
            f"{marked} at or above {self.high:.3f} nats",
        ]
        for kind, values in self.by_kind().items():
            parts.append(f"{kind}: {_mean(values):.3f} nats over {len(values)}")
        return f"TokenTranscript({'; '.join(parts)})"

    def by_kind(self) -> dict[str, list[float]]:
        """The entropies of each kind of token, kinds in order of appearance; empty without kinds."""
        groups: dict[str, list[float]] = {}
        for kind, value in zip(self.kinds or (), self.entropy, strict=False):
            groups.setdefault(kind, []).append(value)
        return groups

    def _repr_html_(self) -> str:
        kinds = self.kinds or ("",) * len(self.tokens)
        rows = list(zip(self.tokens, self.entropy, kinds, strict=True))
        text = "".join(self._token(*row) for row in rows)
        return (
            f'{_STYLE}<figure class="rlvr-transcript"><figcaption>{escape(self.title)}</figcaption>'
            f'<div class="rlt-text">{text}</div>{self._legend()}{self._table(rows)}</figure>'
        )

    def _token(self, token: str, entropy: float, kind: str) -> str:
        info = f"{entropy:.2f} nats" + (f", {kind}" if kind else "")
        shown = escape(visible(token))
        if entropy >= self.high:
            shown = f'<span class="rlt-high">{shown}</span><sup>{entropy:.1f}</sup>'
        # A line break inside the token is drawn after its mark; otherwise the background would end in mid-air.
        return f'<span title="{escape(info)}" style="{_background(entropy)}">{shown}</span>' + "\n" * token.count("\n")

    def _legend(self) -> str:
        steps = [0.0, 0.5, 1.0, FULL_SCALE]
        names = [f"{step:g}" for step in steps[:-1]] + [f"{FULL_SCALE:g} or more"]
        swatches = "".join(
            f'<span style="{_background(step)}">{name}</span>' for step, name in zip(steps, names, strict=True)
        )
        mark = f"underlined, with its value: {self.high:.2f} nats or more"
        return f'<div class="rlt-legend">Entropy in nats: {swatches} ({mark})</div>'

    def _table(self, rows: Sequence[tuple[str, float, str]]) -> str:
        head = "<th>Position</th><th>Token</th><th>Entropy (nats)</th>" + ("<th>Kind</th>" if self.kinds else "")
        body = "".join(
            f"<tr><td>{i}</td><td><code>{escape(visible(token))}</code></td><td>{entropy:.2f}</td>"
            + (f"<td>{escape(kind)}</td>" if self.kinds else "")
            + "</tr>"
            for i, (token, entropy, kind) in enumerate(rows)
        )
        return f"<details><summary>All values as a table</summary><table><tr>{head}</tr>{body}</table></details>"


def transcript_html(
    tokens: Sequence[str],
    entropy: Sequence[float],
    *,
    kinds: Sequence[str] | None = None,
    title: str = "Entropy of the policy at each token",
    high: float = HIGH,
) -> TokenTranscript:
    """Mark each token with the entropy (nats) of the distribution it was sampled from.

    ``kinds`` optionally names what each token is ("fork", "computed", …); the means per kind then appear in the text
    form.
    """
    if len(tokens) != len(entropy) or (kinds is not None and len(kinds) != len(tokens)):
        raise ValueError("tokens, entropy and kinds must have equal length")
    values = tuple(float(value) for value in entropy)
    if any(not math.isfinite(value) or value < -1e-6 for value in values):
        raise ValueError("an entropy must be finite and not negative")
    # Rounding error of a float32 log-softmax may leave -1e-8 at a certain token; that is a zero.
    return TokenTranscript(
        tokens=tuple(tokens),
        entropy=tuple(max(value, 0.0) for value in values),
        kinds=None if kinds is None else tuple(kinds),
        title=title,
        high=high,
    )


def _background(entropy: float) -> str:
    opacity = _STRONGEST * min(entropy / FULL_SCALE, 1.0)
    return f"background: rgba({_AMBER}, {opacity:.2f})"


def visible(token: str) -> str:
    """Whitespace that would otherwise vanish: line breaks as an arrow, a token of blanks only as open boxes."""
    token = token.replace("\n", "↵")
    return token if token.strip() else token.replace(" ", "␣")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
