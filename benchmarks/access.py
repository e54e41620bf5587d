"""What looking into a model costs: CPU time of a forward pass over that of the bare model.

    python benchmarks/access.py [--repeats 9]

One process, interleaved A B A B ..., the median of the ratios of neighbouring pairs with the lowest and the highest.
Equal in all: the same random Llama of 28 million parameters, 8 sequences of 128 tokens, no gradient. `imported` is a
model at whose parts somebody looked before (`parts`, an earlier `record`); `nothing` a `record` that asks for nothing;
`residual` and `everything` keep all streams; `lens` is the policy of the third of eight layers. Results go to
`benchmarks/results/access.json` with machine, versions and date. The aim is 1.1 where nothing is requested.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from step import cpu, ratios
from transformers import LlamaConfig, LlamaForCausalLM

from rlvr_lab.policy.access import Lens, What, lens_logits, parts, record
from rlvr_lab.train.loop import machine

ROOT = Path(__file__).resolve().parents[1]
AIM = 1.1


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of one call."""
    return cpu(work)[0]


def main(
    repeats: Annotated[int, typer.Option(help="Ratios of each kind.")] = 9,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "benchmarks/results/access.json",
) -> None:
    """Measure access; see the head of this file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    )).eval()  # fmt: skip
    ids = torch.randint(1024, (8, 128))

    def bare() -> None:
        model(input_ids=ids, use_cache=False)

    def seen(*what: What) -> Callable[[], None]:
        def work() -> None:
            with record(model, what):
                bare()

        return work

    def lens() -> None:
        lens_logits(model, Lens(3), input_ids=ids, use_cache=False)

    parts(model)
    seen(*get_args(What))()
    works = {"imported": bare, "nothing": seen(), "residual": seen("residual"), "everything": seen(*get_args(What))}
    with torch.no_grad():
        found = {
            name: ratios(partial(seconds, work), partial(seconds, bare), repeats)
            for name, work in (works | {"lens": lens}).items()
        }
    for name, ratio in found.items():
        print(name, {key: round(value, 3) for key, value in ratio.items()})
    report = {
        "what": __doc__,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "repeats": repeats,
        "aim": AIM,
        "cost_over_bare": found,
        "within_aim": all(found[name]["median"] <= AIM for name in ("imported", "nothing")),
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
