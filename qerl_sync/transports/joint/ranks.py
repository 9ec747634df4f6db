"""Let trainer ranks tell each other how far they are in a sync, and what failed.

A sharded model is gathered by collectives, in which a rank waits for all others. Before each chunk
the ranks meet, through torch.distributed's key-value store, not a collective:

    <meeting>/<rank>    what the rank is about to do, and what it says
    <meeting>/arrived   how many have written theirs; the last one writes the
    <meeting>/verdict   "all are here", or the first failure. Written once (compare and set)

A rank that fails writes its error as the verdict of the next meeting, where the others find it.
A rank that waits for a verdict writes the failure of one that has died or does not come.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from qerl_sync.errors import (
    AgreementError,
    ConfigError,
    PeerLostError,
    SyncError,
    TrainerRankError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.wire.host import host_id
from qerl_sync.wire.messages import Failure, error_of, failure

# How often a waiting rank looks whether the others' processes live, in seconds.
LOOK_SECONDS = 0.5
# How long a rank whose collective has failed waits for a process to be seen dead: the connection
# to a killed process closes before the process is gone.
GRACE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 0.02

_numbers = count()


class TrainerRanks:
    """The ranks of torch.distributed's default group, in one sync after the other.

    Example:
        ranks = TrainerRanks(timeout_seconds=300.0)
        with ranks.together():
            versions = ranks.meet("the version", version)

    Make it on every rank, in the same order: its making is a meeting.

    Args:
        timeout_seconds: what a rank may take for anything else that it waits for. Another rank
            waits twice as long for it, so that its own error comes first.
        num_ranks: how many there are, if the caller knows.

    Raises:
        ConfigError: torch.distributed has not been initialized, or has another number of ranks: an
            engine in this process makes a group of one where the trainer has made none.
    """

    def __init__(self, timeout_seconds: float = 300.0, *, num_ranks: int | None = None) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        if not initialized or dist.get_world_size() != (num_ranks or dist.get_world_size()):
            raise ConfigError(
                "several trainer ranks sync together in torch.distributed's default group, and "
                f"this process has {'one of another size' if initialized else 'none'}; call "
                "torch.distributed.init_process_group first, or start the program with torchrun"
            )
        self.rank: int = dist.get_rank()
        self.num_ranks: int = dist.get_world_size()
        self.patience_seconds = 2 * timeout_seconds
        store: Any = distributed_c10d._get_default_store()
        # A connection of its own: a request that waits would hold up others on the same one.
        with suppress(AttributeError, NotImplementedError, RuntimeError):
            store = store.clone()
        self._store = distributed_c10d.PrefixStore(f"qerl_sync/{next(_numbers)}", store)
        self._meeting = 0
        self._failed = False
        self._processes: list[tuple[str, int]] = []
        me = (_process_space(), os.getpid())
        self._processes = [(space, pid) for space, pid in self.meet("introducing themselves", me)]

    def meet(self, what: str, said: Any = None, *, last: bool = False) -> list[Any]:
        """Block until all ranks have called this with the same `what`. Return what each has said.

        Args:
            said: anything that JSON can hold.
            last: this rank's process may end afterwards.

        Raises:
            SyncError: a rank has failed, died, not come in time, or is doing something else. Every
                rank raises the same.
        """
        self._meeting += 1
        number, verdict = self._meeting, f"{self._meeting}/verdict"
        with self._store_lost_explained():
            self._store.set(f"{number}/{self.rank}", json.dumps([what, said]))
            if self._store.add(f"{number}/arrived", 1) == self.num_ranks:
                self._decide(verdict, self._all_said(number))
                self._forget(number - 1)
            decided = self._await(verdict)
            if last or "failure" in decided:
                self._await_departures(number)
        if "failure" in decided:
            self._failed = True
            raise _error(decided)
        return list(decided["said"])

    def of_leader(self, what: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gives on rank 0, which must fit into JSON. The others wait."""
        return self.meet(what, compute() if self.rank == 0 else None)[0]

    def require_same(self, what: str, said: str, parts: Callable[[], Sequence[Any]]) -> None:
        """Check that all ranks say the same, for instance a digest.

        Args:
            parts: of what it is a digest, called where ranks differ, to find the first difference.

        Raises:
            AgreementError: on every rank; `rank` is the lowest that differs from rank 0.
        """
        all_said = self.meet(what, said)
        rank = next((r for r, one in enumerate(all_said) if one != all_said[0]), None)
        if rank is None:
            return
        of_all = self.meet(f"where {what} differ", list(parts()))
        first, other = of_all[0], of_all[rank]
        place = next(
            (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b),
            min(len(first), len(other)),
        )
        ours, theirs = (p[place] if place < len(p) else None for p in (first, other))
        raise AgreementError(
            f"trainer rank {rank} and rank 0 differ in {what}: the first difference is number "
            f"{place}, {theirs!r} on rank {rank} and {ours!r} on rank 0. Build the same model with "
            "the same configuration on every rank",
            rank=rank,
            place=place,
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make an error that leaves this context, on any rank, that of all ranks.

        Each rank enters it for each sync. Collectives that fail on a part of the ranks, and would
        leave the others waiting for torch's half an hour, end within `patience_seconds`.

        Raises:
            SyncError: the error of the rank that failed first: of the same class on every rank. An
                exception that is no SyncError becomes a TrainerRankError.
        """
        self._failed = False
        try:
            with _collectives_within(self.patience_seconds):
                yield
            self.meet("ending the sync", last=True)
        except BaseException as exc:
            if self._failed:  # it came from a meeting: every rank has it
                raise
            joint = self._fail(exc)
            same = isinstance(exc, SyncError) and type(exc) is type(joint)
            if same or not isinstance(exc, Exception):
                raise
            raise joint from exc

    def _fail(self, exc: BaseException) -> SyncError:
        """Return the first failure, which is this one unless another rank was quicker."""
        self._failed = True
        self._meeting += 1
        number, verdict = self._meeting, f"{self._meeting}/verdict"
        lost = self._lost_within(GRACE_SECONDS) if isinstance(exc, TransportError) else None
        try:
            with self._store_lost_explained():
                decided = self._decide(verdict, self._failure(lost or exc))
                self._await_departures(number)
            return _error(decided)
        except PeerLostError as gone:
            return gone

    def _failure(self, exc: BaseException) -> dict[str, Any]:
        if not isinstance(exc, SyncError):
            exc = TrainerRankError(f"{type(exc).__name__}: {exc}", error=type(exc).__name__)
        if not hasattr(exc, "rank"):
            exc.rank = self.rank  # type: ignore[attr-defined]
        return {"by": self.rank, "failure": failure(exc).model_dump(mode="json")}

    def _decide(self, verdict: str, decision: dict[str, Any]) -> dict[str, Any]:
        """Write the verdict unless there is one. Return the one there is."""
        return dict(json.loads(self._store.compare_set(verdict, "", json.dumps(decision))))

    def _all_said(self, number: int) -> dict[str, Any]:
        told = [json.loads(self._store.get(f"{number}/{r}")) for r in range(self.num_ranks)]
        rank = next((r for r, (what, _) in enumerate(told) if what != told[0][0]), None)
        if rank is None:
            return {"said": [said for _, said in told]}
        return self._failure(
            AgreementError(
                f"trainer rank {rank} is at {told[rank][0]!r} and rank 0 at {told[0][0]!r}; every "
                "rank must call SyncSession.push, with the same model, the same number of times",
                rank=rank,
            )
        )

    def _await(self, verdict: str) -> dict[str, Any]:
        began = looked = time.monotonic()
        pause = 1e-4
        while not self._store.check([verdict]):
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked = now
                if (lost := self._lost()) is not None:
                    return self._decide(verdict, self._failure(lost))
            if now - began > self.patience_seconds:
                return self._decide(verdict, self._failure(self._late(verdict)))
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
        return dict(json.loads(self._store.get(verdict)))

    def _late(self, verdict: str) -> SyncError:
        number = verdict.partition("/")[0]
        late = [r for r in range(self.num_ranks) if not self._store.check([f"{number}/{r}"])]
        return TransportTimeout(
            f"trainer ranks {late} did not come to this sync within {self.patience_seconds:g} s. "
            "Every rank must call SyncSession.push; sync.timeout_seconds gives them longer (they "
            "get twice that)",
            rank=late[0] if late else self.rank,
        )

    def _lost(self) -> SyncError | None:
        """Return the error for a rank whose process has ended, as far as this machine knows."""
        for rank in self._dead():
            return PeerLostError(
                f"the process of trainer rank {rank} (pid {self._processes[rank][1]}) has ended in "
                "the middle of a sync; look at its log, and start the training again",
                rank=rank,
            )
        return None

    def _dead(self) -> list[int]:
        """Return the ranks of this machine whose processes have ended."""
        here, dead = _process_space(), []
        for rank, (space, pid) in enumerate(self._processes):
            if space == here:
                status = psutil.STATUS_DEAD
                with suppress(psutil.NoSuchProcess):
                    status = psutil.Process(pid).status()
                if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    dead.append(rank)
        return dead

    def _lost_within(self, seconds: float) -> SyncError | None:
        deadline = time.monotonic() + seconds
        while (lost := self._lost()) is None and time.monotonic() < deadline:
            time.sleep(LONGEST_PAUSE_SECONDS)
        return lost

    def _await_departures(self, number: int) -> None:
        """Block rank 0 until all that live have read the verdict.

        The store may be in its process, which may end after this meeting. Ranks that are left in a
        collective come here when it has timed out.
        """
        key = f"{number}/left"
        self._store.add(key, 1)
        began = looked = time.monotonic()
        awaited = self.num_ranks
        while self.rank == 0 and self._store.add(key, 0) < awaited:
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked, awaited = now, self.num_ranks - len(self._dead())
            if now - began > self.patience_seconds:
                return
            time.sleep(1e-3)

    def _forget(self, number: int) -> None:
        """Delete a meeting that all ranks have left: they have come to the next one."""
        names = ("arrived", "verdict", "left", *range(self.num_ranks))
        for name in names if number > 0 else ():
            self._store.delete_key(f"{number}/{name}")

    @contextmanager
    def _store_lost_explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as exc:  # torch's DistError is a RuntimeError
            lost = self._lost_within(GRACE_SECONDS) or PeerLostError(
                f"torch.distributed's store, by which trainer ranks tell each other of failures, "
                f"does not answer ({exc}); the process that has it, mostly rank 0's, has ended",
                rank=0,
            )
            self._failed = True
            raise lost from exc


def _error(decided: dict[str, Any]) -> SyncError:
    reported = Failure.model_validate(decided["failure"])
    return error_of(reported, f"trainer rank {decided['by']}")


def _process_space() -> str:
    """Return a text that is equal for processes that know each other's pids."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{host_id()} {namespace}"


@contextmanager
def _collectives_within(seconds: float) -> Iterator[None]:
    """Give this process's groups, the model's among them, that timeout in this context."""
    # Else a rank that is left in a collective would wait for torch's default, half an hour. torch
    # has no public call for this; torchtitan uses the same one.
    before: dict[Any, timedelta] = {}
    for group in list(distributed_c10d._world.pg_map):
        with suppress(Exception):  # a backend without timeouts, such as mpi
            device = group._device_types[0]
            before[group] = group._get_backend(device).options._timeout
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    try:
        yield
    finally:
        for group, timeout in before.items():
            distributed_c10d._set_pg_timeout(timeout, group)
