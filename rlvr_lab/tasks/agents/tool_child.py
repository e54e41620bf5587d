"""The child process that runs tools of others. Run as a script, never imported by the package.

It reads one JSON object per line, `{"function": "module:name", "argument": str, "seconds": float}`, and writes
`{"value": str}` or `{"error": str}`. As in `sympy_child.py` the kernel ends the process at the deadline, and
RLIMIT_AS bounds memory. The function comes from the settings of a run, never from what a policy wrote.
"""

import importlib
import json
import os
import signal
import sys

LONGEST = 10_000
"""Most characters of a result that are sent back."""


def limit_memory(megabytes: int) -> None:
    """Best effort: macOS refuses RLIMIT_AS, and there the deadline alone has to do."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, OSError, ValueError):
        pass


def run(function: str, argument: str) -> str:
    """What the function says about the argument, as text."""
    module, _, path = function.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{function} is no function")
    return str(found(argument))[:LONGEST]


def main() -> None:
    """Serve requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a tool that prints must not write into the protocol
    sys.path.insert(0, os.getcwd())  # where the run was started: tools of the user lie there
    limit_memory(int(sys.argv[1]))

    def reply(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            result: dict[str, object] = {"value": run(request["function"], request["argument"])}
        except MemoryError:
            result = {"error": "memory"}
        except BaseException as error:  # SystemExit too: a tool must not end the child
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(result)
        if result.get("error") == "memory":
            return


if __name__ == "__main__":
    main()
