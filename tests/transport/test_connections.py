"""Connections in bad company: forked children, forgetful routers, strangers, small /dev/shm.

No vLLM: the workers are those of `support.loaders`."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.loaders import (
    NEW,
    OLD,
    TIMEOUT_SECONDS,
    Workers,
    lets_in,
    serves,
    session,
    tensors,
)
from support.ports import free_port
from support.relay import HOST as RELAYED
from support.relay import Relay
from support.servers import wait_until

from qerl_sync import ConfigError, SyncConfig, SyncSession, TransportError
from qerl_sync.engines.base import EngineClient
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import AgreementError, IntegrityError, NoRoomError, PeerLostError, SyncError
from qerl_sync.telemetry.files import read_lines
from qerl_sync.transports.remote import transport
from qerl_sync.transports.remote.connection import WorkerConnection
from qerl_sync.wire import endpoints, segments, tokens
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import Connection
from qerl_sync.wire.endpoints import Listener, connect, format_endpoint, parse_endpoint
from qerl_sync.wire.segments import remove_abandoned
from qerl_sync.worker.protocol.connection import TrainerConnection

HOST = "127.0.0.1"
SOON_SECONDS = 8.0


@contextmanager
def relayed(engine: Workers, **options) -> Iterator[tuple[SyncSession, Relay]]:
    """A session whose workers reach the trainer through a relay."""
    port = free_port()
    relay = Relay(port)
    address = {"trainer_address": RELAYED, "trainer_bind": HOST, "trainer_port": port}
    try:
        with session(engine, **address, **options) as sync:
            yield sync, relay
    finally:
        relay.close()


def test_the_reading_thread_of_a_closed_connection_ends_whatever_is_opened_next(listener):
    worker = connect(HOST, listener.port, "secret", 5, TrainerConnection)
    with listener.accept(5):
        before = set(threading.enumerate())
        worker.read_ahead(5)
        (inbox,) = set(threading.enumerate()) - before
        time.sleep(0.05)  # it polls the descriptor
        number = worker._connection.fileno()
        worker.close()
        reused = socket.socketpair()
        with reused[0], reused[1]:
            assert number in [one.fileno() for one in reused]
            inbox.join(SOON_SECONDS)
            assert not inbox.is_alive()


# --------------------------------------------------------------------------------- forked children

FORKING = """
import os, sys, time
{prepare}
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
print(child, flush=True)
time.sleep(600)
"""


@contextmanager
def forking(prepare: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A process that prepares something, and then has a forked child that outlives it."""
    program = FORKING.format(prepare=prepare)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said: list[str] = []

    def line() -> str:
        said.append(process.stdout.readline().strip())
        return said[-1]

    try:
        with process.stdout:
            yield process, line
    finally:
        process.kill()
        process.wait()
        with suppress(ProcessLookupError, ValueError, IndexError):
            os.kill(int(said[-1]), signal.SIGKILL)


@pytest.mark.parametrize("role", ["trainer", "worker"])
def test_a_forked_child_does_not_hide_the_end_of_its_parent(role):
    ends = {
        "trainer": "listener = Listener('127.0.0.1', 0, 'secret')\n"
        "print(listener.port, flush=True)\nheld = listener.accept(30)",
        "worker": "held = connect('127.0.0.1', int(sys.stdin.readline()), 'secret', 30)",
    }
    prepare = f"from qerl_sync.wire.endpoints import Listener, connect\n{ends[role]}"
    if role == "worker":
        listener = Listener(HOST, 0, "secret")
        prepare = prepare.replace("sys.stdin.readline()", str(listener.port))
    with forking(prepare) as (process, line):
        if role == "trainer":
            port = int(line())
            ours = connect(HOST, port, "secret", 30)
        else:
            ours = listener.accept(30)
            port = listener.port
            listener.close()
        line()
        with ours:
            ours.send(say.End(), 5)
            ours.require_open("after the fork")
            process.kill()
            process.wait()
            started = time.monotonic()
            with pytest.raises(PeerLostError):
                ours.receive(TIMEOUT_SECONDS, "a word")
            assert time.monotonic() - started < SOON_SECONDS
        Listener(HOST, port, "secret").close()  # nobody listens there any more


