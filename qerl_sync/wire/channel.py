"""A connection between a trainer and one worker rank: authenticated, framed, every wait timed.

    worker                            trainer
      ---- nonce_w -------------------->        both know the token; it never travels
      <--- nonce_t, HMAC(token, trainer, nonces)
      ---- HMAC(token, worker, nonces) ->

After that, frames of eight bytes of length and as many of JSON, in both directions. Nothing is
unpickled. The token keeps strangers out; the bytes are not encrypted.
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
from collections.abc import Callable
from types import TracebackType

from typing_extensions import Self

from qerl_sync.errors import AgreementError, PeerLostError, TransportError, TransportTimeout
from qerl_sync.wire.messages import Message, decode, encode

# A token that trainer and workers share beforehand; without it the trainer makes one up and sends
# it with its first call.
TOKEN_VARIABLE = "QERL_SYNC_TOKEN"
# Of a request over HTTP that changes or controls an engine: proof(token, "http", "/pause").
PROOF_HEADER = "x-qerl-sync-proof"

MAX_FRAME_BYTES = 1 << 30
HANDSHAKE_SECONDS = 5.0
# A silent peer is asked by the kernel whether its host is there, and lost after so many questions.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_INTERVAL_SECONDS, KEEPALIVE_PROBES = 30, 10, 3
# How long a worker asks again where nobody listens: the ranks of a trainer do not all open their
# listeners at the moment at which the first of them has the workers connect.
REFUSED_SECONDS = 10.0
_RETRY_SECONDS = 0.1
_NONCE = 32
_LENGTH = struct.Struct("!Q")
# A wait looks this often whether there is still something to wait for.
_GLANCE_SECONDS = 0.1


class Channel:
    """One end of a connection. `send` may be called from several threads, `receive` from one.

    Args:
        peer: what the other side is, for error messages ("worker 0", "the trainer").
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host is gone sends no FIN. Without this its session would stay alive for the
        # system's default of two hours, and keep every other trainer out.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        connection.setblocking(False)
        self.peer = peer
        self._connection = connection
        self._received = bytearray()
        self._sending = threading.Lock()

    def send(self, message: Message, timeout_seconds: float) -> None:
        """Raises PeerLostError, or TransportTimeout if the other side does not read."""
        self.send_bytes(encode(message), timeout_seconds, f"sending {message.type!r}")

    def send_bytes(self, frame: bytes, timeout_seconds: float, what: str) -> None:
        """A frame that is no message, for protocols of their own. Raises as `send`."""
        with self._sending:
            self._write(memoryview(_LENGTH.pack(len(frame)) + frame), timeout_seconds, what)

    def receive(
        self,
        timeout_seconds: float,
        what: str,
        glance: Callable[[], None] = lambda: None,
    ) -> Message:
        """The next message.

        Args:
            what: what is waited for, for the error.
            glance: called some ten times a second; raises if waiting has become pointless.

        Raises:
            PeerLostError: the other side has closed the connection or died.
            TransportTimeout: nothing arrived in time.
        """
        return decode(self.receive_bytes(timeout_seconds, what, glance))

    def receive_bytes(
        self,
        timeout_seconds: float,
        what: str,
        glance: Callable[[], None] = lambda: None,
    ) -> bytes:
        """The next frame, whatever it holds. Raises as `receive`."""
        deadline = time.monotonic() + timeout_seconds
        length = _LENGTH.unpack(self._read(_LENGTH.size, deadline, timeout_seconds, what, glance))[
            0
        ]
        if length > MAX_FRAME_BYTES:
            raise TransportError(f"{self.peer} announces a message of {length:,} bytes; closing")
        return self._read(length, deadline, timeout_seconds, what, glance)

    def require_open(self, what: str) -> None:
        """Raises PeerLostError if the other side has closed the connection or died."""
        poll = select.poll()
        try:
            poll.register(self._connection, select.POLLRDHUP)
        except (OSError, ValueError) as exc:  # closed by another thread
            raise self._lost(what) from exc
        if poll.poll(0):
            raise self._lost(what)

    @property
    def readable(self) -> bool:
        """Whether `receive` has something to read, or to raise, by now. Does not block."""
        poll = select.poll()
        try:
            poll.register(self._connection, select.POLLIN)
        except (OSError, ValueError):  # closed by another thread
            return True
        return bool(self._received) or bool(poll.poll(0))

    @property
    def local_host(self) -> str:
        """This end's address: one that the other side can reach."""
        return str(self._connection.getsockname()[0])

    def close(self) -> None:
        self._connection.close()

    def _read(
        self, size: int, deadline: float, given: float, what: str, glance: Callable[[], None]
    ) -> bytes:
        while len(self._received) < size:
            self._wait(select.POLLIN, deadline, given, what, glance)
            try:
                data = self._connection.recv(max(size - len(self._received), 65536))
            except OSError as exc:
                raise self._lost(what) from exc
            if not data:
                raise self._lost(what)
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _write(self, rest: memoryview, timeout_seconds: float, what: str) -> None:
        deadline = time.monotonic() + timeout_seconds
        while rest:
            self._wait(select.POLLOUT, deadline, timeout_seconds, what)
            try:
                rest = rest[self._connection.send(rest) :]
            except OSError as exc:
                raise self._lost(what) from exc

    def _wait(
        self,
        event: int,
        deadline: float,
        given: float,
        what: str,
        glance: Callable[[], None] = lambda: None,
    ) -> None:
        poll = select.poll()
        try:
            poll.register(self._connection, event)
        except (OSError, ValueError) as exc:  # closed by another thread
            raise self._lost(what) from exc
        while not poll.poll(1000 * min(_GLANCE_SECONDS, max(deadline - time.monotonic(), 0.0))):
            glance()
            if time.monotonic() >= deadline:
                raise TransportTimeout(
                    f"{what}: {self.peer} did not answer within {given:.0f} s; it is stopped, "
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


class Listener:
    """The trainer's end: takes connections in the background, for as long as it is open.

    Strangers are turned away one by one, each in a thread of its own: they delay nobody.

    Args:
        host: the address to bind to; workers must be able to reach it.
        port: 0 for any free one.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        try:
            self._socket = socket.create_server((host, port))
        except OSError as exc:
            raise TransportError(
                f"cannot listen on {host}:{port} ({exc.strerror or exc}); choose a free port and "
                "an address of this machine (sync.trainer_address)"
            ) from exc
        self._token = token
        self._accepted: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        self._closing, self._closed = threading.Lock(), False
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._listen, name="qerl-sync listener", daemon=True).start()

    def accept(self, timeout_seconds: float) -> Channel | None:
        """The next authenticated connection; None if there is none within the time."""
        try:
            return self._accepted.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        with self._closing:
            self._closed = True
        while (unwanted := self.accept(0)) is not None:
            unwanted.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, (host, *_) = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection, host), daemon=True).start()

    def _admit(self, connection: socket.socket, host: str) -> None:
        try:
            _prove(connection, self._token, ours=b"trainer", theirs=b"worker", first=False)
        except OSError:
            connection.close()
            return
        with self._closing:
            if not self._closed:
                self._accepted.put(Channel(connection, f"a worker on {host}"))
                return
        connection.close()  # it proved itself just too late


def connect(host: str, port: int, token: str, timeout_seconds: float) -> Channel:
    """The worker's end. Where nobody listens yet it asks again, for REFUSED_SECONDS at most.

    Raises:
        PeerLostError: nobody listens there.
        TransportTimeout: who listens there says nothing.
        AgreementError: who listens there does not know the token, or does not accept ours.
    """
    connection = _reach(host, port, timeout_seconds)
    try:
        _prove(connection, token, ours=b"worker", theirs=b"trainer", first=True)
    except TimeoutError as exc:
        connection.close()
        raise TransportTimeout(
            f"what listens at {host}:{port} did not answer within {HANDSHAKE_SECONDS:.0f} s; is it "
            "the trainer, and does it still run?"
        ) from exc
    except OSError as exc:
        connection.close()
        raise AgreementError(
            f"the trainer at {host}:{port} and this worker do not share a token; set the same "
            "QERL_SYNC_TOKEN for both, or for neither"
        ) from exc
    return Channel(connection, "the trainer")


def _reach(host: str, port: int, timeout_seconds: float) -> socket.socket:
    started = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, port), timeout_seconds)
        except (OSError, UnicodeError) as exc:  # the latter of a name that can be none
            seconds = time.monotonic() - started
            waiting = seconds < min(timeout_seconds, REFUSED_SECONDS)
            if not (waiting and isinstance(exc, ConnectionRefusedError)):
                raise _unreachable(host, port, exc, seconds) from exc
        time.sleep(_RETRY_SECONDS)


def _unreachable(host: str, port: int, exc: Exception, seconds: float) -> PeerLostError:
    return PeerLostError(
        f"cannot reach the trainer at {host}:{port} ({getattr(exc, 'strerror', None) or exc}, "
        f"tried for {seconds:.1f} s); give it an address that this worker can reach "
        "(sync.trainer_address), and look whether it still runs"
    )


def new_token() -> str:
    return secrets.token_hex(32)


def proof(token: str, *parts: object) -> str:
    """Shows that its maker knows the token, for these parts alone."""
    text = "\0".join(map(str, parts))
    return hmac.new(_bytes(token), _bytes(text), "sha256").hexdigest()


def same_proof(ours: str, theirs: str) -> bool:
    """In constant time, whatever `theirs` holds: `compare_digest` takes no text beyond ASCII."""
    return hmac.compare_digest(_bytes(ours), _bytes(theirs))


def _bytes(text: str) -> bytes:
    """Of any text: JSON may bring halves of characters."""
    return text.encode("utf-8", "surrogatepass")


def _prove(
    connection: socket.socket, token: str, *, ours: bytes, theirs: bytes, first: bool
) -> None:
    """Both sides show that they know the token. Raises OSError if the other side does not."""
    connection.settimeout(HANDSHAKE_SECONDS)
    nonce = secrets.token_bytes(_NONCE)
    if first:
        connection.sendall(nonce)
        other = _exactly(connection, _NONCE)
        nonces = nonce + other
    else:
        other = _exactly(connection, _NONCE)
        nonces = other + nonce
        connection.sendall(nonce + _seal(token, ours, nonces))
    if not hmac.compare_digest(_exactly(connection, 32), _seal(token, theirs, nonces)):
        raise ConnectionRefusedError("wrong token")
    if first:
        connection.sendall(_seal(token, ours, nonces))
        # The trainer answers a worker that it admits; one that it turns away finds the line cut.
        _exactly(connection, 1)
    else:
        connection.sendall(b"\1")


def _seal(token: str, role: bytes, nonces: bytes) -> bytes:
    return hmac.new(_bytes(token), role + nonces, "sha256").digest()


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionResetError("closed during the handshake")
        data += more
    return data
