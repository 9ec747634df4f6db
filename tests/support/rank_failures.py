"""Syncs of a tiny FSDP2 model on several ranks, in which one rank raises or is killed.

A program that forks the ranks of one case after the other: importing torch takes longer than a
case. Arguments: a directory for what the ranks report, then the names of cases, such as `raise` or
`kill joint between 2`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.errors import LoadError
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.sources.sharded import ShardedSource
from qerl_sync.transports.base import SyncResult, Transport, WorkerReport
from qerl_sync.transports.joint import JointTransport, LedTransport, TrainerRanks
from support.models import make_model
from support.ranks import report, surroundings

TIMEOUT_SECONDS = 3.0
# Where a rank fails: in its source, in its transport, and, for `_value`, in a gather itself.
PLACES = ("metadata", "layer_map", "start", "first", "between", "last", "finish", "_value")
# All that a rank does that only takes part.
OF_FOLLOWERS = ("metadata", "_value")


class Sink(Transport):
    """Takes everything. Each tensor is a layer of its own. Calls `at` with each place."""

    def at(self, place: str) -> None:
        pass

    def layer_map(self, metas, *, allow_incomplete=(), load="auto"):
        self.at("layer_map")
        return LayerMap(
            {m.name: ParentLayer(m.name, "Linear", m.numel, m.numel) for m in metas},
            {m.name: (Contribution(m.name, "weight", m.numel, m.nbytes, True),) for m in metas},
        )

    def free_bytes(self) -> int:
        return 1 << 30

    def start(self, plan, layer_map, options):
        self.at("start")
        self._plan = plan

    def send(self, chunk, tensors):
        self.at("first")
        for index, _ in enumerate(tensors):
            if index:
                self.at("between")
        self.at("last")

    def finish(self) -> SyncResult:
        self.at("finish")
        worker = WorkerReport("a sink", self._plan.predicted, self._plan.predicted)
        return SyncResult([worker], "sink")

    def abort(self, reason: str) -> None:
        pass


def sharded() -> Any:
    model = make_model("moe", 0)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def new_session(kind: str, ranks: TrainerRanks) -> tuple[SyncSession, Sink, ShardedSource]:
    sink, source = Sink(), ShardedSource(sharded())
    if kind == "led":
        transport = LedTransport(sink if ranks.rank == 0 else None, ranks)
    else:
        transport = JointTransport(sink, ranks)
    return SyncSession(source, transport, SyncConfig.of(chunk_bytes=1 << 16)), sink, source


def once_at(place: str, act: Any, sink: Sink, source: ShardedSource) -> None:
    """Have `act` happen when the session's transport or source is there for the second time, of
    places that it passes more than once, and else for the first."""
    left = [2 if place in ("first", "between", "last", "_value") else 1]

    def at(here: str) -> None:
        if here == place:
            left[0] -= 1
            if not left[0]:
                act()

    sink.at = at
    for name in OF_FOLLOWERS:
        own = getattr(source, name)
        setattr(source, name, lambda *given, own=own, name=name: (at(name), own(*given))[1])


def tried(session: SyncSession) -> dict[str, Any]:
    began = time.monotonic()
    told: dict[str, Any] = {}
    try:
        told["version"] = session.push().version
    except Exception as exc:
        told |= {"error": type(exc).__name__, "rank": getattr(exc, "rank", None), "text": str(exc)}
    return told | {"seconds": time.monotonic() - began}


def load_error() -> None:
    raise LoadError("a rank that the test makes fail", layer="x")


def key_error() -> None:
    raise KeyError("of other code")


def raise_everywhere(ranks: TrainerRanks) -> dict[str, Any]:
    told = {}
    cases = [("joint", place, 1) for place in PLACES[:-1]]
    cases += [("led", place, 0) for place in PLACES[:-1]]
    # A gather that fails leaves torch's group out of step: nothing can follow it.
    cases += [("led", "metadata", 1), ("led", "_value", 0)]
    for number, (kind, place, rank) in enumerate(cases):
        act = (load_error, key_error)[number % 2]
        session, sink, source = new_session(kind, ranks)
        if ranks.rank == rank:
            once_at(place, act, sink, source)
        told[f"{kind}, {place}, rank {rank}"] = {"raised": act.__name__} | tried(session)
        if place in ("between", "finish"):
            told[f"after {kind}, {place}"] = tried(session)
    return told


def in_one_rank(
    directory: str, what: str, kind: str = "", place: str = "", rank: str = "0"
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = TrainerRanks(TIMEOUT_SECONDS)
    if what == "raise":
        report(directory, **raise_everywhere(ranks))
    else:
        session, sink, source = new_session(kind, ranks)
        if ranks.rank == int(rank):
            once_at(place, lambda: os.kill(os.getpid(), signal.SIGKILL), sink, source)
        report(directory, **tried(session))


def fork_ranks(directory: Path, num_ranks: int, *case: str) -> None:
    """Run a case. Kill what has not ended after a minute: it then has reported nothing."""
    directory.mkdir()
    common = surroundings(num_ranks)
    pids = []
    for rank in range(num_ranks):
        pids.append(os.fork())
        if not pids[-1]:
            status = 1
            try:
                os.environ |= {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                in_one_rank(str(directory), *case)
                status = 0
            finally:
                os._exit(status)  # torch's groups may be half way in a collective
    deadline = time.monotonic() + 60
    left = set(pids)
    while left and time.monotonic() < deadline:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main(directory: str, *cases: str) -> None:
    for case in cases:
        num_ranks = 2 if case == "raise" else 3
        fork_ranks(Path(directory) / case, num_ranks, *case.split())


if __name__ == "__main__":
    main(*sys.argv[1:])
