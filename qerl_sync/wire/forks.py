"""Descriptors that a forked child must give up: sockets and locks live until every copy is closed.

A child that keeps its parent's connections open hides the parent's death from the other side, and
one that keeps a lock open (`flock` belongs to the open file, not to the process) makes the parent's
shared memory look owned. Closing the child's copies changes nothing for the parent.
"""

from __future__ import annotations

import io
import os
import socket
import weakref
from contextlib import suppress
from typing import TypeVar

# Types whose `close` closes the descriptor and does nothing else.
C = TypeVar("C", socket.socket, io.FileIO)

_OPEN: weakref.WeakSet[socket.socket | io.FileIO] = weakref.WeakSet()


def close_in_children(held: C) -> C:
    """Register `held` to be closed in every process that is forked from this one. Return it.

    A process that is started by exec inherits nothing: Python's descriptors close on exec.
    """
    _OPEN.add(held)
    return held


def close_all() -> None:
    """Close the copies of a forked child."""
    for held in list(_OPEN):
        with suppress(OSError):
            held.close()


os.register_at_fork(after_in_child=close_all)
