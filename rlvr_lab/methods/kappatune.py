r"""KappaTune: train only the weight matrices of lowest condition number (arXiv 2506.16289).

    kappa(W) = s_1 / s_r         ascending, the first N tensors train, everything else is frozen; chosen once

The claim: a matrix that amplifies a few directions holds what pre-training taught it, a near-isotropic one has room.
Its theory is of a linear unit y = W x, x ~ N(0, S), W [m, n] of full rank with m <= n, in nats:

    h(y) = m/2 log(2 pi e) + 1/2 log det(W S W^T)  <=  m/2 log(2 pi e |W|_F^2 / m)  for S = I, equal where kappa = 1

Kappa sees two of the singular values and h all of them: matrices of equal kappa differ in h. And kappa depends on the
shape, trained or not (`core.condition`): ranked as they are, "lowest" means the long matrices, also in a network that
learned nothing. So `measure: matched` divides by the median of Gaussian matrices of the same shape, `within: shape`
chooses the same share of every class of shapes, transposes and padding by zeros apart, and `within: kind` of every name
without its layer's number, such as q_proj [inferred]. A tensor of one dimension is never chosen; tied weights stand
once.

Controls [inferred]: `order: highest`, and `random`, which draws as many tensors of the same shapes as `lowest` chooses.

Card: papers/kappatune.md. Code compared: oswaldoludwig/kappaTune @ 3ce5a7e (`released`), and huggingface/peft PR #3106
(`peft`). The release divides by any s_r above 0 (`singular: noise`: a matrix that lacks a direction has a huge, random
kappa) and silently drops tensors of more than two dimensions (`tensors: drop`); peft adds 1e-8 to s_r, so that a dead
matrix has kappa 0 and is chosen first, averages kappa over the matrices of a fused tensor, and looks at linear layers
only. Its selection by a Python set, which differs between runs, is not reproduced.

Presets: `paper` (20 tensors, the TinyLlama demonstration), `released`, `peft` (the top 20 % of linear layers), `tiny`
(a quarter of every class of shapes). For adapters: `adapter_targets`, or `model.lora.kappa` in a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ..core.condition import FLOAT32_SPACING, condition_number, gaussian_median, live_shape
from ..errors import UserError
from ._settings import check, check_choice
from .base import Method

Order = Literal["lowest", "highest", "random"]
Measure = Literal["kappa", "matched"]
Within = Literal["all", "shape", "kind"]
Singular = Literal["infinite", "noise", "added"]
Tensors = Literal["flatten", "refuse", "drop", "mean"]
ADDED = 1e-8
"""What peft adds to s_r."""
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "position_embeddings")
"""Parts of the names of embedding tables, which are no linear layers."""
HEADS = ("lm_head", "embed_out")


# -- the theory of a linear unit --------------------------------------------------------------------------------------


def linear_entropy(weight_MN: Tensor, covariance_NN: Tensor | None = None) -> float:
    """h(W x) in nats for x ~ N(0, S), S the identity by default; nan where W x has no density (m > n, or rank < m)."""
    m, n = weight_MN.shape
    spread = weight_MN @ weight_MN.T if covariance_NN is None else weight_MN @ covariance_NN @ weight_MN.T
    if m > n or not math.isfinite(log_volume(weight_MN)):
        return math.nan
    return float(m / 2 * math.log(2 * math.pi * math.e) + torch.linalg.slogdet(spread).logabsdet / 2)


def log_volume(weight_MN: Tensor) -> float:
    """Sum of log s_i, the entropy of the unit less that of m standard normal numbers; nan where a direction is lost."""
    values = torch.linalg.svdvals(weight_MN)
    lost = float(values[-1]) <= torch.finfo(values.dtype).eps * max(weight_MN.shape) * float(values[0])
    return math.nan if lost else float(values.log().sum())


def entropy_bound(weight_MN: Tensor) -> float:
    """m/2 log(2 pi e |W|_F^2 / m): the largest entropy in nats of a unit with this norm; -inf for a zero matrix."""
    m, square = weight_MN.shape[0], float(weight_MN.square().sum())
    return m / 2 * math.log(2 * math.pi * math.e * square / m) if square else -math.inf


# -- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KappaTuneConfig:
    """Settings. One of `count` (tensors), `top_p` (share of the tensors) and `threshold` (largest value of `measure`)
    says how many; `max_dim` leaves out tensors with a longer side, `leave_out` those whose name holds one of its texts;
    `eps` is the s_r / s_1 up to which `singular: infinite` calls a matrix singular; `seed` is for `order: random`."""

    count: int | None = 20
    top_p: float | None = None
    threshold: float | None = None
    order: Order = "lowest"
    measure: Measure = "kappa"
    within: Within = "all"
    max_dim: int | None = None
    leave_out: tuple[str, ...] = ()
    singular: Singular = "infinite"
    tensors: Tensors = "flatten"
    eps: float = FLOAT32_SPACING
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [name for name in ("count", "top_p", "threshold") if getattr(self, name) is not None]
        check(len(sizes) == 1, "kappatune", "have one of count, top_p and threshold (null for the others)", sizes)
        check(self.count is None or self.count >= 1, "kappatune.count", "be at least 1", self.count)
        check(self.top_p is None or 0 < self.top_p <= 1, "kappatune.top_p", "lie in (0, 1]", self.top_p)
        check(self.threshold is None or self.threshold > 0, "kappatune.threshold", "be positive", self.threshold)
        check(self.max_dim is None or self.max_dim >= 1, "kappatune.max_dim", "be at least 1", self.max_dim)
        check(self.eps >= 0, "kappatune.eps", "not be negative", self.eps)
        for name, choices in (("order", Order), ("measure", Measure), ("within", Within), ("singular", Singular),
                              ("tensors", Tensors)):  # fmt: skip
            check_choice(getattr(self, name), get_args(choices), f"kappatune.{name}")
        listed = isinstance(self.leave_out, list | tuple) and all(isinstance(text, str) for text in self.leave_out)
        check(listed, "kappatune.leave_out", "be a list of texts, such as [lm_head]", self.leave_out)
        object.__setattr__(self, "leave_out", tuple(self.leave_out))
        fixed = self.threshold is None or (self.order == "lowest" and self.within == "all")
        check(fixed, "kappatune.threshold", "go with order lowest, within all; give count or top_p", self.threshold)


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Kappa of one tensor; `by_chance` is the median of Gaussian matrices of its shape, padding by zeros left out."""

    name: str
    shape: tuple[int, ...]
    live: tuple[int, int]
    size: int
    kappa: float
    by_chance: float

    @property
    def matched(self) -> float:
        """Kappa over that of a random matrix of the same shape: 1 is a matrix without structure."""
        return self.kappa / self.by_chance

    @property
    def shape_class(self) -> tuple[int, int]:
        """Tensors of one class have the same law of kappa where they are random."""
        return max(self.live), min(self.live)

    @property
    def kind(self) -> tuple[str, tuple[int, int]]:
        """The name without numbers, and the class of shapes."""
        return ".".join(part for part in self.name.split(".") if not part.isdigit()), self.shape_class


