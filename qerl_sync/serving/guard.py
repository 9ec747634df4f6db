"""The program between a trainer and its vLLM server. Nothing that it starts outlives it, and it
does not outlive the process that started it.

    trainer ── guard ── vLLM's API server ── engine core ── workers
               leads a session of its own and adopts what loses its parent

Killed with SIGKILL, vLLM's API server leaves its engine and workers behind, and a trainer that is
killed so leaves all three. The guard sees its parent go and stops them, whatever else happened.

    python -m qerl_sync.serving.guard PARENT_PID GRACE_SECONDS COMMAND...

It ends with the exit code of COMMAND (128 + N for signal N), which gets SIGTERM, and GRACE_SECONDS
later SIGKILL, when the guard gets SIGTERM, SIGINT or SIGHUP or its parent ends. A second signal
ends the grace. It imports little, so that it is there in an instant and needs little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType

from qerl_sync.serving.processes import descendants, is_resource_tracker

POLL_SECONDS = 0.1
# Time for resource trackers to remove the shared memory of processes that were killed.
TRACKER_SECONDS = 5.0
# Longest after the grace that a guard may take to end.
KILL_SECONDS = TRACKER_SECONDS + 2.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def guard(parent: int, grace_seconds: float, command: list[str]) -> int:
    """Run `command` until it or `parent` ends; return its exit code."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    server = Server(command)
    server.wait(lambda: bool(signals) or os.getppid() != parent)
    if server.code is None:
        server.signal(signal.SIGTERM)
        num_signals, deadline = len(signals), time.monotonic() + grace_seconds
        server.wait(lambda: len(signals) > num_signals or time.monotonic() > deadline)
    # Everything below this process ends. Resource trackers come last: they clean up first.
    deadline = time.monotonic() + TRACKER_SECONDS
    while server.reap() and time.monotonic() < deadline:
        kill(pid for pid in descendants(os.getpid()) if not is_resource_tracker(pid))
        time.sleep(POLL_SECONDS / 2)
    kill(descendants(os.getpid()))
    return server.code if server.code is not None else 128 + signal.SIGKILL


class Server:
    """The guarded command. `code`: its exit code, once it has ended."""

    def __init__(self, command: list[str]) -> None:
        self.code: int | None = None
        # Between fork and exec more than exec is safe here: this process has one thread.
        self._pid = os.fork()
        if self._pid != 0:
            return
        try:
            # Should the guard itself be killed: at least the server goes with it.
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.execvp(command[0], command)
        except OSError as exc:
            print(f"{command[0]} cannot be started: {exc}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def wait(self, stop: Callable[[], bool]) -> None:
        """Block until the command has ended or `stop()` returns True."""
        while self.reap() and self.code is None and not stop():
            time.sleep(POLL_SECONDS)

    def reap(self) -> bool:
        """Reap every child that has ended, adopted ones too. Return False if no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to the processes that still exist."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
