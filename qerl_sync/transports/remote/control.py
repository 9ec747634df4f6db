"""Call the engine's control plane before and after a session with its workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from qerl_sync.engines.base import EngineClient, PauseMode, ends_within, in_thread
from qerl_sync.errors import PeerLostError, SyncError, TransportError, TransportTimeout
from qerl_sync.transports.base import still_cached
from qerl_sync.transports.remote.connection import WorkerConnection
from qerl_sync.wire import messages as say
from qerl_sync.wire.handshake import ConnectCall, ServeCall
from qerl_sync.wire.tokens import proof

logger = logging.getLogger(__name__)

# How long a failed session may take to end, on top of the timeout that it has run into.
GRACE_SECONDS = 5.0


class EngineCall:
    """A call of the engine's client, in a thread, while its workers are talked to."""

    def __init__(self, method: Callable[..., Any], *arguments: Any) -> None:
        self._what = method.__name__
        self._answer = in_thread(self._what, partial(method, *arguments))

    @property
    def done(self) -> bool:
        return self._answer.done()

    def ends_within(self, timeout_seconds: float) -> bool:
        return ends_within(self._answer, timeout_seconds)

    def raise_if_failed(self) -> None:
        """Raise TransportError (or the error of ours that the client raised) if it has failed."""
        error = self._answer.exception() if self.done else None
        if isinstance(error, SyncError):
            raise error
        if error is not None:
            raise TransportError(
                f"the engine's {self._what} failed: {type(error).__name__}: {error}; look "
                "at the engine's log"
            ) from error

    def wait(
        self,
        timeout_seconds: float,
        workers: Sequence[WorkerConnection] = (),
        doing: str = "ending the call",
    ) -> None:
        """Block until the call has returned. Raises as `raise_if_failed`, TransportTimeout if it
        does not return, and PeerLostError once one of `workers` is lost."""

        def check_alive() -> None:
            for worker in workers:
                worker.require_open(doing)

        if not ends_within(self._answer, timeout_seconds, check_alive):
            raise TransportTimeout(
                f"the engine's {self._what} did not return within {timeout_seconds:.0f} s; look at "
                "its log, or raise sync.timeout_seconds"
            )
        self.raise_if_failed()