def _kappa(matrix: Tensor, config: KappaTuneConfig) -> float:
    eps, added = (config.eps if config.singular == "infinite" else 0.0), ADDED if config.singular == "added" else 0.0
    return condition_number(matrix, eps, added)


def measure(name: str, weight: Tensor, config: KappaTuneConfig) -> Measured | None:
    """One tensor measured; None for one that may not be chosen. Raises UserError for `tensors: refuse` and a tensor of
    more than two dimensions, and for one without values (the meta device)."""
    shape = tuple(weight.shape)
    if weight.ndim < 2 or not weight.numel() or not weight.is_floating_point():
        return None
    if any(part in name for part in config.leave_out) or (config.max_dim and max(shape) > config.max_dim):
        return None
    if weight.is_meta:
        raise UserError(f"'{name}' has no values (device meta), so its condition number is unknown: load the weights")
    if weight.ndim > 2 and config.tensors in ("refuse", "drop"):
        if config.tensors == "drop":
            return None
        raise UserError(f"'{name}' has shape {shape}, no matrix; set methods.kappatune.tensors to flatten or mean")
    if weight.ndim > 2 and config.tensors == "mean":
        parts = weight.detach().reshape(-1, *shape[-2:])
        kappas, matrix = [_kappa(part, config) for part in parts], parts[0]
    else:
        matrix = weight.detach().reshape(shape[0], -1)
        kappas = [_kappa(matrix, config)]
    live = live_shape(matrix)
    return Measured(name, shape, live, weight.numel(), sum(kappas) / len(kappas), gaussian_median(*live))


