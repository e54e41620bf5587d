"""`rlvr-lab evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, nearest
from ._common import cell, table, user_errors

if TYPE_CHECKING:
    from ..evaluate.evaluation import ProblemResult
    from ..evaluate.suite import Job, Settings
    from ..policy.load import Policy

ENGINES = ("transformers", "vllm")
OWN, LONGEST = "countdown", {"maze": 200}
"""The task that is measured where nothing is named, and the tasks whose episodes need more than 96 tokens."""

_Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Same as --model.", show_default=False)]
_ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Transformers directory, `tiny/S` or hub name.", show_default=False)
]
_Benchmarks = Annotated[
    str | None, typer.Option(help="Names with commas: math500, aime24, aime25, amc23, minerva, olympiadbench, gsm8k.")
]
_Data = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FILE: a JSONL file for a benchmark. Or one FILE of problems, graded as mathematics."),
]
_Problems = Annotated[int | None, typer.Option(help="The first so many; a benchmark's all, else 96.", min=1)]


_Task = Annotated[
    str | None, typer.Option("--task", help="Held-out problems of countdown, instructions, triples, maze or feedback.")
]


@dataclass(frozen=True)
class _Request:
    """What the command line asks for; None stands for a default that depends on the rest."""

    model: str
    benchmarks: tuple[str, ...]
    files: dict[str, Path]
    data: Path | None
    task: str
    problems: int | None
    samples: int
    ks: tuple[int, ...]
    temperature: float
    max_tokens: int
    rows: int
    seed: int
    device: str
    dtype: str
    engine: str
    template: str | None
    max_bad_rows: int
    texts: bool


def evaluate(
    model_: _Model = None,
    model: _ModelOption = None,
    benchmarks: _Benchmarks = None,
    data: _Data = None,
    task: _Task = None,
    problems: _Problems = None,
    samples: Annotated[int, typer.Option(help="Responses per problem; pass@k needs at least k.", min=1)] = 64,
    k: Annotated[str | None, typer.Option(help="The k of pass@k and maj@k, with commas; powers of two.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="96; 512 with a file, 3072 with benchmarks.", min=1)] = None,
    rows: Annotated[int | None, typer.Option(help="Responses in flight; 512, or 64 with data.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same figures (on CPU).")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    template: Annotated[str | None, typer.Option(help="Another prompt, with {question} in it.")] = None,
    max_bad_rows: Annotated[int, typer.Option(help="Broken rows to skip per file.", min=0)] = 20,
    texts: Annotated[bool, typer.Option("--texts", help="Keep the text of every response, too.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for the results, or a .jsonl.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the evaluation in --out.")] = False,
) -> None:
    """Measure pass@k, maj@k, distinct solutions, entropies and lengths of a policy.

    Examples:

        rlvr-lab evaluate tiny/S --temperature 0.3

        rlvr-lab evaluate tiny/A --task maze --samples 16

        rlvr-lab evaluate path/to/model --benchmarks math500,aime24 --samples 32 --out runs/eval

        rlvr-lab evaluate path/to/model --benchmarks math500,aime24 --samples 32 --out runs/eval --resume

        rlvr-lab evaluate path/to/model --benchmarks aime24 --data aime24=aime24.jsonl --samples 8

        rlvr-lab evaluate --model path/to/model --data problems.jsonl --samples 8 --out results.jsonl

    Benchmarks come from files named by --data, the folder RLVR_LAB_DATA, or the Hub. The folder --out holds a line per
    problem with every response, a report as JSON and as HTML. Intervals are 95 % bootstrap intervals over problems.
    """
    with user_errors():
        request = _request(
            model or model_, benchmarks, data, task, problems, samples, k, temperature, max_tokens, rows,
            seed=seed, device=device, dtype=dtype, engine=engine, template=template, max_bad_rows=max_bad_rows,
            texts=texts,
        )  # fmt: skip
        _check_out(out, resume, request)
        _report(request, _run(request, out, resume), out)


# -- what is asked for ------------------------------------------------------------------------------------------------


def _request(
    model: str | None,
    benchmarks: str | None,
    data: Sequence[str] | None,
    task: str | None,
    problems: int | None,
    samples: int,
    k: str | None,
    temperature: float,
    max_tokens: int | None,
    rows: int | None,
    **rest: Any,
) -> _Request:
    if model is None:
        raise UserError("--model is missing: name a transformers directory, tiny/S, or a hub name")
    if rest["engine"] not in ENGINES:
        raise UserError(f"--engine '{rest['engine']}' is unknown: {nearest(rest['engine'], ENGINES)}")
    ks = _ks(k, samples)
    files, file = _files(data or ())
    names = _names(benchmarks, files)
    if names and file:
        raise UserError(f"with --benchmarks, --data is NAME=FILE: {names[0]}={file}, or leave --benchmarks out")
    if task and (names or file):
        raise UserError("--task has problems of its own: leave --data and --benchmarks out")
    longest = max_tokens or (3072 if names else 512 if file else LONGEST.get(task or OWN, 96))
    in_flight = rows or (64 if names or file else 512)
    count = problems or (None if names else 96)
    return _Request(model, names, files, file, task or OWN, count, samples, ks, temperature, longest, in_flight, **rest)


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    if text is None:
        from ..evaluate.evaluation import DEFAULT_K

        return tuple(k for k in DEFAULT_K if k <= samples)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise UserError(f"--k '{text}' is no list of whole numbers from 1 on, such as 1,8,32")
    ks = tuple(sorted({int(word) for word in words}))
    if ks[-1] > samples:
        raise UserError(f"pass@{ks[-1]} needs --samples {ks[-1]} or more; --samples is {samples}")
    return ks


def _names(benchmarks: str | None, files: dict[str, Path]) -> tuple[str, ...]:
    if benchmarks is None:
        return tuple(files)
    from ..tasks.benchmarks import BENCHMARKS, benchmark

    names = tuple(dict.fromkeys(benchmark(name.strip()).name for name in benchmarks.split(",") if name.strip()))
    if not names:
        raise UserError(f"--benchmarks names none; there are {', '.join(BENCHMARKS)}")
    if extra := [name for name in files if name not in names]:
        raise UserError(f"--data {extra[0]}=... stands for a benchmark that --benchmarks does not name")
    return names


def _files(data: Sequence[str]) -> tuple[dict[str, Path], Path | None]:
    """Files by benchmark, and the file without a benchmark."""
    if not data:
        return {}, None
    from ..tasks.benchmarks import benchmark

    files: dict[str, Path] = {}
    plain: list[Path] = []
    for item in data:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            plain.append(Path(item))
        elif not path:
            raise UserError(f"--data '{item}' names no file; write NAME=FILE")
        else:
            files[benchmark(name).name] = Path(path)
    if len(plain) > 1 or (plain and files):
        raise UserError("--data takes one file of problems, or NAME=FILE for each benchmark")
    return files, plain[0] if plain else None


def _check_out(out: Path | None, resume: bool, request: _Request) -> None:
    if out is None:
        if resume:
            raise UserError("--resume needs --out, the folder of the evaluation to continue")
        return
    if out.exists() and not resume:
        raise UserError(f"{out} already exists; choose another --out" + ("" if out.is_file() else " or add --resume"))
    if _is_file(out):
        if resume or len(request.benchmarks) > 1:
            what = "cannot be resumed" if resume else "holds one set of problems"
            raise UserError(f"--out {out}: a single file {what}; name a folder instead")
        if not out.parent.is_dir():
            raise UserError(f"{out}: its folder does not exist")


def _is_file(out: Path) -> bool:
    return out.suffix == ".jsonl"


# -- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    settings: Settings
    jobs: list[Job]
    results: dict[str, list[ProblemResult]]


def _run(request: _Request, out: Path | None, resume: bool) -> _Outcome:
    from ..evaluate.suite import Settings, kept_rows, open_folder, run_job, weights_digest
    from ..policy.load import load_policy
    from ..rollout.factory import make_engine
    from ..train.console import for_terminal

    if request.engine == "vllm":
        from ..rollout.vllm_settings import installed_version

        installed_version()  # before the model is loaded
    console = for_terminal()
    policy = load_policy(request.model, device=request.device, dtype=request.dtype)
    jobs = _jobs(request, policy, console.say)
    settings = Settings(
        request.model, weights_digest(policy), request.engine, policy.device.type, request.dtype, request.samples,
        request.temperature, request.max_tokens, request.rows, request.seed, request.texts,
    )  # fmt: skip
    folder = None if out is None or _is_file(out) else out
    if folder is not None:
        open_folder(folder, settings, jobs, resume)
    paths = {job.name: out if folder is None else folder / f"{job.name}.jsonl" for job in jobs}
    # a run that is complete is only reported again, and starts no vLLM for that
    left = any(len(kept_rows(paths[job.name], job, settings)) < len(job.problems) for job in jobs)
    engine = make_engine("vllm" if request.engine == "vllm" and left else "transformers", policy)
    console.begin("evaluating", sum(len(job.problems) for job in jobs) * request.samples)
    results = {}
    try:
        for job in jobs:
            results[job.name] = run_job(
                job, policy, engine, settings, paths[job.name], lambda done: console.advance(done)
            )
    except KeyboardInterrupt:
        if folder is not None:
            typer.echo(f"whole batches are in {folder}; continue with the same command and --resume", err=True)
        raise
    finally:
        console.end()
        engine.close()
    return _Outcome(settings, jobs, results)


def _jobs(request: _Request, policy: Policy, say: Callable[[str], None]) -> list[Job]:
    from ..tasks.benchmarks import BENCHMARKS, load_benchmark, make_task

    if not request.benchmarks:
        return [_own_job(request, policy, say)]
    jobs = []
    for name in request.benchmarks:
        loaded = load_benchmark(
            BENCHMARKS[name], request.files.get(name), limit=request.problems, max_bad_rows=request.max_bad_rows,
            report=say,
        )  # fmt: skip
        task = make_task(loaded.benchmark, request.template)
        jobs.append(_job(name, task, loaded.problems, loaded.source, loaded.skipped, request, policy, say))
    return jobs


def _own_job(request: _Request, policy: Policy, say: Callable[[str], None]) -> Job:
    """Held-out problems of a task that makes its own, or those of a file."""
    from ..tasks.jsonl import load_jsonl
    from ..tasks.registry import MathTask

    count = request.problems or 96
    if request.data is None:
        made, held_out = _made(request.task, count, policy)
        return _job(request.task, made, held_out, f"held-out problems of {request.task}", 0, request, policy, say)
    skipped: list[str] = []

    def tell(line: str) -> None:
        skipped.append(line)
        say(line)

    found = load_jsonl(
        request.data, limit=count, max_bad_lines=request.max_bad_rows, report=tell, setting="--max-bad-rows"
    )
    task = MathTask(template=request.template) if request.template else MathTask()
    return _job(request.data.stem, task, found, str(request.data), len(skipped), request, policy, say)


def _made(name: str, count: int, policy: Policy) -> tuple[Any, list[Any]]:
    """A task that makes its problems, and held-out ones; refused where the policy knows other words.

    Raises UserError for a task with a file, and as `check_words` does.
    """
    from ..policy.load import check_words
    from ..tasks.registry import entry, task

    if entry(name).file is not None:
        raise UserError(f"--task {name} has no problems of its own; name a file with --data")
    check_words(policy, name)
    made = task(name)
    return made, entry(name).problems(made, count, 0, evaluation=True)


def _job(
    name: str,
    task: Any,
    problems: Sequence[Any],
    source: str,
    skipped: int,
    request: _Request,
    policy: Policy,
    say: Callable[[str], None],
) -> Job:
    from ..evaluate.suite import Job
    from ..train.data import that_fit

    kept, prompts = that_fit(list(problems), task, policy, request.max_tokens, say, setting="--max-tokens")
    notes = {"rows_skipped": skipped, "prompts_left_out": len(problems) - len(kept)}
    return Job(name, task, kept, prompts, source, notes)


# -- reporting --------------------------------------------------------------------------------------------------------


def _report(request: _Request, outcome: _Outcome, out: Path | None) -> None:
    import json

    from ..evaluate.evaluation import summarise
    from ..evaluate.suite import replace

    summaries = {
        job.name: {"source": job.source, **job.notes}
        | summarise(outcome.results[job.name], request.temperature, request.ks, request.seed)
        for job in outcome.jobs
    }
    _print(request, summaries)
    if out is None:
        return
    if _is_file(out):
        typer.echo(f"per problem: {out}")
        return
    told = {**asdict(outcome.settings), "template": request.template}
    report = {"settings": told, "benchmarks": summaries}
    replace(out / "report.json", json.dumps(report, indent=1) + "\n")
    try:
        from ..show.evaluation_page import evaluation_page
    except ImportError:  # environments of an engine may be installed without it
        typer.echo(f"report: {out / 'report.json'}; report.html needs plotly: pip install plotly, then --resume")
        return
    replace(out / "report.html", evaluation_page(request.model, summaries, told))
    typer.echo(f"report: {out / 'report.html'}   per problem: {', '.join(f'{name}.jsonl' for name in summaries)}")


def _print(request: _Request, summaries: dict[str, dict[str, Any]]) -> None:
    if len(summaries) == 1:
        (summary,) = summaries.values()
        table(request.model, ["", "value", "95 % interval"], [_row(summary, name) for name in _shown(summary)])
        return
    last = request.ks[-1]
    names = ["problems", f"avg@{request.samples}", f"pass@{last}", f"maj@{last}", "answer_entropy", "mean_tokens",
             "truncated"]  # fmt: skip
    rows = [[name, *(_cell(summary, figure) for figure in names)] for name, summary in summaries.items()]
    table(request.model, ["benchmark", *names], rows)


def _shown(summary: dict[str, Any]) -> list[str]:
    hidden = ("source", "problems", "samples", "temperature", "rows_skipped", "prompts_left_out")
    return [name for name in summary if name not in hidden and not name.endswith("_interval")]


def _row(summary: dict[str, Any], name: str) -> list[str]:
    interval = summary.get(f"{name}_interval")
    return [name, _cell(summary, name), f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""]


def _cell(summary: dict[str, Any], name: str) -> str:
    value = summary.get(name)
    return str(value) if isinstance(value, int) else cell(summary, name)
