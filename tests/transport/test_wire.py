"""The connection between trainer and workers: who gets in, what is believed, what is left behind.

No vLLM: the workers are those of `support.loaders`."""

from __future__ import annotations

import hmac
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from support.errors import raises
from support.loaders import (
    CALLER,
    NEW,
    OLD,
    TIMEOUT_SECONDS,
    HashedSource,
    KeepingLoader,
    TensorSource,
    Workers,
    lets_in,
    serves,
    session,
    tensors,
)
from support.servers import wait_until

import qerl_sync
from qerl_sync import (
    ConfigError,
    RemoteTransport,
    SyncConfig,
    SyncSession,
    TransportError,
    share_parameters,
)
from qerl_sync.build import remote_transport
from qerl_sync.engines.base import EngineClient
from qerl_sync.errors import (
    AgreementError,
    CoverageError,
    EngineTakenError,
    LoadError,
    NoRoomError,
    PeerLostError,
    PlanError,
    SyncError,
    TransportTimeout,
    WorldSizeError,
)
from qerl_sync.plan.staging import touched_bytes
from qerl_sync.serving.processes import descendants
from qerl_sync.transports.remote import compatibility as agreement
from qerl_sync.transports.remote import control, transport
from qerl_sync.transports.remote.connection import WorkerConnection
from qerl_sync.transports.remote.staging import Staging
from qerl_sync.wire import connection as wire
from qerl_sync.wire import endpoints, segments, tokens
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.endpoints import Listener, connect
from qerl_sync.wire.segments import AttachedSegment, SharedSegment, remove_abandoned
from qerl_sync.wire.tokens import HANDSHAKE_SECONDS, new_token, proof

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    own = f"*{segments.PREFIX}{os.getpid()}-*"
    before = set(segments.DIRECTORY.glob(own))
    yield
    assert set(segments.DIRECTORY.glob(own)) <= before


class CountedWorkers(Workers, EngineClient):
    """An engine that may say how many workers it has: its `world_size` is set."""


class Half(TensorSource):
    """What one of two trainer ranks holds, of tensors that both know."""

    def __init__(self, rank: int, checks_finite: bool) -> None:
        super().__init__(NEW)
        self._names = list(NEW)[rank::2]
        self.checks_finite = checks_finite

    def held_names(self):
        return self._names

    def check_finite(self, names=None, *, alone=True):
        assert set(names) <= set(self._names)


# --------------------------------------------------------------------------- the way it should go


@pytest.mark.parametrize("carrier", ["shm", "tcp", "auto"])
@pytest.mark.parametrize("chunks_in_flight", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 3])
def test_every_rank_gets_everything(workers, number, chunks_in_flight, carrier):
    engine = workers(number)
    with session(engine, transport=carrier, chunks_in_flight=chunks_in_flight) as sync:
        for version in (1, 2):
            report = sync.push()
            assert serves(engine, NEW)
            assert report.version == version
            assert report.prediction_exact
            assert len(report.workers) == number
            assert report.num_chunks == len(NEW)
    with session(engine, OLD, transport=carrier, chunk_bytes="1MiB") as sync:
        assert sync.push().version == 3
    assert serves(engine, OLD)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_the_trainer_waits_for_a_slow_worker(workers, carrier):
    engine = workers()
    loaded, ahead = [], []
    engine.loaders[0].before_load = lambda: (time.sleep(0.02), loaded.append(1))
    with session(engine, tensors(1, count=12), transport=carrier, chunks_in_flight=3) as sync:
        gather = sync._source.materialize

        def watched(names):
            ahead.append(len(ahead) - len(loaded))
            yield from gather(names)

        sync._source.materialize = watched
        sync.push()
    assert max(ahead) == 2  # and the one that is being gathered: three


@pytest.mark.parametrize(
    ("sizes", "chunks_in_flight", "in_place", "mapped"),
    [
        ([5, 1, 2, 9], 2, False, [6, 6, 14, 14]),
        ([5, 1], 3, False, [6, 6]),
        ([3, 4, 5], 1, True, [3, 7, 12]),
        ([3, 4, 5], 2, True, [7, 12, 12]),
        ([], 2, False, []),
    ],
)
def test_a_worker_has_mapped_what_it_reads_ahead(sizes, chunks_in_flight, in_place, mapped):
    assert touched_bytes(sizes, chunks_in_flight, [in_place] * len(sizes)) == mapped


def test_other_shapes_get_other_slots(workers):
    engine = workers()
    with session(engine, transport="shm") as sync:
        for numel in (10, 5000, 50):
            sync._source.held = tensors(1, numel=numel)
            sync.push()
            assert serves(engine, sync._source.held)


def test_parameters_in_shared_memory_are_not_copied(workers):
    engine = workers(2)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    parameters = share_parameters(model)
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    names = lambda: {p.name for p in segments.DIRECTORY.glob(f"*-{os.getpid()}-*")}  # noqa: E731
    with closing(parameters), session(engine, held, transport="shm") as sync:
        seen = []
        engine.loaders[0].before_load = lambda: seen.append(names())
        sync.push()
        assert seen
        assert all(found == {parameters.name} for found in seen)
        assert serves(engine, held)


