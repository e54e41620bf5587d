"""What sampling from prefixes costs: CPU time per generated token of `extend`, with and without its memory.

    python benchmarks/prefix.py [--repeats 5] [--jobs 8] [--case 28m-64 ...]
    python benchmarks/prefix.py --device cuda

A process for each variant, interleaved A B C A B C ..., the median of the ratios of neighbours with the lowest and the
highest. Policies: the tiny lab's S on Countdown, and a Llama of 28 million random parameters on random prompts, with 16
and with 64 responses in flight, because what is left of a prefix's cost comes from few rows. The variants of `extend`
continue the same responses:

- `empty`: from the prompts themselves, which is what the path costs where no prefix is;
- `first`, `half`, `late`: every response cut at a quarter, half and three quarters of its own length, so that contexts
  are ragged. Reading a prefix is charged to the tokens that follow it, of which a late cut leaves few;
- `ragged`: every response cut at a random place;
- `tree`: what a tree method does. A quarter of the responses from the prompts, and three branches of each from random
  places; time and tokens of both calls together;
- `stops`: `empty`, looking for a stop text that never comes.

Every variant runs twice: as it trains by default, with the keys and values of one sampling kept
(`rollout.prefix_memory`), and `again`, where every prefix is read again. Keeping them is charged to whoever samples
first: `tree` holds both calls; in the other variants the responses that are cut were sampled before, as by a method
that went through its tree, and what the memory then holds is copied for every measurement.

Each is compared with three things. `over_plain`: whole responses by `sample`, in which more rows are in flight for
longer. `over_same_shape`: as many rows with the same limits on tokens, from the bare prompts, whose contexts are
shorter. `over_same_places`: the same tokens in the same contexts without what it takes to read these (`again` minus one
token from every prefix, over one step less, by the steps), which is plain sampling at these places of a response; what
is left is the prefixes' own cost. CPU time of the process is the measure, because wall time on a shared machine is
noise; on a GPU it is wall time up to the device's last kernel. Results go to `benchmarks/results/prefix.json`, or
`prefix_cuda.json`, with machine, versions and date. The aim is 1.2 at most.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from step import cpu

from rlvr_lab.core.paths import Path as ResponsePath
from rlvr_lab.core.paths import Piece, Start
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.policy.tiny import shipped
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.rollout.memory import Memory
from rlvr_lab.tasks import countdown
from rlvr_lab.train.loop import machine

ROOT = Path(__file__).resolve().parents[1]
AIM = 1.2
CUTS = {"first": 0.25, "half": 0.5, "late": 0.75}
BRANCHES = 3


@dataclass(frozen=True)
class Case:
    """A policy, its prompts, and how many responses of which length."""

    policy: Policy
    prompts: list[list[int]]
    group: int
    sampling: Sampling
    stop: str
    """A text that the policy never writes."""


def tiny(device: str) -> Case:
    """The shipped S at the batch of grpo/tiny."""
    policy = load_policy("tiny/S", device=device)
    prompts = [list(p.prompt_ids) for p in countdown.problems(32, 0)]
    return Case(policy, prompts, 8, Sampling(1.0, 28), "yes yes yes")


def larger(device: str, prompts: int) -> Case:
    """28 million random parameters; responses run to their limit, because the end token is one of 1,024 words."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    rng = random.Random(0)
    drawn = [[rng.randrange(8, 1024) for _ in range(32)] for _ in range(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).eval().save_pretrained(folder)
        AutoTokenizer.from_pretrained(shipped("S")).save_pretrained(folder)
        return Case(load_policy(folder, device=device), drawn, 8, Sampling(1.0, 48), "yes yes yes")


CASES: dict[str, Callable[[str], Case]] = {
    "tiny/S": tiny,
    "28m": lambda device: larger(device, 2),
    "28m-64": lambda device: larger(device, 8),
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


Work = Callable[[torch.Generator], list[Piece]]


@dataclass(frozen=True)
class Variant:
    """What is measured, work of the same shape without prefixes, and reading its prefixes for one token each."""

    work: Work
    shape: Work
    read: Work | None = None


def roots_of(case: Case) -> list[ResponsePath]:
    """An empty path for every response."""
    return [ResponsePath(i, i, i, j, prompt) for i, prompt in enumerate(case.prompts) for j in range(case.group)]


def cut(paths: Sequence[ResponsePath], share: Callable[[], float], most: int) -> list[Start]:
    """Where the paths go on, each cut at a share of its length."""
    branches = [path.branch(1_000 + i, int(share() * len(path))) for i, path in enumerate(paths)]
    return [branch.start(most - len(branch)) for branch in branches if len(branch) < most]


def bare(starts: Sequence[Start], prompt_tokens: int) -> list[Start]:
    """The same rows and limits without their prefixes, those of one prompt side by side."""
    short = [replace(start, ids=start.ids[:prompt_tokens]) for start in starts]
    return sorted(short, key=lambda start: list(start.ids))


def generator(case: Case, seed: int) -> torch.Generator:
    """A seeded source of draws on the policy's device."""
    return torch.Generator(case.policy.device).manual_seed(seed)


def variants(case: Case, engine: TransformersEngine) -> dict[str, Variant]:
    """Every variant by name."""
    most, width = case.sampling.max_tokens, len(case.prompts[0])

    def grown(starts: Sequence[Start], source: torch.Generator, *stops: str) -> list[Piece]:
        return engine.extend(starts, case.sampling, source, stops=stops)

    def both(starts: Sequence[Start], *stops: str) -> Variant:
        short, first = bare(starts, width), [replace(start, max_tokens=1) for start in starts]
        return Variant(
            lambda source: grown(starts, source, *stops),
            lambda source: grown(short, source),
            lambda source: grown(first, source),
        )

    roots = roots_of(case)
    empty = [path.start(most) for path in roots]
    for path, piece in zip(roots, grown(empty, generator(case, 1)), strict=True):
        path.add(piece)

    def tree(source: torch.Generator, short: bool = False) -> list[Piece]:
        paths, rng = roots_of(case)[:: BRANCHES + 1], random.Random(3)
        pieces = grown([path.start(most) for path in paths], source)
        for path, piece in zip(paths, pieces, strict=True):
            path.add(piece)
        starts = cut([path for path in paths for _ in range(BRANCHES)], rng.random, most)
        return pieces + grown(bare(starts, width) if short else starts, source)

    found = {"empty": both(empty)}
    found |= {name: both(cut(roots, lambda share=share: share, most)) for name, share in CUTS.items()}  # type: ignore[misc]
    found["ragged"] = both(cut(roots, random.Random(4).random, most))
    found["tree"] = Variant(tree, lambda source: tree(source, True))
    found["stops"] = both(empty, case.stop)
    return found


def known(engine: TransformersEngine) -> Callable[[], Memory]:
    """Makes memories that hold what the engine's holds now."""
    memory = engine.memory
    assert memory is not None

    def again() -> Memory:
        made = Memory(memory.most_bytes)
        made.blocks, made.bytes, made._index = list(memory.blocks), memory.bytes, dict(memory._index)
        return made

    return again


def cost(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, or seconds until a GPU has done its last kernel; and the result."""
    if device.type != "cuda":
        return cpu(work)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def per_token(case: Case, engine: TransformersEngine, work: Work, memory: Memory | None = None) -> float:
    """Seconds per generated token."""
    engine.memory = memory
    seconds, pieces = cost(case.policy.device, lambda: work(generator(case, 2)))
    engine.memory = None
    return seconds / sum(len(piece.ids) for piece in pieces)


def same_places(case: Case, engine: TransformersEngine, work: Work, read: Work, memory: Memory) -> float:
    """Cost of the work with what the memory holds, over that of as many passes in the same contexts."""

    def seconds(what: Work, held: Memory | None = None) -> tuple[float, int]:
        engine.memory = held
        spent, pieces = cost(case.policy.device, lambda: what(generator(case, 2)))
        engine.memory = None
        return spent, max(len(piece.ids) for piece in pieces)

    (whole, steps), (reading, _) = seconds(work), seconds(read)
    plain = (whole - reading) * steps / (steps - 1)  # the first token comes out of the reading
    return seconds(work, memory)[0] / plain


def measured(name: str, variant: str, device: str, repeats: int) -> dict[str, Any]:
    """One variant against plain sampling and against its own shape."""
    torch.set_num_threads(1)
    case = CASES[name](device)
    engine = TransformersEngine(case.policy)

    def plain() -> float:
        drawn = generator(case, 0)
        seconds, rollout = cost(
            case.policy.device, lambda: engine.sample(case.prompts, case.group, case.sampling, drawn)
        )
        return seconds / int(rollout.sampled.sum())

    with engine.remembering():
        measured_one = variants(case, engine)[variant]
        roots = known(engine)
    work, shape, read = measured_one.work, measured_one.shape, measured_one.read
    memory = Memory if variant == "tree" else roots
    rows = [
        (
            per_token(case, engine, work, memory()),
            per_token(case, engine, work),
            plain(),
            per_token(case, engine, shape),
        )
        for _ in range(repeats + 1)
    ][1:]
    places = [same_places(case, engine, work, read, memory()) for _ in range(repeats + 1)][1:] if read else []
    found = {
        way: {
            "over_plain": spread([row[place] / row[2] for row in rows]),
            "over_same_shape": spread([row[place] / row[3] for row in rows]),
        }
        for place, way in enumerate(("kept", "again"))
    }
    if places:
        found["kept"]["over_same_places"] = spread(places)
    print(name, variant, {(w, k): round(v["median"], 2) for w, o in found.items() for k, v in o.items()}, flush=True)
    about = {
        "parameters": sum(p.numel() for p in case.policy.model.parameters()),
        "responses": len(case.prompts) * case.group,
        "prompt_tokens": len(case.prompts[0]),
        "max_tokens": case.sampling.max_tokens,
        "plain_microseconds_per_token": 1e6 * statistics.median(row[2] for row in rows),
    }
    return {"about": about, "cost": found}


VARIANTS = ("empty", *CUTS, "ragged", "tree", "stops")


def joined(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the processes of one policy found, by variant."""
    return next(iter(parts.values()))["about"] | {
        "cost_per_generated_token": {variant: part["cost"] for variant, part in parts.items()},
        "within_aim": {
            variant: {key: value["median"] <= AIM for key, value in part["cost"]["kept"].items()}
            for variant, part in parts.items()
        },
    }


def main(
    repeats: Annotated[int, typer.Option(help="Ratios of each kind.")] = 5,
    case: Annotated[list[str] | None, typer.Option(help=f"Only these policies, of {', '.join(CASES)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time; on a GPU leave it at 1.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Measure the prefix path; see the head of this file."""
    wanted = case or list(CASES)
    if unknown := set(wanted) - set(CASES):
        raise SystemExit(f"--case {unknown.pop()}: choose of {', '.join(CASES)}")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        started = {
            name: {variant: pool.submit(measured, name, variant, device, repeats) for variant in VARIANTS}
            for name in wanted
        }
        policies = {
            name: joined({variant: future.result() for variant, future in parts.items()})
            for name, parts in started.items()
        }
    measure = "seconds" if device.startswith("cuda") else "CPU seconds"
    report: dict[str, object] = {"what": __doc__, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    report |= {"measure": measure, "repeats": repeats, "aim": AIM, "policies": policies}
    name = "prefix.json" if device == "cpu" else f"prefix_{device.split(':')[0]}.json"
    (out or ROOT / "benchmarks/results" / name).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
