"""Run the engine that a run generates with, where it is in other processes.

It is a server that is found or started, watched and stopped, or vLLM's own engine process and its
log.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qerl_sync.config import TrainConfig
from qerl_sync.engines.environment import changed_environment
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import PeerLostError
from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.log import complaint_in
from qerl_sync.serving.processes import signals_handled
from qerl_sync.serving.server import ServerProcess
from qerl_sync.training.arguments import engine_options
from qerl_sync.training.directory import RunDirectory
from qerl_sync.training.display import Display
from qerl_sync.training.environment import hush
from qerl_sync.wire.tokens import TOKEN_VARIABLE, new_token

LOG_TO_STDERR = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "INFO"}
POLL_SECONDS = 0.25
# How long a server that no longer answers may take to be known as dead, with its reasons.
ENDING_SECONDS = 3.0


@contextmanager
def rollout_server(
    config: TrainConfig, model: str, directory: RunDirectory, display: Display
) -> Iterator[str | None]:
    """Yield the address of the server to generate with; None if the run needs none.

    Unless the configuration names one it is started here, with `model`, and stopped when this
    context ends. If it dies, the context ends at once with PeerLostError. For the main thread.

    A server that is started here takes control calls of this run only: QERL_SYNC_TOKEN is set to a
    new token in this context, unless it is set already. Make the clients of the server in it.

    Raises:
        SyncError: it cannot be started, or does not answer in time.
    """
    rollout = config.rollout
    if rollout.mode != "server":
        yield None
    elif rollout.server_url is not None:
        url, timeout_seconds = rollout.server_url, rollout.start_timeout_seconds
        client, started = HTTPClient(url), time.monotonic()
        with display.phase("waiting for the vLLM server", f"found {url}") as phase:
            while not client.health():
                seconds = time.monotonic() - started
                if seconds > timeout_seconds:
                    raise PeerLostError(
                        f"rollout.server_url: no vLLM server answers at {url} within "
                        f"{timeout_seconds:g} s; is it running, and is this its address? "
                        "`rollout.server_url: null` starts one"
                    )
                phase.progress(seconds, f"no answer from {url}")
                time.sleep(POLL_SECONDS)

        def check() -> None:
            if not client.health():
                raise PeerLostError(f"{client} does not answer any more; its log says why")

        with _losses_explained(check, None):
            yield url
    else:
        spec = ServerSpec(model, engine=engine_options(config), port=rollout.server_port)
        with ExitStack() as stack:
            token = os.environ.get(TOKEN_VARIABLE) or new_token()
            stack.enter_context(changed_environment({TOKEN_VARIABLE: token}))
            with display.phase("starting the vLLM server", "vLLM server started") as phase:
                server = ServerProcess(
                    spec,
                    log=directory.engine_log,
                    start_timeout_seconds=rollout.start_timeout_seconds,
                    progress=phase.progress,
                )
                stack.enter_context(server)
            stack.enter_context(_losses_explained(server.check, directory.engine_log))
            # TRL would retry a dead server for a minute, and its error would not say why it died.
            stack.enter_context(signals_handled(lambda *_: server.check(), signal.SIGCHLD))
            yield server.url


@contextmanager
def engine_process(log: Path | None) -> Iterator[None]:
    """Redirect the output of engines that get their own process in this context to `log`.

    It goes there instead of the terminal for as long as they live. None: no redirection.

    Raises:
        PeerLostError: such a process ended before it was ready; with the end of its log.
    """
    with ExitStack() as stack:
        if log is not None:
            stack.enter_context(_stderr_to(log))
            stack.enter_context(changed_environment(LOG_TO_STDERR))
            # An engine's configuration sets the level of this process's logs too.
            stack.callback(hush)
        try:
            yield
        except RuntimeError as exc:
            if "Engine core initialization failed" not in str(exc):
                raise
            raise engine_lost(log, " before it was ready") from exc


def engine_lost(log: Path | None, when: str = "") -> PeerLostError:
    """Return the error to raise when the process of an engine that wrote to `log` has ended."""
    words = f"; the end of its log {log}:\n{complaint_in(log)}" if log else "; its output says why"
    return PeerLostError(f"the vLLM engine's process has ended{when}{words}")


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Redirect stderr, that of processes started meanwhile included."""
    before = os.dup(2)
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def _losses_explained(check: Callable[[], None], log: Path | None) -> Iterator[None]:
    """Replace connection errors in this context by the cause.

    The cause is what `check` raises if the server is gone, else the errors in its log: a server
    may outlive its engine.
    """
    import requests

    try:
        yield
    except (PeerLostError, requests.RequestException) as exc:
        deadline = time.monotonic() + ENDING_SECONDS
        while time.monotonic() < deadline:
            try:
                check()
            except PeerLostError as why:
                raise why from exc
            time.sleep(POLL_SECONDS)
        words = f"; the log of the vLLM server {log}:\n{complaint_in(log)}" if log else ""
        raise PeerLostError(f"{exc}{words}") from exc