@pytest.mark.parametrize(
    ("looks", "finite_check"),
    [((True, True), "source"), ((True, False), "worker"), ((False, True), "worker")],
)
def test_workers_look_for_nan_unless_every_trainer_rank_has(
    workers, monkeypatch, looks, finite_check
):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "0" * 32)
    engine = workers(2)
    with (
        closing(socket.create_server((HOST, 0))) as one,
        closing(socket.create_server((HOST, 0))) as other,
    ):
        endpoints = [f"{HOST}:{it.getsockname()[1]}" for it in (one, other)]

    def push(rank: int) -> None:
        transport = RemoteTransport(
            None if rank else engine,
            endpoints=endpoints,
            rank=rank,
            num_workers=2,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        config = SyncConfig.of(chunk_bytes=500, timeout_seconds=TIMEOUT_SECONDS)
        with SyncSession(Half(rank, looks[rank]), transport, config) as sync:
            sync.push()

    with ThreadPoolExecutor() as ranks:
        for done in [ranks.submit(push, rank) for rank in (0, 1)]:
            done.result()
    assert serves(engine, NEW)
    assert {loader.options.finite_check for loader in engine.loaders} == {finite_check}


# -------------------------------------------------------------------------------------- strangers


def silent(stranger):
    """Connects and says nothing."""


def no_token(stranger):
    stranger.sendall(bytes(32) + hmac.new(b"", b"worker" + bytes(64), "sha256").digest())


def garbage(stranger):
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: trainer\r\n\r\n" * 20)


def huge(stranger):
    stranger.sendall(struct.pack("!Q", 1 << 62) + bytes(1 << 16))


def reflected(stranger):
    """Sends the trainer's own proof back to it."""
    stranger.sendall(bytes(32))
    reported = stranger.recv(64, socket.MSG_WAITALL)
    stranger.sendall(reported[32:])


def hung_up(stranger) -> bool:
    try:
        while stranger.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("approach", [silent, no_token, garbage, huge, reflected])
def test_strangers_get_nothing_and_delay_nobody(listener, approach):
    with socket.create_connection((HOST, listener.port)) as stranger:
        stranger.settimeout(HANDSHAKE_SECONDS * 3)
        approach(stranger)
        assert lets_in(listener)
        assert listener.accept(0.1) is None
        assert approach is silent or hung_up(stranger)


def test_a_wrong_token_is_refused_on_both_sides(listener):
    with raises(AgreementError, subject="token"):
        connect(HOST, listener.port, "another", 5)
    assert listener.accept(0.1) is None
    assert lets_in(listener)


def test_a_worker_does_not_believe_a_listener_without_the_token():
    with Opened() as (port, accepted):
        thread = threading.Thread(target=lambda: accepted().sendall(bytes(64)))
        thread.start()
        with raises(AgreementError, subject="token"):
            connect(HOST, port, "secret", 5)
        thread.join()


def test_a_listener_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(tokens, "HANDSHAKE_SECONDS", 0.2)
    with Opened() as (port, _), pytest.raises(TransportTimeout):
        connect(HOST, port, "secret", 5)


class Opened:
    """A port at which anybody listens."""

    def __enter__(self):
        self.server = socket.create_server((HOST, 0))
        self.connections = []
        return self.server.getsockname()[1], self._accept

    def _accept(self):
        self.connections.append(self.server.accept()[0])
        return self.connections[-1]

    def __exit__(self, *exc):
        for one in (*self.connections, self.server):
            one.close()


def unused_port() -> int:
    with Opened() as (port, _):
        return port


def test_nobody_listens():
    port = unused_port()
    with pytest.raises(PeerLostError) as caught:
        connect(HOST, port, "secret", 0.3)
    assert f"{HOST}:{port}" in str(caught.value)


def test_a_worker_does_not_wait_long_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(endpoints, "REFUSED_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(PeerLostError):
        connect(HOST, unused_port(), "secret", 300)
    assert time.monotonic() - started < 5


def test_a_listener_that_opens_late_is_found():
    """As those of the trainer's other ranks may."""
    port, opened = unused_port(), []

    def open_late() -> None:
        time.sleep(0.5)
        opened.append(Listener(HOST, port, "secret"))

    thread = threading.Thread(target=open_late)
    thread.start()
    with connect(HOST, port, "secret", 10):
        thread.join()
    opened[0].close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 300, "\u0130" * 70])
def test_a_name_that_nobody_has_is_not_tried_again(host):
    started = time.monotonic()
    with pytest.raises(PeerLostError):
        connect(host, 80, "secret", 300)
    assert time.monotonic() - started < 5


def test_a_port_in_use_is_named(workers):
    with Opened() as (port, _), pytest.raises(TransportError, match=f"listen on {HOST}:{port}"):
        Listener(HOST, port, "secret")


def pair(listener: Listener) -> tuple[Connection, Connection]:
    worker = connect(HOST, listener.port, "secret", 5)
    trainer = listener.accept(5)
    assert trainer is not None
    return trainer, worker


