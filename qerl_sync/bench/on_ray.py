"""`qerl-sync bench ray`: syncs of rollout actors, beside loads alone and what Ray itself transfers.

A cluster of two raylets on this machine. The trainer has one of its cores, and the rollout actors
share the others, when they load alone too: what a sync takes longer is then its own. What is
compared runs in turns; medians of the rounds' ratios. The tensors that were timed are checked, in
the engines' kernels and in the bytes.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qerl_sync.bench.echo import EchoLoader, checksums, hello
from qerl_sync.bench.engines import CALL_SECONDS, RPCActor
from qerl_sync.bench.extension import ENGINE_ARGUMENTS
from qerl_sync.bench.transport import (
    UNCHECKED,
    Results,
    Rounds,
    Target,
    check_kernels,
    make_model,
    save,
)
from qerl_sync.config import SyncConfig
from qerl_sync.engines.environment import changed_environment
from qerl_sync.errors import SyncError, TransportTimeout
from qerl_sync.integrations.ray.actors import CONTROL
from qerl_sync.integrations.ray.cluster import connect, require_ray
from qerl_sync.integrations.ray.pool import WorkerPool
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import HFSource
from qerl_sync.wire.host import own_cores
from qerl_sync.worker.protocol import mailbox

SECOND = {"second": 1}
COMMIT_SECONDS = 3.0


@dataclass
class RayMeasured(Results):
    """Results of `qerl-sync bench ray`; `workers`: the numbers of rollout actors."""

    workers: tuple[int, ...] = ()

    @property
    def targets(self) -> list[Target]:
        found = [
            Target(f"sync / {n} loads alone", self.ratios[f"sync of {n} / load"], 1.25, True)
            for n in self.workers
        ]
        return [
            *found,
            Target("put and get / sync, bandwidth", self.ratios["put and get / sync"], 0.7, False),
            Target("kill to commit, s", self.seconds["kill to commit"], COMMIT_SECONDS, True),
        ]


class BenchActor(RPCActor):
    """Run a rollout actor on all cores but one, which the trainer has."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        cores = sorted(own_cores())[:-1]
        # Each thread: Ray has started some, which keep the cores that they began with.
        for thread in os.listdir("/proc/self/task") if cores else ():
            os.sched_setaffinity(int(thread), cores)
        super().__init__(*arguments, **options)


class EchoActor:
    """Connect like a worker, with the real session and chunk receivers, and load nothing."""

    def __init__(self) -> None:
        from qerl_sync.worker.protocol.session import WorkerSession

        self._loader = EchoLoader()
        self._connection = WorkerSession(self._loader, torch.device("cpu"), hello)

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self._connection.open(request["init_info"])

    def start_weight_update(self) -> None: ...

    def update_weights(self, request: dict[str, Any]) -> None:
        self._connection.serve(request["update_info"])

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def pause(self, mode: str) -> None: ...

    def resume(self) -> None: ...

    def reset_caches(self, running: bool) -> bool:
        return True

    def deliver(self, key: str, index: int, chunk: Any) -> bool:
        return mailbox.put(key, index, chunk)

    def check(self, wanted: bool) -> dict[str, int]:
        """Switch checksums on or off. Return those of the last sync."""
        self._loader.check = wanted
        return self._loader.checksums

    def take(self, array: Any) -> int:
        """Map an object of the store; read its first and last byte."""
        return int(array[0]) + int(array[-1])


def measure(
    config: Path,
    *,
    rounds: int = 5,
    workers: Sequence[int] = (1, 2, 3),
    note: Callable[[str], None] = lambda text: None,
) -> RayMeasured:
    """Measure for a model of this shape, with random weights in bfloat16.

    Raises:
        SyncError: a sync failed, or a tensor that was timed is not what it should be.
    """
    found = RayMeasured(rounds=rounds, workers=tuple(workers))
    clock = Rounds()
    with tempfile.TemporaryDirectory(prefix="qerl_sync-bench-") as directory:
        note("making the model")
        model = make_model(config)
        found.nbytes = sum(meta.nbytes for meta in HFSource(model).metadata())
        checkpoint = save(model, directory)
        note("starting Ray")
        with two_nodes(2 * found.nbytes + (256 << 20)), ExitStack() as stack:
            note("across nodes")
            _across(clock, model, rounds)
            note("starting vLLM")
            engine = {**ENGINE_ARGUMENTS, "model": directory}
            pool = WorkerPool.start(max(workers), engine, actor=BenchActor)
            stack.callback(pool.stop)
            note("syncs")
            _syncs(clock, pool, model, checkpoint, workers, rounds)
            note("a kill")
            _kill(clock, pool, model)
    found.seconds = clock.medians()
    for n in workers:
        found.ratios[f"sync of {n} / load"] = clock.ratio(f"sync of {n}", f"{n} loads alone")
    found.ratios["put and get / sync"] = clock.ratio("put and get", "sync across nodes")
    return found


