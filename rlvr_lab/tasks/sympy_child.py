"""The child process that compares two LaTeX answers with math-verify. Run as a script, never imported by the package.

It reads one JSON object per line, `{"gold": str, "answer": str, "seconds": float}`, and writes one,
`{"equal": bool}` or `{"error": str}`. Every request runs under SIGALRM with its default action: the kernel ends the
process at the deadline, in the middle of C code too, and even if the parent is gone. RLIMIT_AS bounds memory.

What can still be slow after the static guard of `math_answer`: `simplify` on the difference of two unequal expressions
with roots, trigonometric functions or high powers; `solve` on relations; `factorint` under roots of long integers;
`evalf` of nested exponentials; latex2sympy's grammar on long juxtapositions. All end at the deadline.
"""

import json
import os
import signal
import sys


def limit_memory(megabytes: int) -> None:
    """Best effort: macOS refuses RLIMIT_AS, and there the deadline alone has to do."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    """Serve requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library that prints must not write into the protocol

    def reply(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"[:500]})
        return
    # Only the LaTeX reader: math-verify's reader of plain expressions goes through sympy's parse_expr, which is `eval`.
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[object]:
        found: list[object] = parse(f"\\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)
        return found

    verify(read(r"\frac{1}{2}"), read("0.5"), timeout_seconds=None)  # builds the parser's tables before any deadline
    limit_memory(int(sys.argv[1]))
    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            gold, answer = read(request["gold"]), read(request["answer"])
            if not gold or not answer:
                result: dict[str, object] = {"error": f"cannot read the {'answer' if gold else 'reference'} as LaTeX"}
            else:
                result = {"equal": bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))}
        except MemoryError:
            result = {"error": "memory"}
        except RecursionError:
            result = {"error": "nested too deeply"}
        except Exception as error:
            result = {"error": f"cannot compare: {type(error).__name__}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(result)
        if result.get("error") == "memory":
            return


if __name__ == "__main__":
    main()
