"""Ask a child process a question under a wall-clock deadline and a memory limit.

A library's own timeouts are signals: they fail off the main thread and do not interrupt C code. Here a child does the
work, JSON lines go over its pipes, and a child that is late is killed and replaced. It starts with the first question,
serves all threads of this process in turn, and ends with the process; after a fork the child process gets one of its
own. POSIX only (`poll` on pipes).
"""

from __future__ import annotations

import abc
import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from ..errors import UserError

START_SECONDS = 120.0  # importing sympy takes about a second, far more on a loaded machine
STOPPED = ("the comparison ", "memory", "nested too deeply")
"""How the reasons begin that mean: not settled, because a limit or a crash ended the work."""
_CHUNK, _MAX_REPLY = 1 << 16, 1 << 24


class _Late(Exception):
    """No reply before the deadline."""


class ChildProcess(abc.ABC):
    """One child and the lock that serialises its questions. A subclass names the script and the library it needs.

    The script is started with `megabytes` as its only argument and greets with `{"ready": true}` or `{"error": str}`.
    """

    library = ""
    """What the child imports, for the error where it cannot."""
    install = ""

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False

    @abc.abstractmethod
    def script(self) -> Path:
        """The file that the child runs."""

    def ask(self, request: Mapping[str, object], seconds: float) -> dict[str, object]:
        """The reply, or `{"error": reason}` where the child did not reply within `seconds`, crashed, or ran out of
        memory. Raises UserError where the child cannot start."""
        with self.lock:
            process = self._started()
            try:
                # the child's own alarm comes later: it is for the case that this process is gone
                reply = self._asked(process, {**request, "seconds": seconds + 0.5}, seconds)
            except (_Late, OSError, ValueError) as error:
                late = isinstance(error, _Late)
                reply = {
                    "error": f"the comparison took longer than {seconds:g} s" if late else "the comparison crashed"
                }
            else:
                if reply.get("error") != "memory":
                    return reply
                reply = {"error": f"the comparison needed more than {self.megabytes} MB"}
            self._stop()
            self._launch()  # the next question finds it warm, or nearly so
            return reply

    def close(self) -> None:
        """End the child; a later question starts another."""
        with self.lock:
            self._stop()

    def _asked(self, process: subprocess.Popen[bytes], request: dict[str, object], seconds: float) -> dict[str, object]:
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
                raise UserError(f"the {self.library} process did not start within {START_SECONDS:g} s") from error
            if not greeting.get("ready"):
                self._stop()
                raise UserError(f"{self.library} cannot be imported ({greeting.get('error')}); {self.install}")
            self.ready = True
        return process

    def _launch(self) -> subprocess.Popen[bytes]:
        # -P: the child must not find this folder's modules under top-level names
        command = [sys.executable, "-P", str(self.script()), str(self.megabytes)]
        pipe = subprocess.PIPE
        # a fixed hash seed: a library that iterates over a set of words must do the same in the child's successor
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, env=environment
        )
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
        chunk = os.read(descriptor, _CHUNK)
        received += chunk
        if not chunk or len(received) > _MAX_REPLY:
            raise BrokenPipeError("the child ended or broke the protocol")
    reply = json.loads(received)
    if not isinstance(reply, dict):
        raise ValueError("not an object")
    return reply


C = TypeVar("C", bound=ChildProcess)
_processes: dict[tuple[type[ChildProcess], int], ChildProcess] = {}
_processes_lock = threading.Lock()


def shared(kind: type[C], megabytes: int) -> C:
    """The process of this kind and memory limit; created on first use, its child started with the first question."""
    with _processes_lock:
        found = _processes.setdefault((kind, megabytes), kind(megabytes))
    assert isinstance(found, kind)
    return found


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