@contextmanager
def two_nodes(object_store_bytes: int) -> Iterator[None]:
    """Start two raylets on this machine; the second has the resource `second`."""
    ray = require_ray()
    from ray.cluster_utils import Cluster

    # Ray's sockets live under it, and their paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="q", dir="/tmp") as short,
        changed_environment({"RAY_TMPDIR": short}),
    ):
        (Path(short) / "ray").mkdir()
        cluster = Cluster()
        common = {"num_cpus": 8, "object_store_memory": object_store_bytes}
        try:
            cluster.add_node(include_dashboard=False, **common)
            cluster.add_node(resources=SECOND, **common)
            connect(cluster.address, log_to_driver=False, logging_level="ERROR")
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def _across(clock: Rounds, model: torch.nn.Module, rounds: int) -> None:
    """Measure syncs through the object store of two nodes, and a put and get of as many bytes."""
    ray = require_ray()
    remote = ray.remote(num_cpus=1, resources=SECOND, concurrency_groups={CONTROL: 2})
    actor = remote(EchoActor).remote()
    source = HFSource(model)
    array = torch.ones(sum(m.nbytes for m in source.metadata()), dtype=torch.uint8).numpy()
    with _session(WorkerPool({"echo": actor}), source, transport="ray", **UNCHECKED) as session:
        ray.get(actor.check.remote(True), timeout=CALL_SECONDS)
        session.push()
        if ray.get(actor.check.remote(False), timeout=CALL_SECONDS) != checksums(source):
            raise SyncError("the bytes that arrived across nodes are not those that were sent")
        for _ in range(rounds):
            started = time.perf_counter()
            ray.get(actor.take.remote(ray.put(array)), timeout=CALL_SECONDS)
            clock.add("put and get", time.perf_counter() - started)
            clock.add("sync across nodes", session.push().seconds["total"])
    ray.kill(actor)


def _syncs(
    clock: Rounds,
    pool: WorkerPool,
    model: torch.nn.Module,
    checkpoint: str,
    workers: Sequence[int],
    rounds: int,
) -> None:
    source = HFSource(model)
    order = [meta.name for meta in source.metadata()]
    fresh = _call(pool, "bench_kernels")
    for n in workers:
        some = WorkerPool(dict(list(pool.handles.items())[:n]))
        load_alone = partial(_call, some, "bench_load_alone", checkpoint, order)
        kernels = partial(_call, some, "bench_kernels")
        with _session(some, source) as session:
            check_kernels(f"{n} actors", session, model, kernels, fresh[:n])
            load_alone()  # the first reads the checkpoint
            for _ in range(rounds):
                clock.add(f"{n} loads alone", max(load_alone()))
                clock.add(f"sync of {n}", session.push().seconds["total"])


def _call(pool: WorkerPool, method: str, *args: Any) -> list[Any]:
    """Call the method on the worker of each actor, all at a time. Return the answers."""
    calls = [actor.call.remote(method, args) for actor in pool.handles.values()]
    return [answer for (answer,) in require_ray().get(calls, timeout=CALL_SECONDS)]


def _kill(clock: Rounds, pool: WorkerPool, model: torch.nn.Module) -> None:
    """Kill an actor in the middle of a sync; check that it comes back with the right weights."""
    with _session(pool, HFSource(model)) as session:
        before = session.push()
        pid = pool.wait()["rollout-0"]["pid"]
        killed: list[float] = []

        def kill() -> None:
            os.kill(pid, signal.SIGKILL)
            killed.append(time.perf_counter())

        def push_until(wanted: Callable[[SyncReport], bool]) -> SyncReport:
            deadline = time.monotonic() + CALL_SECONDS
            while not wanted(report := session.push()):
                if time.monotonic() > deadline:
                    raise TransportTimeout(
                        f"the killed actor was not lost and back within {CALL_SECONDS:.0f} s; look "
                        "at Ray's log of the actor"
                    )
            return report

        threading.Timer(before.seconds["total"] / 2, kill).start()
        push_until(lambda report: bool(killed) and "rollout-0" in report.lost)
        clock.add("kill to commit", time.perf_counter() - killed[0])
        pool.wait()
        clock.add("kill to restart", time.perf_counter() - killed[0])
        last = push_until(lambda report: not report.lost)
        clock.add("kill to right again", time.perf_counter() - killed[0])
        held = _call(pool, "bench_kernels")
        if any(other != held[0] for other in held) or set(pool.versions.values()) != {last.version}:
            raise SyncError("the restarted actor does not hold the weights that were sent")


def _session(pool: WorkerPool, source: HFSource, **options: Any) -> SyncSession:
    config = SyncConfig.of(timeout_seconds=120, **options)
    return SyncSession(source, pool.transport(config), config)