def test_a_trainer_that_dies_in_a_chunk_is_noticed_and_the_next_sync_heals(workers, monkeypatch):
    engine = workers()
    send = Connection.send

    def die(end: Connection, message: say.Message, seconds: float, payload=()) -> None:
        send(end, message, seconds)
        if payload:
            end._write(payload[0][: payload[0].nbytes // 2], seconds, "half of a chunk")
            end.cut_off()
            raise PeerLostError("the trainer died")

    with session(engine, transport="tcp") as sync:
        sync.push()
        sync._source.held = OLD
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "send", die)
            with pytest.raises(TransportError):
                sync.push()
        assert wait_until(lambda: engine.loaders[0].poisoned, SOON_SECONDS)
        sync.push()
    assert serves(engine, OLD)


# ------------------------------------------------------------------------- room, addresses, ports


@pytest.fixture
def small_shm(tmp_path, monkeypatch) -> Path:
    """/dev/shm with room for a probe and not for a slot."""
    monkeypatch.setattr(segments, "DIRECTORY", tmp_path)
    monkeypatch.setattr(segments, "free_bytes", lambda: 64 << 10)
    return tmp_path


LARGE = tensors(1, numel=9000)  # six of 36 KB


def test_where_slots_do_not_fit_into_shared_memory_another_way_is_taken(workers, small_shm):
    engine = workers(2)
    with session(engine, LARGE, chunk_bytes="64KiB") as sync:
        for version in (1, 2):
            report = sync.push()
            assert report.version == version
            assert report.transport.startswith(f"tcp: {small_shm} has ")
            assert serves(engine, LARGE)
        assert len([name for name, _ in engine.calls if name == "init"]) == 2
        sync._source.held = NEW
        sync.push()
    assert serves(engine, NEW)
    assert not list(small_shm.iterdir())


def test_shared_memory_that_was_asked_for_and_is_too_small_is_refused_with_sizes(
    workers, small_shm
):
    engine = workers(2)
    with session(engine, LARGE, chunk_bytes="64KiB", transport="shm") as sync:
        with pytest.raises(NoRoomError) as caught:
            sync.push()
        assert caught.value.needed_bytes >= 2 * 36_000
        assert caught.value.free_bytes <= 64 << 10
        assert serves(engine, OLD)
        assert [loader.started for loader in engine.loaders] == [0, 0]
        assert not list(small_shm.iterdir())
        sync._source.held = NEW
        assert sync.push().transport.startswith("shm")
    assert serves(engine, NEW)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_workers_reach_the_trainer_over_ipv6(workers, carrier):
    engine = workers(2)
    with session(engine, transport=carrier, trainer_address="::1") as sync:
        sync.push()
    assert engine.calls[0][1]["endpoints"][0].startswith("[::1]:")
    assert serves(engine, NEW)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:80", "[::1]:29500", "[fe80::1%eth0]:1", "host:9"])
def test_endpoints_have_a_host_and_a_port(endpoint):
    assert format_endpoint(*parse_endpoint(endpoint)) == endpoint


@pytest.mark.parametrize("endpoint", ["::1:80", "[::1]", "[]:80", "[::1]:0", "::1"])
def test_ipv6_addresses_stand_in_brackets(endpoint):
    with pytest.raises(AgreementError):
        parse_endpoint(endpoint)


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_the_trainer_listens_where_it_is_told_and_is_known_under_another_address(workers, carrier):
    engine, port = workers(), free_port()
    options = {"trainer_address": RELAYED, "trainer_bind": "0.0.0.0", "trainer_port": port}
    with session(engine, transport=carrier, **options) as sync:
        sync.push()
        with pytest.raises(TransportError):
            Listener(HOST, port, "secret")
    assert engine.calls[0][1]["endpoints"] == [f"{RELAYED}:{port}"]
    assert serves(engine, NEW)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]", ""])
def test_an_address_that_nobody_can_connect_to_is_refused(address):
    with pytest.raises(ConfigError):
        SyncConfig.of(trainer_address=address)


# --------------------------------------------------------------------------------- idle connections


class PausingWorkers(EngineClient):
    """The engine, and when it was paused."""

    def __init__(self, engine: Workers) -> None:
        self._engine = engine
        self.events = engine.calls

    def init_weight_transfer_engine(self, init_info):
        self._engine.init_weight_transfer_engine(init_info)

    def start_weight_update(self):
        self._engine.start_weight_update()

    def update_weights(self, update_info):
        self._engine.update_weights(update_info)

    def finish_weight_update(self, weight_version=None):
        self._engine.finish_weight_update(weight_version)

    def pause(self, mode: str) -> None:
        self.events.append(("pause", {}))

    def resume(self) -> None:
        self.events.append(("resume", {}))


def test_a_connection_that_was_forgotten_on_the_way_is_renewed_while_the_engine_runs(
    workers, monkeypatch
):
    monkeypatch.setattr(transport, "PING_SECONDS", 0.5)
    engine = workers(2)
    with relayed(PausingWorkers(engine)) as (sync, relay):
        sync.push()
        relay.forget()
        sync._source.held = OLD
        del engine.calls[:]
        started = time.monotonic()
        assert sync.push().version == 2
        assert time.monotonic() - started < SOON_SECONDS
    assert serves(engine, OLD)
    names = [name for name, _ in engine.calls]
    assert names.index("init") < names.index("pause")


