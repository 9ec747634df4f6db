"""Measure what this machine can do at best, to hold transports against. Standard library only.

Each function moves bytes once, checks outside of the timed part that they arrived, and returns
seconds. Take the median of several calls, in turns with what is compared.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

from qerl_sync.errors import PeerLostError, TransportError, TransportTimeout

# The longest wait for the other process, whatever it is busy with.
TIMEOUT_SECONDS = 60.0
_ROOT = str(Path(__file__).parents[2])
_RECEIVER = (
    f"import sys; sys.path.insert(0, {_ROOT!r})\n"
    "from qerl_sync.wire.baselines import receive; receive(*map(int, sys.argv[1:]))"
)


def memcpy_seconds(nbytes: int) -> float:
    """One thread copies `nbytes` from memory to memory, both already touched."""
    source, target = _noise(nbytes), bytearray(b"\1") * nbytes
    started = time.perf_counter()
    memoryview(target)[:] = source
    seconds = time.perf_counter() - started
    if source != target:
        raise TransportError(f"a copy of {nbytes:,} bytes differs from its source")
    return seconds


def loopback_tcp_seconds(nbytes: int, chunk_bytes: int) -> float:
    """`nbytes` from this process to another, in chunks, over plain sockets on loopback.

    From memory to memory, both already touched, until the receiver has acknowledged the last
    byte.

    Raises:
        PeerLostError: the other process died.
        TransportTimeout: it did not answer.
    """
    source = _noise(nbytes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), TIMEOUT_SECONDS)
        theirs, address = listener.accept()
    if address != ours.getsockname():  # anybody may connect to a port of loopback
        raise TransportError(f"a stranger connected from {address}; try again")
    for end in (ours, theirs):
        end.settimeout(TIMEOUT_SECONDS)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with ours:
        with theirs:
            command = [sys.executable, "-c", _RECEIVER, str(theirs.fileno())]
            receiver = subprocess.Popen(
                [*command, str(nbytes), str(chunk_bytes)], pass_fds=[theirs.fileno()]
            )
        try:
            seconds, checksum = _send(ours, source, chunk_bytes)
        except TimeoutError as exc:
            raise TransportTimeout(
                f"the receiving process did not answer within {TIMEOUT_SECONDS:.0f} s; this "
                "machine may be out of memory"
            ) from exc
        except OSError as exc:
            raise PeerLostError(f"the receiving process died ({exc}); see its output") from exc
        finally:
            receiver.kill()
            receiver.wait()
    if checksum != zlib.crc32(source):
        raise TransportError(f"{nbytes:,} bytes arrived over loopback TCP, but not as they were")
    return seconds


def receive(descriptor: int, nbytes: int, chunk_bytes: int) -> None:
    """Run the other process of `loopback_tcp_seconds`, on an inherited connection."""
    target = memoryview(bytearray(b"\1") * nbytes)
    with socket.socket(fileno=descriptor) as connection:
        connection.settimeout(TIMEOUT_SECONDS)
        connection.sendall(b"\1")
        for chunk in _chunks(target, chunk_bytes):
            _fill(connection, chunk)
        connection.sendall(b"\2")
        connection.sendall(zlib.crc32(target).to_bytes(4, "big"))


def _send(connection: socket.socket, source: bytearray, chunk_bytes: int) -> tuple[float, int]:
    """Send; return the seconds, and the receiver's checksum."""
    answer = memoryview(bytearray(4))
    _fill(connection, answer[:1])  # the receiver has its memory
    started = time.perf_counter()
    for chunk in _chunks(memoryview(source), chunk_bytes):
        connection.sendall(chunk)
    _fill(connection, answer[:1])
    seconds = time.perf_counter() - started
    _fill(connection, answer)
    return seconds, int.from_bytes(answer, "big")


def _fill(connection: socket.socket, target: memoryview) -> None:
    while target:
        received = connection.recv_into(target)
        if not received:
            raise ConnectionResetError("the connection was closed")
        target = target[received:]


def _chunks(memory: memoryview, chunk_bytes: int) -> Iterator[memoryview]:
    return (memory[at : at + chunk_bytes] for at in range(0, len(memory), chunk_bytes))


def _noise(nbytes: int) -> bytearray:
    """Return the same bytes in every run; no page of it is shared or zero."""
    block = Random(nbytes).randbytes(min(nbytes, 1 << 20))
    return (bytearray(block) * (nbytes // max(len(block), 1) + 1))[:nbytes]