def send_raw(end: Connection, frame: bytes) -> None:
    tag = end._own_tags.next(frame)
    end._connection.send(struct.pack("!Q", len(tag) + len(frame)) + tag + frame)


def test_frames_that_cannot_be_are_refused(listener):
    trainer, worker = pair(listener)
    with trainer, worker:
        send_raw(worker, b'{"type": "hello"}')
        with pytest.raises(TransportError):
            trainer.receive(5, "")
        send_raw(worker, b"\x80\x04N.")  # a pickle
        with pytest.raises(TransportError):
            trainer.receive(5, "")
        worker._connection.send(struct.pack("!Q", 1 << 40))
        with pytest.raises(TransportError):
            trainer.receive(5, "")


def test_waits_end(listener):
    trainer, worker = pair(listener)
    with trainer, worker:
        with pytest.raises(TransportTimeout):
            trainer.receive(0.2, "a word")
        with pytest.raises(TransportTimeout):
            trainer.send(say.Abort(reason="x" * (64 << 20)), 0.3)  # nobody reads
        # Half of a message has left: a second one would be taken for the rest of it.
        started = time.monotonic()
        with pytest.raises(PeerLostError):
            trainer.send(say.End(), 5)
        assert time.monotonic() - started < 1
        with pytest.raises(PeerLostError):
            worker.receive(5, "a word")
    trainer, worker = pair(listener)
    with trainer:
        worker.close()
        with pytest.raises(PeerLostError):
            trainer.receive(5, "a word")


# ---------------------------------------------------------------------------- the engine's routes


def call_of(engine, what):
    return next(info for name, info in reversed(engine.calls) if name == what)


def test_calls_that_do_not_come_from_the_trainer_change_nothing(workers):
    engine = workers(2)
    with raises(AgreementError, subject="session"):
        engine.update_weights({"number": 1, "proof": ""})
    with session(engine) as sync:
        sync.push()
        first = call_of(engine, "update")
        with raises(AgreementError, subject="call"):
            engine.update_weights(first)
        for wrong in ({"number": first["number"] + 1}, {"proof": "pr\u00fcf"}):
            with raises(AgreementError, subject="token"):
                engine.update_weights({**first, **wrong})
        for garbage in ({}, {"number": "x", "proof": "y"}, {**first, "path": "/etc/passwd"}):
            with raises(AgreementError, subject="call"):
                engine.update_weights(garbage)
        sync.push()
    assert serves(engine, NEW)


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"token": ""}, "token"),
        ({"token": "another"}, "token"),
        ({"proof": "00"}, "token"),
        ({"proof": "pr\u00fcf"}, "token"),
        ({"proof": "\ud800"}, "token"),
        ({"token": "\ud800"}, "token"),
        ({"endpoints": ["10.0.0.1:80"]}, "token"),
        ({"endpoints": []}, "call"),
        ({"endpoints": "127.0.0.1:1"}, "call"),
        ({"timeout_seconds": -1}, "call"),
        ({"more": 1}, "call"),
    ],
)
def test_garbage_in_the_first_call_does_not_disturb_who_is_connected(workers, change, subject):
    engine = workers()
    with session(engine) as sync:
        sync.push()
        with raises(AgreementError, subject=subject):
            engine.init_weight_transfer_engine({**call_of(engine, "init"), **change})
        engine.calls = engine.calls[:1]
        sync.push()
    assert serves(engine, NEW)


@pytest.mark.parametrize(
    "endpoint",
    ["", "x", "host:", ":80", "host:0", "host:65536", "host:8e3", "host:-1", "host:" + "9" * 5000],
)
def test_endpoints_are_addresses(workers, endpoint):
    engine, token = workers(), new_token()
    with raises(AgreementError, subject="endpoint"):
        engine.init_weight_transfer_engine(
            {
                "endpoints": [endpoint],
                "token": token,
                "proof": proof(token, "init", endpoint),
                "session": CALLER,
            }
        )


@pytest.mark.parametrize("token", ["", "that both know"])
def test_a_second_trainer_waits_for_the_first(workers, monkeypatch, token):
    monkeypatch.setenv("QERL_SYNC_TOKEN", token)
    engine = workers(2)
    with session(engine) as first, session(engine, OLD) as second:
        first.push()
        with pytest.raises(EngineTakenError) as refused:
            second.push()
        held = first._transport._session
        found = {name: getattr(refused.value, name) for name in ("host", "pid", "since")}
        assert found == held.facts()
        assert found["pid"] == os.getpid()
        assert serves(engine, NEW)
        assert first.push().version == 2, "it is connected as before"
        first.close()
        assert second.push().version == 3
    assert serves(engine, OLD)


def test_a_dead_trainer_is_followed_by_the_next_and_finds_it_there(workers, monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "that both know")
    engine = workers()
    with session(engine) as first, session(engine, OLD) as second:
        first.push()
        for peer in first._transport.workers:
            peer.close()
        assert second.push().version == 2
        with pytest.raises(EngineTakenError):
            first.push()
        assert serves(engine, OLD)


