"""A connection between a trainer and one worker rank: authenticated, framed, every wait timed.

Frames in both directions: eight bytes of length, a tag, JSON. Nothing is unpickled. A message may
be followed by its payload, raw bytes whose sizes both sides know from it. The tag is a keyed hash
of the JSON and of the frame's number in its direction; the key is that of `wire.tokens.prove`.
Without the token nobody can change, repeat, reorder or drop frames unnoticed. The bytes are not
encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from typing_extensions import Self

from qerl_sync.errors import (
    IntegrityError,
    PeerLostError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.wire.messages import Message, decode, encode
from qerl_sync.wire.tags import TAG_BYTES, Tags
from qerl_sync.wire.tokens import TRAINER, WORKER

MAX_FRAME_BYTES = 1 << 30
# An idle connection is probed after the first of these, so often, this far apart: routers and
# firewalls forget idle connections after minutes (AWS: 350 s, Azure: 240 s), and the kernel's own
# probes would begin after two hours. Data that nobody acknowledges ends it as soon as probes do.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_PROBES, KEEPALIVE_INTERVAL_SECONDS = 30, 6, 10
SOCKET_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    (
        socket.IPPROTO_TCP,
        socket.TCP_USER_TIMEOUT,  # in milliseconds
        1000 * (KEEPALIVE_IDLE_SECONDS + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL_SECONDS),
    ),
)
_LENGTH = struct.Struct("!Q")
# A wait looks this often whether there is still something to wait for.
_GLANCE_SECONDS = 0.1


class Connection:
    """One end: frames and payloads. `send` may be called from several threads, `receive` from one.

    `transports.remote.connection` has the trainer's end, `worker.protocol.connection` a worker's.

    Args:
        peer: what the other side is, for error messages ("worker 0", "the trainer").
        key: of this connection, known to both ends.
        role: TRAINER or WORKER, whichever this end is.

    Attributes:
        sealed: payloads carry authentication tags, as messages always do. Set at both ends before
            the first payload.
    """

    def __init__(self, connection: socket.socket, peer: str, key: bytes, role: str) -> None:
        for option in SOCKET_OPTIONS:
            connection.setsockopt(*option)
        connection.setblocking(False)
        self.peer = peer
        self.sealed = False
        self._connection = connection
        self._received = bytearray()
        self._sending = threading.Lock()
        self._own_tags = Tags(key, role)
        self._other_tags = Tags(key, TRAINER if role == WORKER else WORKER)

    def send(
        self, message: Message, timeout_seconds: float, payload: Sequence[memoryview] = ()
    ) -> None:
        """Send a message, and behind it bytes that are its own.

        Args:
            timeout_seconds: the longest that the other side may go without reading.
            payload: contiguous bytes. They must not change until this returns. The other side
                passes `receive_into` buffers of these sizes next.

        Raises:
            PeerLostError: the other side has closed the connection or died.
            TransportTimeout: it does not read. The connection is ended.
        """
        what = f"sending {message.type!r}"
        frame = encode(message)
        # A message of another thread waits until the payload before it has left.
        if not self._sending.acquire(timeout=timeout_seconds):
            raise self._too_slow(what, timeout_seconds)
        try:
            head = _LENGTH.pack(TAG_BYTES + len(frame)) + self._own_tags.next(frame)
            self._write(memoryview(head + frame), timeout_seconds, what)
            if payload:
                tag = self._own_tags.next(*payload) if self.sealed else b""
                for part in (*payload, memoryview(tag)):
                    self._write(part, timeout_seconds, what)
        except BaseException:
            # The other side takes whatever follows for the rest of this frame.
            self.cut_off()
            raise
        finally:
            self._sending.release()

    def receive(
        self,
        timeout_seconds: float,
        what: str,
        check_alive: Callable[[], None] = lambda: None,
    ) -> Message:
        """Return the next message.

        Args:
            what: what is waited for, for the error.
            check_alive: called some ten times a second; raises if waiting has become pointless.

        Raises:
            PeerLostError: the other side has closed the connection or died.
            TransportTimeout: nothing arrived in time.
            IntegrityError: what arrived is not what the other side sent next.
        """
        deadline = time.monotonic() + timeout_seconds
        wait = (deadline, timeout_seconds, what, check_alive)
        self._fill(_LENGTH.size, *wait)
        (length,) = _LENGTH.unpack_from(self._received)
        if not TAG_BYTES <= length <= MAX_FRAME_BYTES:
            raise TransportError(f"{self.peer} announces a message of {length:,} bytes; closing")
        self._fill(_LENGTH.size + length, *wait)
        # A frame is taken whole or not at all: a caller that times out in it may call again.
        body = bytes(self._received[_LENGTH.size : _LENGTH.size + length])
        del self._received[: _LENGTH.size + length]
        tag, frame = body[:TAG_BYTES], body[TAG_BYTES:]
        self._require_tag(tag, (memoryview(frame),), what)
        return decode(frame)

    def receive_into(
        self, buffers: Sequence[memoryview], timeout_seconds: float, what: str
    ) -> None:
        """Receive the payload of the message that was received last.

        Args:
            buffers: writable bytes, of the sizes in which the payload was sent.
            timeout_seconds: the longest that nothing may arrive.

        Raises as `receive`.
        """
        tag = bytearray(TAG_BYTES if self.sealed else 0)
        for buffer in (*buffers, memoryview(tag)):
            # `_fill` reads more than it needs: the beginning of the payload may be here already.
            early = min(len(self._received), buffer.nbytes)
            buffer[:early] = self._received[:early]
            del self._received[:early]
            rest = buffer[early:]
            while rest:
                try:
                    count = self._connection.recv_into(rest)
                except BlockingIOError:
                    deadline = time.monotonic() + timeout_seconds
                    self._wait(select.POLLIN, deadline, timeout_seconds, what)
                    continue
                except (OSError, ValueError) as exc:  # the latter: closed by another thread
                    raise self._lost(what) from exc
                if not count:
                    raise self._lost(what)
                rest = rest[count:]
        if self.sealed:
            self._require_tag(tag, buffers, what)

    def _require_tag(self, tag: bytes | bytearray, parts: Sequence[memoryview], what: str) -> None:
        if not hmac.compare_digest(tag, self._other_tags.next(*parts)):
            raise IntegrityError(
                f"{what}: what arrived is not what {self.peer} sent (its authentication tag does "
                "not fit): it was changed on the way, or the two run different versions of "
                "qerl-sync; look at who can reach the network between them"
            )

    def require_open(self, what: str) -> None:
        """Raise PeerLostError if the other side has closed the connection or died."""
        if self._poller(select.POLLRDHUP, what).poll(0):
            raise self._lost(what)

    @property
    def connected(self) -> bool:
        """Return whether the connection is open, as far as is known without asking."""
        try:
            self.require_open("looking for it")
        except PeerLostError:
            return False
        return True

    @property
    def readable(self) -> bool:
        """Return whether `receive` has something to read, or to raise, by now. Does not block."""
        try:
            return bool(self._received) or bool(self._poller(select.POLLIN, "looking").poll(0))
        except PeerLostError:
            return True

    def cut_off(self) -> None:
        """End the connection. Threads of either side that wait for it raise PeerLostError."""
        cut_off(self._connection)

    def close(self) -> None:
        self._connection.close()

    def _fill(
        self, size: int, deadline: float, given: float, what: str, check_alive: Callable[[], None]
    ) -> None:
        """Block until `size` bytes have arrived."""
        while len(self._received) < size:
            self._wait(select.POLLIN, deadline, given, what, check_alive)
            try:
                data = self._connection.recv(max(size - len(self._received), 65536))
            except OSError as exc:
                raise self._lost(what) from exc
            if not data:
                raise self._lost(what)
            self._received += data

    def _write(self, rest: memoryview, timeout_seconds: float, what: str) -> None:
        while rest:
            try:
                sent = self._connection.send(rest)
            except BlockingIOError:
                deadline = time.monotonic() + timeout_seconds
                self._wait(select.POLLOUT, deadline, timeout_seconds, what)
                continue
            except (OSError, ValueError) as exc:  # the latter: closed by another thread
                raise self._lost(what) from exc
            rest = rest[sent:]

    def _wait(
        self,
        event: int,
        deadline: float,
        given: float,
        what: str,
        check_alive: Callable[[], None] = lambda: None,
    ) -> None:
        while True:
            # Anew each time: a poll holds the descriptor's number, which belongs to the next file
            # that is opened once another thread has closed the connection.
            poll = self._poller(event, what)
            if poll.poll(1000 * min(_GLANCE_SECONDS, max(deadline - time.monotonic(), 0.0))):
                return
            check_alive()
            if time.monotonic() >= deadline:
                raise self._too_slow(what, given)

    def _poller(self, event: int, what: str) -> select.poll:
        poll = select.poll()
        try:
            poll.register(self._connection, event)
        except (OSError, ValueError) as exc:  # closed by another thread
            raise self._lost(what) from exc
        return poll

    def _too_slow(self, what: str, seconds: float) -> TransportTimeout:
        return TransportTimeout(
            f"{what}: {self.peer} did not answer within {seconds:.0f} s; it is stopped, "
            "overloaded or cut off. Look at its log, or raise sync.timeout_seconds"
        )

    def _lost(self, what: str) -> PeerLostError:
        return PeerLostError(f"{what}: {self.peer} closed the connection or died; look at its log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def cut_off(connection: socket.socket) -> None:
    """Shut it down, which wakes whatever thread waits for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
