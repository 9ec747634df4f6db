"""A trainer in a process of its own, to be killed, stopped or cut off.

Its engine belongs to who started it: it asks for the engine's calls over a pipe, one at a time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qerl_sync.engines.base import EngineClient, PauseMode
from qerl_sync.errors import TransportError

# How long a trainer stays stopped that no worker waits for.
PATIENCE_SECONDS = 4.0
# A forked child is killed when its case is judged.
CHILD_SECONDS = 600.0
# "orphan" kills it too, and leaves a forked child of it alive.
SIGNALS = {"kill": signal.SIGKILL, "orphan": signal.SIGKILL, "stop": signal.SIGSTOP}


class TrainerProcess:
    """Runs one sync there.

    Args:
        transport: as `sync.transport`.
        device: where the trainer's tensors are.

    Attributes:
        fired_at, ended_at: `time.monotonic()` of its fault and of its end.
        freed_at: when the engine came out of the call that was open then.
        error: what its push raised, by name and text; "" if it succeeded; None if it was killed.
        children: forked from it, which outlive it.
    """

    fired_at: float | None = None
    ended_at: float | None = None
    freed_at: float | None = None
    error: str | None = None
    children: tuple[int, ...] = ()

    def __init__(
        self,
        client: Any,
        checkpoint: Path,
        phase: str,
        action: str,
        *,
        transport: str = "shm",
        device: str = "cpu",
    ) -> None:
        self._client, self._action = client, action
        self._pipe, there = Pipe()
        with there:
            given = (str(there.fileno()), str(checkpoint), phase, action, transport, device)
            command = [sys.executable, "-m", __name__, *given]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()])
        self.pid = self._process.pid

    def run(self) -> None:
        """Serve its calls until it ends."""
        watch = threading.Thread(target=self._watch, name="trainer's end", daemon=True)
        watch.start()
        try:
            with suppress(EOFError, OSError):  # its end
                while True:
                    self._hear(*self._pipe.recv())
        finally:
            self._process.kill()
            watch.join()
            self._pipe.close()

    def _watch(self) -> None:
        self._process.wait()
        self.ended_at = time.monotonic()

    def _hear(self, what: str, reported: Any, options: dict[str, Any] | None = None) -> None:
        if what == "error":
            self.error = reported
        elif what == "forked":
            self.children = (reported,)
        elif what == "fired":
            self.fired_at = reported
            if self._action == "stop":  # nobody waits for it, so that nobody can notice
                later = threading.Timer(PATIENCE_SECONDS, os.kill, (self.pid, signal.SIGCONT))
                later.daemon = True
                later.start()
        else:
            self._pipe.send(self._call(what, reported, options or {}))

    def _call(self, method: str, arguments: Any, options: dict[str, Any]) -> tuple[Any, str]:
        try:
            return getattr(self._client, method)(*arguments, **options), ""
        except Exception as exc:
            return None, f"{type(exc).__name__}: {exc}"
        finally:
            if method == "update_weights":
                self.freed_at = time.monotonic()
                if self._action == "stop":  # the worker has given it up: let it find that out
                    os.kill(self.pid, signal.SIGCONT)


# ------------------------------------------------------------------------------ that process


class _PipeClient(EngineClient):
    """The engine's client there."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version)

    def pause(self, mode: PauseMode) -> None:
        self._call("pause", mode)

    def resume(self) -> None:
        self._call("resume")

    def reset_caches(self, *, running: bool) -> bool:
        return bool(self._call("reset_caches", running=running))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            self._pipe.send((method, arguments, options))
            result, error = self._pipe.recv()
        if error:
            raise TransportError(f"the engine refuses: {error}")
        return result


def main(
    pipe: Connection, checkpoint: str, phase: str, action: str, transport: str, device: str
) -> None:
    from support.models import checkpoint_tensors

    from faults.engines import TIMEOUT_SECONDS
    from faults.triggers import FaultySource, PhasedRemote, Trigger
    from qerl_sync import SyncConfig, SyncSession

    def act() -> None:
        if action == "orphan":
            child = os.fork()
            if child == 0:
                pipe.close()  # else it hides its parent's end from the harness
                time.sleep(CHILD_SECONDS)
                os._exit(0)
            pipe.send(("forked", child))
        pipe.send(("fired", time.monotonic()))
        os.kill(os.getpid(), SIGNALS[action])

    client = _PipeClient(pipe)
    phased = PhasedRemote(client, transport=transport, timeout_seconds=TIMEOUT_SECONDS)
    phased.trigger = Trigger(phase, act)
    tensors = {n: t.to(device) for n, t in checkpoint_tensors(Path(checkpoint)).items()}
    source = FaultySource(tensors, phased.trigger)
    config = SyncConfig.of(chunk_bytes="64KiB", timeout_seconds=TIMEOUT_SECONDS)
    try:
        with SyncSession(source, phased, config) as session:
            session.push()
    except Exception as exc:
        pipe.send(("error", f"{type(exc).__name__}: {exc}"))
    else:
        pipe.send(("error", ""))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), *sys.argv[2:])