def test_a_worker_tells_the_caller_when_its_trainer_is_gone_before_it_asked_for_anything(workers):
    """It has not been synced; a call that returns would say that it has."""
    engine = workers(2)
    with session(engine) as sync:
        sync.push()
        peers = sync._transport.workers
        (lost,) = [peer for peer in peers if peer.hello.rank == 1]
        peers.remove(lost)
        lost.close()
        with pytest.raises(TransportError):
            sync.push()
        assert [loader.version for loader in engine.loaders] == [2, 1], "the call alone knew"
        assert sync.push().version == 3
        assert [loader.version for loader in engine.loaders] == [3, 3]


# ----------------------------------------------------------------- who an engine's workers are


def replicas(**reported):
    """What two data parallel replicas say: each is rank 0 of its own, by the engine's name."""
    alone = {"rank": 0, "world_size": 1, "layout": {"tensor_parallel_size": 1}}
    return {
        "rank0": {**alone, "replica": 0},
        "rank1": {**alone, "replica": 1, "pid": 1, **reported},
    }


def test_data_parallel_replicas_are_workers_of_their_own(workers):
    engine = workers(2, **replicas())
    with session(engine) as sync:
        report = sync.push()
    assert len(report.workers) == 2
    assert len({worker["worker"] for worker in report.workers}) == 2
    assert serves(engine, NEW)


def test_two_processes_in_one_place_are_refused(workers):
    engine = workers(2, **replicas(replica=0))
    with session(engine) as sync, pytest.raises(AgreementError):
        sync.push()
    assert serves(engine, OLD)
    assert [loader.started for loader in engine.loaders] == [0, 0]


@pytest.mark.parametrize("size", [1, 3])
def test_as_many_workers_as_the_engine_has_must_connect(workers, size):
    engine = workers(2, CountedWorkers, **replicas())
    engine.world_size = lambda: size
    with session(engine) as sync:
        with pytest.raises(WorldSizeError) as refused:
            sync.push()
        assert (refused.value.connected, refused.value.expected) == (2, size)
        assert serves(engine, OLD)
        engine.world_size = lambda: 2
        sync.push()
    assert serves(engine, NEW)


def test_a_server_with_a_part_of_the_replicas_counts_those_of_the_others_too(workers):
    engine = workers(1, CountedWorkers, rank0={"server_is_partial": True})
    engine.world_size = lambda: 4
    with session(engine) as sync:
        assert [sync.push().version for _ in range(2)] == [1, 2]
    assert len(engine.calls_of("init")) == 1


def test_a_replica_that_joins_between_two_syncs_takes_part_in_the_next(workers):
    engine = workers(1, CountedWorkers)
    joined = workers(1, rank0={"replica": 1, "pid": 1})
    engine.world_size = lambda: len(engine.connections)
    with session(engine) as sync:
        sync.push()
        engine.connections += joined.connections
        report = sync.push()
        assert report.version == 2
        assert len(report.workers) == 2
        assert len(engine.calls_of("init")) == 2
        sync.push()
        assert len(engine.calls_of("init")) == 2, "it is connected"
    assert serves(joined, NEW)


def test_a_shared_token_never_travels(workers, monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "from the environment")
    engine = workers()
    with session(engine) as sync:
        sync.push()
    assert "from the environment" not in str(engine.calls)
    assert serves(engine, NEW)
    with session(engine, OLD) as sync:
        monkeypatch.setenv("QERL_SYNC_TOKEN", "the worker's own")
        with raises(AgreementError, subject="token"):
            sync.push()
    assert serves(engine, NEW)


# -------------------------------------------------------------------------------------- agreement


def test_another_protocol_is_refused(workers, monkeypatch):
    engine = workers(2)
    with session(engine) as sync:
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "PROTOCOL", 99)
            with raises(AgreementError, subject="version"):
                sync.push()
        assert serves(engine, OLD)
        sync.push()
        assert len(sync._transport.workers) == 2
    assert serves(engine, NEW)


def test_a_worker_that_speaks_otherwise_is_refused_with_its_versions(workers, monkeypatch):
    """Its first message has fields that nobody here knows."""
    engine = workers(2)
    known = wire.encode

    def unknown(message):
        own, other = b'"protocol":%d', b'"protocol":%d,"dialect":"new"'
        return known(message).replace(own % say.PROTOCOL, other % (say.PROTOCOL + 1))

    with session(engine) as sync:
        with monkeypatch.context() as patch:
            patch.setattr(wire, "encode", unknown)
            with raises(AgreementError, subject="protocol"):
                sync.push()
        assert serves(engine, OLD)
        sync.push()
    assert serves(engine, NEW)


