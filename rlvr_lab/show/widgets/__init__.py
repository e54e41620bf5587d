"""Widgets whose whole behaviour is in JavaScript, so they work on Colab, in JupyterLab and on the kernel-less pages.

Each widget answers one question. Its mathematics is a set of pure, exported functions that the tests run under node
and compare with Python. anywidget loads a module from a blob address, where relative imports do not work; the shared
helpers in ``common.js`` are therefore put in front of each widget's own file.

This package is the only one that imports anywidget: the rest of ``rlvr_lab`` must work without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anywidget
import traitlets

__all__ = [
    "ArmSwap",
    "AttentionDeadZone",
    "BoundSearch",
    "ClipForce",
    "Curve",
    "EntropyCorridor",
    "EntropySignal",
    "KappaByChance",
    "MemoryCalculator",
    "MovingFigure",
    "NucleusHead",
    "PassAtK",
    "PolicyGradientBandit",
    "RareToken",
    "RunReader",
    "ShardingExplorer",
    "SignedPush",
    "SpectrumRank",
    "StoppingDial",
    "SurrogateForce",
    "TemperatureExplorer",
    "TemperedImitation",
    "TokenWeights",
    "TreeBudget",
    "WindowEvents",
    "javascript",
]

_HERE = Path(__file__).parent
_CSS = (_HERE / "widgets.css").read_text(encoding="utf-8")


def javascript(name: str) -> str:
    """The complete module of a widget: shared helpers, then the widget's own file."""
    return "\n".join((_HERE / f"{part}.js").read_text(encoding="utf-8") for part in ("common", name))


class _Widget(anywidget.AnyWidget):  # type: ignore[misc]
    """Common part: the style sheet, and a ``repr`` without object addresses so that stored outputs stay comparable."""

    _css = _CSS
    _shown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)
        return f"{type(self).__name__}({values})"


