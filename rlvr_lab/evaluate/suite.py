"""Evaluations that are written down problem by problem, and go on where they were stopped.

A folder holds `settings.json` and, for each set of problems, `NAME.jsonl` with a line per problem: its figures, and
every response with answer, verdict, reason and length. Problems are sampled in batches of `rows // samples`, and the
lines of a batch are appended together and synced, so that `kill -9` loses one batch at most.

Every problem has a random stream of its own, from the seed, the set's name and its place in it. A run that continues
keeps whole batches only, so that its batches are those of a run without interruption: the files are the same, byte
for byte, on the same machine. Other settings are refused, because half of the samples would be of something else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.rollout import Rollout
from ..errors import UserError
from ..policy.load import Policy
from ..rollout.engine import Sampling
from ..rollout.episodes import for_task
from ..rollout.factory import Engine
from ..rollout.grading import grade, response_texts, verdicts_of
from ..tasks.base import Task, Verdict
from .evaluation import ProblemResult, problem_result

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What all sets of an evaluation share, and what must not change when it continues."""

    model: str
    weights: str
    """Digest of the weights; see `weights_digest`."""
    engine: str
    device: str
    dtype: str
    samples: int
    temperature: float
    max_tokens: int
    rows: int
    """Responses in flight, and so the size of a batch."""
    seed: int
    texts: bool
    """Whether the file keeps the text of every response."""

    @property
    def batch(self) -> int:
        """Problems per batch."""
        return max(1, self.rows // self.samples)


@dataclass(frozen=True)
class Job:
    """A named set of problems with its task and encoded prompts."""

    name: str
    task: Task[Any]
    problems: Sequence[Any]
    prompts: Sequence[Sequence[int]]
    source: str
    notes: Mapping[str, int]
    """What the report counts beside the figures: rows skipped, prompts left out."""

    @property
    def digest(self) -> str:
        """Of prompts and problems, references included."""
        lines = (f"{list(p)} {q}\n" for p, q in zip(self.prompts, self.problems, strict=True))
        return _sha(line.encode("utf-8", "surrogatepass") for line in lines)


def weights_digest(policy: Policy) -> str:
    """Of every parameter's name, shape and 64 of its values: tells two sets of trained weights apart at no cost."""

    def parts() -> Iterator[bytes]:
        for name, p in policy.model.named_parameters():
            flat = p.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            yield f"{name} {tuple(p.shape)} ".encode() + some.numpy().tobytes()

    return _sha(parts())


def _sha(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


# -- the folder -------------------------------------------------------------------------------------------------------


def open_folder(out: Path, settings: Settings, jobs: Sequence[Job], resume: bool) -> None:
    """Make the folder of an evaluation, or check that it may be continued. Sets may be added, not changed.

    Raises UserError that names what differs.
    """
    path = out / SETTINGS
    shared = asdict(settings)
    mine = {job.name: {"source": job.source, "problems": len(job.problems), "digest": job.digest} for job in jobs}
    if resume:
        before = _read_settings(path)
        _compare(out, before["settings"], shared)
        for name, own in mine.items():
            _compare_job(out, name, before["jobs"].get(name), own)
        mine = before["jobs"] | mine
    else:
        if out.exists():
            raise UserError(f"{out} already exists; choose another --out, or continue it with --resume")
        out.mkdir(parents=True)
    replace(path, json.dumps({"settings": shared, "jobs": mine}, indent=1) + "\n")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(found["settings"], dict) and isinstance(found["jobs"], dict)):
            raise ValueError("settings or jobs missing")
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no evaluation to resume (no {path.name}); leave --resume out") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); start again with another --out") from None
    result: dict[str, Any] = found
    return result