def test_another_package_version_is_refused(workers, monkeypatch):
    engine = workers()
    monkeypatch.setattr(qerl_sync, "__version__", "99.0")
    with session(engine) as sync, raises(AgreementError, subject="version"):
        sync.push()
    assert serves(engine, OLD)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "Another"),
        ("dtype", "bfloat16"),
        ("quantization", "fp8"),
        ("layout", {"tensor_parallel_size": 1}),
        ("packages", {"qerl-sync": qerl_sync.__version__, "torch": "1.0"}),
    ],
)
def test_ranks_that_differ_are_refused_by_the_first_difference(workers, field, value):
    engine = workers(2, rank1={field: value})
    with session(engine) as sync, raises(AgreementError, subject=field):
        sync.push()
    assert serves(engine, OLD)
    assert [loader.started for loader in engine.loaders] == [0, 0]


def test_a_missing_rank_is_named(workers):
    engine = workers(1, rank0={"world_size": 2})
    with session(engine) as sync, raises(AgreementError, subject="ranks", ranks=[1]):
        sync.push()


def on_the_wire(monkeypatch, kind, change) -> None:
    """What the trainer sends of that kind is changed on its way."""
    tell = WorkerConnection.tell
    monkeypatch.setattr(
        WorkerConnection,
        "tell",
        lambda worker, m: tell(worker, change(m) if isinstance(m, kind) else m),
    )


def with_plan(**changes):
    return lambda request: request.model_copy(update={"plan": {**request.plan, **changes}})


@pytest.mark.parametrize(
    ("change", "kind", "subject"),
    [
        (with_plan(digest="0" * 64), PlanError, None),
        (with_plan(format=0), PlanError, None),
        (with_plan(metas=[]), PlanError, None),
        (with_plan(chunks=[]), PlanError, None),
        (lambda r: r.model_copy(update={"layer_map": "0" * 64}), AgreementError, "layer_map"),
        (lambda r: r.model_copy(update={"slots": [1 << 40] * 2}), AgreementError, "slots"),
        (lambda r: r.model_copy(update={"slots": []}), AgreementError, "slots"),
    ],
)
def test_a_plan_that_was_changed_is_refused_before_anything_moves(
    workers, monkeypatch, change, kind, subject
):
    engine = workers(2)
    with session(engine) as sync:
        with monkeypatch.context() as patch:
            on_the_wire(patch, say.SyncRequest, change)
            with raises(kind, **({"subject": subject} if subject else {})):
                sync.push()
        assert serves(engine, OLD)
        assert [loader.started for loader in engine.loaders] == [0, 0]
        sync.push()
    assert serves(engine, NEW)


def test_an_engine_that_was_restarted_gets_a_full_sync(workers):
    """Its worker has no layer map, and knows nothing of the session's plan."""
    engine = workers()
    with session(engine) as sync:
        assert not sync.current
        sync.push()
        assert sync.current
        engine.connections[0].close()
        engine.connections = workers().connections
        assert wait_until(lambda: not sync.current)
        assert sync.push().version == 2
        assert sync.current
    fresh = engine.connections[0]._loader
    assert fresh.has(NEW)
    assert fresh.version == 2


def test_versions_move_forwards_whoever_is_restarted(workers):
    engine = workers(2)
    with session(engine) as sync:
        assert [sync.push().version for _ in range(3)] == [1, 2, 3]
    with session(engine) as forgetful:
        assert forgetful.push().version == 4
    with session(engine) as resumed:
        resumed.version = 10
        assert resumed.push().version == 11
    assert [loader.version for loader in engine.loaders] == [11, 11]


# ----------------------------------------------------------------------- in the middle of a sync


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_a_sync_that_fails_poisons_and_the_next_one_heals(workers, carrier):
    engine = workers(2)

    def fail():
        raise CoverageError("no such layer")

    with session(engine, transport=carrier) as sync:
        sync.push()
        sync._source.held = OLD
        engine.loaders[1].before_load = fail
        with pytest.raises(CoverageError, match="worker 1 of 2"):
            sync.push()
        assert all(loader.poisoned for loader in engine.loaders)
        assert sync.version == 1
        engine.loaders[1].before_load = lambda: None
        assert sync.push().version == 2
    assert serves(engine, OLD)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_a_source_that_fails_poisons_and_the_next_sync_heals(workers, carrier):
    engine = workers(2)

    def fail(names):
        raise RuntimeError("out of memory")

    with session(engine, transport=carrier) as sync:
        gather = sync._source.materialize
        sync._source.materialize = fail
        with pytest.raises(RuntimeError, match="out of memory"):
            sync.push()
        assert all("out of memory" in loader.poisoned for loader in engine.loaders)
        sync._source.materialize = gather
        sync.push()
    assert serves(engine, NEW)


def moved(place):
    return lambda chunk: chunk.model_copy(update={"places": [place] * len(chunk.places)})


@pytest.mark.parametrize(
    "change",
    [
        moved((0, -64)),
        moved((0, 1 << 40)),
        moved((0, 3)),
        moved((-1, 0)),
        moved((7, 0)),
        lambda c: c.model_copy(update={"places": []}),
        lambda c: c.model_copy(update={"index": 99}),
        lambda c: c.model_copy(update={"index": -1}),
        lambda c: c.model_copy(
            update={"segments": [say.Segment(name="../../etc/passwd", nbytes=64)]}
        ),
    ],
)
def test_places_outside_of_what_was_announced_are_refused(workers, monkeypatch, change):
    engine = workers()
    with session(engine, transport="shm") as sync:
        sync.push()
        with monkeypatch.context() as patch:
            on_the_wire(patch, say.Chunk, change)
            with pytest.raises(TransportError):
                sync.push()
        assert engine.loaders[0].poisoned
        sync.push()
    assert serves(engine, NEW)


