"""Ask about processes: descendants, session, the ports that they listen on. Handle signals."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import psutil

ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def descendants(pid: int) -> list[int]:
    """Return the children of `pid`, their children and so on, parents first."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return list(_alive(children))


def members(session: int) -> list[int]:
    """Return the processes of the session that the process `session` leads, or led."""
    found = []
    for pid in _alive(psutil.process_iter()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(pid) == session:
                found.append(pid)
    return found


def is_resource_tracker(pid: int) -> bool:
    """Return whether this is Python's helper that removes the shared memory of killed processes."""
    with contextlib.suppress(psutil.Error):
        command = psutil.Process(pid).cmdline()
        return any("multiprocessing.resource_tracker" in word for word in command)
    return False


def any_listens(pids: Iterable[int], port: int) -> bool:
    """Return whether one of these processes listens on that TCP port."""
    for pid in pids:
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            for found in psutil.Process(pid).net_connections("tcp"):
                if found.status == psutil.CONN_LISTEN and found.laddr.port == port:
                    return True
    return False


@contextlib.contextmanager
def signals_handled(handler: Callable[..., object], *numbers: signal.Signals) -> Iterator[None]:
    """Handle these signals in this context. Must be used in the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _alive(processes: Iterable[psutil.Process]) -> Iterator[int]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if process.status() not in ENDED:
                yield process.pid
