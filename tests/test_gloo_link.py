"""Gloo links: every byte arrives, nothing waits for ever, strangers get nothing."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.gloo_peer import END, GIVEN_BYTES, GIVEN_TIMES, HOST, TAKEN_BYTES, connect, peer

from qerl_sync.errors import (
    AgreementError,
    PeerLostError,
    SyncError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.wire import channel
from qerl_sync.wire.baselines import loopback_tcp_seconds, memcpy_seconds
from qerl_sync.wire.channel import Channel
from qerl_sync.wire.gloo import GlooLink
from qerl_sync.wire.gloo_pair import TRAINER, WORKER, GlooPair

pytestmark = pytest.mark.dist
SECRET, LOOPBACK = "5ec7e7", "0100007F"
# Whoever waits this long has not been told: a test that expects another error fails then.
LONG_SECONDS, SHORT_SECONDS = 60.0, 3.0
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
)


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """A thread for the other end."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def ends(aside: ThreadPoolExecutor) -> Iterator[tuple[GlooLink, GlooLink]]:
    """Both ends of a link in this process: the trainer's and the worker's."""
    pending = GlooLink.listen(HOST, SECRET, LONG_SECONDS)
    other = aside.submit(GlooLink.connect, HOST, pending.port, SECRET, LONG_SECONDS)
    with pending.accept() as trainer, other.result() as worker:
        yield trainer, worker


def some_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def raised(call: Callable[[], object]) -> SyncError:
    with pytest.raises(SyncError) as caught:
        call()
    return caught.value


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def state_of(process_id: int) -> str:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def stop(process_id: int) -> None:
    """Returns when the process has stopped."""
    os.kill(process_id, signal.SIGSTOP)
    while state_of(process_id) != "T":
        time.sleep(0.001)


def listening() -> set[str]:
    """What this process listens at, as the kernel has it: `address:port` in hexadecimal."""
    ours = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            ours.add(os.readlink(descriptor))
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in ours}


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# ----------------------------------------------------------------------------- another process


def test_every_dtype_arrives_over_two_links_beside_a_default_group():
    with peer(SECRET, "echo") as (process, pipe):
        links = connect(pipe, *(GlooLink.listen(HOST, SECRET, LONG_SECONDS) for _ in range(2)))
        for number, dtype in enumerate(DTYPES):
            for shape in [(), (0,), (5, 0), (1,), (3, 7), (1 << 20,)]:
                link, back = links[number % 2], torch.zeros(shape, dtype=dtype)
                memory = some_bytes(back.nbytes, number)
                there = (memory % 2 if dtype == torch.bool else memory).view(dtype).reshape(shape)
                handles = [link.send(torch.tensor(there.nbytes)), link.send(there)]
                link.receive(back)
                for handle in handles:
                    handle.wait()
                assert as_bytes(back).equal(as_bytes(there)), (dtype, shape)
        for link in links:
            link.send(torch.tensor(END)).wait()
        assert pipe.recv() == "ended well"
        process.join()
        assert process.exitcode == 0
        for link in links:
            link.close()


def test_a_killed_receiver_ends_sends_at_once():
    """Those in the middle, which Gloo alone does not end, and those that wait for their turn."""
    with peer(SECRET, "take") as (process, pipe):
        (link,) = connect(pipe, GlooLink.listen(HOST, SECRET, LONG_SECONDS))
        payload = some_bytes(TAKEN_BYTES)
        link.send(payload).wait()
        stop(process.pid)  # from here on it takes no more than the kernel's buffers do
        handles = [link.send(payload) for _ in range(2)]
        process.kill()
        for handle in handles:
            error = raised(handle.wait)
            assert type(error) is PeerLostError
            assert f"sending {TAKEN_BYTES:,} bytes: " in str(error)
            assert "the worker closed the connection or died" in str(error)
        link.close()


