"""Tools of an environment, and a call that always comes back.

A tool is a function from one text to another. Those of this package run in place; those of others run in a child
process under a time and a memory limit (`ChildTool`). `call` makes an observation of whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...errors import UserError
from ..child_process import ChildProcess, shared
from ..expressions import parse
from .base import clean

Tool = Callable[[str], str]
"""From the argument of a call to its result; may raise anything."""

NONE, FAILED, UNREADABLE, LATE = "none", "error", "invalid", "timeout"
"""Results that say: nothing found, the tool raised, the call could not be read, the tool took too long."""


def result(text: str) -> str:
    """A tool's output as an observation."""
    return f"<result> {clean(text) or NONE} </result>"


def call(tool: Tool, argument: str) -> str:
    """The observation on a call of a tool; never raises. A `TimeoutError` is `LATE`, any other exception `FAILED`."""
    try:
        return result(tool(argument))
    except TimeoutError:
        return result(LATE)
    except Exception:
        return result(FAILED)


def calculator(argument: str) -> str:
    """Exact integer arithmetic, see `tasks.expressions`. Raises ExpressionError for anything else."""
    return str(parse(argument).value)


class _Tools(ChildProcess):
    library, install = "the tools", "check data.settings.tools"

    def script(self) -> Path:
        return Path(__file__).with_name("tool_child.py")


@dataclass(frozen=True)
class ChildTool:
    """A function of another package, `module:name`, from str to anything with a text, in a child process.

    One question and its answer are remembered, so that a replay finds what the episode found and pays only once.
    Raises UserError for a function that is not of the form `module:name`.
    """

    function: str
    seconds: float = 2.0
    megabytes: int = 2048

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise UserError(f"data.settings.tools: '{self.function}' is no 'module:function'")

    def __call__(self, argument: str) -> str:
        """The function's answer. Raises TimeoutError at the limit, RuntimeError where the function failed."""
        value, error = _asked(self, argument)
        if value is not None:
            return value
        raise TimeoutError(error) if "longer than" in error else RuntimeError(error)


@lru_cache(maxsize=4096)
def _asked(tool: ChildTool, argument: str) -> tuple[str | None, str]:
    request = {"function": tool.function, "argument": argument}
    reply = shared(_Tools, tool.megabytes).ask(request, tool.seconds)
    return (str(reply["value"]), "") if "value" in reply else (None, str(reply.get("error")))
