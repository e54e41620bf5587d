r"""Two-hop facts: a synthetic world in which composing was or was not practised (explicit CoT, arXiv 2502.04667).

Every head h of `entities` has `out_degree` distinct relations, each with a uniformly random tail: atomic facts
(h, r, t). A share `ood_share` of them is OOD, the rest ID. Two facts (h, r1, b), (b, r2, t) make a chain with the
bridge b:

    both hops ID   -> with probability `iid_test_share` the ID test, else the pool that training draws from
    both hops OOD  -> the OOD test: facts that training shows alone and never composed
    one of each    -> dropped

Training sees all atomic facts, the OOD ones too (else OOD accuracy is 0 by construction), and round(lambda |ID|) chains
of the pool. With probability xi the answer t (second-hop noise), the bridge b, or both are replaced by a uniformly
random entity, in the training chains only; the draw may hit the right one.

    atomic  h r | t </a>        without CoT  h r1 r2 | t </a>        with CoT  h r1 r2 | b t </a>

Official code: chen123CtrlS/T-CotMechanism. Its splits iterate sets of strings, so that their order hangs on
PYTHONHASHSEED; here every list is sorted and every choice has its own stream of `seed`, so that worlds which differ in
lambda, form or noise alone share facts, splits and the first chains. Card: papers/explicit_cot.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..errors import UserError, nearest
from .base import Verdict

Form = Literal["cot", "no_cot"]
Noise = Literal["none", "t", "b", "both"]
END = "</a>"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", END)
"""The first four are those of `policy.tiny.build_tokenizer`; no text holds them."""
_WORD = re.compile(r"<[er]_\d+>")


class Fact(NamedTuple):
    """An atomic fact: head, relation, tail."""

    h: int
    r: int
    t: int


class Chain(NamedTuple):
    """Two facts in a row: head, two relations, bridge, answer."""

    h: int
    r1: int
    r2: int
    b: int
    t: int


@dataclass(frozen=True)
class WorldConfig:
    """A world. `paper`: the card's section 4. `released`: the notebook and run script as they ship, with 40 % noise on
    the second hop and almost no chains. `tiny`: for CPU minutes [inferred].

    Raises UserError that names the setting for values that make no world.
    """

    entities: int = 60
    relations: int = 8
    out_degree: int = 6
    ood_share: float = 0.2
    iid_test_share: float = 0.05
    chains_per_fact: float = 4.0
    """lambda: training chains per ID fact."""
    noise: Noise = "none"
    noise_share: float = 0.0
    """xi: probability that a training chain is corrupted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise UserError(f"noise '{self.noise}' does not exist; {nearest(self.noise, get_args(Noise))}")
        for name in ("entities", "relations", "out_degree"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.out_degree > self.relations:
            raise UserError(
                f"out_degree {self.out_degree} exceeds relations {self.relations}: a head's relations are distinct"
            )
        for name in ("ood_share", "iid_test_share", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.chains_per_fact < 0:
            raise UserError(f"chains_per_fact must not be negative, not {self.chains_per_fact}")
        if (self.noise == "none") != (self.noise_share == 0):
            raise UserError(f"noise '{self.noise}' with noise_share {self.noise_share}: set both or neither")


PRESETS = {
    "paper": WorldConfig(2000, 200, 20, 0.05, 0.005, 7.2),
    "released": WorldConfig(2000, 200, 20, 0.05, 0.005, 0.001, "t", 0.4),
    "tiny": WorldConfig(),
}


@dataclass(frozen=True)
class Chains:
    """Every chain of some facts by how it was split; all lists sorted."""

    id: list[Chain]
    ood: list[Chain]
    mixed: list[Chain]


@dataclass(frozen=True)
class World:
    """Facts and splits. `train` holds what training shows, noise included; `clean` the same chains without."""

    config: WorldConfig
    id_facts: list[Fact]
    ood_facts: list[Fact]
    train: list[Chain]
    clean: list[Chain]
    test_iid: list[Chain]
    test_ood: list[Chain]

    @property
    def facts(self) -> list[Fact]:
        """All atomic facts, sorted."""
        return sorted([*self.id_facts, *self.ood_facts])

    @property
    def tails(self) -> dict[tuple[int, int], int]:
        """The tail of every head with every relation it has."""
        return {(fact.h, fact.r): fact.t for fact in self.facts}


def find_chains(id_facts: Sequence[Fact], ood_facts: Sequence[Fact]) -> Chains:
    """Every two-hop chain. Chains may revisit an entity (h = b or b = t). Nothing is drawn here."""
    facts = sorted([(fact, 0) for fact in id_facts] + [(fact, 1) for fact in ood_facts])
    of_head: dict[int, list[tuple[Fact, int]]] = defaultdict(list)
    for fact, is_ood in facts:
        of_head[fact[0]].append((fact, is_ood))
    found: tuple[list[Chain], ...] = ([], [], [])
    for (h, r1, b), first in facts:
        for (_, r2, t), second in of_head[b]:
            found[first + second].append(Chain(h, r1, r2, b, t))
    id_chains, mixed, ood = (sorted(part) for part in found)
    return Chains(id_chains, ood, mixed)


def make_world(config: WorldConfig = PRESETS["tiny"]) -> World:
    """Draw a world. Raises UserError where lambda asks for more chains than there are."""
    draws = [np.random.default_rng([config.seed, number]) for number in range(5)]
    facts = [
        Fact(h, int(r), int(draws[0].integers(config.entities)))
        for h in range(config.entities)
        for r in sorted(draws[0].choice(config.relations, config.out_degree, replace=False))
    ]
    is_ood = set(draws[1].permutation(len(facts))[: round(config.ood_share * len(facts))].tolist())
    id_facts, ood_facts = ([f for i, f in enumerate(facts) if (i in is_ood) == kind] for kind in (False, True))
    chains = find_chains(id_facts, ood_facts)
    held_out = draws[2].random(len(chains.id)) < config.iid_test_share
    pool, test_iid = ([c for c, out in zip(chains.id, held_out, strict=True) if out == kind] for kind in (False, True))
    wanted = round(config.chains_per_fact * len(id_facts))
    if wanted > len(pool):
        most = len(pool) / max(len(id_facts), 1)
        raise UserError(f"chains_per_fact {config.chains_per_fact:g} needs {wanted} chains, and the pool has "
                        f"{len(pool)}; set at most {most:.2f}")  # fmt: skip
    clean = [pool[i] for i in draws[3].permutation(len(pool))[:wanted]]
    return World(config, id_facts, ood_facts, corrupt(clean, config, draws[4]), clean, test_iid, chains.ood)


def corrupt(chains: Sequence[Chain], config: WorldConfig, draw: np.random.Generator) -> list[Chain]:
    """The chains with noise. Which ones are hit, and by what, is the same for every kind of noise."""
    hit = draw.random(len(chains)) < config.noise_share
    other = draw.integers(config.entities, size=(len(chains), 2)).tolist()
    b_hit, t_hit = config.noise in ("b", "both"), config.noise in ("t", "both")
    return [
        chain._replace(b=b if b_hit else chain.b, t=t if t_hit else chain.t) if bad else chain
        for chain, bad, (b, t) in zip(chains, hit, other, strict=True)
    ]


# -- text ---------------------------------------------------------------------------------------------------------


def entity(number: int) -> str:
    """The word of an entity."""
    return f"<e_{number}>"


def relation(number: int) -> str:
    """The word of a relation."""
    return f"<r_{number}>"


def vocabulary(config: WorldConfig) -> tuple[str, ...]:
    """All words, one id each: special ones, entities, relations."""
    return (*SPECIALS, *map(entity, range(config.entities)), *map(relation, range(config.relations)))


def words(item: Fact | Chain, form: Form) -> tuple[list[str], list[str]]:
    """Prompt and response of a fact or a chain. Raises UserError for an unknown form."""
    if form not in get_args(Form):
        raise UserError(f"form '{form}' does not exist; {nearest(form, get_args(Form))}")
    if isinstance(item, Fact):
        return [entity(item.h), relation(item.r)], [entity(item.t), END]
    bridge = [entity(item.b)] if form == "cot" else []
    return [entity(item.h), relation(item.r1), relation(item.r2)], [*bridge, entity(item.t), END]


def texts(item: Fact | Chain, form: Form) -> tuple[str, str]:
    """The official strings: the prompt, and the prompt with its response."""
    prompt, response = words(item, form)
    return "".join(prompt), "".join(prompt + response)


def exact_match(prediction: str, gold: str) -> bool:
    """Equal up to the first `</a>`. A prediction that lacks it is forgiven, and what follows it is not read."""
    return _upto_end(prediction) == _upto_end(gold)


def _upto_end(text: str) -> str:
    return "".join(text.split()).split(END)[0]


@dataclass(frozen=True)
class TwoHopTask:
    """Two-hop questions as verifiable problems, for reinforcement learning. `graded`: the answer t alone, which must
    be the last entity before `</a>`, or the whole response of `form`, bridge included."""

    config: WorldConfig
    form: Form = "cot"
    graded: Literal["answer", "whole"] = "answer"
    name: str = "explicit_cot"

    def prompt_ids(self, problem: Chain, tokenizer: Any = None) -> list[int]:
        """Ids of `vocabulary`; the tokenizer is not asked."""
        return Encoder(self.config).example(problem, self.form)[0]

    def grade(self, problem: Chain, response_text: str, finished: bool) -> Verdict:
        """Right or wrong; a missing end is forgiven."""
        answer = self.read(response_text, finished)
        if answer is None:
            return Verdict(False, None, "no entity")
        if self.graded == "whole":
            right = exact_match(response_text, "".join(words(problem, self.form)[1]))
        else:
            right = answer == entity(problem.t)
        return Verdict(right, answer, "right" if right else "wrong")

    def read(self, response_text: str, finished: bool) -> str | None:
        """The last word before `</a>` where it is an entity, else None."""
        found = _WORD.findall(_upto_end(response_text))
        return found[-1] if found and found[-1].startswith("<e_") else None


class Encoder:
    """Token ids of a world's words."""

    def __init__(self, config: WorldConfig) -> None:
        self.words = vocabulary(config)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.end, self.pad = self.ids[END], self.ids["<pad>"]

    def entity(self, number: int) -> int:
        """Id of an entity."""
        return self.ids[entity(number)]

    def relation(self, number: int) -> int:
        """Id of a relation."""
        return self.ids[relation(number)]

    def example(self, item: Fact | Chain, form: Form) -> tuple[list[int], list[int]]:
        """Ids of prompt and response, as `train.sft` takes them."""
        prompt, response = words(item, form)
        return [self.ids[w] for w in prompt], [self.ids[w] for w in response]
