"""Print the table of scale.md: what syncs that nobody ran would cost through an object store.

    python docs/scale.py

`estimate` is the formula of the page, `simulate` plays the same sync transfer by transfer. Both
know a chunk's way: gathered and put on the trainer, announced to each worker, pulled by each node
from the nodes that have it, loaded by the node's workers at the same time. Chunk i is begun when
chunk i - `chunks_in_flight` is loaded everywhere.
"""

import heapq
import math
from typing import NamedTuple


class Rates(NamedTuple):
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


class Setting(NamedTuple):
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
        """Return the bytes that a node's object store must hold."""
        return self.chunks_in_flight * self.chunk_bytes


def source_seconds(setting: Setting, rates: Rates) -> float:
    """Return the trainer's seconds for one chunk."""
    copying = setting.chunk_bytes / rates.gather + setting.chunk_bytes / rates.put
    return copying + setting.workers * rates.message_seconds


def estimate(setting: Setting, rates: Rates) -> float:
    """Return the seconds of a sync by the formula.

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
    """Return the seconds of the same sync, played transfer by transfer."""
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
    """Return when each node has the chunk that the trainer has at `start`. The node that has it
    first passes it on first; one transfer at a time in each direction."""
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

if __name__ == "__main__":
    print("model  workers  nodes  formula  simulated  store/node  trainer host")
    for name, nbytes in MODELS.items():
        for workers in WORKERS:
            setting = Setting(nbytes, workers)
            gib = setting.store_bytes / (1 << 30)
            print(
                f"{name:>5} {workers:8} {setting.nodes:6} {estimate(setting, Rates()):6.0f} s"
                f" {simulate(setting, Rates()):8.0f} s {gib:7.0f} GiB {2 * gib:9.0f} GiB"
            )
