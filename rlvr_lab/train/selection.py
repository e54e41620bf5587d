"""Which problems of a run taught it something: accuracy histories of `problems.jsonl`, scored by `methods.one_shot`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..errors import UserError, nearest
from ..methods.one_shot import Score, impact_scores, random_scores, ranking, variance_scores
from .logs import PROBLEMS, read_jsonl


@dataclass(frozen=True)
class History:
    """Accuracies of one problem in the order of its visits."""

    problem: int
    text: str
    accuracy: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over the visits."""
        return sum(self.accuracy) / len(self.accuracy)


@dataclass(frozen=True)
class Ranked:
    """A problem with its rank from 1 and its score; None where the score is undefined."""

    rank: int
    score: float | None
    history: History

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        h = self.history
        return {"rank": self.rank, "problem": h.problem, "score": self.score, "mean_accuracy": h.mean,
                "visits": len(h.accuracy), "accuracy": list(h.accuracy), "text": h.text}  # fmt: skip


def read_histories(run: Path) -> dict[int, History]:
    """Histories of a run by problem. Raises UserError where the folder holds no log of problems."""
    rows = read_jsonl(run / PROBLEMS)
    if not rows:
        raise UserError(f"{run} holds no {PROBLEMS} with a finished step; name a folder that `rlvr-lab train` wrote")
    accuracy: dict[int, list[float]] = {}
    names: dict[int, str] = {}
    for row in rows:
        names |= {int(i): text for i, text in row["names"].items()}
        for problem, right, responses in zip(row["problem"], row["right"], row["responses"], strict=True):
            accuracy.setdefault(problem, []).append(right / responses)
    return {i: History(i, names.get(i, ""), tuple(values)) for i, values in sorted(accuracy.items())}


def rank(histories: dict[int, History], by: str = "variance", least: int = 2, seed: int = 0) -> list[Ranked]:
    """Problems with at least `least` visits by falling score, the rest left out.

    Raises UserError for an unknown score, or where no problem has so many visits.
    """
    if by not in get_args(Score):
        raise UserError(f"--by '{by}' does not exist; {nearest(by, get_args(Score))}")
    kept = {i: h.accuracy for i, h in histories.items() if len(h.accuracy) >= least}
    if not kept:
        most = max(len(h.accuracy) for h in histories.values())
        raise UserError(f"no problem was visited {least} times, the most is {most}; train for more epochs, take a "
                        "smaller data.pool, or lower --least")  # fmt: skip
    scores = (
        random_scores(kept, seed) if by == "random" else (variance_scores if by == "variance" else impact_scores)(kept)
    )
    return [
        Ranked(place, None if scores[i] != scores[i] else scores[i], histories[i])
        for place, i in enumerate(ranking(scores), 1)
    ]
