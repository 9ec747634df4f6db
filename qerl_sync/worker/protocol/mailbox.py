"""Keep chunks that another thread of this process received, for the worker to take.

Ray hands objects to an actor's method and not to a thread of vLLM's: the method leaves them here.
"""

from __future__ import annotations

import threading
from typing import Any

_waiting: dict[str, dict[int, Any]] = {}
_changed = threading.Condition()


def open_mailbox(key: str) -> None:
    """Keep chunks with this key from here on. Drop what an earlier sync left."""
    with _changed:
        _waiting[key] = {}


def close_mailbox(key: str) -> None:
    """Drop what is still in it, and what arrives later. Idempotent."""
    with _changed:
        _waiting.pop(key, None)
        _changed.notify_all()


def put(key: str, index: int, chunk: Any) -> bool:
    """Leave a chunk. Return whether a worker waits for it."""
    with _changed:
        if key in _waiting:
            _waiting[key][index] = chunk
            _changed.notify_all()
        return key in _waiting


def take(key: str, index: int, timeout_seconds: float) -> Any:
    """Block for chunk `index` and take it out; None if the time is up or the box was closed."""
    with _changed:
        _changed.wait_for(
            lambda: key not in _waiting or index in _waiting[key], timeout=timeout_seconds
        )
        return _waiting.get(key, {}).pop(index, None)
