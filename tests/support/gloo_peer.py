"""A worker process for the tests of Gloo links. What it does:

    echo    on each of its links, sends back what it gets, until told to end
    take    receives buffers of TAKEN_BYTES for ever
    give    sends a buffer of GIVEN_BYTES, GIVEN_TIMES

It says "started", is told the ports of its links, and works beside a default process group.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist

from qerl_sync.wire.gloo import GlooLink, PendingLink

HOST, TIMEOUT_SECONDS = "127.0.0.1", 60.0
TAKEN_BYTES = GIVEN_BYTES = 64 << 20
GIVEN_TIMES = 40
END = -1


@contextmanager
def peer(secret: str, what: str) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that has started and waits for its ports, until it is dead."""
    # Forks of a process that has imported torch, once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(secret, what, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "started"
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def connect(pipe: Connection, *pendings: PendingLink) -> list[GlooLink]:
    """The trainer's ends of its links."""
    pipe.send([pending.port for pending in pendings])
    return [pending.accept() for pending in pendings]


def echo(link: GlooLink) -> None:
    """Each tensor is announced by its number of bytes."""
    nbytes = torch.tensor(0)
    while True:
        link.receive(nbytes)
        if nbytes == END:
            return
        tensor = torch.empty(int(nbytes), dtype=torch.uint8)
        link.receive(tensor)
        link.send(tensor).wait()


def echo_all(links: list[GlooLink]) -> None:
    with ThreadPoolExecutor(len(links)) as pool:
        list(pool.map(echo, links))


def take(link: GlooLink) -> None:
    buffer = torch.empty(TAKEN_BYTES, dtype=torch.uint8)
    while True:
        link.receive(buffer)


def give(link: GlooLink) -> None:
    buffer = torch.ones(GIVEN_BYTES, dtype=torch.uint8)
    for handle in [link.send(buffer) for _ in range(GIVEN_TIMES)]:
        handle.wait()


@contextmanager
def default_group() -> Iterator[None]:
    """torch's default process group, as vLLM has one, in use before and after."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    for after in (False, True):
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0, 1.0]
        assert dist.group.WORLD is group
        if not after:
            yield
    dist.destroy_process_group()


def main(secret: str, what: str, pipe: Connection) -> None:
    with default_group():
        pipe.send("started")
        links = [GlooLink.connect(HOST, port, secret, TIMEOUT_SECONDS) for port in pipe.recv()]
        if what == "echo":
            echo_all(links)
        else:
            {"take": take, "give": give}[what](*links)
        for link in links:
            link.close()
    pipe.send("ended well")
