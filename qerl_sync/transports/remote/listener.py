"""Admit the workers that connect to a trainer rank; reject those that do not belong to it."""

from __future__ import annotations

import time
from collections.abc import Callable

from qerl_sync.errors import AgreementError, TransportError, TransportTimeout
from qerl_sync.transports.remote.compatibility import require_alike, require_complete
from qerl_sync.transports.remote.connection import WorkerConnection
from qerl_sync.transports.remote.control import GRACE_SECONDS, EngineCall
from qerl_sync.wire.endpoints import Listener


def admit_workers(
    listener: Listener[WorkerConnection],
    call: EngineCall | None,
    greet: Callable[[WorkerConnection], None],
    *,
    num_workers: int,
    world_size: Callable[[], int | None],
    timeout_seconds: float,
) -> list[WorkerConnection]:
    """Greet workers until all are there, all alike.

    Args:
        call: the engine's, which returns when all its workers have been greeted.
        num_workers: how many to wait for where no call of the engine says when all are there.
        world_size: returns how many workers the engine has; None: not known.

    Raises:
        SyncError: of any kind; no worker is connected then.
    """
    workers: list[WorkerConnection] = []
    deadline = time.monotonic() + timeout_seconds
    try:
        while True:
            complete = len(workers) >= num_workers if call is None else call.done
            if complete and call is None:
                break
            # A worker that connected before the engine's call ended may say why it has failed.
            worker = listener.accept(0.0 if complete else 0.05)
            if worker is not None:
                worker.await_hello(timeout_seconds)
                _forget_lost(workers, worker)
                workers.append(worker)
                greet(worker)
            elif complete:
                break
            elif time.monotonic() > deadline:
                raise TransportTimeout(
                    f"{len(workers)} workers connected to the trainer within "
                    f"{timeout_seconds:.0f} s, and the engine still waits for others; look at its "
                    "log, or raise sync.timeout_seconds"
                )
        if call is not None:
            call.raise_if_failed()
            if not workers:
                raise TransportError(
                    "the engine answered and none of its workers connected; was it started with "
                    'weight_transfer_config={"backend": "qerl"}?'
                )
        hellos = [worker.hello for worker in workers]
        require_complete(hellos, world_size())
        require_alike(hellos)
    except BaseException:
        for worker in workers:
            worker.close()
        # Workers that come while the engine gives up: the next call must not meet them.
        deadline = time.monotonic() + GRACE_SECONDS
        while call is not None and not call.done and time.monotonic() < deadline:
            reject(listener, 0.05)
        reject(listener, 0.05)
        raise
    return workers


def reject(listener: Listener[WorkerConnection], timeout_seconds: float = 0.0) -> None:
    """Close the connections of late workers, until none comes within the time."""
    while (late := listener.accept(timeout_seconds)) is not None:
        late.close()


def _forget_lost(workers: list[WorkerConnection], new: WorkerConnection) -> None:
    """Drop the connection that `new` replaces: its own earlier one, or that of a worker that died.

    Raises:
        AgreementError: another process with an open connection claims the same place.
    """
    for old in list(workers):
        if old.hello.place != new.hello.place:
            continue
        if old.hello.process != new.hello.process and old.connected:
            # To drop one of two live workers would leave it on its old weights, unnoticed.
            new.close()
            raise AgreementError(
                f"{old.peer} and {new.peer} claim the same place in the engine; start each engine "
                "in processes of its own, and sync them in sessions of their own",
                subject="place",
            )
        old.close()
        workers.remove(old)
