"""`rlvr-lab`: train, evaluate, pretrain, methods, doctor. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from .train.config import TrainConfig
    from .train.loop import RunResult

app = typer.Typer(
    name="rlvr-lab",
    help="Entropy in reinforcement learning with verifiable rewards: train, evaluate and watch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130


@app.callback()
def _root() -> None:
    """Entropy in reinforcement learning with verifiable rewards: train, evaluate and watch."""


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A recipe (`grpo/tiny`, or a YAML file), then settings such as `optimizer.lr=3e-4`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; must not exist yet.")] = None,
    model: Annotated[str | None, typer.Option(help="Transformers directory, `tiny/S`, `tiny/R` or hub name.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL with question|problem|prompt and answer.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    settings: Annotated[bool, typer.Option("--settings", help="List all settings and recipes, then stop.")] = False,
) -> None:
    """Train a policy with reinforcement learning from verifiable rewards.

    The tiny lab, about two minutes on two cores:

        rlvr-lab train grpo/tiny --out runs/first

    Your own model and problems:

        rlvr-lab train grpo/math --model path/to/model --data gsm8k.jsonl --out runs/gsm8k

    Change settings, see what there is, continue after an interruption:

        rlvr-lab train grpo/tiny optimizer.lr=3e-4 methods.grpo.clip_high=0.28 --out runs/higher

        rlvr-lab train --settings

        rlvr-lab train --resume --out runs/first

    Ctrl-C finishes the step, writes a checkpoint and stops; a second Ctrl-C stops at once.
    """
    if settings:
        _print_settings()
        return
    with _user_errors():
        if out is None:
            raise UserError("--out is missing: name a folder for the run, such as --out runs/first")
        words = arguments or []
        recipe = next((w for w in words[:1] if "=" not in w), None)
        overrides = words[1:] if recipe else words
        config = _config(recipe, overrides, model, data, out if resume else None)
        _report(_train(config, out, resume), config)


def _config(
    recipe: str | None, overrides: list[str], model: str | None, data: Path | None, resumed: Path | None
) -> TrainConfig:
    from .train.config import load_config

    for word in overrides:
        if "=" not in word:
            raise UserError(f"'{word}' is neither a setting (KEY=VALUE) nor the first word, where a recipe stands")
    if resumed is not None and recipe is None:
        recipe = str(resumed / "config.yaml")
        if not Path(recipe).exists():
            raise UserError(f"{resumed} holds no run to resume (no config.yaml)")
    short = [f"model.path={model}"] if model else []
    if data is not None:
        short += ["data.task=math", f"data.file={data}"]
        recipe = recipe or "grpo/math"
    return load_config(recipe or "grpo/tiny", [*short, *overrides])


def _train(config: TrainConfig, out: Path, resume: bool) -> RunResult:
    from .train.console import for_terminal
    from .train.loop import Trainer

    with _polite_interrupt() as asked:
        trainer = Trainer(config, out, resume=resume, console=for_terminal(), stop=asked)
        return trainer.run()


def _report(result: RunResult, config: TrainConfig) -> None:
    if result.interrupted:
        typer.echo(f"stopped after step {result.steps_done} of {config.steps}; the state is saved. Continue with:")
        typer.echo(f"  rlvr-lab train --resume --out {result.out}")
        raise typer.Exit(INTERRUPTED)
    if result.first and result.last:
        _table(
            "held-out problems" if result.last["held_out"] else "training problems",
            ["", "before", "after"],
            [[name, _cell(result.first, name), _cell(result.last, name)] for name in _shown(result.last)],
        )
    typer.echo(f"policy: {result.out / 'model'}   curves: tensorboard --logdir {result.out / 'tensorboard'}")


@app.command()
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
    with _user_errors():
        if out is not None and out.exists():
            raise UserError(f"{out} already exists; choose another --out")
        summary, results = _evaluate(model, data, problems, samples, temperature, max_tokens, rows, seed, device)
        _table(model, ["", "value", "95 % interval"], [_row(summary, name) for name in _shown(summary)])
        if out is not None:
            from .train.logs import append_jsonl

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

    from .evaluate.evaluation import evaluate as run
    from .policy.load import load_policy
    from .rollout.engine import Sampling
    from .train.config import parse_config
    from .train.console import for_terminal
    from .train.data import load_problems

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


@app.command()
def pretrain(
    base: Annotated[str, typer.Option(help="S: one attempt. R: up to five attempts.")] = "S",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the new base policy.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of 64 sequences; as shipped.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Processor threads; one is nearly as fast as two.", min=1)] = 1,
) -> None:
    """Pre-train a base policy of the tiny lab from scratch, as the shipped ones were made.

    Examples:

        rlvr-lab pretrain --base S --out bases/S

        rlvr-lab pretrain --base R --steps 1500 --out bases/R-short

    About an hour on one core for the shipped settings. Interrupted runs go on when the command is repeated.
    """
    with _user_errors():
        import torch

        from .policy import tiny
        from .policy.pretrain import SHIPPED
        from .policy.pretrain import pretrain as run
        from .train.console import for_terminal

        if base not in tiny.BASES:
            raise UserError(f"no base '{base}'; there are {', '.join(tiny.BASES)}")
        if out is None:
            raise UserError("--out is missing: name a directory for the new base, such as --out bases/S")
        from dataclasses import replace

        torch.set_num_threads(threads)
        config = replace(SHIPPED[base], seed=seed, steps=steps or SHIPPED[base].steps)
        console = for_terminal()
        console.begin(f"pre-training {base}", config.total_steps)
        try:
            run(config, out, lambda step, loss, factor: console.advance(1))
        finally:
            console.end()
        typer.echo(f"written to {out}; measure it with: rlvr-lab evaluate --model {out}")


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="Show one method with its settings.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the methods with stage, citation, hooks, presets, chapter, recipe and status; or one with its settings.

    Examples:

        rlvr-lab methods

        rlvr-lab methods kl_cov

        rlvr-lab methods --json

    Hooks marked * are exclusive: a composition can hold one owner of each beside its base. Compose methods on the
    command line: rlvr-lab train grpo/tiny "methods={grpo: {preset: tiny}, kl_cov: {preset: tiny}}" --out runs/kl
    """
    import json

    from .methods import REGISTRY

    with _user_errors():
        if slug is not None:
            row = _method_row(slug)
            settings = _method_settings(slug)
            typer.echo(json.dumps(row | {"settings": settings}, indent=1)) if as_json else _show_method(row, settings)
            return
        rows = [_method_row(name) for name in REGISTRY]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _table("methods", list(rows[0]), [list(row.values()) for row in rows])