class Telling(BaseHTTPRequestHandler):
    """Answers with the kernel's timer on the client's connection; 2: it is probed when idle."""

    def do_POST(self) -> None:
        ends = (line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:])
        port = f"{self.client_address[1]:04X}"
        (timer,) = (one[5].partition(":")[0] for one in ends if one[1].endswith(f":{port}"))
        body = json.dumps({"timer": timer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


class IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def test_a_call_over_http_is_probed_while_nothing_is_said_over_ipv6_too():
    with IPv6Server(("::1", 0), Telling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = HTTPClient(f"http://[::1]:{server.server_address[1]}")
        assert client._post("update_weights") == {"timer": "02"}
        server.shutdown()


def test_both_ends_probe_idle_connections():
    listener = Listener(HOST, 0, "secret")
    with connect(HOST, listener.port, "secret", 5) as worker:
        trainer = listener.accept(5)
        assert trainer is not None
        with trainer:
            for end in (worker._connection, trainer._connection):
                option = lambda name: end.getsockopt(socket.IPPROTO_TCP, name)  # noqa: B023, E731
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle = option(socket.TCP_KEEPIDLE)
                probing = option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
                assert idle < 240
                assert option(socket.TCP_USER_TIMEOUT) == 1000 * (idle + probing) <= 120_000
    listener.close()


# ---------------------------------------------------------------------------------------- listener


def test_a_listener_survives_that_descriptors_run_out(listener):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as early:
        taken = [os.open(os.devnull, os.O_RDONLY)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 64, limits[1]))
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            early.connect((HOST, listener.port))
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in taken:
                os.close(descriptor)
        assert lets_in(listener)


def test_silent_strangers_are_bounded_and_delay_a_worker_by_a_moment(listener, monkeypatch):
    monkeypatch.setattr(endpoints, "MAX_HANDSHAKES", 8)
    monkeypatch.setattr(endpoints, "FAIR_SECONDS", 0.02)
    before = threading.active_count()
    strangers = [socket.create_connection((HOST, listener.port)) for _ in range(40)]
    try:
        assert lets_in(listener)
        assert threading.active_count() <= before + 8
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_handshake_has_one_deadline(listener, monkeypatch):
    monkeypatch.setattr(tokens, "HANDSHAKE_SECONDS", 0.5)
    with socket.create_connection((HOST, listener.port)) as slow:
        slow.settimeout(0.2)
        started = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - started < 4:
                slow.sendall(b"x")
                with suppress(TimeoutError):
                    if slow.recv(1) == b"":
                        break
        assert time.monotonic() - started < 2


# --------------------------------------------------------------------------------------- strangers


LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o666)
fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
time.sleep(600)
"""


def test_a_lease_on_a_file_does_not_hold_up_the_clean_up():
    path = segments.DIRECTORY / f"{segments.PREFIX}1-{'0' * 16}"
    command = [sys.executable, "-c", LEASE, str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        with holder.stdout:
            assert holder.stdout.readline() == "leased\n"
            started = time.monotonic()
            remove_abandoned()
            assert time.monotonic() - started < SOON_SECONDS
    finally:
        holder.kill()
        holder.wait()
        path.unlink(missing_ok=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_of_other_users_are_left_to_them():
    path = segments.DIRECTORY / f"{segments.PREFIX}1-{'1' * 16}"
    path.touch()
    try:
        os.chown(path, 65534, 65534)
        remove_abandoned()
        assert path.exists()
        os.chown(path, os.geteuid(), -1)
        remove_abandoned()
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def once(before: bytes, after: bytes) -> Callable[[bytes], bytes]:
    """Replace it in what passes."""
    assert len(before) == len(after)
    return lambda data: data.replace(before, after)


@pytest.mark.parametrize(
    ("direction", "before", "after"),
    [
        ("to_worker", b'"commit","version":2', b'"commit","version":7'),
        ("to_worker", b'"places":[[0,0]]', b'"places":[[1,0]]'),
        ("to_trainer", b'"caches_overwritten":false', b'"caches_overwritten":true '),
    ],
)
def test_a_message_that_is_changed_on_its_way_is_refused(workers, direction, before, after):
    engine = workers()
    with relayed(engine) as (sync, relay):
        sync.push()
        setattr(relay, direction, once(before, after))
        with pytest.raises(IntegrityError):
            sync.push()
        assert engine.loaders[0].version != 7
        setattr(relay, direction, bytes)
        sync.push()
    assert serves(engine, NEW)


def test_a_message_that_is_repeated_is_refused(listener):
    with connect(HOST, listener.port, "secret", 5) as worker:
        trainer = listener.accept(5)
        assert trainer is not None
        with trainer:
            sent = []
            write = worker._write
            worker._write = lambda rest, *args: (sent.append(bytes(rest)), write(rest, *args))
            worker.send(say.Credit(index=1), 5)
            assert trainer.receive(5, "a credit") == say.Credit(index=1)
            worker._connection.send(sent[0])
            with pytest.raises(IntegrityError):
                trainer.receive(5, "a credit")


@pytest.mark.parametrize("sealed", [True, False])
def test_a_sealed_payload_that_is_changed_on_its_way_is_refused(listener, sealed):
    with connect(HOST, listener.port, "secret", 5) as worker:
        trainer = listener.accept(5)
        assert trainer is not None
        with trainer:
            worker.sealed = trainer.sealed = sealed
            sent = [bytearray(os.urandom(size)) for size in (5 << 20, 0, 7)]
            arrived = [memoryview(bytearray(len(part))) for part in sent]
            write, changed = trainer._write, [False]

            def meddle(rest: memoryview, *args) -> None:
                if changed[0] and rest.nbytes == 7:
                    rest = memoryview(bytes(7))
                write(rest, *args)

            trainer._write = meddle
            for changed[0] in (False, True):
                message = say.Credit(index=1)
                thread = threading.Thread(
                    target=trainer.send, args=(message, 5, [memoryview(part) for part in sent])
                )
                thread.start()
                assert worker.receive(5, "a message") == message
                if changed[0] and sealed:
                    with pytest.raises(IntegrityError):
                        worker.receive_into(arrived, 5, "its payload")
                else:
                    worker.receive_into(arrived, 5, "its payload")
                    assert ([bytes(part) for part in arrived] == sent) is not changed[0]
                thread.join()


@pytest.mark.parametrize(("token", "host", "sealed"), [("t", "far", True), ("t", "", False)])
def test_tcp_is_sealed_between_hosts_that_share_a_token(workers, monkeypatch, token, host, sealed):
    monkeypatch.setenv("QERL_SYNC_TOKEN", token)
    engine = workers(1, **({"rank0": {"host": host}} if host else {}))
    reported: list[say.Welcome] = []
    tell = WorkerConnection.tell
    monkeypatch.setattr(
        WorkerConnection, "tell", lambda one, m: (reported.append(m), tell(one, m))[1]
    )
    with session(engine, transport="tcp") as sync:
        sync.push()
    (welcome,) = (message for message in reported if isinstance(message, say.Welcome))
    assert welcome.options["sealed"] is sealed
    assert "secret" not in welcome.options
    assert serves(engine, NEW)


# --------------------------------------------------------------------------------------- telemetry


def test_what_trainer_and_workers_did_when(workers, tmp_path):
    """Over the wire: the spans of one sync, the workers' versions, and those that are poisoned."""
    engine = workers(2)
    with session(engine, record_directory=str(tmp_path), trace=2, transport="tcp") as sync:
        sync.push()
        report = sync.push()
        assert set(sync._transport.versions.values()) == {2}
        assert sync._transport.num_poisoned == 0
        (path,) = tmp_path.glob("trace-*.json")
        events = json.loads(path.read_text())["traceEvents"]
        processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        assert list(processes.values()) == ["trainer", *(w["worker"] for w in report.workers)]
        spans = {pid: {e["name"] for e in events if e["pid"] == pid} for pid in processes}
        assert report.num_chunks > 2
        chunks = [f"chunk {index}" for index in range(report.num_chunks)]
        assert spans[0] >= {f"{name} {one}" for name in ("send", "await slot") for one in chunks}
        threads = set()
        for worker in report.workers:
            written = [e for e in events if e["name"].endswith(f" to {worker['worker']}")]
            # That of the last chunk may end after the worker's report has come.
            assert {e["name"].partition(" to ")[0] for e in written} >= {
                f"write {one}" for one in chunks[:-1]
            }
            threads |= {e["tid"] for e in written}
        assert threads == {1, 2}
        for pid in (1, 2):
            assert spans[pid] >= {f"{name} {one}" for name in ("wait", "load") for one in chunks}
        # Each chunk is loaded after its sending began, by the clock of this machine.
        at = {(e["pid"], e["name"]): e["ts"] for e in events if e["ph"] == "X"}
        assert all(at[0, f"send {one}"] < at[1, f"load {one}"] for one in chunks)

        def fail() -> None:
            raise ValueError("out of memory")

        engine.loaders[1].before_load = fail
        with pytest.raises(SyncError):
            sync.push()
        assert sync._transport.num_poisoned == 2
        (failure,) = read_lines(tmp_path / "failures.jsonl")
        assert failure["num_poisoned"] == 2
        engine.loaders[1].before_load = lambda: None
        sync.push()
        assert sync._transport.num_poisoned == 0