def _compare(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if name in ("weights", "model") or before.get(name) == value:
            continue
        option = "--" + name.replace("_", "-")
        raise UserError(
            f"{out} was made with {option} {before.get(name)}, not {value}: resume with {option} {before.get(name)}, "
            "or choose another --out"
        )
    if before.get("weights") != now["weights"]:
        raise UserError(
            f"{out} was made with other weights (--model {before.get('model')}) than those of {now['model']}; "
            "choose another --out"
        )


def _compare_job(out: Path, name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    if before is None or before["digest"] == now["digest"]:
        return
    if before["problems"] != now["problems"]:
        raise UserError(
            f"{out} was made with {before['problems']} problems of {name}, not {now['problems']}: resume with the same "
            "--problems and data, or choose another --out"
        )
    raise UserError(
        f"{out} was made with other prompts or problems of {name} ({before['source']}): resume with the same --data "
        "and --template, or choose another --out"
    )


def replace(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


# -- running ----------------------------------------------------------------------------------------------------------


def kept_rows(path: Path | None, job: Job, settings: Settings) -> list[dict[str, Any]]:
    """The lines of whole batches in `path`, which is cut back to them. Raises UserError for lines of something else."""
    if path is None or not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for line in lines[:-1]:  # what stands behind the last line end was cut by a kill
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append(row)
    for i, row in enumerate(rows):
        if i >= len(job.problems) or row.get("index") != i or row.get("problem") != str(job.problems[i]):
            raise UserError(f"{path}:{i + 1}: not the result of problem {i} of {job.name}; choose another --out")
    whole = len(rows) if len(rows) == len(job.problems) else len(rows) // settings.batch * settings.batch
    kept = b"".join(line + b"\n" for line in lines[:whole])
    if b"\n".join(lines) != kept:
        with path.open("r+b") as stream:
            stream.truncate(len(kept))
            os.fsync(stream.fileno())
    return rows[:whole]


def run_job(
    job: Job,
    policy: Policy,
    engine: Engine,
    settings: Settings,
    path: Path | None = None,
    report: Callable[[int], None] = lambda rows: None,
) -> list[ProblemResult]:
    """Sample and grade a set of problems; lines go to `path` batch by batch, and those that are there are kept.

    An environment is played. `report(rows)` is called as responses are completed, first with those that were there.
    """
    rows = kept_rows(path, job, settings)
    if rows:
        report(len(rows) * settings.samples)
    results = [_result(row) for row in rows]
    for start in range(len(rows), len(job.problems), settings.batch):
        batch = job.problems[start : start + settings.batch]
        rollout = for_task(engine, job.task, batch).sample(
            job.prompts[start : start + settings.batch],
            settings.samples,
            Sampling(settings.temperature, settings.max_tokens, settings.rows, streams="prompt", first=start),
            torch.Generator().manual_seed(_seed(settings.seed, job.name)),
            report=report,
        )
        verdicts = verdicts_of(rollout, job.task, batch, policy)
        rollout = grade(rollout, job.task, batch, policy, verdicts)
        new = [_row(rollout, verdicts, i, start, job, settings, policy) for i in range(len(batch))]
        results += [_result(row) for row in new]
        if path is not None:
            _append(path, new)
    return results


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("ab") as stream:
        stream.write(text.encode("utf-8", "replace"))
        stream.flush()
        os.fsync(stream.fileno())


def _row(
    rollout: Rollout, verdicts: Sequence[Verdict], i: int, start: int, job: Job, settings: Settings, policy: Policy
) -> dict[str, Any]:
    """One line: the problem's figures, then its responses."""
    rows = slice(i * settings.samples, (i + 1) * settings.samples)
    own = rollout.rows(torch.arange(len(rollout))[rows].to(rollout.response_ids.device))
    result = asdict(problem_result(own, slice(None), job.problems[start + i]))
    texts = response_texts(own, policy) if settings.texts else None
    responses = [
        {"answer": v.answer, "correct": v.correct, "reason": v.reason, "tokens": n, "finished": f}
        | ({"text": texts[j]} if texts else {})
        for j, (v, n, f) in enumerate(zip(verdicts[rows], own.lengths.tolist(), own.finished.tolist(), strict=True))
    ]
    figures = {k: None if v != v else v for k, v in result.items()}  # JSON has no nan
    return {"index": start + i, **figures, "responses": responses}


def _result(row: Mapping[str, Any]) -> ProblemResult:
    fields = {name: row[name] for name in ProblemResult.__dataclass_fields__}
    return ProblemResult(**fields | {"votes": tuple((int(n), bool(c)) for n, c in row["votes"])})