def _method_row(slug: str) -> dict[str, str]:
    from .errors import nearest
    from .methods import REGISTRY, hooks_of, load_class

    if slug not in REGISTRY:
        raise UserError(f"no method '{slug}'; {nearest(slug, REGISTRY)}")
    entry = REGISTRY[slug]
    cls = load_class(slug) if entry.cls else None
    return {
        "slug": entry.slug,
        "title": entry.title,
        "arXiv": entry.arxiv,
        "stage": entry.stage,
        "hooks": ", ".join(hooks_of(cls)) if cls else "",
        "presets": ", ".join(cls.presets) if cls else "",
        "chapter": entry.chapter,
        "recipe": entry.recipe or "",
        "status": entry.status,
    }


def _method_settings(slug: str) -> dict[str, dict[str, Any]]:
    """Every setting with its value in each preset."""
    from dataclasses import asdict

    from .methods import REGISTRY, load_class

    if not REGISTRY[slug].cls:
        return {}
    presets = {name: asdict(config) for name, config in load_class(slug).presets.items()}
    names = next(iter(presets.values()), {})
    return {name: {preset: values[name] for preset, values in presets.items()} for name in names}


def _show_method(row: dict[str, str], settings: dict[str, dict[str, Any]]) -> None:
    for name, value in row.items():
        if value:
            typer.echo(f"{name:8s} {value}")
    if settings:
        presets = list(next(iter(settings.values())))
        prefix = f"methods.{row['slug']}."
        rows = [[prefix + name, *(str(values[p]) for p in presets)] for name, values in settings.items()]
        _table("settings by preset", ["setting", *presets], rows)


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="Run folder, as given to `rlvr-lab train --out`.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write a page with a plot per finding here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Read a run's log and name what is likely wrong: evidence, cause, and the setting to change.

    Examples:

        rlvr-lab doctor runs/first

        rlvr-lab doctor runs/first --html doctor.html

        rlvr-lab doctor runs/first --json

    Works on runs that are still going, were interrupted, or lost part of their log. Findings are notes, warnings or
    critical, in order of likelihood; a healthy run has nothing above a note.
    """
    import json

    with _user_errors():
        from .train.doctor import diagnose, page, read_history, render

        report = diagnose(run)
        if html is not None:
            html.write_text(page(report, read_history(run)[0]), encoding="utf-8")
        typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else render(report))
        if html is not None:
            typer.echo(f"page: {html}", err=as_json)


# -- shared -------------------------------------------------------------------------------------------------------


@contextmanager
def _user_errors() -> Iterator[None]:
    """One clear line and a non-zero exit for what the user can mend; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: {error.filename or 'file'}: {error.strerror or error}", err=True)
        raise typer.Exit(2) from None
    except (RuntimeError, FloatingPointError) as error:
        reason = _known_stop(error)
        if reason is None:
            raise
        typer.echo(f"stopped: {reason}", err=True)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _known_stop(error: Exception) -> str | None:
    """What to tell the user about a run that could not go on; None for anything unforeseen."""
    # by name, because importing torch here would slow down every --help
    kind = type(error).__name__
    if kind in ("TrainingStopped", "FloatingPointError"):
        return str(error)
    if kind == "OutOfMemoryError":
        return "the GPU's memory is full; lower rollout.rows, update.micro_batch_rows or rollout.max_tokens"
    return None


