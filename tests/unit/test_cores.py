"""A trainer keeps off the cores that workers on its machine are bound to, while they load."""

from __future__ import annotations

import threading

import pytest
from support.loaders import KeepingLoader, TensorSource, Workers, tensors

from qerl_sync import RemoteTransport, SyncConfig, SyncSession
from qerl_sync.transports.remote import staging
from qerl_sync.wire.host import avoid_cores, own_cores

OWN = own_cores()
needs_two = pytest.mark.skipif(len(OWN) < 2, reason="needs two CPUs that threads can be bound to")


def elsewhere() -> frozenset[int]:
    """The CPUs of a thread that is started here."""
    found: list[frozenset[int]] = []
    thread = threading.Thread(target=lambda: found.append(own_cores()))
    thread.start()
    thread.join()
    return found[0]


@needs_two
def test_a_thread_keeps_off_and_comes_back():
    taken = {min(OWN)}
    with avoid_cores(taken):
        assert own_cores() == elsewhere() == OWN - taken
    assert own_cores() == OWN
    with pytest.raises(ZeroDivisionError), avoid_cores(taken):
        _ = 1 / 0
    assert own_cores() == OWN


@pytest.mark.parametrize("taken", [(), OWN, [*OWN, 100_000], [100_000]])
def test_a_thread_stays_where_nothing_is_left_to_it_or_nothing_taken(taken):
    with avoid_cores(taken):
        assert own_cores() == OWN


class Noting(TensorSource):
    """Notes which CPUs it is looked at on."""

    checks_finite = True

    def __init__(self, held) -> None:
        super().__init__(held)
        self.looks: set[tuple[bool, frozenset[int]]] = set()

    def check_finite(self, names=None, *, alone=True):
        self.looks.add((alone, own_cores()))


@needs_two
@pytest.mark.parametrize("host", ["this machine", "another"])
def test_what_is_copied_and_looked_at_beside_a_load_is_on_other_cores(monkeypatch, host):
    reported = (
        {"cores": [min(OWN)]} if host == "this machine" else {"cores": [min(OWN)], "host": "far"}
    )
    spare = OWN - {min(OWN)} if host == "this machine" else OWN
    copies: list[frozenset[int]] = []
    write = staging._write_beside

    def noting(*args):
        copies.append(own_cores())
        write(*args)

    monkeypatch.setattr(staging, "_write_beside", noting)
    weights = tensors(1)
    source, loader = Noting(weights), KeepingLoader(tensors(0))
    workers = Workers(loader, rank0=reported)
    transport = RemoteTransport(workers, transport="shm", timeout_seconds=10)
    try:
        with SyncSession(source, transport, SyncConfig.of(chunk_bytes=500)) as session:
            session.push()
    finally:
        workers.close()
    assert loader.has(weights)
    assert source.looks == {(True, OWN), (False, spare)}
    assert set(copies) == {spare}
    assert own_cores() == OWN
