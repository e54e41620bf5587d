"""`rlvr-lab evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ._common import cell, shown, table, user_errors

if TYPE_CHECKING:
    from ..train.config import TrainConfig


def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="Transformers directory, `tiny/S` or hub name.")],
    data: Annotated[Path | None, typer.Option(help="JSONL of problems; without it, Countdown's held-out ones.")] = None,
    problems: Annotated[int, typer.Option(help="Number of problems, from the first line on.", min=1)] = 96,
    samples: Annotated[int, typer.Option(help="Responses per problem; pass@k needs at least k.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest response; 96, or 512 with --data.", min=1)] = None,
    rows: Annotated[int | None, typer.Option(help="Responses in flight; 512, or 64 with --data.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same figures (on CPU).")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write one JSON line per problem here.")] = None,
) -> None:
    """Measure pass@k, distinct solutions, entropies and lengths of a policy.

    Examples:

        rlvr-lab evaluate --model tiny/S

        rlvr-lab evaluate --model tiny/S --temperature 0.3

        rlvr-lab evaluate --model runs/first/model --out results.jsonl

        rlvr-lab evaluate --model path/to/model --data aime24.jsonl --samples 8 --max-tokens 2048

    Intervals are 95 % bootstrap intervals over problems.
    """
    with user_errors():
        if out is not None and out.exists():
            raise UserError(f"{out} already exists; choose another --out")
        summary, results = _evaluate(model, data, problems, samples, temperature, max_tokens, rows, seed, device)
        table(model, ["", "value", "95 % interval"], [_row(summary, name) for name in shown(summary)])
        if out is not None:
            from ..train.logs import append_jsonl

            append_jsonl(out, results)
            typer.echo(f"per problem: {out}")


def _evaluate(
    model: str,
    data: Path | None,
    problems: int,
    samples: int,
    temperature: float,
    max_tokens: int | None,
    rows: int | None,
    seed: int,
    device: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from dataclasses import asdict

    from ..evaluate.evaluation import evaluate as run
    from ..policy.load import load_policy
    from ..rollout.engine import Sampling
    from ..train.config import parse_config
    from ..train.console import for_terminal
    from ..train.data import load_problems

    console = for_terminal()
    policy = load_policy(model, device=device)
    longest = max_tokens or (512 if data else 96)
    config: TrainConfig = parse_config(
        {
            "data": {"task": "math", "file": data} if data else {},
            "evaluation": {"problems": problems, "file": data},
            "rollout": {"max_tokens": longest},
        }
    )
    loaded = load_problems(config, policy, console.say)
    console.begin("evaluating", len(loaded.evaluation) * samples)
    sampling = Sampling(temperature, longest, rows or (64 if data else 512))
    try:
        result = run(
            policy,
            loaded.task,
            loaded.evaluation,
            samples=samples,
            sampling=sampling,
            seed=seed,
            report=lambda done: console.advance(done),
        )
    finally:
        console.end()
    return result.summary(seed=seed), [asdict(p) for p in result.problems]


def _row(summary: dict[str, Any], name: str) -> list[str]:
    interval = summary.get(f"{name}_interval")
    shown = f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
    return [name, cell(summary, name), shown]
