"""What a run writes: metrics.jsonl (one object per step), TensorBoard events, transcripts, evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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


class RunLog:
    """The files of one run folder. `step` rows carry their step number, so that a resumed run can cut them."""

    def __init__(self, out: Path, tensorboard: bool, first_step: int) -> None:
        self.out = out
        for name in ("metrics.jsonl", "samples.jsonl"):
            drop_from(out / name, first_step)
        # the evaluation made after step n has step n: it belongs to the weights that a checkpoint of n holds
        drop_from(out / "evaluations.jsonl", first_step + 1)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One training step."""
        append_jsonl(self.out / "metrics.jsonl", [{"step": step, **values}])
        self._scalars("train", step, values)

    def evaluation(self, step: int, summary: Mapping[str, Any]) -> None:
        """One evaluation of the policy after `step` updates."""
        append_jsonl(self.out / "evaluations.jsonl", [{"step": step, **summary}])
        self._scalars("evaluation", step, {k: v for k, v in summary.items() if isinstance(v, float)})

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Transcripts with their rewards."""
        append_jsonl(self.out / "samples.jsonl", [{"step": step, **row} for row in rows])

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)