@contextmanager
def _polite_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (and SIGTERM) once: finish the step. Twice: stop at once."""
    asked: list[int] = []

    def remember(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        typer.echo("\nfinishing this step and saving; press Ctrl-C again to stop at once", err=True)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_settings() -> None:
    from .train.config import describe_settings, packaged_recipes

    _table("settings and their defaults", ["setting", "default"], [list(row) for row in describe_settings()])
    _table("recipes", ["name"], [[name] for name in packaged_recipes()])


def _shown(summary: dict[str, Any]) -> list[str]:
    passes = [name for name in summary if name.startswith("pass@") and not name.endswith("interval")]
    return [
        *passes,
        "distinct_correct",
        "answer_entropy",
        "token_entropy",
        "sequence_entropy",
        "mean_tokens",
        "finished",
    ]


def _cell(summary: dict[str, Any], name: str) -> str:
    value = summary.get(name)
    if value is None:
        return "-"
    return f"{value:.1%}" if name.startswith(("pass@", "finished")) else f"{value:.3f}"


def _row(summary: dict[str, Any], name: str) -> list[str]:
    interval = summary.get(f"{name}_interval")
    shown = f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
    return [name, _cell(summary, name), shown]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Entry point of the `rlvr-lab` command."""
    # Threads that spin while they wait fight any other busy process for the cores: with one core taken, a tiny step
    # took 39 s instead of 1.3 s. Never spinning costs a fifth on idle cores, a short spin nothing that was measurable.
    # Must be set before torch loads its OpenMP runtime (libgomp).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    app()


if __name__ == "__main__":
    main()
