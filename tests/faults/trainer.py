"""A trainer in a process of its own, to be killed, stopped or cut off.

Its engine belongs to who started it: it asks for the engine's calls over its output and reads the
answers from its input, one at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qerl_sync.errors import TransportError

# How long a trainer stays stopped that no worker waits for.
PATIENCE_SECONDS = 4.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class TrainerProcess:
    """Runs one sync there.

    Attributes:
        fired_at, ended_at: `time.monotonic()` of its fault and of its end.
        freed_at: when the engine came out of the call that was open then.
        error: what its push raised, by name and text; "" if it succeeded; None if it was killed.
    """

    def __init__(self, client: Any, checkpoint: Path, phase: str, action: str) -> None:
        self._client, self._action = client, action
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(checkpoint), phase, action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.fired_at: float | None = None
        self.ended_at: float | None = None
        self.freed_at: float | None = None
        self.error: str | None = None

    def run(self) -> None:
        """Serve its calls until it ends."""
        watch = threading.Thread(target=self._watch, name="trainer's end", daemon=True)
        watch.start()
        try:
            for line in self._process.stdout:
                self._hear(**json.loads(line))
        finally:
            self._process.kill()
            watch.join()
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.stdout.close()

    def _watch(self) -> None:
        self._process.wait()
        self.ended_at = time.monotonic()

    def _hear(
        self,
        fired_at: float | None = None,
        error: str | None = None,
        call: str = "",
        arguments: Any = (),
        options: Any = None,
    ) -> None:
        if call:
            self._answer(call, arguments, options)
        elif error is not None:
            self.error = error
        else:
            self.fired_at = fired_at
            if self._action == "stop":  # nobody waits for it, so that nobody can notice
                later = threading.Timer(PATIENCE_SECONDS, os.kill, (self.pid, signal.SIGCONT))
                later.daemon = True
                later.start()

    def _answer(self, method: str, arguments: list[Any], options: dict[str, Any]) -> None:
        try:
            answer = [getattr(self._client, method)(*arguments, **options), None]
        except Exception as exc:
            answer = [None, f"{type(exc).__name__}: {exc}"]
        if method == "update_weights":
            self.freed_at = time.monotonic()
            if self._action == "stop":  # the worker has given it up: let it find that out
                os.kill(self.pid, signal.SIGCONT)
        with contextlib.suppress(OSError):
            print(json.dumps(answer), file=self._process.stdin, flush=True)


# ------------------------------------------------------------------------------ that process


class _PipeClient:
    """The engine's client there."""

    METHODS = (
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "pause",
        "resume",
        "reset_caches",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __getattr__(self, method: str) -> Any:
        if method not in self.METHODS:
            raise AttributeError(method)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                say(call=method, arguments=arguments, options=options)
                result, error = json.loads(sys.stdin.readline())
            if error is not None:
                raise TransportError(f"the engine refuses: {error}")
            return result

        return call


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main(checkpoint: str, phase: str, action: str) -> None:
    from support.models import checkpoint_tensors

    from faults.engines import TIMEOUT_SECONDS
    from faults.triggers import FaultySource, PhasedRemote, Trigger
    from qerl_sync import SyncConfig, SyncSession

    def act() -> None:
        say(fired_at=time.monotonic())
        os.kill(os.getpid(), SIGNALS[action])

    transport = PhasedRemote(_PipeClient(), transport="shm", timeout_seconds=TIMEOUT_SECONDS)
    transport.trigger = Trigger(phase, act)
    source = FaultySource(checkpoint_tensors(Path(checkpoint)), transport.trigger)
    config = SyncConfig.of(chunk_bytes="64KiB", timeout_seconds=TIMEOUT_SECONDS)
    try:
        with SyncSession(source, transport, config) as session:
            session.push()
    except Exception as exc:
        say(error=f"{type(exc).__name__}: {exc}")
    else:
        say(error="")


if __name__ == "__main__":
    main(*sys.argv[1:])
