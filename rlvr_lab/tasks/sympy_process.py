"""Ask a child process whether two LaTeX answers are equal, under a wall-clock deadline and a memory limit.

math-verify's own timeouts are signals: they fail off the main thread and do not interrupt C code. Here a child
(`sympy_child.py`) does the work, JSON lines go over its pipes, and a child that is late is killed and replaced. It
starts with the first question, serves all threads of this process in turn, and ends with the process; after a fork the
child process gets one of its own. POSIX only (`poll` on pipes).
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..errors import UserError

START_SECONDS = 120.0  # importing sympy takes about a second, far more on a loaded machine
_MAX_REPLY = 4096
_CHILD = Path(__file__).with_name("sympy_child.py")


class _Late(Exception):
    """No reply before the deadline."""


class SympyProcess:
    """One child and the lock that serialises its questions."""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False

    def equal(self, gold: str, answer: str, seconds: float) -> tuple[bool, str]:
        """Whether `answer` equals `gold`, and the reason if this could not be settled within `seconds`."""
        with self.lock:
            process = self._started()
            request = {"gold": gold, "answer": answer, "seconds": seconds + 0.5}
            try:
                reply = self._ask(process, request, seconds)
            except (_Late, OSError, ValueError) as error:
                self._stop()
                self._launch()  # the next question finds it warm, or nearly so
                late = isinstance(error, _Late)
                return False, f"the comparison took longer than {seconds:g} s" if late else "the comparison crashed"
            if reply.get("error") == "memory":
                self._stop()
                self._launch()
                return False, f"the comparison needed more than {self.megabytes} MB"
        return bool(reply.get("equal")), str(reply.get("error", ""))

    def close(self) -> None:
        """End the child; a later question starts another."""
        with self.lock:
            self._stop()

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, object], seconds: float) -> dict[str, object]:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return _reply(process, seconds)

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is not None:
            self._stop()
        process = self.process or self._launch()
        if not self.ready:
            try:
                greeting = _reply(process, START_SECONDS)
            except (_Late, OSError, ValueError) as error:
                self._stop()
                raise UserError(f"the math-verify process did not start within {START_SECONDS:g} s") from error
            if not greeting.get("ready"):
                self._stop()
                raise UserError(f"math-verify cannot be imported ({greeting.get('error')}); pip install math-verify")
            self.ready = True
        return process

    def _launch(self) -> subprocess.Popen[bytes]:
        # -P: the child must not find this folder's modules under top-level names
        command = [sys.executable, "-P", str(_CHILD), str(self.megabytes)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        self.ready = False
        return self.process

    def _stop(self) -> None:
        process, self.process, self.ready = self.process, None, False
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _reply(process: subprocess.Popen[bytes], seconds: float) -> dict[str, object]:
    """One JSON line of the child. Raises _Late at the deadline, OSError or ValueError where the child broke."""
    assert process.stdout is not None
    descriptor, deadline, received = process.stdout.fileno(), time.monotonic() + seconds, b""
    poller = select.poll()  # unlike select(), good for descriptors above 1023
    poller.register(descriptor, select.POLLIN)
    while not received.endswith(b"\n"):
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _Late
        chunk = os.read(descriptor, _MAX_REPLY)
        received += chunk
        if not chunk or len(received) > _MAX_REPLY:
            raise BrokenPipeError("the child ended or broke the protocol")
    reply = json.loads(received)
    if not isinstance(reply, dict):
        raise ValueError("not an object")
    return reply


_processes: dict[int, SympyProcess] = {}
_processes_lock = threading.Lock()


def shared(megabytes: int) -> SympyProcess:
    """The process of this memory limit; created on first use, its child started with the first question."""
    with _processes_lock:
        return _processes.setdefault(megabytes, SympyProcess(megabytes))


@atexit.register
def close_all() -> None:
    """End every child of this process."""
    for process in list(_processes.values()):
        process.close()


def _forget() -> None:
    """After a fork: the pipes belong to the parent, and a lock may be held by a thread that no longer exists."""
    global _processes_lock
    for process in _processes.values():
        process.process = None  # dropped, not killed
    _processes.clear()
    _processes_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
