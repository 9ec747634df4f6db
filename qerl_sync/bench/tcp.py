"""Measure what plain TCP does on this machine, to hold transports against."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import zlib
from random import Random

from qerl_sync.errors import PeerLostError, TransportError, TransportTimeout

# The longest wait for the other process, whatever it is busy with.
TIMEOUT_SECONDS = 60.0
# It says when its memory is there, acknowledges the last byte, and then tells a checksum.
RECEIVER = """
import socket, sys, zlib
port, nbytes, chunk_bytes, timeout = map(int, sys.argv[1:])
target = memoryview(bytearray(b"1") * nbytes)
with socket.create_connection(("127.0.0.1", port), timeout) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(b"1")
    at = 0
    while at < nbytes:
        at += connection.recv_into(target[at : at + chunk_bytes]) or sys.exit("connection closed")
    connection.sendall(b"2")
    connection.sendall(zlib.crc32(target).to_bytes(4, "big"))
"""


def loopback_tcp_seconds(nbytes: int, chunk_bytes: int) -> float:
    """Return the seconds of sending `nbytes` to another process, over plain sockets on loopback.

    From memory to memory, both already touched, until the receiver has acknowledged the last byte.
    That they arrived is checked outside of the timed part.

    Raises:
        PeerLostError: the other process died.
        TransportTimeout: it did not answer.
    """
    block = Random(nbytes).randbytes(min(nbytes, 1 << 20))
    source = (bytearray(block) * (nbytes // max(len(block), 1) + 1))[:nbytes]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_SECONDS)
        arguments = (listener.getsockname()[1], nbytes, chunk_bytes, int(TIMEOUT_SECONDS))
        receiver = subprocess.Popen([sys.executable, "-c", RECEIVER, *map(str, arguments)])
        try:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as answers:
                connection.settimeout(TIMEOUT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready = answers.read(1)
                started = time.perf_counter()
                for at in range(0, nbytes, chunk_bytes):
                    connection.sendall(memoryview(source)[at : at + chunk_bytes])
                acknowledged = answers.read(1)
                seconds = time.perf_counter() - started
                checksum = int.from_bytes(answers.read(4), "big")
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
    if (ready, acknowledged) != (b"1", b"2"):
        raise PeerLostError("the receiving process died; see its output")
    if checksum != zlib.crc32(source):
        raise TransportError(f"{nbytes:,} bytes arrived over loopback TCP, but not as they were")
    return seconds
