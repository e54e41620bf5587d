"""Ask a child process (`sympy_child.py`) whether two LaTeX answers are equal; see `child_process`."""

from __future__ import annotations

from pathlib import Path

from . import child_process
from .child_process import ChildProcess

_CHILD = Path(__file__).with_name("sympy_child.py")


class SympyProcess(ChildProcess):
    """The child that runs math-verify."""

    library, install = "math-verify", "pip install math-verify"

    def script(self) -> Path:
        return _CHILD

    def equal(self, gold: str, answer: str, seconds: float) -> tuple[bool, str]:
        """Whether `answer` equals `gold`, and the reason if this could not be settled within `seconds`."""
        reply = self.ask({"gold": gold, "answer": answer}, seconds)
        return bool(reply.get("equal")), str(reply.get("error", ""))


def shared(megabytes: int) -> SympyProcess:
    """The process of this memory limit."""
    return child_process.shared(SympyProcess, megabytes)
