"""A connection between a trainer and one worker rank: authenticated, framed, every wait timed.

    worker                            trainer
      ---- nonce_w -------------------->        both know the token; it never travels
      <--- nonce_t, HMAC(token, trainer, nonces)
      ---- HMAC(token, worker, nonces) ->

After that, frames in both directions: eight bytes of length, a tag, JSON. Nothing is unpickled.
A message may be followed by its payload, raw bytes whose sizes both sides know from it.
The tag is a keyed hash of the JSON and of the frame's number in its direction; the key is derived
from token and nonces. Who does not know the token can neither change, repeat, reorder nor drop
frames unseen. The bytes are not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from typing_extensions import Self

from qerl_sync.errors import (
    AgreementError,
    IntegrityError,
    PeerLostError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.wire.forks import close_in_children
from qerl_sync.wire.messages import Message, decode, encode
from qerl_sync.wire.tags import TAG_BYTES, Tags

# A token that trainer and workers share beforehand; without it the trainer makes one up and sends
# it with its first call.
TOKEN_VARIABLE = "QERL_SYNC_TOKEN"
# Of a request over HTTP that changes or controls an engine: proof(token, "http", "/pause").
PROOF_HEADER = "x-qerl-sync-proof"

MAX_FRAME_BYTES = 1 << 30
# Of a whole handshake, however its bytes trickle in.
HANDSHAKE_SECONDS = 5.0
# Handshakes at a time on one listener. One more waits until the oldest has had FAIR_SECONDS, which
# is cut off then: strangers that say nothing delay a worker by no more than that.
MAX_HANDSHAKES = 128
FAIR_SECONDS = 2.0
# How soon a listener tries again after the process ran out of descriptors, memory or threads.
RECOVERY_SECONDS = 0.1
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
# How long a worker asks again where nobody listens: the ranks of a trainer do not all open their
# listeners at the moment at which the first of them has the workers connect.
REFUSED_SECONDS = 10.0
_RETRY_SECONDS = 0.1
_NONCE = 32
TRAINER, WORKER = "trainer", "worker"
_LENGTH = struct.Struct("!Q")
# A wait looks this often whether there is still something to wait for.
_GLANCE_SECONDS = 0.1

C = TypeVar("C", bound="Connection")


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
            TransportTimeout: it does not read.
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
            # What was read beyond the message is the beginning of its payload.
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
        poll = select.poll()
        try:
            poll.register(self._connection, select.POLLRDHUP)
        except (OSError, ValueError) as exc:  # closed by another thread
            raise self._lost(what) from exc
        if poll.poll(0):
            raise self._lost(what)

    @property
    def readable(self) -> bool:
        """Return whether `receive` has something to read, or to raise, by now. Does not block."""
        poll = select.poll()
        try:
            poll.register(self._connection, select.POLLIN)
        except (OSError, ValueError):  # closed by another thread
            return True
        return bool(self._received) or bool(poll.poll(0))

    def cut_off(self) -> None:
        """End the connection. Threads of either side that wait for it raise PeerLostError."""
        _cut_off(self._connection)

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
        poll = select.poll()
        try:
            poll.register(self._connection, event)
        except (OSError, ValueError) as exc:  # closed by another thread
            raise self._lost(what) from exc
        while not poll.poll(1000 * min(_GLANCE_SECONDS, max(deadline - time.monotonic(), 0.0))):
            check_alive()
            if time.monotonic() >= deadline:
                raise self._too_slow(what, given)

    def _too_slow(self, what: str, seconds: float) -> TransportTimeout:
        return TransportTimeout(
            f"{what}: {self.peer} did not answer within {seconds:.0f} s; it is stopped, "
            "overloaded or cut off. Look at its log, or raise sync.timeout_seconds"
        )

    def _lost(self, what: str) -> PeerLostError:
        return PeerLostError(f"{what}: {self.peer} closed the connection or died; look at its log")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Listener(Generic[C]):
    """Accept connections in the background, for as long as it is open.

    Each handshake has a thread of its own, so that strangers delay no worker; their number is
    bounded.

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
        # Those in progress, oldest first, with their start.
        self._handshakes: dict[socket.socket, float] = {}
        self._changed, self._closed = threading.Condition(), False
        self.host = host
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
                _cut_off(connection)
            self._changed.notify_all()
        _cut_off(self._socket)  # wakes the thread that accepts
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
                    _cut_off(oldest)  # its thread wakes and takes it out
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
            key = _prove(raw, self._token, TRAINER)
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
        PeerLostError: nobody listens there.
        TransportTimeout: who listens there says nothing.
        AgreementError: who listens there does not know the token, or does not accept ours.
    """
    connection = close_in_children(_reach(host, port, timeout_seconds))
    at = format_endpoint(host, port)
    try:
        key = _prove(connection, token, WORKER)
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


def new_token() -> str:
    return secrets.token_hex(32)


def proof(token: str, *parts: object) -> str:
    """Return a proof that its maker knows the token, for these parts alone."""
    text = "\0".join(map(str, parts))
    return hmac.new(_bytes(token), _bytes(text), "sha256").hexdigest()


def same_proof(ours: str, theirs: str) -> bool:
    """Compare in constant time. `theirs` may hold any text, as `compare_digest` alone may not."""
    return hmac.compare_digest(_bytes(ours), _bytes(theirs))


def _bytes(text: str) -> bytes:
    """Encode any text: JSON may bring halves of characters."""
    return text.encode("utf-8", "surrogatepass")


def _prove(connection: socket.socket, token: str, role: str) -> bytes:
    """Prove the token to each other. Return a key that no other connection has.

    Raises OSError if the other side does not, or not within HANDSHAKE_SECONDS.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    nonce = secrets.token_bytes(_NONCE)
    if role == WORKER:
        connection.settimeout(HANDSHAKE_SECONDS)
        connection.sendall(nonce)
        nonces = nonce + _exactly(connection, _NONCE, deadline)
        _require_seal(connection, token, TRAINER, nonces, deadline)
        connection.sendall(_seal(token, WORKER, nonces))
        # The trainer answers a worker that it admits; the connection of others is cut.
        _exactly(connection, 1, deadline)
    else:
        nonces = _exactly(connection, _NONCE, deadline) + nonce
        connection.sendall(nonce + _seal(token, TRAINER, nonces))
        _require_seal(connection, token, WORKER, nonces, deadline)
        connection.sendall(b"\1")
    return _seal(token, "key", nonces)


def _require_seal(
    connection: socket.socket, token: str, role: str, nonces: bytes, deadline: float
) -> None:
    if not hmac.compare_digest(_exactly(connection, 32, deadline), _seal(token, role, nonces)):
        raise ConnectionRefusedError("wrong token")


def _seal(token: str, role: str, nonces: bytes) -> bytes:
    return hmac.digest(_bytes(token), role.encode() + nonces, "sha256")


def _exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        # One deadline for the whole handshake: a wait that began anew with each byte would let a
        # stranger hold its thread for minutes.
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionResetError("closed during the handshake")
        data += more
    return data


def _cut_off(connection: socket.socket) -> None:
    """Shut it down, which wakes whatever thread waits for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
