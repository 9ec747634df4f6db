"""Several engines synced as one: what is shared, who is left behind, who is refused.

No vLLM and no Ray: engines that load nothing, behind the real connections, in this process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import torch
from support.errors import raises
from support.loaders import HashedSource, TensorSource, tensors
from support.servers import wait_until

from qerl_sync import ConfigError, SyncConfig, SyncSession, TransportError
from qerl_sync.bench.echo import EchoLoader, hello
from qerl_sync.bench.echo import checksum as crc32
from qerl_sync.engines.base import EngineClient
from qerl_sync.errors import (
    AgreementError,
    CoverageError,
    EngineTakenError,
    NoRoomError,
    PlanError,
    StaleBaseError,
    SyncError,
)
from qerl_sync.transports.remote import pool as pool_module
from qerl_sync.transports.remote.pool import PoolTransport
from qerl_sync.transports.remote.transport import RemoteTransport
from qerl_sync.verify.probe_prompt import Probe
from qerl_sync.wire import segments
from qerl_sync.worker.protocol import mailbox as mailbox
from qerl_sync.worker.protocol.session import WorkerSession

WEIGHTS = tensors(0)


class Store:
    """What a cluster shares: counts what is put."""

    def __init__(self) -> None:
        self.puts: list[int] = []

    def put(self, chunk: torch.Tensor) -> Any:
        self.puts.append(chunk.nbytes)
        threading.Event().wait(0.05)  # long enough for all peers to ask
        return chunk.numpy().copy()


class Engine(EngineClient):
    """An engine client and its worker."""

    started: ClassVar[list[Engine]] = []

    def __init__(self, store: Store | None = None, **reported: Any) -> None:
        self.cluster = store
        self.fails: dict[str, Exception] = {}
        self.endpoints: list[str] = []

        def introduce() -> Any:
            return hello().model_copy(update=reported)

        self.started.append(self)
        self.loader = EchoLoader()
        self.connection = WorkerSession(self.loader, torch.device("cpu"), introduce)

    def init_weight_transfer_engine(self, call: dict[str, Any]) -> None:
        self.endpoints += call["endpoints"]
        self.connection.open(call)

    def start_weight_update(self) -> None:
        if "start" in self.fails:
            raise self.fails["start"]

    def update_weights(self, call: dict[str, Any]) -> None:
        self.connection.serve(call)

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class ProbedEngine(Engine):
    """Says of each token of a prompt what it is told to."""

    says: float | Exception = 0.0

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        if isinstance(self.says, Exception):
            raise self.says
        return [self.says] * (len(token_ids) - 1)


class StoringEngine(Engine):
    @property
    def store(self):
        return self

    def put(self, chunk: torch.Tensor) -> Any:
        assert self.cluster is not None
        return self.cluster.put(chunk)

    def deliver(self, key: str, index: int, stored: Any) -> None:
        assert mailbox.put(key, index, stored)

    def require_store(self, nbytes: int) -> None: ...

    def require_mailbox(self, key: str) -> None: ...


@pytest.fixture(autouse=True)
def _engines_end() -> Iterator[None]:
    yield
    while Engine.started:
        Engine.started.pop().connection.close()


def session_of(pool: PoolTransport, **options: Any) -> SyncSession:
    return SyncSession(TensorSource(WEIGHTS), pool, SyncConfig.of(chunk_bytes=900, **options))


def pool_of(*engines: Engine, **options: Any) -> PoolTransport:
    pool = PoolTransport(timeout_seconds=20.0, **options)
    for number, engine in enumerate(engines):
        pool.add(f"engine-{number}", engine)
    return pool


def test_each_chunk_is_put_into_the_store_once_for_all_engines():
    store = Store()
    with session_of(pool_of(*[StoringEngine(store) for _ in range(3)], transport="ray")) as session:
        report = session.push()
    assert len(report.workers) == 3
    assert not report.lost
    assert len(store.puts) == report.num_chunks > 1


def test_the_store_is_tried_where_shared_memory_fails_on_the_same_host(monkeypatch):
    def missing(self: Any, name: str, nbytes: int) -> None:
        raise TransportError(f"there is no segment {name} here")

    monkeypatch.setattr(segments.AttachedSegment, "__init__", missing)
    store = Store()
    with session_of(pool_of(StoringEngine(store), transport="auto")) as session:
        report = session.push()
    assert report.transport.startswith("ray: shared memory does not work: worker 0")
    assert store.puts


def named_segments() -> set[str]:
    return {path.name for path in segments.DIRECTORY.glob(f"{segments.PREFIX}{os.getpid()}-*")}


def test_between_two_syncs_no_memory_has_a_name_that_a_killed_trainer_would_leave():
    before = named_segments()
    pool = pool_of(Engine())
    with session_of(pool, verify="checksum") as session:
        assert session.push().transport.startswith("shm")
        assert named_segments() == before
        pool.add("late", Engine())  # cannot attach what has no name
        for _ in range(2):
            report = session.push()
            assert (len(report.workers), report.lost) == (2, {})
            assert named_segments() == before
        pool._members["late"].transport.workers[0].close()
        session.push()
        assert named_segments() == before
        report = session.push()
        assert (len(report.workers), report.lost) == (2, {})


def test_an_engine_that_raises_what_nobody_expects_is_left_behind_alone():
    odd = Engine()
    pool = pool_of(Engine(), odd)
    with session_of(pool) as session:
        session.push()
        odd.fails["start"] = AttributeError("no such engine")
        report = session.push()
        assert len(report.workers) == 1
        assert report.lost == {"engine-1": "AttributeError: no such engine"}
        pool._members["engine-1"].is_up = lambda: False
        away = "not up again since version 1: AttributeError: no such engine"
        assert session.push().lost == {"engine-1": away}


def test_an_engine_with_another_quantisation_is_named_before_the_first_sync():
    with (
        session_of(pool_of(Engine(), Engine(quantization="fp8"))) as session,
        raises(AgreementError, subject="quantization"),
    ):
        session.push()


def test_one_that_joins_with_another_dtype_is_left_behind():
    pool = pool_of(Engine())
    with session_of(pool) as session:
        session.push()
        pool.add("late", Engine(dtype="float16"))
        report = session.push()
    assert "engine late) 'float16'" in report.lost["late"]
    assert len(report.workers) == 1


def test_workers_that_connect_later_are_told_the_address_of_then():
    address = ["127.0.0.1"]
    first, late, back = Engine(), Engine(), Engine()
    pool = pool_of(first, back, address=lambda: address[0])
    with session_of(pool) as session:
        session.push()
        address[0] = "127.0.0.2"
        pool.add("late", late)
        pool.forget("engine-1", "it was restarted")
        while pool.versions["engine-1"] != session.version:
            session.push()
    assert [e.rpartition(":")[0] for e in first.endpoints] == ["127.0.0.1"]
    assert [e.rpartition(":")[0] for e in late.endpoints] == ["127.0.0.2"]
    assert [e.rpartition(":")[0] for e in back.endpoints] == ["127.0.0.1", "127.0.0.2"]


def test_each_engine_is_told_a_port_of_its_own_from_the_first_that_may_be_used():
    for port in range(20_000, 30_000, 2):  # two that are free, below those that are given out
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            socket.create_server(("127.0.0.1", port + 1)).close()
            break
    engines = Engine(), Engine()
    with session_of(pool_of(*engines, first_port=port)) as session:
        session.push()
    reported = [engine.endpoints for engine in engines]
    assert reported == [[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]


def test_without_room_in_shared_memory_all_engines_get_chunks_another_way(monkeypatch):
    from qerl_sync.wire import segments

    monkeypatch.setattr(segments, "free_bytes", lambda: 100)
    pool = pool_of(Engine(), Engine(), StoringEngine(Store()))
    with session_of(pool) as session:
        for version in (1, 2):
            report = session.push()
            assert report.version == version
            assert not report.lost
            ways = {name: m.transport.kinds for name, m in pool._members.items()}
            assert ways == {"engine-0": {"tcp"}, "engine-1": {"tcp"}, "engine-2": {"ray"}}


def test_shared_memory_that_was_asked_for_and_is_too_small_is_refused_for_all(monkeypatch):
    from qerl_sync.wire import segments

    monkeypatch.setattr(segments, "free_bytes", lambda: 100)
    with (
        session_of(pool_of(Engine(), Engine(), transport="shm")) as session,
        pytest.raises(NoRoomError) as caught,
    ):
        session.push()
    assert caught.value.free_bytes == 100 < caught.value.needed_bytes


# ---- the engines' answers to a prompt


def probing(pool: PoolTransport) -> SyncSession:
    """By a trainer that gives every token a probability of 1."""
    probe = Probe((1, 2, 3), lambda ids: [0.0] * (len(ids) - 1))
    config = SyncConfig.of(chunk_bytes=900, verify="full")
    return SyncSession(TensorSource(WEIGHTS), pool, config, probe=probe)


def test_every_engine_is_asked_and_the_one_that_differs_is_named():
    right, wrong = ProbedEngine(dtype="float32"), ProbedEngine(dtype="float32")
    pool = pool_of(right, wrong)
    with probing(pool) as session:
        wrong.says = -1e-6
        assert session.push().probe_gap == 1e-6
        wrong.says = -0.5
        with raises(CoverageError, engine="engine-1", gap=0.5):
            session.push()
        assert pool.versions == {"engine-0": 0, "engine-1": 0}
        wrong.says = 0.0
        report = session.push()
        assert not report.lost
        assert pool.versions == dict.fromkeys(pool.versions, report.version)


def test_an_engine_that_does_not_answer_a_prompt_is_left_behind():
    mute = ProbedEngine(dtype="float32")
    pool = pool_of(ProbedEngine(dtype="float32"), mute)
    with probing(pool) as session:
        mute.says = TransportError("it does not answer")
        poisoned: list[str] = []
        mute.loader.poison = poisoned.append
        report = session.push()
        assert report.lost == {"engine-1": "it does not answer"}
        assert pool.versions == {"engine-0": 1, "engine-1": 0}
        # It has the new weights, and nobody knows whether it computes with them as the trainer.
        assert wait_until(lambda: pool._members["engine-1"].idle)
        assert (poisoned, pool.num_poisoned) == (["it does not answer"], 1)
        mute.says = 0.0
        assert not session.push().lost


def test_engines_that_cannot_be_asked_are_no_right_ones():
    with (
        probing(pool_of(Engine(dtype="float32"))) as session,
        pytest.raises(ConfigError),
    ):
        session.push()


# ---- another trainer


def test_a_second_pool_is_refused_by_the_engines_of_the_first(monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "that both know")
    engines = Engine(), Engine()
    with session_of(pool_of(*engines)) as first, session_of(pool_of(*engines)) as second:
        first.push()
        with pytest.raises(EngineTakenError) as refused:
            second.push()
        assert refused.value.pid == os.getpid()
        assert first.push().version == 2
        assert not first.push().lost
        first.close()
        assert not second.push().lost


def test_a_store_that_takes_no_chunk_leaves_no_worker_waiting_for_it(monkeypatch):
    def full(chunk: torch.Tensor) -> None:
        raise TransportError("the store is full")

    engine = StoringEngine(Store())
    remote = RemoteTransport(engine, transport="ray", timeout_seconds=20.0)
    with SyncSession(TensorSource(WEIGHTS), remote, SyncConfig.of(chunk_bytes=900)) as session:
        session.push()
        with monkeypatch.context() as patched:
            patched.setattr(engine, "put", full)
            started = time.monotonic()
            with pytest.raises(TransportError):
                session.push()
            assert time.monotonic() - started < 4
        session.push()


@pytest.mark.parametrize("error", [SyncError, PlanError])
def test_whatever_fails_on_one_when_others_have_committed_is_its_own(error):
    engines = Engine(), Engine()
    pool = pool_of(*engines)
    with session_of(pool) as session:
        session.push()

        def commit(version: int, *, keep_old: bool) -> bool:
            raise error("no such version")

        engines[1].loader.commit = commit
        report = session.push()
        assert list(report.lost) == ["engine-1"]
        assert pool.versions == {"engine-0": 2, "engine-1": 0}


# ---- a part of the model


class Declaring(TensorSource):
    def unchanging(self):
        return dict.fromkeys(list(self.held)[1:])


def test_all_get_everything_where_one_of_them_is_new():
    pool = pool_of(Engine(instance="a"), Engine(instance="b"))
    config = SyncConfig.of(chunk_bytes=900)
    with SyncSession(Declaring(WEIGHTS), pool, config) as session:
        assert session.push().unsent_tensors == 0
        assert session.push().unsent_tensors == len(WEIGHTS) - 1
        pool.add("engine-2", Engine(instance="c"))
        report = session.push()
        assert (report.unsent_tensors, len(report.workers)) == (0, 3)
        assert session.push().unsent_tensors == len(WEIGHTS) - 1
        # It has the version, and is another model than the one that got it.
        pool.remove("engine-2")
        pool.add("engine-2", Engine(instance="d", version=session.version))
        assert session.push().unsent_tensors == 0


def test_engines_that_have_all_lost_what_stays_get_everything_in_the_same_sync():
    """As one engine does, that a session syncs alone."""
    engines = Engine(instance="a"), Engine(instance="b")
    with SyncSession(Declaring(WEIGHTS), pool_of(*engines), SyncConfig.of(chunk_bytes=900)) as sync:
        sync.push()
        for engine in engines:

            def start(plan, layer_map, options, *, borrowed, own=engine.loader.start):
                if options.base is not None:
                    raise StaleBaseError("it slept", base=options.base, version=1)
                own(plan, layer_map, options, borrowed=borrowed)

            engine.loader.start = start
        report = sync.push()
        assert (report.unsent_tensors, report.lost, len(report.workers)) == (0, {}, 2)


# ---- versions


@pytest.mark.parametrize("step", ["complete", "commit"])
def test_ctrl_c_does_not_end_a_sync_beside_the_threads_that_go_on_with_it(monkeypatch, step):
    """On one connection there would be two that send and read."""
    within, beside, interrupted = threading.Event(), [], []
    own, abort = getattr(RemoteTransport, step), RemoteTransport.abort

    def slow(self, *given):
        within.set()
        time.sleep(0.3)
        try:
            return own(self, *given)
        finally:
            within.clear()

    def watched(self, reason):
        beside.append(within.is_set())
        abort(self, reason)

    def wait_or_stop(answers):
        if within.wait(0.1 if interrupted else 0) and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return wait(answers)

    pool = pool_of(Engine())
    with session_of(pool) as session:
        with monkeypatch.context() as patched:
            patched.setattr(RemoteTransport, step, slow)
            patched.setattr(RemoteTransport, "abort", watched)
            patched.setattr(pool_module, "wait", wait_or_stop)
            with pytest.raises(KeyboardInterrupt):
                session.push()
            assert wait_until(lambda: pool._members["engine-0"].idle)
        assert not any(beside)
        assert not session.push().lost
        pool.forget("engine-0", "it died")
        leaving = pool._members["engine-0"].leaving
        pool.remove("engine-0")
        assert not leaving.is_alive()


def test_a_version_below_that_of_a_worker_is_refused_untouched():
    pool = pool_of(Engine(version=10))
    with session_of(pool) as session:
        pool.required_version = 5
        session.version = 4
        with raises(ConfigError, least=11):
            session.push()
        pool.required_version = 12
        session.version = 11
        assert session.push().version == 12


def test_who_is_forgotten_needs_a_full_sync_and_a_stranger_is_no_error():
    pool = pool_of(Engine(), Engine())
    with session_of(pool) as session:
        session.push()
        pool.forget("nobody", "it never was here")
        pool.forget("engine-1", "it died")
        assert pool.versions == {"engine-0": 1, "engine-1": 0}
        pool.forget("engine-0", "it died too")
        assert pool.newest_version == 1


def test_the_cores_of_all_engines_on_this_machine_are_left_to_them():
    reported = ({"cores": [1]}, {"cores": [2, 3]}, {"cores": [4], "host": "far"})
    pool = pool_of(*(Engine(**words) for words in reported))
    with session_of(pool) as session:
        session.push()
        assert pool.busy_cores == {1, 2, 3}
        pool.remove("engine-1")
        session.push()
        assert pool.busy_cores == {1}


def test_an_engine_that_does_not_answer_at_once_is_waited_for():
    """Its first answers that it is up come late, as those of an actor on a busy machine."""
    asked: list[None] = []
    pool = PoolTransport(timeout_seconds=20.0)
    pool.add("slow", Engine(), lambda: len(asked) > 2 or bool(asked.append(None)))
    with session_of(pool) as sync:
        assert sync.push().version == 1
    assert len(asked) == 3


@pytest.mark.parametrize("transport", ["tcp", "ray"])
def test_changed_elements_reach_all_engines_and_a_new_one_has_all_get_everything(transport):
    store = Store()
    weights = {f"layer.{i}": torch.randn(20, 30) for i in range(5)}
    engines = [StoringEngine(store) for _ in range(3)]
    pool = pool_of(*engines[:2], transport=transport)
    config = SyncConfig.of(delta="elements", chunk_bytes=5000)
    with SyncSession(HashedSource(weights), pool, config) as session:
        for engine in engines:
            engine.loader.check = True

        def arrived(*some: StoringEngine) -> bool:
            right = {name: crc32(tensor) for name, tensor in weights.items()}
            return all(engine.loader.checksums == right for engine in some)

        full = session.push()
        assert arrived(*engines[:2])
        for tensor in weights.values():
            tensor[3, 4] += 1
        assert not arrived(engines[0])
        report = session.push()
        assert arrived(*engines[:2])
        assert report.delta == {"sent": "elements", "reason": ""}
        assert report.wire_bytes < full.wire_bytes / 50
        assert {worker["mirror_bytes"] for worker in report.workers} == {report.mirror_bytes}

        pool.add("new", engines[2])
        weights["layer.0"][0, 0] += 1
        report = session.push()
        assert report.delta["sent"] == "everything"
        assert report.delta["reason"]
        assert arrived(*engines)
        for tensor in weights.values():
            tensor[3, 4] += 1
        assert session.push().delta["sent"] == "elements"
        assert arrived(*engines)
