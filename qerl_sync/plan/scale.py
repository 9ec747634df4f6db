"""What a sync through a cluster's object store costs at a size that nobody here can run.

    python -m qerl_sync.plan.scale

`estimate` is a formula, `simulate` plays the same sync transfer by transfer; tests hold them
together. Both know a chunk's way: gathered and put on the trainer, announced to each worker, pulled
by each node from the nodes that have it, loaded by the node's workers at the same time; chunk i is
begun when chunk i - `chunks_in_flight` is loaded everywhere.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Measured, or assumed, of one machine each. Bytes per second, but for `message_seconds`.

    Attributes:
        gather: the trainer's weights into a staged chunk.
        put: a staged chunk into the object store.
        link: between two nodes, in each direction.
        load: vLLM's loaders, per worker, while all workers of a node load.
        message_seconds: the trainer's time for announcing a chunk to a worker and hearing of it.
    """

    gather: float = 4.5e9
    put: float = 2.2e9
    link: float = 12.5e9
    load: float = 2.4e9
    message_seconds: float = 2e-4


@dataclass(frozen=True)
class Setting:
    """A sync.

    Attributes:
        nbytes: of the weights, whole.
        chunk_bytes: the largest parent layer is one chunk at least.
    """

    nbytes: float
    workers: int
    workers_per_node: int = 8
    chunk_bytes: float = 1 << 30
    chunks_in_flight: int = 2

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.workers_per_node)

    @property
    def chunks(self) -> int:
        return math.ceil(self.nbytes / self.chunk_bytes)

    @property
    def store_bytes(self) -> float:
        """What a node's object store must hold."""
        return self.chunks_in_flight * self.chunk_bytes


def source_seconds(setting: Setting, rates: Rates) -> float:
    """What one chunk takes of the trainer."""
    copying = setting.chunk_bytes / rates.gather + setting.chunk_bytes / rates.put
    return copying + setting.workers * rates.message_seconds


def estimate(setting: Setting, rates: Rates) -> float:
    """Seconds of a sync.

        source = chunk/gather + chunk/put + workers * message
        way    = source + ceil(rounds) * chunk/link + chunk/load       rounds = log2(nodes + 1)
        period = max(source, floor(rounds) * chunk/link, chunk/load, way / chunks_in_flight)
        total  = way + (chunks - 1) * period

    A node that has a chunk passes it on, so that the number that have it doubles with each round;
    the trainer's node sends in every whole round.
    """
    chunk = setting.chunk_bytes
    source = source_seconds(setting, rates)
    rounds = math.log2(setting.nodes + 1)
    way = source + math.ceil(rounds) * chunk / rates.link + chunk / rates.load
    sending = math.floor(rounds) * chunk / rates.link
    period = max(source, sending, chunk / rates.load, way / setting.chunks_in_flight)
    return way + (setting.chunks - 1) * period


def simulate(setting: Setting, rates: Rates) -> float:
    """Seconds of the same sync, transfer by transfer."""
    source = source_seconds(setting, rates)
    sending = setting.chunk_bytes / rates.link
    loading = setting.chunk_bytes / rates.load
    uplink = [0.0] * (setting.nodes + 1)  # when each node can send again; the last is the trainer's
    downlink = [0.0] * setting.nodes
    loader = [0.0] * setting.nodes
    trainer = 0.0
    loaded: list[float] = []
    for index in range(setting.chunks):
        slot = loaded[index - setting.chunks_in_flight] if index >= setting.chunks_in_flight else 0
        trainer = max(trainer, slot) + source
        arrived = _broadcast(trainer, sending, uplink, downlink)
        for node, at in enumerate(arrived):
            loader[node] = max(loader[node], at) + loading
        loaded.append(max(loader))
    return loaded[-1]


def _broadcast(
    start: float, sending: float, uplink: list[float], downlink: list[float]
) -> list[float]:
    """When each node has the chunk that the trainer has at `start`. Who has it first passes it on
    first; one transfer at a time in each direction."""
    arrived = [0.0] * len(downlink)
    holders = [(max(start, uplink[-1]), len(downlink))]
    for node in sorted(range(len(downlink)), key=downlink.__getitem__):
        free, holder = heapq.heappop(holders)
        done = max(free, downlink[node]) + sending
        uplink[holder] = downlink[node] = arrived[node] = done
        heapq.heappush(holders, (done, holder))
        heapq.heappush(holders, (max(done, uplink[node]), node))
    return arrived


MODELS = {"30B": 61e9, "235B": 470e9}
WORKERS = (8, 64, 512)


def table() -> str:
    """Both models, all numbers of workers, as text."""
    head = ("model", "workers", "nodes", "formula", "simulated", "store/node", "trainer host")
    rows = [head, *(_row(name, count) for name in MODELS for count in WORKERS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _row(name: str, workers: int) -> tuple[str, ...]:
    setting, rates = Setting(MODELS[name], workers), Rates()
    gib = setting.store_bytes / (1 << 30)
    return (
        name,
        str(workers),
        str(setting.nodes),
        f"{estimate(setting, rates):.0f} s",
        f"{simulate(setting, rates):.0f} s",
        f"{gib:.0f} GiB",
        f"{2 * gib:.0f} GiB",
    )


if __name__ == "__main__":
    print(table())
