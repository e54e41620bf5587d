"""What a run writes: metrics.jsonl and problems.jsonl (one object per step), evaluations, transcripts; TensorBoard and
W&B beside them.

The JSONL files are the record: a run that cannot write them stops. Everything else is a *sink*. A sink that fails
(network, disk, a bug in its library) is switched off with one warning, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from .config import LoggingSection

FINISH_S = 60.0
"""Longest wait, at the end of a run, for W&B to send what it still holds."""
INIT_S = 30.0
"""Longest wait, at its start, for W&B's server."""
PAGE_ROWS = 60
"""Transcripts on the page `samples.html`: the newest ones. The file `samples.jsonl` keeps all."""
PROBLEMS = "problems.jsonl"


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows; a number that is not finite is written as null, because JSON has no nan."""
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that this module wrote; a last line cut by a kill is left out. A missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would also cut at U+2028 inside a text
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def drop_from(path: Path, step: int) -> None:
    """Remove rows of steps that a resumed run will repeat, and a half-written last line."""
    if path.exists():
        rows = [row for row in read_jsonl(path) if row["step"] < step]
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        append_jsonl(partial, rows)
        partial.touch()
        partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- sinks ------------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Somewhere else to which the record is copied."""

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, in a named group."""

    def page(self, step: int, path: Path) -> None:
        """A page of transcripts was written."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in `tensorboard/` of the run folder; scalars are called `train/NAME` and `evaluation/NAME`."""

    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """One point per name."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def page(self, step: int, path: Path) -> None:
        """TensorBoard shows no pages."""

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run with the same names as TensorBoard's, over the axis `step`.

    The run's id is kept in `wandb.json` of the run folder, so that a resumed run continues it. W&B cannot take points
    back: steps that a resumed run repeats are there twice, the later one last. `offline` writes to `wandb/` of the run
    folder; `wandb sync` sends it. Raises UserError where W&B needs a login.
    """

    def __init__(self, out: Path, settings: LoggingSection, run_settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb: Any = wandb
        kept = {"id": _run_id(out / "wandb.json", settings.wandb_project), "project": settings.wandb_project}
        try:
            self._run: Any = wandb.init(
                mode="offline" if settings.wandb == "offline" else "online",
                dir=str(out),
                project=settings.wandb_project,
                name=settings.wandb_name or out.resolve().name,
                group=settings.wandb_group,
                id=kept["id"],
                resume="allow",
                reinit="create_new",
                config=dict(run_settings),
                # its own lines would tear the live view apart
                settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_S),
            )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"logging.wandb is 'online', but W&B says: {first_line(error)} Run `wandb login`, or set "
                "logging.wandb=offline"
            ) from error
        (out / "wandb.json").write_text(json.dumps(kept) + "\n")
        for group in ("train", "evaluation"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """One row; what was not measured is left out."""
        known = {f"{group}/{name}": value for name, value in values.items() if math.isfinite(value)}
        self._run.log({"step": step, **known})

    def page(self, step: int, path: Path) -> None:
        """The page, as W&B's media `transcripts`."""
        self._run.log({"step": step, "transcripts": self._wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def close(self) -> None:
        """Wait for what is still to be sent, but not for ever. A run that ends in an error is marked as failed."""
        failed = sys.exception() is not None  # closed in a `finally`: the error that is on its way
        sender = threading.Thread(target=lambda: self._run.finish(exit_code=int(failed)), daemon=True)
        sender.start()
        sender.join(FINISH_S)
        if sender.is_alive():
            raise TimeoutError(f"not everything was sent in {FINISH_S:.0f} s; `wandb sync {self._run.dir}/..` sends it")


def _run_id(path: Path, project: str) -> str:
    """The id of the run that this folder continues, or a new one: ids belong to a project."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["project"] == project:
            return str(kept["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return secrets.token_hex(4)


def check_installed(settings: LoggingSection) -> None:
    """Raises UserError, with the command to install it, where a library that the settings ask for is missing."""
    for asked, library, setting in (
        (settings.tensorboard, "tensorboard", "logging.tensorboard=false"),
        (settings.wandb != "off", "wandb", "logging.wandb=off"),
    ):
        if asked and importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed; run `pip install {library}`, or set {setting}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Guarded:
    """A sink that may fail: the first error is told once and switches it off. `UserError` from the start is raised."""

    def __init__(self, name: str, make: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self.name, self._warn = name, warn
        self._sink: Sink | None = None
        try:
            self._sink = make()
        except UserError:
            raise
        except Exception as error:  # whatever a logger's library does, the run must go on
            self._give_up(error)

    def __call__(self, use: Callable[[Sink], None]) -> None:
        """Do something with the sink while it works."""
        if self._sink is None:
            return
        try:
            use(self._sink)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._sink = None
        self._warn(
            f"{self.name} is switched off: {first_line(error)}. The run goes on; the JSONL files have everything"
        )


# -- the log of a run -------------------------------------------------------------------------------------------------


class RunLog:
    """The files of one run folder. `step` rows carry their step number, so that a resumed run can cut them.

    With `main=False` (a rank other than 0) nothing is written. Raises UserError where W&B is asked for and needs a
    login; see `check_installed` for what else can be missing.
    """

    def __init__(
        self,
        out: Path,
        settings: LoggingSection,
        first_step: int,
        *,
        main: bool = True,
        warn: Callable[[str], None] = lambda text: print(f"warning: {text}", file=sys.stderr),
        run_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.main = out, main
        self._sinks: list[Guarded] = []
        self._newest: deque[dict[str, Any]] = deque(maxlen=PAGE_ROWS)
        if not main:
            return
        for name in ("metrics.jsonl", "samples.jsonl", PROBLEMS):
            drop_from(out / name, first_step)
        self._named = {int(i) for row in read_jsonl(out / PROBLEMS) for i in row["names"]}
        # the evaluation made after step n has step n: it belongs to the weights that a checkpoint of n holds
        drop_from(out / "evaluations.jsonl", first_step + 1)
        self._newest.extend(read_jsonl(out / "samples.jsonl")[-PAGE_ROWS:])
        if settings.tensorboard:
            self._sinks.append(Guarded("TensorBoard", lambda: TensorBoard(out, first_step), warn))
        if settings.wandb != "off":
            tree = run_settings or {}
            self._sinks.append(Guarded("W&B", lambda: WeightsAndBiases(out, settings, tree), warn))
        self._page = Guarded("samples.html", lambda: SamplesPage(out, self._newest), warn)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One training step."""
        self._write("metrics.jsonl", [{"step": step, **values}])
        self._scalars("train", step, values)

    def evaluation(self, step: int, summary: Mapping[str, Any]) -> None:
        """One evaluation of the policy after `step` updates."""
        self._write("evaluations.jsonl", [{"step": step, **summary}])
        self._scalars("evaluation", step, {k: v for k, v in summary.items() if isinstance(v, float)})

    def problems(self, step: int, solved: Mapping[int, tuple[int, int]], name: Callable[[int], str]) -> None:
        """Right and all responses to each problem of a step, by its index in the pool; `name` tells what a problem
        says, which is written where it is first met. `train.selection` reads the file."""
        if not self.main:
            return
        new = [i for i in sorted(solved) if i not in self._named]
        self._named.update(new)
        row = {
            "step": step,
            "problem": sorted(solved),
            "right": [solved[i][0] for i in sorted(solved)],
            "responses": [solved[i][1] for i in sorted(solved)],
            "names": {str(i): name(i) for i in new},
        }
        self._write(PROBLEMS, [row])

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Transcripts with their rewards; also redraws `samples.html`."""
        told = [{"step": step, **row} for row in rows]
        self._write("samples.jsonl", told)
        if self.main:
            self._newest.extend(told)
            path = self.out / "samples.html"
            self._page(lambda sink: sink.page(step, path))
            for guarded in self._sinks:
                guarded(lambda sink: sink.page(step, path))

    def close(self) -> None:
        """Let the sinks send what they hold."""
        for guarded in self._sinks:
            guarded(lambda sink: sink.close())

    def _write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.main:
            append_jsonl(self.out / name, rows)

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for guarded in self._sinks:
            guarded(lambda sink: sink.scalars(group, step, values))


class SamplesPage:
    """Draws `samples.html` from the newest transcripts."""

    def __init__(self, out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self.out, self.rows = out, rows

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """The page has no numbers."""

    def page(self, step: int, path: Path) -> None:
        """Replace the page in one go, so that whoever reads it never finds half of it."""
        from ..show.run_page import samples_page

        partial = path.with_name(path.name + ".partial")
        partial.write_text(samples_page(list(self.rows), self.out.resolve().name), encoding="utf-8")
        partial.replace(path)

    def close(self) -> None:
        """Nothing is held back."""