def test_a_worker_that_dies_is_noticed(workers):
    engine = workers(2)
    with session(engine) as sync:
        sync.push()
        engine.loaders[1].before_load = engine.connections[1].close
        started = time.monotonic()
        with pytest.raises(TransportError):
            sync.push()
        assert time.monotonic() - started < TIMEOUT_SECONDS
        engine.loaders[1].before_load = lambda: None
        sync.push()
    assert serves(engine, NEW)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_a_trainer_that_dies_leaves_poisoned_workers_to_the_next_one(workers, carrier):
    engine = workers(2)
    first = session(engine, transport=carrier)
    gather = first._source.materialize

    def vanish(names):
        if "layer.2.weight" in names:
            for peer in first._transport.workers:
                peer.close()
        return gather(names)

    first._source.materialize = vanish
    with pytest.raises(TransportError):
        first.push()
    assert all("closed the connection or died" in one.poisoned for one in engine.loaders)
    with session(engine, transport=carrier) as second:
        second.push()
    assert serves(engine, NEW)
    first.close()


class RestoringLoader(KeepingLoader):
    """`on_failure: rollback`: goes back to the old version where that may be."""

    def abort(self, reason, *, keep_old=True):
        super().abort(reason)
        if self.poisoned is not None and keep_old:
            self.serving, self.poisoned = OLD, None


def interrupt(*given, **options):
    raise KeyboardInterrupt


def once(act, then):
    """Return a function that is `act` when it is called first, and `then` afterwards."""
    calls = chain([act], repeat(then))
    return lambda *given, **options: next(calls)(*given, **options)


@pytest.mark.parametrize("interrupted", [False, True])
def test_nobody_goes_back_once_others_may_have_committed(monkeypatch, interrupted):
    engine, ranks = Workers(*(RestoringLoader(OLD) for _ in range(3))), []
    with closing(engine), session(engine) as sync:
        way = sync._transport
        complete = way.complete

        def lose_the_second():
            complete()
            ranks.extend(worker.hello.rank for worker in way.workers)
            way.workers[1].cut_off()  # the first gets its Commit, and the third none

        way.complete = lose_the_second
        if interrupted:
            monkeypatch.setattr(way, "_abort", once(interrupt, way._abort))
        with pytest.raises(KeyboardInterrupt if interrupted else PeerLostError):
            sync.push()
        way.abort("once more")
        way.complete = complete
        told, *others = [engine.loaders[rank] for rank in ranks]
        assert wait_until(lambda: told.has(NEW))
        assert all(other.poisoned for other in others)
        sync.push()
        assert serves(engine, NEW)


@pytest.mark.parametrize("step", ["the map", "the abort"])
def test_ctrl_c_leaves_no_worker_waiting_for_the_next_push(workers, monkeypatch, step):
    engine = workers(2)
    with session(engine) as sync:
        way = sync._transport
        way.open()
        with monkeypatch.context() as patched:
            if step == "the map":
                patched.setattr(
                    WorkerConnection, "expect", once(interrupt, WorkerConnection.expect)
                )
            else:
                patched.setattr(way, "_abort", once(interrupt, way._abort))
                patched.setattr(sync._source, "materialize", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sync.push()
        started = time.monotonic()
        sync.push()
        assert time.monotonic() - started < 5
        assert serves(engine, NEW)


class FailingLoader(RestoringLoader):
    """vLLM fails when it is to activate an adapter."""

    def commit(self, version, *, keep_old):
        self.abort("no slot", keep_old=keep_old)
        raise LoadError("no slot")


def test_a_worker_that_fails_at_the_commit_does_not_go_back_either():
    engine = Workers(RestoringLoader(OLD), failing := FailingLoader(OLD))
    with closing(engine), session(engine) as sync:
        with pytest.raises(LoadError):
            sync.push()
        assert failing.poisoned


class StrictLoader(KeepingLoader):
    """Opens one sync at a time, as a Receiver does."""

    is_open = False

    def layer_map(self, metas, options):
        assert not self.is_open
        return super().layer_map(metas, options)

    def start(self, *given, **options):
        assert not self.is_open
        self.is_open = True
        super().start(*given, **options)

    def finish(self):
        self.is_open = False
        return super().finish()

    def abort(self, reason, *, keep_old):
        self.is_open = False
        super().abort(reason, keep_old=keep_old)


def test_ctrl_c_in_the_engines_process_leaves_no_sync_open(monkeypatch):
    """An engine that lives in a notebook's process goes on after it."""
    engine = Workers(loader := StrictLoader(OLD))
    with closing(engine), session(engine) as sync:
        with monkeypatch.context() as patched:
            patched.setattr(loader, "before_load", interrupt)
            with pytest.raises(SyncError):
                sync.push()
        assert loader.poisoned
        sync.push()
        assert serves(engine, NEW)


def test_an_error_may_name_a_file_whose_name_is_not_utf8(workers):
    engine, name = workers(2), "caf\udce9"

    def fail(*names):
        raise LoadError(name)

    with session(engine) as sync:
        gather = sync._source.materialize
        sync._source.materialize = fail
        with pytest.raises(LoadError):
            sync.push()
        sync._source.materialize = gather
        engine.loaders[0].before_load = fail
        with pytest.raises(LoadError, match=r"caf\\udce9"):
            sync.push()
        engine.loaders[0].before_load = lambda: None
        sync.push()
    assert serves(engine, NEW)


def test_workers_keep_no_memory_of_a_trainer_that_is_gone(workers):
    def mapped():
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in maps if segments.PREFIX in line]

    engine, before = workers(2), mapped()
    with session(engine, transport="shm") as sync:
        sync.push()
        assert len(mapped()) > len(before)
    assert wait_until(lambda: mapped() == before)
    config = SyncConfig.of(transport="tcp", delta="elements", timeout_seconds=TIMEOUT_SECONDS)
    with SyncSession(HashedSource(NEW), remote_transport(config, engine), config) as sync:
        sync.push()
        held = [one._connections[0] for one in engine.connections]
        assert all(one.mirror and one.chunk_receiver._slots for one in held)
    assert wait_until(lambda: not any(one.mirror or one.chunk_receiver._slots for one in held))