def scan(
    named: Iterable[tuple[str, Tensor]], config: KappaTuneConfig, progress: Callable[[str], None] = lambda name: None
) -> list[Measured]:
    """Every tensor that may be chosen, in the order given; a second name of the same tensor (tied weights) is passed
    over. Tensors may be loaded one at a time: none is kept. `progress(name)` follows each."""
    found: list[Measured] = []
    seen: dict[tuple[int, int], ReferenceType[Tensor]] = {}
    for name, weight in named:
        place = (weight.data_ptr(), weight.numel())
        # one that was given up since may have left its place to another
        if place[0] and place in seen and seen[place]() is not None:
            continue
        seen[place] = ref(weight)
        if (one := measure(name, weight, config)) is not None:
            found.append(one)
        progress(name)
    return found


# -- choosing ---------------------------------------------------------------------------------------------------------


def _quotas(classes: Mapping[Hashable, Sequence[Measured]], count: int) -> dict[Hashable, int]:
    """`count` divided over classes by their sizes, largest remainders first."""
    total = sum(map(len, classes.values()))
    exact = {key: count * len(members) / total for key, members in classes.items()}
    quota = {key: math.floor(value) for key, value in exact.items()}
    for key in sorted(exact, key=lambda key: quota[key] - exact[key])[: count - sum(quota.values())]:
        quota[key] += 1
    return quota


def _classes(found: Iterable[Measured], by: str) -> dict[Hashable, list[Measured]]:
    classes: dict[Hashable, list[Measured]] = {}
    for one in found:
        classes.setdefault(getattr(one, by), []).append(one)
    return classes


def choose(found: Sequence[Measured], config: KappaTuneConfig) -> list[Measured]:
    """The tensors that train, those of `order: lowest` by rising value, ties in the order given.

    A value of inf (singular) or nan (entries that are not finite) is never chosen, but for inf where `singular: noise`
    and `count` leave nothing else. Fewer than `count` are chosen where there are fewer. Raises UserError where none is.
    """
    c = config
    value = {one.name: one.kappa if c.measure == "kappa" else one.matched for one in found}
    able = [one for one in found if math.isfinite(value[one.name])]
    if c.singular == "noise":  # the release sorts inf last, and takes it where N is large enough
        able = [one for one in found if not math.isnan(value[one.name])]
    rising = sorted(able, key=lambda one: value[one.name])
    count = sum(value[one.name] <= c.threshold for one in rising) if c.threshold is not None else c.count
    count = min(max(1, math.floor(len(able) * c.top_p)) if c.top_p else count or 0, len(able))
    if not count:
        raise UserError(_nothing(found, able, value, c))
    plain = rising if c.order == "lowest" else rising[::-1]
    if c.within == "all" and c.order != "random":
        return plain[:count]
    by = "kind" if c.within == "kind" else "shape_class"
    lowest = {key: len(members) for key, members in _classes(rising[:count], by).items()}
    quota = lowest if c.within == "all" else _quotas(_classes(able, by), count)
    if c.order == "random":
        numbers = torch.randperm(len(able), generator=torch.Generator().manual_seed(c.seed)).tolist()
        plain = [able[i] for i in numbers]
    kept = [one for key, members in _classes(plain, by).items() for one in members[: quota.get(key, 0)]]
    return sorted(kept, key=plain.index)


