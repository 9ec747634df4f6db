"""NaN is looked for ahead of what is sent, without holding it up."""

from __future__ import annotations

import threading

import pytest
import torch
from support.errors import raises
from support.loaders import KeepingLoader, TensorSource, Workers, tensors

from qerl_sync import RemoteTransport, SyncConfig, SyncSession
from qerl_sync.buffers.detect import require_finite
from qerl_sync.errors import CoverageError
from qerl_sync.verify.finite import FiniteChecker

CHUNKS = [["a"], ["b", "c"], ["d"]]
OLD, NEW = tensors(0), tensors(1)


class Looks:
    """Looks when it is allowed to."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.may = threading.Semaphore(0)
        self.seen: list[str] = []

    def __call__(self, names, alone) -> None:
        assert alone == (names == CHUNKS[0])
        assert self.may.acquire(timeout=10)
        self.seen.extend(names)
        if self.bad in names:
            raise CoverageError(f"{self.bad} is bad")


def test_a_chunk_is_awaited_and_what_comes_later_is_not():
    looks = Looks()
    looks.may.release()
    with FiniteChecker(looks, CHUNKS) as ahead:
        ahead.await_chunk(0)
        assert looks.seen == ["a"]
        waiter = threading.Thread(target=ahead.await_chunk, args=(1,), daemon=True)
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive(), "it was not looked at yet"
        looks.may.release(2)
        waiter.join(10)
        assert not waiter.is_alive()
        ahead.await_chunk(2)
    assert looks.seen == ["a", "b", "c", "d"]


def test_what_is_found_further_on_ends_it_at_once():
    looks = Looks(bad="d")
    looks.may.release(3)
    with FiniteChecker(looks, CHUNKS) as ahead:
        with pytest.raises(CoverageError, match="d is bad"):
            ahead.await_chunk(2)
        with pytest.raises(CoverageError, match="d is bad"):
            ahead.await_chunk(0)


def test_who_leaves_early_waits_for_the_look_in_hand_alone():
    looks = Looks()
    with FiniteChecker(looks, CHUNKS) as ahead:
        looks.may.release()
        ahead.await_chunk(0)
        looks.may.release()
    assert looks.seen in (["a"], ["a", "b", "c"])


def test_of_unknown_chunks_nothing_is_awaited():
    with FiniteChecker(Looks(), []) as ahead:
        ahead.await_chunk(0)


class Watching(TensorSource):
    """Looks itself, and says when it has looked at everything."""

    checks_finite = True

    def __init__(self, held) -> None:
        super().__init__(held)
        self.looked_at: list[str] = []

    def check_finite(self, names=None, *, alone=True):
        for name in self.held if names is None else names:
            require_finite(name, self.held[name], alone=alone)
            self.looked_at.append(name)


class Checking(KeepingLoader):
    """Nothing may arrive that was not looked at."""

    def receive(self, chunk, tensors):
        assert set(chunk.names) <= set(self.source.looked_at)
        super().receive(chunk, tensors)


@pytest.mark.parametrize("late", [False, True])
def test_no_chunk_leaves_before_it_was_looked_at(late):
    bad = list(NEW)[-1 if late else 0]
    source = Watching({**NEW, bad: torch.full_like(NEW[bad], float("nan"))})
    loader = Checking(OLD)
    loader.source = source
    workers = Workers(loader)
    config = SyncConfig.of(chunk_bytes=500, timeout_seconds=10)
    try:
        with SyncSession(source, RemoteTransport(workers, timeout_seconds=10), config) as sync:
            with raises(CoverageError, tensor=bad):
                sync.push()
            assert loader.started == 1
            assert bad not in source.looked_at
            source.held = dict(NEW)
            assert sync.push().version == 1
        assert loader.has(NEW)
    finally:
        workers.close()