def test_a_worker_that_hangs_is_given_up(workers, monkeypatch):
    for module in (control, transport):
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    engine = workers()
    release = threading.Event()
    with session(engine, timeout_seconds=1) as sync:
        sync.push()
        engine.loaders[0].before_load = lambda: release.wait(30)
        with pytest.raises(TransportTimeout):
            sync.push()
        release.set()
    assert not serves(engine, NEW)


# ---------------------------------------------------------------------------------- shared memory


@pytest.mark.parametrize(
    "name",
    [
        "../etc/passwd",
        "/etc/passwd",
        "qerl_sync-1-0123456789abcdef/../x",
        "qerl_sync-1-0123456789abcdef\n",
        "qerl_sync--0123456789abcdef",
        "psm_12345678",
        ".",
        "",
    ],
)
def test_names_of_others_are_not_opened(name):
    with pytest.raises(TransportError):
        AttachedSegment(name, 1)


@pytest.fixture
def planted():
    """A name that looks like one of ours, to put something there."""
    path = segments.DIRECTORY / f"{segments.PREFIX}{os.getpid()}-{'0' * 16}"
    yield path
    path.unlink(missing_ok=True)


def test_links_are_not_followed(planted, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(100))
    planted.symlink_to(tmp_path / "secret")
    with pytest.raises(TransportError):
        AttachedSegment(planted.name, 100)
    remove_abandoned()
    assert (tmp_path / "secret").exists()


def test_a_pipe_with_our_name_does_not_hold_us_up(planted):
    os.mkfifo(planted)
    with pytest.raises(TransportError):
        AttachedSegment(planted.name, 100)


def test_a_segment_smaller_than_announced_is_refused():
    segment = SharedSegment(100)
    with closing(segment), pytest.raises(TransportError):
        AttachedSegment(segment.name, 101)


def test_a_reader_cannot_write():
    segment = SharedSegment(64)
    with closing(segment):
        reader = AttachedSegment(segment.name, 64)
        with pytest.raises(TypeError):
            reader._map[0] = 1
        segment.bytes[0] = 7
        assert reader.tensor(0, (1,), torch.uint8).item() == 7
        assert (segments.DIRECTORY / segment.name).stat().st_mode & 0o077 == 0


def test_no_room_is_told_before_anything_is_written():
    own = f"*{segments.PREFIX}{os.getpid()}-*"  # other processes have theirs
    before = set(segments.DIRECTORY.glob(own))
    with pytest.raises(NoRoomError):
        SharedSegment(1 << 50)
    assert set(segments.DIRECTORY.glob(own)) <= before


def test_room_that_a_dead_process_holds_is_taken_back(planted, monkeypatch):
    planted.touch()  # nobody holds its lock
    monkeypatch.setattr(segments, "free_bytes", lambda: 0 if planted.exists() else 1 << 20)
    segments.require_room(1 << 20)


def test_a_rank_that_sends_nothing_of_a_chunk_makes_no_slot():
    own = f"{segments.PREFIX}{os.getpid()}-*"
    staging = Staging({"shm"})
    with closing(staging):
        staging.prepare([1 << 20], (), later=True)
        before = set(segments.DIRECTORY.glob(own))
        staging.stage(0, [], [])
        assert set(segments.DIRECTORY.glob(own)) == before


@pytest.mark.parametrize(
    "where",
    [{"address": "0.0.0.0"}, {"endpoints": ["10.0.0.7:1", "[::]:1"]}],
    ids=["address", "endpoint"],
)
def test_nobody_can_connect_to_all_addresses(where, monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "a secret")
    with pytest.raises(ConfigError):
        RemoteTransport(None, **where)