class EngineControl:
    """Pauses an engine, starts our sessions on its workers' threads, empties caches, resumes it.

    Trainer ranks other than 0 have no client: there every call does nothing.

    Attributes:
        in_session: from `begin_session` to `end_session` the workers' threads are ours.
        paused: we have paused the engine, and it is ours to resume.
    """

    def __init__(
        self,
        client: EngineClient | None,
        token: str,
        *,
        timeout_seconds: float,
        pause_mode: PauseMode,
        recompute_running: bool,
    ) -> None:
        self._client = client
        self._token = token
        self._timeout_seconds = timeout_seconds
        self._pause_mode: PauseMode = pause_mode
        self._recompute_running = recompute_running
        self._number = 0
        self._call: EngineCall | None = None
        self._pausing: EngineCall | None = None
        self.in_session = self.paused = False

    def ask_to_connect(self, call: ConnectCall) -> EngineCall | None:
        """Begin to have the engine's workers connect; calls are counted anew from here."""
        self._number = 0
        if self._client is None:
            return None
        return EngineCall(self._client.init_weight_transfer_engine, call.model_dump())

    def world_size(self) -> int | None:
        """Ask how many workers the engine has now; None: its client cannot tell."""
        return None if self._client is None else self._client.world_size()

    def close_stale_update(self) -> None:
        """Close the update that a dead trainer left open. A rank on which vLLM has closed it
        raises; ignore that."""
        if self._client is None:
            return
        try:
            self._client.finish_weight_update()
        except (PeerLostError, TransportTimeout):
            raise
        except TransportError as exc:
            logger.warning("closing the update that an earlier trainer left open: %s", exc)

    def begin_session(self, workers: Sequence[WorkerConnection]) -> None:
        """Start our session on the workers' threads. It lasts until `end_session`."""
        if self._client is None:
            self.in_session = True
            return
        self._client.start_weight_update()
        self.in_session = True
        self._number += 1
        shown = proof(self._token, "update", self._number)
        update = ServeCall(number=self._number, proof=shown).model_dump()
        self._call = EngineCall(self._client.update_weights, update)
        for worker in workers:
            worker.check_alive = self._check_alive

    def end_session(self, workers: Sequence[WorkerConnection], version: str | None = None) -> None:
        """Send End to the workers, and block until their threads are the engine's again."""
        for worker in workers:
            worker.tell(say.End())
        # From here on the workers' threads are vLLM's: `abort` would wait for answers in vain.
        self.in_session = False
        if self._call is not None and self._client is not None:
            # vLLM's server does not answer a call in which its engine has died.
            self._call.wait(self._timeout_seconds, workers, "ending the sync")
            self._client.finish_weight_update(version)

    def end_failed_session(self, workers: Sequence[WorkerConnection]) -> bool:
        """End the session as far as it can be ended. Return whether the engine is ready for the
        next call."""
        for worker in workers:
            with suppress(SyncError):  # it may be what has failed
                worker.tell(say.End())
        self.in_session = False
        if self._call is None or self._client is None:
            return True
        try:
            self._call.wait(GRACE_SECONDS)
            self._client.finish_weight_update()
        except Exception as exc:
            logger.warning("the engine does not come out of the failed sync: %s", exc)
            return False
        return True

    def pause(self, workers: Sequence[WorkerConnection] = ()) -> None:
        """Pause the engine. Raise PeerLostError if one of `workers` is lost meanwhile: an engine
        may take seconds to notice that."""
        if self._client is None:
            return
        self.paused = True
        self._pausing = EngineCall(self._client.pause, self._pause_mode)
        self._pausing.wait(self._timeout_seconds + GRACE_SECONDS, workers, "pausing")

    def resume(self, *, caches: bool, overwritten: bool = False, connector: str = "") -> None:
        """Resume the engine.

        Args:
            caches: its weights are new, what it computed is not.
            overwritten: what requests in flight have in the KV cache is gone: they are computed
                anew, whatever the configuration says.
            connector: of the engine, which must have emptied its cache with the others.

        Raises:
            StaleCacheError: it has not. The engine stays paused.
        """
        client = self._client
        if client is None:
            return
        if caches:
            running = self._recompute_running or overwritten
            forgotten = client.reset_caches(running=running)
            # No request holds its blocks any more, so False is a cache that was not emptied, of one
            # data parallel replica for instance.
            if (not forgotten and connector) or (forgotten is False and running):
                raise still_cached(connector)
            if not forgotten and not running:
                logger.warning(
                    "requests in flight keep what they computed with the old weights, and vLLM "
                    "keeps its whole prefix cache with them; sync.recompute_running: true "
                    "forgets both"
                )
        if self.paused:
            client.resume()
        self.paused = False
        client.admit()

    def go_on(self, reason: str, *, caches: bool) -> None:
        """Resume the engine after a failed sync that left its workers as they were. `caches`: they
        may hold what other weights have computed."""
        if not self.paused:
            return
        # An engine that is still pausing would pause after this, unnoticed.
        if self._pausing is not None and not self._pausing.ends_within(GRACE_SECONDS):
            self.leave_paused(reason)
            return
        try:
            self.resume(caches=caches)
        except SyncError:
            self.refuse(reason)

    def leave_paused(self, reason: str) -> None:
        """Leave the engine paused until the next sync that succeeds; requests are refused with
        `reason`."""
        self.paused = False
        self.refuse(reason)

    def refuse(self, reason: str) -> None:
        if self._client is not None:
            self._client.refuse(reason)

    def _check_alive(self) -> None:
        """Raise if the workers no longer listen, while we wait for one of them."""
        assert self._call is not None
        self._call.raise_if_failed()
        if self._call.done:
            raise TransportError(
                "the engine returned from update_weights before its workers had answered; look at "
                "its log"
            )