class PolicyGradientBandit(_Widget):
    """One prompt with four answers: what do exact GRPO steps do to entropy and to the second correct answer?"""

    _esm = javascript("policy_gradient_bandit")
    _shown = ("rewards", "logits", "learning_rate")
    rewards = traitlets.List(traitlets.Float()).tag(sync=True)
    logits = traitlets.List(traitlets.Float()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    learning_rate = traitlets.Float(0.5).tag(sync=True)

    def __init__(
        self,
        rewards: Sequence[float] = (1, 1, 0, 0),
        logits: Sequence[float] = (0.5, 0.0, 0.5, 0.0),
        *,
        labels: Sequence[str] | None = None,
        learning_rate: float = 0.5,
        **kwargs: Any,
    ) -> None:
        names = list(labels) if labels is not None else [f"answer {letter}" for letter in "ABCDEFGH"[: len(rewards)]]
        if not len(rewards) == len(logits) == len(names):
            raise ValueError("rewards, logits and labels must have equal length")
        super().__init__(
            rewards=[float(r) for r in rewards],
            logits=[float(z) for z in logits],
            labels=names,
            learning_rate=learning_rate,
            **kwargs,
        )


class TemperatureExplorer(_Widget):
    """A fork token beside a computed token: how much entropy does the same temperature give each of them?"""

    _esm = javascript("temperature_explorer")
    _shown = ("fork_logits", "computed_logits", "temperature")
    fork_labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    fork_logits = traitlets.List(traitlets.Float()).tag(sync=True)
    computed_labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    computed_logits = traitlets.List(traitlets.Float()).tag(sync=True)
    temperature = traitlets.Float(1.0).tag(sync=True)

    def __init__(
        self,
        fork: dict[str, float],
        computed: dict[str, float],
        *,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """``fork`` and ``computed`` map the text of a token to its logit (or to its log-probability)."""
        super().__init__(
            fork_labels=list(fork),
            fork_logits=[float(z) for z in fork.values()],
            computed_labels=list(computed),
            computed_logits=[float(z) for z in computed.values()],
            temperature=temperature,
            **kwargs,
        )


class PassAtK(_Widget):
    """Unbiased pass@k of two policies on the same problems: at which k does the base policy catch up?"""

    _esm = javascript("pass_at_k")
    _shown = ("samples", "base", "trained", "k")
    samples = traitlets.Int().tag(sync=True)
    base = traitlets.List(traitlets.Int()).tag(sync=True)
    trained = traitlets.List(traitlets.Int()).tag(sync=True)
    k = traitlets.Int(1).tag(sync=True)

    def __init__(self, samples: int, base: Sequence[int], trained: Sequence[int], *, k: int = 1, **kwargs: Any) -> None:
        """``base`` and ``trained``: correct responses per problem among ``samples`` drawn, same problems in both."""
        if len(base) != len(trained):
            raise ValueError("base and trained must count the same problems")
        if any(not 0 <= count <= samples for count in (*base, *trained)):
            raise ValueError(f"a count of correct responses must lie in 0..{samples}")
        super().__init__(samples=samples, base=[int(c) for c in base], trained=[int(c) for c in trained], k=k, **kwargs)


class ClipForce(_Widget):
    """One token under a reward that says nothing: where does the clip act, and which way does it push on average?"""

    _esm = javascript("clip_force")
    _shown = ("old", "change", "range")
    old = traitlets.Float(0.05).tag(sync=True)
    change = traitlets.Float(0.0).tag(sync=True)
    range = traitlets.Float(0.2).tag(sync=True)

    def __init__(self, old: float = 0.05, *, change: float = 0.0, clip_range: float = 0.2, **kwargs: Any) -> None:
        """``old``: the token's probability when it was sampled; ``change``: how far its logit has moved since."""
        if not 0 < old < 1 or not 0 < clip_range < 1:
            raise ValueError("old and clip_range must lie between 0 and 1")
        super().__init__(old=float(old), change=float(change), range=float(clip_range), **kwargs)


class SurrogateForce(_Widget):
    """One token of one response: how hard does each surrogate push its log-probability, and which one falls silent?"""

    _esm = javascript("surrogate_force")
    _shown = ("ratio", "others", "sign", "tokens")
    ratio = traitlets.Float(1.0).tag(sync=True)
    others = traitlets.Float(1.0).tag(sync=True)
    sign = traitlets.Int(1).tag(sync=True)
    tokens = traitlets.Int(20).tag(sync=True)

    def __init__(
        self, ratio: float = 1.0, *, others: float = 1.0, sign: int = 1, tokens: int = 20, **kwargs: Any
    ) -> None:
        """``ratio``: importance ratio of the token; ``others``: that of every other token of its response."""
        if ratio <= 0 or others <= 0 or sign not in (-1, 1) or tokens < 1:
            raise ValueError("ratio and others must be positive, sign must be -1 or 1, tokens at least 1")
        super().__init__(ratio=float(ratio), others=float(others), sign=sign, tokens=tokens, **kwargs)


class MemoryCalculator(_Widget):
    """One training step on one GPU: which part of its memory grows with the model, and which with the tokens?"""

    _esm = javascript("memory_calculator")
    _shown = ("chosen",)
    models = traitlets.List(traitlets.Dict()).tag(sync=True)
    chosen = traitlets.Int(0).tag(sync=True)

    def __init__(self, models: Sequence[Mapping[str, Any]], *, chosen: int = 0, **kwargs: Any) -> None:
        """``models``: name and sizes of each: parameters, embedding, layer (parameters of one), vocabulary, hidden,
        feedForward, layers, heads, queryWidth, kvWidth."""
        if not 0 <= chosen < len(models):
            raise ValueError("chosen must be the place of a model in models")
        super().__init__(models=[dict(m) for m in models], chosen=chosen, **kwargs)


class RunReader(_Widget):
    """A recorded run, step by step: which curve shows first that something is wrong, and what is it?"""

    _esm = javascript("run_reader")
    _shown = ("run", "step")
    runs = traitlets.List().tag(sync=True)
    run = traitlets.Int(0).tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    def __init__(self, runs: Sequence[Mapping[str, Any]], *, run: int = 0, step: int = 0, **kwargs: Any) -> None:
        """``runs``: each with ``name``, ``verdict`` (shown on request) and ``columns``, label to one value per step.

        "token entropy" and "accuracy" must be among the columns; None is a value that was not measured.
        """
        told = []
        for one in runs:
            columns = {
                str(label): [None if v is None else float(v) for v in vs] for label, vs in one["columns"].items()
            }
            lengths = {len(values) for values in columns.values()}
            if len(lengths) != 1 or 0 in lengths or not {"token entropy", "accuracy"} <= set(columns):
                raise ValueError("columns must be equally long, not empty, and have 'token entropy' and 'accuracy'")
            # pairs keep their order, which a stored notebook's sorted keys would not
            pairs = [[label, values] for label, values in columns.items()]
            told.append({"name": one["name"], "verdict": one["verdict"], "steps": lengths.pop(), "columns": pairs})
        if not 0 <= run < len(told) or not 0 <= step < told[run]["steps"]:
            raise ValueError("run and step must name a recorded run and one of its steps")
        super().__init__(runs=told, run=run, step=step, **kwargs)


class ShardingExplorer(_Widget):
    """One model on 1 to 64 GPUs: at which number does it fit, and what does each way of dividing it send?"""

    _esm = javascript("sharding_explorer")
    _shown = ("gpus", "split")
    shape = traitlets.Dict().tag(sync=True)
    memory = traitlets.Float(80.0).tag(sync=True)
    passes = traitlets.Int(8).tag(sync=True)
    tokens = traitlets.Int(16384).tag(sync=True)
    gpus = traitlets.Int(1).tag(sync=True)
    split = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        name: str,
        *,
        parameters: float,
        layers: int,
        hidden: int,
        memory: float = 80.0,
        passes: int = 8,
        tokens: int = 16384,
        gpus: int = 1,
        split: int = 0,
        **kwargs: Any,
    ) -> None:
        """``memory`` of one GPU in GiB; ``passes`` micro-batches of ``tokens`` tokens per GPU and optimizer step;
        ``split``: 0 data parallel, 1 FSDP2, 2 tensor parallel; ``gpus`` a power of two up to 64."""
        if gpus not in (1, 2, 4, 8, 16, 32, 64) or split not in (0, 1, 2):
            raise ValueError("gpus must be a power of two up to 64, split 0, 1 or 2")
        shape = {"name": name, "parameters": float(parameters), "layers": layers, "hidden": hidden}
        super().__init__(
            shape=shape, memory=float(memory), passes=passes, tokens=tokens, gpus=gpus, split=split, **kwargs
        )


class TokenWeights(_Widget):
    """One response among the tokens of its batch: which keep their gradient, and how much of it, under one setting?"""

    _esm = javascript("token_weights")
    _shown = ("rule", "setting")
    rule = traitlets.Unicode("top").tag(sync=True)
    setting = traitlets.Float(0.2).tag(sync=True)
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    values = traitlets.List(traitlets.Float()).tag(sync=True)
    sizes = traitlets.List(traitlets.Float()).tag(sync=True)
    marks = traitlets.List(traitlets.Bool()).tag(sync=True)
    size_name = traitlets.Unicode().tag(sync=True)
    mark_name = traitlets.Unicode().tag(sync=True)

    def __init__(
        self,
        tokens: Sequence[str],
        values: Sequence[float],
        sizes: Sequence[float],
        marks: Sequence[bool],
        *,
        rule: str = "top",
        setting: float = 0.2,
        size_name: str = "the gradient",
        mark_name: str = "forks",
        **kwargs: Any,
    ) -> None:
        """``values``, ``sizes`` and ``marks`` of all tokens of the batch, first those of the response ``tokens``.

        Rule ``top`` keeps the share ``setting`` with the largest values; rule ``steer`` gives the largest the weight
        ``setting`` and smaller ones more. ``sizes`` are what the kept share is counted in, ``marks`` a class of tokens.
        """
        if rule not in ("top", "steer"):
            raise ValueError("rule must be 'top' or 'steer'")
        if not len(tokens) <= len(values) == len(sizes) == len(marks):
            raise ValueError("values, sizes and marks must be equally long, and the response's tokens among them")
        super().__init__(
            rule=rule, setting=setting, tokens=list(tokens), values=[float(v) for v in values],
            sizes=[float(s) for s in sizes], marks=[bool(m) for m in marks], size_name=size_name, mark_name=mark_name,
            **kwargs,
        )  # fmt: skip


class SignedPush(_Widget):
    """One state, one sampled token: where does praise take probability from, and where does blame send it?"""

    _esm = javascript("signed_push")
    _shown = ("labels", "logits", "sampled", "rate")
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    logits = traitlets.List(traitlets.Float()).tag(sync=True)
    sampled = traitlets.Int(0).tag(sync=True)
    pair = traitlets.List(traitlets.Int()).tag(sync=True)
    rate = traitlets.Float(0.5).tag(sync=True)

    def __init__(
        self,
        probabilities: Mapping[str, float],
        *,
        sampled: int = 0,
        pair: tuple[int, int] = (1, 2),
        rate: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """``probabilities`` of the tokens by name; ``pair``: two whose odds are told; ``rate``: step in the logits."""
        if any(p <= 0 for p in probabilities.values()):
            raise ValueError("probabilities must be positive")
        if any(not 0 <= place < len(probabilities) for place in (sampled, *pair)):
            raise ValueError("sampled and pair must be places of tokens")
        logits = [math.log(p) for p in probabilities.values()]
        super().__init__(
            labels=list(probabilities), logits=logits, sampled=sampled, pair=list(pair), rate=float(rate), **kwargs
        )


class RareToken(_Widget):
    """A rare token of a wrong response under Lp-Reg: does the filter keep it, and does the pull outdo the push?"""

    _esm = javascript("rare_token")
    _shown = ("old", "ratio", "size", "kappa")
    rest = traitlets.List(traitlets.Float()).tag(sync=True)
    old = traitlets.Float(0.04).tag(sync=True)
    ratio = traitlets.Float(1.0).tag(sync=True)
    size = traitlets.Float(1.0).tag(sync=True)
    kappa = traitlets.Float(0.02).tag(sync=True)

    def __init__(
        self, rest: Sequence[float], *, old: float = 0.04, ratio: float = 1.0, size: float = 1.0, kappa: float = 0.02,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """``rest``: the other tokens' shares of what the rare one leaves, 1 in all; ``ratio``: its probability now,
        divided by ``old``; ``size`` of its negative advantage."""
        if abs(sum(rest) - 1) > 1e-6 or not 0 < old < 1 or not 0 < ratio <= 1:
            raise ValueError("rest must sum to 1, old lie in (0, 1) and ratio in (0, 1]")
        super().__init__(rest=[float(p) for p in rest], old=old, ratio=ratio, size=size, kappa=kappa, **kwargs)


class TemperedImitation(_Widget):
    """Imitating one's own samples of temperature T: which way does entropy go, and at which T does it stay?"""

    _esm = javascript("tempered_imitation")
    _shown = ("logits", "temperature", "surer")
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    logits = traitlets.List(traitlets.Float()).tag(sync=True)
    temperature = traitlets.Float(1.2).tag(sync=True)
    surer = traitlets.Float(0.0).tag(sync=True)

    def __init__(
        self, probabilities: Mapping[str, float], *, temperature: float = 1.2, surer: float = 0.0, **kwargs: Any
    ) -> None:
        """``probabilities`` of the actions by name; ``surer``: from 0, all are right equally often, to 1, as often as
        the policy is sure of them."""
        if any(p <= 0 for p in probabilities.values()) or not 0 <= surer <= 1:
            raise ValueError("probabilities must be positive and surer lie in [0, 1]")
        logits = [math.log(p) for p in probabilities.values()]
        super().__init__(labels=list(probabilities), logits=logits, temperature=temperature, surer=surer, **kwargs)


class EntropyCorridor(_Widget):
    """Token entropies and EPO's corridor around their history: which tokens are outside, and how are they pushed?"""

    _esm = javascript("entropy_corridor")
    _shown = ("low", "high", "weight")
    entropies = traitlets.List(traitlets.Float()).tag(sync=True)
    most = traitlets.Float(1.0).tag(sync=True)
    low = traitlets.Float(0.5).tag(sync=True)
    high = traitlets.Float(1.2).tag(sync=True)
    weight = traitlets.Float(10.0).tag(sync=True)

    def __init__(
        self,
        entropies: Sequence[float],
        vocabulary: int,
        *,
        low: float = 0.5,
        high: float = 1.2,
        weight: float = 10.0,
        **kwargs: Any,
    ) -> None:
        """``entropies`` of sampled tokens in nats; ``weight`` of the penalty beside the bonus: beta times alpha."""
        if not entropies or vocabulary < 2 or not 0 <= low <= high:
            raise ValueError("entropies must not be empty, vocabulary be at least 2, and low lie in [0, high]")
        values = [float(h) for h in entropies]
        super().__init__(
            entropies=values,
            most=math.log(vocabulary),
            low=float(low),
            high=float(high),
            weight=float(weight),
            **kwargs,
        )


class BoundSearch(_Widget):
    """Tokens of one update under BAPO: which of the two clip bounds can raise the share of right answers?"""

    _esm = javascript("bound_search")
    _shown = ("lower", "upper", "target")
    probabilities = traitlets.List(traitlets.Float()).tag(sync=True)
    ratios = traitlets.List(traitlets.Float()).tag(sync=True)
    advantages = traitlets.List(traitlets.Float()).tag(sync=True)
    lower = traitlets.Float(0.6).tag(sync=True)
    upper = traitlets.Float(1.2).tag(sync=True)
    target = traitlets.Float(0.4).tag(sync=True)

    def __init__(
        self,
        probabilities: Sequence[float],
        ratios: Sequence[float],
        advantages: Sequence[float],
        *,
        lower: float = 0.6,
        upper: float = 1.2,
        target: float = 0.4,
        **kwargs: Any,
    ) -> None:
        """Of every token: ``probabilities`` when it was sampled, importance ratio, advantage; bounds are ratios."""
        if not len(probabilities) == len(ratios) == len(advantages) or not any(advantages):
            raise ValueError("probabilities, ratios and advantages must be equally long, and not all advantages 0")
        super().__init__(
            probabilities=[float(p) for p in probabilities], ratios=[float(r) for r in ratios],
            advantages=[float(a) for a in advantages], lower=lower, upper=upper, target=target, **kwargs,
        )  # fmt: skip


class EntropySignal(_Widget):
    """One token under HAPO: what does its entropy change, as the text has it and as the release computes it?"""

    _esm = javascript("entropy_signal")
    _shown = ("entropy", "ratio")
    scale = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    most = traitlets.Float(1.0).tag(sync=True)
    entropy = traitlets.Float(-3.0).tag(sync=True)
    ratio = traitlets.Float(1.0).tag(sync=True)

    def __init__(
        self,
        scale: tuple[float, float, float],
        most: float,
        *,
        low: float = 0.2,
        high: float = 0.28,
        tau: float = 0.1,
        entropy: float = -3.0,
        ratio: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """``scale``: pivot of the log-entropies, and the largest and the smallest distance from it; ``most``: the
        largest entropy in nats; ``entropy``: that of the token, as a power of ten."""
        pivot, highest, lowest = (float(x) for x in scale)
        if not lowest < 0 < highest or most <= 0:
            raise ValueError("the distances must lie on both sides of 0, and most above it")
        super().__init__(
            scale={"pivot": pivot, "highest": highest, "lowest": lowest},
            settings={"low": low, "high": high, "tau": tau}, most=float(most), entropy=entropy, ratio=ratio, **kwargs,
        )  # fmt: skip


class NucleusHead(_Widget):
    """One next-token distribution: what does its head keep of the entropy, and when does nothing remain?"""

    _esm = javascript("nucleus_head")
    _shown = ("logits", "temperature", "mass")
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    logits = traitlets.List(traitlets.Float()).tag(sync=True)
    temperature = traitlets.Float(1.0).tag(sync=True)
    mass = traitlets.Float(0.8).tag(sync=True)

    def __init__(
        self, probabilities: Mapping[str, float], *, temperature: float = 1.0, mass: float = 0.8, **kwargs: Any
    ) -> None:
        """``probabilities`` of the tokens by name; ``mass`` that the head must reach."""
        if any(p <= 0 for p in probabilities.values()) or not 0 < mass <= 1:
            raise ValueError("probabilities must be positive and mass lie in (0, 1]")
        logits = [math.log(p) for p in probabilities.values()]
        super().__init__(labels=list(probabilities), logits=logits, temperature=temperature, mass=mass, **kwargs)


class ArmSwap(_Widget):
    """Two recorded arms beside GRPO: is what a method gains still there at equal accuracy, and beside its control?"""

    _esm = javascript("arm_swap")
    _shown = ("method", "at")
    arms = traitlets.List(traitlets.Dict()).tag(sync=True)
    method = traitlets.Unicode().tag(sync=True)
    at = traitlets.Int(0).tag(sync=True)

    def __init__(
        self, arms: Sequence[Mapping[str, Any]], *, method: str | None = None, at: int = 0, **kwargs: Any
    ) -> None:
        """``arms`` as `rlvr_lab.arena.swap.arm_curves` gives them; ``at``: the step after which they are read first."""
        methods = [str(arm["name"]) for arm in arms if arm["role"] == "method"]
        if sum(arm["role"] == "reference" for arm in arms) != 1 or not methods or len(arms) < 3:
            raise ValueError("arms must hold one reference, a method and something to hold it against")
        chosen = methods[0] if method is None else method
        if chosen not in methods:
            raise ValueError(f"method must be one of {methods}, not '{chosen}'")
        super().__init__(arms=[dict(arm) for arm in arms], method=chosen, at=at, **kwargs)


class TreeBudget(_Widget):
    """Trees of responses against independent ones: what does a leaf cost, by the formula and as it was sampled?"""

    _esm = javascript("tree_budget")
    _shown = ("trees", "forks", "branches", "position")
    roots = traitlets.List().tag(sync=True)
    trees = traitlets.Int(1).tag(sync=True)
    forks = traitlets.Int(1).tag(sync=True)
    branches = traitlets.Int(1).tag(sync=True)
    position = traitlets.Float(0.5).tag(sync=True)

    def __init__(
        self,
        roots: Sequence[Mapping[str, Any]],
        *,
        trees: int = 1,
        forks: int = 1,
        branches: int = 1,
        position: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """``roots``: of each recorded root path its ``length`` in tokens and its ``forks`` in the order in which they
        were chosen, each with its ``position`` and, in ``branches``, the tokens that each branch generated.
        ``position``: where the formula has its forks, as a share of the path."""
        told: list[dict[str, Any]] = [
            {
                "length": int(r["length"]),
                "forks": [
                    {"position": int(f["position"]), "branches": [int(n) for n in f["branches"]]} for f in r["forks"]
                ],
            }
            for r in roots
        ]
        if not told or any(not r["forks"] or not all(f["branches"] for f in r["forks"]) for r in told):
            raise ValueError("every root needs a fork, and every fork a branch")
        if any(not 0 <= f["position"] < r["length"] for r in told for f in r["forks"]):
            raise ValueError("a fork lies within its root path")
        if not 1 <= trees <= len(told) or forks < 1 or branches < 1 or not 0 <= position <= 1:
            raise ValueError("trees, forks and branches must be at least 1, trees recorded, and position lie in [0, 1]")
        super().__init__(roots=told, trees=trees, forks=forks, branches=branches, position=float(position), **kwargs)


class WindowEvents(_Widget):
    """Real responses under ARES: how many windows of high entropy do they have, and what is "high" taken from?"""

    _esm = javascript("window_events")
    _shown = ("width", "level")
    responses = traitlets.List(traitlets.List(traitlets.Float())).tag(sync=True)
    buckets = traitlets.List(traitlets.Unicode()).tag(sync=True)
    width = traitlets.Int(4).tag(sync=True)
    level = traitlets.Float(0.95).tag(sync=True)

    def __init__(
        self,
        responses: Sequence[Sequence[float]],
        buckets: Sequence[str],
        *,
        width: int = 4,
        level: float = 0.95,
        **kwargs: Any,
    ) -> None:
        """``responses``: token entropies in nats of each; ``buckets``: how difficult its prompt is, as easy, medium or
        hard; ``level`` of the quantile that is the threshold."""
        if not responses or len(responses) != len(buckets) or not set(buckets) <= {"easy", "medium", "hard"}:
            raise ValueError("every response needs a bucket: easy, medium or hard")
        if not (1 <= width <= 8 and 0 < level < 1):
            raise ValueError("width must lie in 1 to 8 and level between 0 and 1")
        super().__init__(
            responses=[[float(h) for h in row] for row in responses], buckets=list(buckets), width=width, level=level,
            **kwargs,
        )  # fmt: skip


class AttentionDeadZone(_Widget):
    """Attention rows around a target entropy: which are left alone, and who owes a penalty that it cannot pay?"""

    _esm = javascript("attention_dead_zone")
    _shown = ("theta", "gamma")
    models = traitlets.List(traitlets.Dict()).tag(sync=True)
    context = traitlets.Int().tag(sync=True)
    theta = traitlets.Float(0.5).tag(sync=True)
    gamma = traitlets.Float(0.2).tag(sync=True)

    def __init__(
        self,
        models: Mapping[str, Sequence[Sequence[float]]],
        context: int,
        *,
        theta: float = 0.5,
        gamma: float = 0.2,
        **kwargs: Any,
    ) -> None:
        """``models``: by name, row entropies in nats of every head, rows in the order of their position."""
        heads = [rows for each in models.values() for rows in each]
        if not heads or not all(1 <= len(rows) <= context for rows in heads):
            raise ValueError(f"every head needs between 1 and {context} rows, and there must be one head")
        if not (0 <= theta <= 1 and 0 <= gamma <= 0.5):
            raise ValueError("theta must lie in [0, 1] and gamma in [0, 0.5]")
        named = [{"name": name, "heads": [[float(h) for h in rows] for rows in each]} for name, each in models.items()]
        super().__init__(models=named, context=context, theta=float(theta), gamma=float(gamma), **kwargs)


class KappaByChance(_Widget):
    """Two matrices of different shapes compete for one place: which has the lower kappa, as it is and for its shape?"""

    _esm = javascript("kappa_by_chance")
    _shown = ("shape", "long", "square")
    shapes = traitlets.List(traitlets.Dict()).tag(sync=True)
    shape = traitlets.Int(1).tag(sync=True)
    long = traitlets.Float(6.0).tag(sync=True)
    square = traitlets.Float(100.0).tag(sync=True)

    def __init__(
        self, chance: Mapping[str, float], *, shape: int = 1, long: float = 6.0, square: float = 100.0, **kwargs: Any
    ) -> None:
        """``chance``: the usual kappa of a random matrix by the name of its shape, the square one first."""
        if len(chance) < 2 or not all(value >= 1 for value in chance.values()):
            raise ValueError("at least two shapes are needed, and no kappa is below 1")
        if not (1 <= shape < len(chance) and 1 <= long <= 1e4 and 1 <= square <= 1e4):
            raise ValueError("shape must number one of the long matrices, and both kappas lie in [1, 10000]")
        shapes = [{"name": name, "chance": float(value)} for name, value in chance.items()]
        super().__init__(shapes=shapes, shape=shape, long=float(long), square=float(square), **kwargs)


class SpectrumRank(_Widget):
    """A power-law spectrum: how many directions by eigenvalues, by singular values, and with the mean left in?"""

    _esm = javascript("spectrum_rank")
    _shown = ("width", "decay", "massive", "offset")
    width = traitlets.Int(64).tag(sync=True)
    decay = traitlets.Float(1.0).tag(sync=True)
    massive = traitlets.Float(1.0).tag(sync=True)
    offset = traitlets.Float(0.0).tag(sync=True)

    def __init__(
        self, width: int = 64, *, decay: float = 1.0, massive: float = 1.0, offset: float = 0.0, **kwargs: Any
    ) -> None:
        """Eigenvalue i is i^-``decay``, the first ``massive`` times that; ``offset``: squared mean / variance."""
        if width < 12 or not 0 <= decay < 4 or massive < 1 or offset < 0:
            raise ValueError("width must be at least 12, decay lie in [0, 4), massive be at least 1, offset at least 0")
        super().__init__(width=width, decay=float(decay), massive=float(massive), offset=float(offset), **kwargs)


class StoppingDial(_Widget):
    """Recorded chains stopped below an entropy: what is saved, and does the signal beat chance and an equal budget?"""

    _esm = javascript("stopping_dial")
    _shown = ("power", "least")
    chains = traitlets.List(traitlets.Dict()).tag(sync=True)
    power = traitlets.Float(-2.0).tag(sync=True)
    least = traitlets.Int(1).tag(sync=True)

    def __init__(
        self, chains: Sequence[Mapping[str, Any]], *, power: float = -2.0, least: int = 1, **kwargs: Any
    ) -> None:
        """``chains``: of each the ``entropy`` after steps 1..K, and ``tokens``, ``thought`` and ``correct`` of the
        response if it is stopped there, last those of the response that is not; ``power``: threshold as one of ten."""
        told = [
            {name: [float(v) for v in chain[name]] for name in ("entropy", "tokens", "thought", "correct")}
            for chain in chains
        ]
        sizes = [[len(c[name]) - 1 for name in ("tokens", "thought", "correct")] for c in told]
        if not told or any({len(c["entropy"])} != set(size) for c, size in zip(told, sizes, strict=True)):
            raise ValueError("tokens, thought and correct need one entry more than entropy, and there must be a chain")
        if not -4 <= power <= 0.5 or not 1 <= least <= 6:
            raise ValueError("power must lie in [-4, 0.5] and least in 1 to 6")
        super().__init__(chains=told, power=float(power), least=least, **kwargs)


@dataclass(frozen=True)
class Curve:
    """One line, or one set of points, of a `MovingFigure`; a value of y that is nan interrupts it."""

    name: str
    x: Sequence[float] | Any
    y: Sequence[float] | Any
    points: bool = False

    def plain(self) -> dict[str, Any]:
        """What the page gets, with four digits of each number. Raises ValueError for lengths that differ."""
        x, y = ([float(value) for value in values] for values in (self.x, self.y))
        if len(x) != len(y) or not x or not all(map(math.isfinite, x)):
            raise ValueError(f"curve '{self.name}' needs as many finite x ({len(x)}) as y ({len(y)}), at least one")
        told = [float(f"{value:.4g}") if math.isfinite(value) else None for value in y]
        return {"name": self.name, "x": [float(f"{v:.4g}") for v in x], "y": told, "points": self.points}


class MovingFigure(_Widget):
    """A figure computed at several positions of one dial: what changes with it, and what stays?"""

    _esm = javascript("moving_figure")
    # here and not in the common sheet: every notebook stores the sheet of its widgets
    _css = _CSS + (_HERE / "moving_figure.css").read_text(encoding="utf-8")
    _shown = ("dial", "start")
    frames = traitlets.List(traitlets.Dict()).tag(sync=True)
    dial, x, y, alt = (traitlets.Unicode().tag(sync=True) for _ in range(4))
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    bars = traitlets.Bool(False).tag(sync=True)
    start = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        frames: Mapping[str, Sequence[Curve]],
        *,
        dial: str,
        x: str,
        y: str,
        says: Sequence[str],
        alt: str,
        start: int = 0,
        bars: bool = False,
        labels: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """``frames``: the curves at each position of the ``dial``, by its reading, one to four with the same names;
        ``says``: a sentence for each position. With ``bars`` the x are 0, 1, ...; ``labels`` are their names."""
        sizes = {tuple(curve.name for curve in curves) for curves in frames.values()}
        if len(frames) < 2 or len(sizes) != 1 or not 1 <= len(next(iter(sizes))) <= 4:
            raise ValueError("a figure that moves needs two positions, and the same one to four curves at each")
        if len(says) != len(frames) or any(a == b for a, b in pairwise(says)):
            raise ValueError(f"says needs a sentence for each of the {len(frames)} positions, unlike its neighbour's")
        if not 0 <= start < len(frames) - 1 or len(alt) < 30:
            raise ValueError("start must leave room to the right, and alt must say in words what is seen")
        told: list[dict[str, Any]] = [
            {"label": label, "says": text, "curves": [curve.plain() for curve in curves]}
            for (label, curves), text in zip(frames.items(), says, strict=True)
        ]
        places = {value for frame in told for curve in frame["curves"] for value in curve["x"]}
        if (bars or labels) and places != set(range(len(labels) or len(places))):
            raise ValueError("with bars or labels the x are 0, 1, ..., one for each label")
        if not any(value is not None for frame in told for curve in frame["curves"] for value in curve["y"]):
            raise ValueError("there is no finite y to draw")
        super().__init__(
            frames=told, dial=dial, x=x, y=y, alt=alt, start=start, bars=bars, labels=list(labels), **kwargs
        )