def test_no_room_for_a_slot_ends_the_sync_before_it_starts(workers, monkeypatch):
    engine = workers()
    room = os.posix_fallocate

    def full(descriptor, offset, nbytes):
        room(descriptor, offset, nbytes if nbytes <= 4096 else 1 << 50)

    with session(engine, tensors(1, numel=5000), transport="shm", chunk_bytes="1MiB") as sync:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(NoRoomError):
                sync.push()
        assert serves(engine, OLD)
        sync.push()
    assert serves(engine, sync._source.held)


# Imports torch once: each line with a program becomes a child with a segment, which ends as a
# program of its own would, through the end of this one. A line with a pid asks for its exit code.
OWNERS = """
import gc, os, sys, time
from qerl_sync.wire.segments import SharedSegment
gc.freeze()  # or each fork that exits would go through all of torch's objects, and copy them
for line in sys.stdin:
    told = eval(line)
    if isinstance(told, int):
        print(os.waitstatus_to_exitcode(os.waitpid(told, 0)[1]), flush=True)
    elif os.fork() == 0:
        held = SharedSegment(1 << 16)
        exec(told[0])
        print(os.getpid(), held.name, flush=True)
        exec(told[1])
        break
"""
# In steps: a signal that comes just before the system call would not end a long one.
STAY = "while True: time.sleep(0.05)"


@pytest.fixture(scope="module")
def host():
    """The program in which owners of segments live."""
    command, pipe = [sys.executable, "-c", OWNERS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


class Owner:
    """A process that owns a segment at `path`, runs `first`, and then `then`."""

    def __init__(self, host: subprocess.Popen[str], then: str = STAY, first: str = "") -> None:
        self._host = host
        pid, name = self._ask((first, then)).split()
        self.pid, self.path = int(pid), segments.DIRECTORY / name

    def _ask(self, reported: object) -> str:
        print(repr(reported), file=self._host.stdin, flush=True)
        return self._host.stdout.readline()

    def end(self, number: int | None = None) -> int:
        """Its exit code, after this signal."""
        if number is not None:
            os.kill(self.pid, number)
        return int(self._ask(self.pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_removed_and_of_a_living_one_nothing(number, host):
    """Neither signal lets Python say a word: the next start removes what they leave."""
    living, killed = Owner(host), Owner(host)
    try:
        assert killed.end(number) == -number
        assert killed.path.exists()
        with closing(SharedSegment(64)):
            assert not killed.path.exists()
            assert living.path.exists()
    finally:
        living.end(signal.SIGKILL)
    remove_abandoned()  # unless another program on this machine has been quicker
    assert not living.path.exists()


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("", 0),
        ("raise RuntimeError", 1),
        ("sys.exit(3)", 3),
        ("os.fork() or os._exit(0); os.wait()", 0),
    ],
)
def test_nothing_is_left_after_an_exit(then, code, host):
    owner = Owner(host, then)
    assert owner.end() == code
    assert not owner.path.exists()


def test_a_forked_child_does_not_take_the_memory_with_it(host):
    owner = Owner(host, first="os.fork() or sys.exit(); os.wait()")
    try:
        assert owner.path.exists()
    finally:
        owner.end(signal.SIGKILL)
    remove_abandoned()
    assert not owner.path.exists()


def test_a_forked_child_does_not_keep_its_parents_shared_memory_alive(host):
    owner = Owner(host, first=f"if os.fork() == 0:\n {STAY}")
    (child,) = descendants(owner.pid)
    try:
        remove_abandoned()
        assert owner.path.exists()  # the fork took nothing from the parent
        owner.end(signal.SIGKILL)
        remove_abandoned()  # or another process of this machine has
        assert not owner.path.exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_left_after_an_interrupt(host):
    owner = Owner(host)
    owner.end(signal.SIGINT)
    assert not owner.path.exists()


# ------------------------------------------------------------------------- clients of other makers


def test_a_client_that_can_pause_declares_it(workers):
    """It would not be paused, and nobody would know."""
    engine = workers(1)
    engine.pause = engine.resume = lambda *mode: None
    with pytest.raises(ConfigError):
        RemoteTransport(engine)


def test_a_client_that_does_not_answer_is_not_waited_for(workers, monkeypatch):
    for module in (control, transport):
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    engine, release = workers(1), threading.Event()
    with session(engine, timeout_seconds=1) as sync:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "start_weight_update", lambda: release.wait(30))
            with pytest.raises(TransportTimeout):
                sync.push()
        release.set()
        sync.push()
    assert serves(engine, NEW)


def test_foreign_errors_of_vllms_four_methods_are_translated(workers):
    engine = workers(1)

    def fail() -> None:
        raise ValueError("no such engine")

    with session(engine) as sync:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "start_weight_update", fail)
            with pytest.raises(
                TransportError, match=r"start_weight_update: .*no such engine"
            ) as it:
                sync.push()
        assert isinstance(it.value.__cause__, ValueError)
        sync.push()
    assert serves(engine, NEW)
