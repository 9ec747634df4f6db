"""Connect workers to the trainer: endpoints, the trainer's listener, a worker's client."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Generic, TypeVar

from qerl_sync.errors import AgreementError, PeerLostError, TransportError, TransportTimeout
from qerl_sync.wire.connection import Connection, cut_off
from qerl_sync.wire.forks import close_in_children
from qerl_sync.wire.tokens import HANDSHAKE_SECONDS, TRAINER, WORKER, prove

# Handshakes at a time on one listener. One more waits until the oldest has had FAIR_SECONDS, which
# is cut off then: clients that send nothing delay a worker by no more than that.
MAX_HANDSHAKES = 128
FAIR_SECONDS = 2.0
# How soon a listener tries again after the process ran out of descriptors, memory or threads.
RECOVERY_SECONDS = 0.1
# How long a worker asks again where nobody listens: the ranks of a trainer do not all open their
# listeners at the moment at which the first of them has the workers connect.
REFUSED_SECONDS = 10.0
_RETRY_SECONDS = 0.1

C = TypeVar("C", bound=Connection)


class Listener(Generic[C]):
    """Accept connections in the background, for as long as it is open.

    Each handshake has a thread of its own, so that other clients delay no worker; their number
    is bounded.

    Args:
        host: the address to bind to; a name is bound to the first of its addresses that can be.
        port: 0 for any free one.
        kind: the class of an authenticated connection.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        kind: type[C] = Connection,  # type: ignore[assignment]
    ) -> None:
        self._socket = close_in_children(_bound(host, port))
        self._token, self._kind = token, kind
        self._accepted: queue.SimpleQueue[C] = queue.SimpleQueue()
        # In progress, oldest first, with the time of their start.
        self._handshakes: dict[socket.socket, float] = {}
        self._changed, self._closed = threading.Condition(), False
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._listen, name="qerl-sync listener", daemon=True).start()

    def accept(self, timeout_seconds: float) -> C | None:
        """Return the next authenticated connection; None if there is none within the time."""
        try:
            return self._accepted.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for connection in self._handshakes:
                cut_off(connection)
            self._changed.notify_all()
        cut_off(self._socket)  # wakes the thread that accepts
        self._socket.close()
        while (unwanted := self.accept(0)) is not None:
            unwanted.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, (host, *_) = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                # Out of descriptors or memory, or the client is gone: the next one may get in.
                time.sleep(RECOVERY_SECONDS)
                continue
            close_in_children(connection)
            if not self._begin_handshake(connection):
                connection.close()
                return
            try:
                threading.Thread(target=self._admit, args=(connection, host), daemon=True).start()
            except RuntimeError:  # no more threads
                self._end_handshake(connection, None)
                time.sleep(RECOVERY_SECONDS)

    def _begin_handshake(self, connection: socket.socket) -> bool:
        """Block until fewer than MAX_HANDSHAKES are in progress. Return False once closed."""
        with self._changed:
            while len(self._handshakes) >= MAX_HANDSHAKES and not self._closed:
                oldest, started = next(iter(self._handshakes.items()))
                seconds = started + FAIR_SECONDS - time.monotonic()
                if seconds <= 0:
                    cut_off(oldest)  # its thread wakes and takes it out
                self._changed.wait(max(seconds, RECOVERY_SECONDS))
            self._handshakes[connection] = time.monotonic()
            return not self._closed

    def _end_handshake(self, raw: socket.socket, authenticated: C | None) -> None:
        with self._changed:
            del self._handshakes[raw]
            self._changed.notify_all()
            if authenticated is not None and not self._closed:
                self._accepted.put(authenticated)
                return
        raw.close()

    def _admit(self, raw: socket.socket, host: str) -> None:
        authenticated = None
        try:
            key = prove(raw, self._token, TRAINER)
            authenticated = self._kind(raw, f"a worker on {host}", key, TRAINER)
        except OSError:
            pass
        finally:
            self._end_handshake(raw, authenticated)


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port of `host:port`, an IPv6 address in brackets: `[::1]:29500`.

    Raises:
        AgreementError: it is not like that.
    """
    host, _, port = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address without brackets: its last group is no port
    # Length first: int() refuses thousands of digits with an error of its own.
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise AgreementError(
            f"{endpoint!r} is no endpoint; it must be like 127.0.0.1:29500 or [::1]:29500",
            subject="endpoint",
        )
    return host, int(port)


def format_endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises TransportError."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in found[:-1]:
            with contextlib.suppress(OSError):
                return socket.create_server(address, family=family)
        family, _, _, _, address = found[-1]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as exc:
        raise TransportError(
            f"cannot listen on {format_endpoint(host, port)} "
            f"({getattr(exc, 'strerror', None) or exc}); choose a free port (sync.trainer_port) "
            "and an address of this machine (sync.trainer_address, or sync.trainer_bind where "
            "workers reach it under another)"
        ) from exc


def connect(
    host: str,
    port: int,
    token: str,
    timeout_seconds: float,
    kind: type[C] = Connection,  # type: ignore[assignment]
) -> C:
    """Connect a worker to the trainer. Where nobody listens yet, retry for REFUSED_SECONDS.

    Raises:
        PeerLostError: nothing listens there.
        TransportTimeout: what listens there does not answer.
        AgreementError: what listens there does not know the token, or does not accept ours.
    """
    connection = close_in_children(_reach(host, port, timeout_seconds))
    at = format_endpoint(host, port)
    try:
        key = prove(connection, token, WORKER)
    except TimeoutError as exc:
        connection.close()
        raise TransportTimeout(
            f"what listens at {at} did not answer within {HANDSHAKE_SECONDS:.0f} s; is it "
            "the trainer, and does it still run?"
        ) from exc
    except OSError as exc:
        connection.close()
        raise AgreementError(
            f"the trainer at {at} and this worker do not share a token; set the same "
            "QERL_SYNC_TOKEN for both, or for neither",
            subject="token",
        ) from exc
    return kind(connection, "the trainer", key, WORKER)


def _reach(host: str, port: int, timeout_seconds: float) -> socket.socket:
    started = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, port), timeout_seconds)
        except (OSError, UnicodeError) as exc:  # the latter of a name that can be none
            seconds = time.monotonic() - started
            waiting = seconds < min(timeout_seconds, REFUSED_SECONDS)
            if not (waiting and isinstance(exc, ConnectionRefusedError)):
                raise PeerLostError(
                    f"cannot reach the trainer at {format_endpoint(host, port)} "
                    f"({getattr(exc, 'strerror', None) or exc}, tried for {seconds:.1f} s); give "
                    "it an address that this worker can reach (sync.trainer_address), and look "
                    "whether it still runs"
                ) from exc
        time.sleep(_RETRY_SECONDS)
