"""The token that trainer and workers share, and proofs that the other side knows it.

worker                            trainer
  ---- nonce_w -------------------->        both know the token; it never travels
  <--- nonce_t, HMAC(token, trainer, nonces)
  ---- HMAC(token, worker, nonces) ->
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

TRAINER, WORKER = "trainer", "worker"
# A token that trainer and workers share beforehand; without it the trainer makes one up and sends
# it with its first call.
TOKEN_VARIABLE = "QERL_SYNC_TOKEN"
# A header of HTTP requests that change or control an engine: proof(token, "http", "/pause").
PROOF_HEADER = "x-qerl-sync-proof"

# The longest that a whole handshake may take.
HANDSHAKE_SECONDS = 5.0
_NONCE = 32


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


def prove(connection: socket.socket, token: str, role: str) -> bytes:
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
        # One deadline for the whole handshake: with one for each byte a client that sends a byte at
        # a time would hold its thread for minutes.
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionResetError("closed during the handshake")
        data += more
    return data
