"""Authentication tags: what arrives is what was sent, by whom, in the order of sending."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

TAG_BYTES = 16


class Tags:
    """Tags of one direction of one connection: both ends compute the same sequence.

    BLAKE2b, since it is the fastest keyed hash of the standard library where the processor has no
    instructions for SHA-256.

    Args:
        key: secret of this connection alone, so that no frame of another one fits.
        direction: differs between the two directions, so that no frame fits its own sender.
    """

    def __init__(self, key: bytes, direction: str) -> None:
        self._key = derived(key, direction)
        self._count = 0

    def next(self, *parts: Any) -> bytes:
        """Return the tag of the next message, whose contiguous buffers are `parts`."""
        mac = hashlib.blake2b(self._count.to_bytes(8, "big"), key=self._key, digest_size=TAG_BYTES)
        self._count += 1
        for part in parts:
            # Without lengths, bytes could move from one buffer to the next.
            mac.update(memoryview(part).nbytes.to_bytes(8, "big"))
            mac.update(part)
        return mac.digest()


def derived(key: bytes, purpose: str) -> bytes:
    """Return a key for one purpose; it says nothing about `key` or those for other purposes."""
    return hmac.digest(key, purpose.encode(), "sha256")
