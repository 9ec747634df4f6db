"""A call of the engine's control plane, in a thread of its own while we talk to its workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from qerl_sync.errors import SyncError, TransportError, TransportTimeout

GLANCE_SECONDS = 0.2


class EngineCall:
    """Runs `function(*arguments)`; the thread dies with the process, whatever the engine does."""

    def __init__(self, what: str, function: Callable[..., Any], *arguments: Any) -> None:
        self._what = what
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(function, arguments), name=f"qerl-sync {what}", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended, well or badly, after at most so long."""
        self._thread.join(seconds)
        return self.done

    def raise_if_failed(self) -> None:
        """Raises TransportError (or the error of ours that the client raised) if it has failed."""
        if self._error is None:
            return
        if isinstance(self._error, SyncError):
            raise self._error
        raise TransportError(
            f"the engine's {self._what} failed: {type(self._error).__name__}: {self._error}; look "
            "at the engine's log"
        ) from self._error

    def wait(self, timeout_seconds: float, check_alive: Callable[[], None] = lambda: None) -> None:
        """Raises as `raise_if_failed`, and TransportTimeout if the call does not return.

        Args:
            glance: called some five times a second; raises if waiting has become pointless.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.done and time.monotonic() < deadline:
            self._thread.join(min(GLANCE_SECONDS, timeout_seconds))
            if not self.done:
                check_alive()
        if not self.done:
            raise TransportTimeout(
                f"the engine's {self._what} did not return within {timeout_seconds:.0f} s"
            )
        self.raise_if_failed()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as exc:
            self._error = exc
