"""Syncs of a tiny FSDP2 model on several ranks, in which one rank raises or is killed.

A program that forks the ranks of one case after the other: importing torch takes longer than a
case. Arguments: a directory for what the ranks report, then the names of cases, such as `raise`,
`kill joint between 2`, `kill led-zero3 _value 1` (partitioned by DeepSpeed, or `fsdp1`, in place of
FSDP2), or `loop 20`: so many tries of a rank that is killed or raises in the middle of a gather,
each at another one, of which it prints what the others have raised and when.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.errors import LoadError
from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
from qerl_sync.sources.sharded import ShardedSource
from qerl_sync.transports.base import SyncResult, Transport, WorkerReport
from qerl_sync.transports.joint import JointTransport, LedTransport, TrainerRanks
from qerl_sync.transports.joint.ranks import GRACE_SECONDS
from support.models import make_model
from support.ranks import read, report, surroundings
from support.sharding import FSDP1, fsdp2, partitioned

TIMEOUT_SECONDS = 3.0
# Where a rank fails: in its source, in its transport, and, for `_value`, in a gather itself.
PLACES = ("metadata", "layer_map", "start", "first", "between", "last", "finish", "_value")
# All that a rank does that only takes part.
OF_FOLLOWERS = ("metadata", "_value", "end_sync")


class Sink(Transport):
    """Takes everything. Each tensor is a layer of its own. Calls `at` with each place."""

    serves_new = False

    def at(self, place: str) -> None:
        pass

    def layer_map(self, metas, options=None):
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
        self.serves_new = True
        worker = WorkerReport("a sink", self._plan.predicted, self._plan.predicted)
        return SyncResult([worker], "sink")

    def abort(self, reason: str) -> None:
        pass

    def invalidate(self, reason: str) -> None:
        self.serves_new = False


def sharded(by: str = "") -> Any:
    model = make_model("moe", 0)
    if by == "zero3":
        return partitioned(model, 0).module
    if by == "fsdp1":
        return FSDP1(model).module
    return fsdp2(model)


def new_session(kind: str, ranks: TrainerRanks) -> tuple[SyncSession, Sink, ShardedSource]:
    way, _, by = kind.partition("-")
    sink, source = Sink(), ShardedSource(sharded(by))
    if way == "led":
        transport = LedTransport(sink if ranks.rank == 0 else None, ranks)
    else:
        transport = JointTransport(sink, ranks)
    return SyncSession(source, transport, SyncConfig.of(chunk_bytes=1 << 16)), sink, source


def once_at(
    place: str, act: Any, sink: Sink, source: ShardedSource, times: int | None = None
) -> None:
    """Have `act` happen when the session's transport or source is there for that time; by default
    the second, of places that it passes more than once, and else the first."""
    left = [times or (2 if place in ("first", "between", "last", "_value") else 1)]

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
    cases += [("led", "metadata", 1), ("led", "end_sync", 1), ("led", "_value", 0)]
    for number, (kind, place, rank) in enumerate(cases):
        act = (load_error, key_error)[number % 2]
        session, sink, source = new_session(kind, ranks)
        if ranks.rank == rank:
            once_at(place, act, sink, source)
        told[f"{kind}, {place}, rank {rank}"] = {"raised": act.__name__} | tried(session)
        told[f"{kind}, {place}, rank {rank}"]["serves_new"] = sink.serves_new
        if place in ("between", "finish"):
            told[f"after {kind}, {place}"] = tried(session)
    return told


def differ(ranks: TrainerRanks) -> dict[str, Any]:
    """Rank 1 has another plan of the same tensors, and then other tensors."""
    told = {}
    for what, options in (
        ("plan", {"chunk_bytes": 1 << 15}),
        ("tensors", {"ignore_names": ["*norm*"]}),
    ):
        given = options if ranks.rank == 1 else {}
        config = SyncConfig.of(**{"chunk_bytes": 1 << 16, **given})
        session = SyncSession(ShardedSource(sharded()), JointTransport(Sink(), ranks), config)
        told[what] = tried(session)
    return told


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_one_rank(
    directory: str,
    what: str,
    kind: str = "",
    place: str = "",
    rank: str = "0",
    times: str | None = None,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = TrainerRanks(TIMEOUT_SECONDS)
    if what == "raise":
        report(directory, **raise_everywhere(ranks), differ=differ(ranks))
    else:
        session, sink, source = new_session(kind, ranks)
        if ranks.rank == int(rank):
            act = {"kill": kill, "load_error": load_error, "key_error": key_error}[what]
            once_at(place, act, sink, source, times and int(times))
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


# Which error the others must find, by what a rank does in the middle of a gather.
NAMED = {"kill": "PeerLostError", "load_error": "LoadError", "key_error": "TrainerRankError"}
# A collective of ranks that are left ends after twice the timeout, and a dead process is then
# looked for.
LONGEST_SECONDS = 2 * TIMEOUT_SECONDS + GRACE_SECONDS + 2


def loop(directory: Path, tries: int) -> Counter[str]:
    """Fail one of two or three ranks in a gather, so often. Return how the others ended."""
    rng, ended = random.Random(0), Counter[str]()
    gathers = sum(1 for _ in make_model("moe", 0).parameters())
    for number in range(tries):
        num_ranks, what = 2 + number % 2, (*NAMED, "kill")[number % 4]
        rank, times = rng.randrange(num_ranks), rng.randrange(1, gathers)
        case = (what, rng.choice(["joint", "led"]), "_value", str(rank), str(times))
        fork_ranks(directory / f"{number}", num_ranks, *case)
        told = [read(directory / f"{number}", r) for r in range(num_ranks)]
        if what == "kill":
            assert not told[rank]
            told.pop(rank)
        found = {(one.get("error"), one.get("rank")) for one in told}
        longest = max(one.get("seconds", float("inf")) for one in told)
        right = found == {(NAMED[what], rank)} and longest <= LONGEST_SECONDS
        ended["named in time" if right else "otherwise"] += 1
        print(num_ranks, "ranks,", *case, sorted(found, key=str), f"{longest:.1f} s", flush=True)
    print(dict(ended))
    return ended


def main(directory: str, *cases: str) -> None:
    for case in cases:
        if case.startswith("loop "):
            if loop(Path(directory), int(case.split()[1]))["otherwise"]:
                sys.exit("a rank that failed in a gather was not named in time")
            continue
        num_ranks = 2 if case == "raise" else 3
        fork_ranks(Path(directory) / case, num_ranks, *case.split())


if __name__ == "__main__":
    main(*sys.argv[1:])