def test_a_killed_sender_ends_receives_at_once():
    with peer(SECRET, "give") as (process, pipe):
        (link,) = connect(pipe, GlooLink.listen(HOST, SECRET, LONG_SECONDS))
        buffer = torch.zeros(GIVEN_BYTES, dtype=torch.uint8)
        # One after the other into the same memory: whenever the sender dies, one is in its middle.
        handles = [link.start_receive(buffer) for _ in range(GIVEN_TIMES)]
        handles[0].wait()
        stop(process.pid)
        process.kill()
        assert type(raised(lambda: [handle.wait() for handle in handles])) is PeerLostError
        assert type(raised(handles[-1].wait)) is PeerLostError
        assert type(raised(lambda: link.receive(buffer))) is PeerLostError
        link.close()


def test_a_stopped_peer_is_waited_for_until_the_timeout():
    with peer(SECRET, "take") as (process, pipe):
        (link,) = connect(pipe, GlooLink.listen(HOST, SECRET, SHORT_SECONDS))
        payload = some_bytes(TAKEN_BYTES)
        link.send(payload).wait()
        stop(process.pid)
        handles = [link.send(payload) for _ in range(2)]
        error = raised(handles[0].wait)
        assert type(error) is TransportTimeout
        assert f"sending {TAKEN_BYTES:,} bytes: the worker did not answer within " in str(error)
        # What follows names the first error, and does not wait again.
        assert type(raised(handles[1].wait)) is TransportTimeout
        assert type(raised(lambda: link.send(payload))) is TransportTimeout
        link.close()


# -------------------------------------------------------------------------- both ends in one


def test_any_number_in_flight_in_both_directions(ends, aside):
    sizes = [0, 1, 2048, 5 << 20, 2048, 2048, 1 << 20, 3] * 3

    def exchange(link: GlooLink, seed: int) -> list[torch.Tensor]:
        handles = [link.send(some_bytes(size, seed)) for size in sizes]
        buffers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        waiting = [link.start_receive(buffer) for buffer in buffers]
        for handle in (*waiting, *handles):
            handle.wait()
        return buffers

    trainer, worker = ends
    other = aside.submit(exchange, worker, WORKER)
    for got, seed in ((exchange(trainer, TRAINER), WORKER), (other.result(), TRAINER)):
        for tensor in got:
            assert tensor.equal(some_bytes(tensor.nbytes, seed))


def test_a_send_that_nobody_waits_for_arrives_all_the_same(ends):
    trainer, worker = ends
    trainer.send(some_bytes(8 << 20))
    gc.collect()
    buffer = torch.zeros(8 << 20, dtype=torch.uint8)
    worker.receive(buffer)
    assert buffer.equal(some_bytes(8 << 20))


@pytest.mark.parametrize("sent_bytes", [100, 50 << 20])
def test_other_sizes_than_agreed_are_an_error_and_not_the_end_of_the_process(ends, sent_bytes):
    trainer, worker = ends
    buffer = torch.zeros(1000, dtype=torch.uint8)
    handle = trainer.send(torch.ones(sent_bytes, dtype=torch.uint8))
    error = raised(lambda: worker.receive(buffer))
    assert type(error) is AgreementError
    assert f"{sent_bytes:,} bytes where 1,000 are expected" in str(error)
    assert not buffer.any()
    assert type(raised(handle.wait)) is PeerLostError


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 6).T, torch.ones(3).expand(2, 3), torch.ones(2, device="meta")]
)
def test_what_is_not_one_piece_of_host_memory_is_refused(ends, tensor):
    trainer, worker = ends
    for call in (trainer.send, worker.start_receive):
        assert type(raised(lambda call=call: call(tensor))) is TransportError
    handle, buffer = trainer.send(tensor.new_ones(3, device="cpu")), torch.zeros(3)
    worker.receive(buffer)
    handle.wait()
    assert buffer.tolist() == [1.0, 1.0, 1.0]


def test_close_ends_the_waits_of_both_sides(ends, aside):
    trainer, worker = ends
    waiting = aside.submit(worker.receive, torch.zeros(8))
    handles = [trainer.start_receive(torch.zeros(8)), trainer.start_receive(torch.zeros(9))]
    worker.close()
    assert type(raised(waiting.result)) is TransportError
    for handle in handles:
        assert type(raised(handle.wait)) is PeerLostError
    assert "the link was closed" in str(raised(lambda: worker.send(torch.zeros(1))))


