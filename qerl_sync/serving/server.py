"""Start, watch and stop a vLLM server."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import ConfigError, PeerLostError, SyncError, TransportTimeout
from qerl_sync.serving.command import (
    LOOPBACK,
    ServerSpec,
    is_loopback,
    local_url,
    server_argv,
    server_environment,
)
from qerl_sync.serving.guard import KILL_SECONDS, kill
from qerl_sync.serving.log import complaint_in, last_line
from qerl_sync.serving.processes import any_listens, is_resource_tracker, members
from qerl_sync.wire.tokens import TOKEN_VARIABLE

GUARD = "qerl_sync.serving.guard"
POLL_SECONDS = 0.25
PROGRESS_SECONDS = 1.0
STARTING_GRACE_SECONDS = 1.0

# Called about once a second while a server starts: seconds so far, the last line of its log.
Progress = Callable[[float, str], None]


class ServerProcess:
    """A vLLM server that lives as long as this `with` block.

        with ServerProcess(ServerSpec(model), log=directory / "server.log") as server:
            client = HTTPClient(server.url)

    Between this process and vLLM runs a guard (serving/guard.py), which stops the server when the
    block is left, by whatever exception, and when this process ends, SIGKILL included.

    Args:
        log: the file that gets the server's output, from its start. None: it goes where this
            process's own goes.
        start_timeout_seconds: how long the server may take until it answers.
        grace_seconds: time from SIGTERM to SIGKILL at the end.
        progress: what to call while the server starts.
    """

    def __init__(
        self,
        spec: ServerSpec,
        *,
        log: Path | None = None,
        start_timeout_seconds: float = 600,
        grace_seconds: float = 15,
        progress: Progress | None = None,
    ) -> None:
        self.spec = spec
        self.log = log
        self.start_timeout_seconds = start_timeout_seconds
        self.grace_seconds = grace_seconds
        self._progress = progress
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._port: int | None = None
        self._is_ready = False

    @property
    def port(self) -> int:
        """Return the port that the server listens on. Known once it has started."""
        if self._port is None:
            raise SyncError("the server has no port before it is started; enter the `with` block")
        return self._port

    @property
    def url(self) -> str:
        """Return the server's address for this machine."""
        return local_url(self.spec.host, self.port)

    def __enter__(self) -> ServerProcess:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: the port is in use, or other machines reach it and there is no token.
            PeerLostError: the server ended before it was ready; with its last words.
            TransportTimeout: it was not ready in time.
        """
        if not is_loopback(self.spec.host) and not os.environ.get(TOKEN_VARIABLE):
            raise ConfigError(
                f"{self.spec.host} lets other machines reach the server, and without a token all "
                f"of them may change its weights; set {TOKEN_VARIABLE} to the same secret for this "
                'process and the trainer (`python -c "import secrets; '
                f'print(secrets.token_hex(32))"` makes one), or listen on {LOOPBACK}'
            )
        try:
            with contextlib.closing(reserve_port(self.spec.host, self.spec.port)) as reserved:
                self._port = int(reserved.getsockname()[1])
                command = [sys.executable, "-m", GUARD, str(os.getpid()), str(self.grace_seconds)]
                with self._output() as output:
                    self._guard = subprocess.Popen(
                        [*command, *server_argv(self.spec, self._port)],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output and subprocess.STDOUT,
                        env=server_environment(os.environ),
                        # Ctrl-C in the terminal is for us; the guard then hears from us.
                        start_new_session=True,
                    )
                self._wait_until_ready(self._guard)
                self._is_ready = True
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and all its processes. Idempotent. Does nothing in a forked child."""
        if self._guard is None or self._owner != os.getpid():
            return
        guard, self._guard = self._guard, None
        try:
            guard.terminate()
            # Before it is ready vLLM ignores SIGTERM, and has nothing to end in good order. The
            # guard kills it at the second signal.
            if not self._is_ready:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guard.wait(STARTING_GRACE_SECONDS)
                guard.terminate()
            guard.wait(self.grace_seconds + KILL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # If the guard was killed itself, it has left processes behind.
            left = members(guard.pid)
            if guard.poll() is None or left:
                kill(pid for pid in left if not is_resource_tracker(pid))
            guard.wait()

    def check(self) -> None:
        """Raise PeerLostError, with the log's last lines, if the server has ended."""
        if self._guard is None:
            raise PeerLostError("the vLLM server was stopped, or never started")
        if self._guard.poll() is not None:
            raise self._ended(self._guard.returncode)

    def wait(self) -> int:
        """Block until the server ends by itself; return its exit code."""
        return 0 if self._guard is None else self._guard.wait()

    def _output(self) -> contextlib.AbstractContextManager[IO[bytes] | None]:
        if self.log is None:
            return contextlib.nullcontext()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("wb")

    def _wait_until_ready(self, guard: subprocess.Popen[bytes]) -> None:
        client, started, shown = HTTPClient(self.url), time.monotonic(), 0.0
        while not (client.health() and any_listens(members(guard.pid), self.port)):
            seconds = time.monotonic() - started
            if guard.poll() is not None:
                raise self._ended(guard.returncode, " before it was ready")
            if seconds > self.start_timeout_seconds:
                raise TransportTimeout(
                    f"the vLLM server was not ready within {self.start_timeout_seconds:g} s, its "
                    f"start_timeout_seconds{self._last_words()}"
                )
            if self._progress is not None and seconds - shown >= PROGRESS_SECONDS:
                shown = seconds
                self._progress(seconds, last_line(self.log))
            time.sleep(POLL_SECONDS)

    def _ended(self, code: int, when: str = "") -> PeerLostError:
        how = f"was ended by signal {code - 128}" if code > 128 else f"ended with code {code}"
        text = f"the vLLM server {how}{when}{self._last_words()}"
        return PeerLostError(text, exit_code=code)

    def _last_words(self) -> str:
        if self.log is None:
            return "; its output says why"
        return f"; the end of its log {self.log}:\n{complaint_in(self.log)}"


def reserve_port(host: str, port: int | None) -> socket.socket:
    """Return a socket bound to that port, or to a free one if it is None or 0.

    While the socket is open no other program gets the port by chance. A server can still listen on
    it, as it does not listen itself.

    Raises:
        ConfigError: another program listens there, or there is no such address on this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"there is no address {host} port {port}: {exc}") from exc
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(address)
    except (OSError, OverflowError) as exc:
        reserved.close()
        if getattr(exc, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use; stop the program that listens there (`ss "
                "-ltnp` names it), or choose another port",
                port=port,
            ) from exc
        raise ConfigError(f"cannot listen on {host} port {port}: {exc}") from exc
    return reserved