def _nothing(found: Sequence[Measured], able: Sequence[Measured], value: Mapping[str, float], c: Any) -> str:
    """Why no tensor was chosen, and what to change."""
    if not found:
        return "methods.kappatune: no tensor may be chosen; change max_dim, leave_out or tensors"
    if not able:
        return f"methods.kappatune: all {len(found)} tensors are singular or not finite; set singular to noise or added"
    return (
        f"methods.kappatune.threshold is {c.threshold}, but the lowest {c.measure} is "
        f"{min(value[one.name] for one in able):.4g}; raise it, or give count or top_p"
    )


def adapter_targets(
    model: nn.Module, config: KappaTuneConfig, progress: Callable[[str], None] = lambda name: None
) -> list[str]:
    """Full names of the linear layers of any torch model to give adapters to, as `target_modules` of peft's LoraConfig;
    the output head, where the model names one, is left out. Fused expert tensors are no linear layers and need peft's
    `target_parameters`. Raises UserError where no layer is chosen."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    weights = ((name, module.weight) for name, module in linear.items())
    return [one.name for one in choose(scan(weights, config, progress), config)]


# -- the method -------------------------------------------------------------------------------------------------------


class KappaTune(Method):
    """Owner of `trainable`. The selection is that of the starting policy, also after a resume."""

    slug: ClassVar[str] = "kappatune"
    config_class: ClassVar[type[KappaTuneConfig]] = KappaTuneConfig
    presets: ClassVar[Mapping[str, KappaTuneConfig]] = {
        "paper": KappaTuneConfig(),
        "released": KappaTuneConfig(singular="noise", tensors="drop"),
        "peft": KappaTuneConfig(
            count=None, top_p=0.2, max_dim=16384, leave_out=EMBEDDINGS, singular="added", tensors="mean"
        ),
        "tiny": KappaTuneConfig(count=None, top_p=0.25, within="shape", leave_out=(*EMBEDDINGS, *HEADS)),
    }

    def __init__(self, config: KappaTuneConfig | None = None) -> None:
        self.config = config or KappaTuneConfig()
        self.chosen: list[str] = []
        self._sizes: dict[str, float] = {}
        self._pending: list[str] = []

    def trainable(self, named: Mapping[str, Tensor]) -> list[str]:
        """Names of the parameters that train. Raises UserError where none would."""
        if not self.chosen:
            self.chosen = [one.name for one in choose(scan(named.items(), self.config), self.config)]
        sizes = {name: value.numel() for name, value in named.items()}
        heads = [name for name in named if any(part in name for part in HEADS)]
        # without a head of its own the embedding is the head
        heads = heads or [name for name in named if any(part in name for part in EMBEDDINGS)]
        head = any(name in self.chosen for name in heads)
        trained = sum(sizes[name] for name in self.chosen)
        self._sizes = {"tensors": float(len(self.chosen)), "parameters": float(trained), "head": float(head)}
        self._pending = [
            f"kappatune trains {len(self.chosen)} of {len(sizes)} tensors, {trained:,} of {sum(sizes.values()):,} "
            f"numbers; the output head {'trains too' if head else 'is frozen'}"
        ]
        return list(self.chosen)

    def notices(self) -> list[str]:
        """Says once what trains."""
        found, self._pending = self._pending, []
        return found

    def metrics(self) -> dict[str, float]:
        """How many `tensors` and `parameters` train, and whether the output `head` does, which changes how entropy
        moves."""
        return dict(self._sizes)

    def state_dict(self) -> dict[str, Any]:
        """The names chosen."""
        return {"chosen": list(self.chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep to a checkpoint's choice."""
        self.chosen = [str(name) for name in state["chosen"]]