def test_nothing_listens_on_another_address_and_nothing_stays(aside):
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    aside.submit(int).result()  # its thread is there
    before, at_first = listening(), held()
    pending = GlooLink.listen(HOST, SECRET, LONG_SECONDS)
    (door,) = listening() - before
    other = aside.submit(GlooLink.connect, HOST, pending.port, SECRET, LONG_SECONDS)
    links = [pending.accept(), other.result()]
    del other  # it would keep the link
    gloos = listening() - before
    assert gloos
    assert {name.split(":")[0] for name in (door, *gloos)} == {LOOPBACK}
    assert soon(lambda: door not in listening())
    for link in links:
        link.close()
    assert soon(lambda: held() == at_first), (held(), at_first)
    assert listening() <= before  # what an earlier test has left may have gone since


# ---------------------------------------------------------------------------------- strangers


def test_nobody_connects():
    pending = GlooLink.listen(HOST, SECRET, 0.1)
    error = raised(pending.accept)
    assert type(error) is TransportTimeout
    assert f"{HOST}:{pending.port}" in str(error)
    refused = raised(lambda: GlooLink.connect(HOST, pending.port, SECRET, 0.3))
    assert type(refused) is PeerLostError


def test_a_worker_that_dies_before_the_link_is_up_is_noticed():
    pending = GlooLink.listen(HOST, SECRET, LONG_SECONDS)
    channel.connect(HOST, pending.port, SECRET, LONG_SECONDS).close()
    assert type(raised(pending.accept)) is PeerLostError


def test_an_address_of_another_machine_cannot_be_listened_at():
    assert type(raised(lambda: GlooLink.listen("192.0.2.77", SECRET, 1.0))) is TransportError


def test_strangers_get_nothing_and_do_not_end_the_wait(aside):
    pending = GlooLink.listen(HOST, SECRET, LONG_SECONDS)
    accepting = aside.submit(pending.accept)
    error = raised(lambda: GlooLink.connect(HOST, pending.port, "guessed", LONG_SECONDS))
    assert type(error) is AgreementError
    with socket.create_connection((HOST, pending.port)) as silent:  # to the end
        with socket.create_connection((HOST, pending.port)) as loud:
            loud.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        worker = GlooLink.connect(HOST, pending.port, SECRET, LONG_SECONDS)
        with worker, accepting.result() as trainer:
            handle, buffer = trainer.send(torch.ones(3)), torch.zeros(3)
            worker.receive(buffer)
            handle.wait()
            assert buffer.tolist() == [1.0, 1.0, 1.0]
        silent.close()


def test_who_connects_to_gloo_without_the_key_is_refused(aside):
    """Between the two, the key of the link is replaced: Gloo connects, its ends differ."""

    def channels() -> tuple[Channel, Channel]:
        with socket.create_server((HOST, 0)) as server:
            one = socket.create_connection(server.getsockname())
            return Channel(one, "the other side"), Channel(server.accept()[0], "the other side")

    (trainer, from_trainer), (to_worker, worker) = channels(), channels()

    def relay() -> None:
        from_trainer.receive_bytes(LONG_SECONDS, "key")
        to_worker.send_bytes(bytes(32), LONG_SECONDS, "key")
        to_worker.send_bytes(from_trainer.receive_bytes(LONG_SECONDS, "to"), LONG_SECONDS, "to")
        from_trainer.send_bytes(to_worker.receive_bytes(LONG_SECONDS, "fro"), LONG_SECONDS, "fro")

    with trainer, worker, from_trainer, to_worker, ThreadPoolExecutor(1) as middle:
        middle.submit(relay)
        other = aside.submit(GlooPair, worker, WORKER, LONG_SECONDS)
        error = raised(lambda: GlooPair(trainer, TRAINER, LONG_SECONDS))
        assert type(error) is AgreementError
        assert "who connected to Gloo is not the worker" in str(error)
        # It finds the same, unless the trainer had hung up before its proof was read.
        assert type(raised(other.result)) in (AgreementError, PeerLostError)


# ---------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("nbytes", [0, 1, (3 << 20) + 1])
def test_baselines_move_and_check_their_bytes(nbytes):
    assert memcpy_seconds(nbytes) > 0
    assert loopback_tcp_seconds(nbytes, 1 << 20) > 0
