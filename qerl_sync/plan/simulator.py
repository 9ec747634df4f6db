"""The one cost model: a stream, tensor by tensor, through vLLM's layerwise reload.

One flat loop, since a command walks through models of 20,000 tensors a dozen times. A property test
compares it with a ledger that is fed the same events one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from qerl_sync.buffers.trace import Trace
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap


@dataclass(slots=True)
class Span:
    """The time in which one parent layer holds bytes.

    Attributes:
        layer: its name.
        opened, closed: indices of the tensors that open and complete it, both included. `closed` is
            None if it is held to the end of the stream.
        arrivals: indices of its tensors, ascending.
        held_bytes: what it holds after each of them.
    """

    layer: str
    opened: int
    closed: int | None = None
    arrivals: list[int] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes[-1]

    def covers(self, index: int) -> bool:
        return self.opened <= index and (self.closed is None or index <= self.closed)

    def held_at(self, index: int) -> int:
        """Return the bytes held when tensor `index` has been buffered; the span must cover it."""
        return self.held_bytes[bisect_right(self.arrivals, index) - 1]


# A contribution, prepared for the loop (a plain tuple: there are as many as tensors): the number
# of its parent layer, the bytes that are held of it, the elements that the layer counts, the key of
# the storage that it keeps alive (None: nothing else does), the bytes of that storage.
Landing = tuple[int, int, int, "int | str | None", int]


class Simulator:
    """Walks through a stream, in its own order or in another one.

    vLLM keeps what it is given until the elements loaded into a layer reach its total, then
    processes the layer, releases its tensors (`online_process_loader` in vLLM's
    reload/layerwise.py), and drops what arrives for it later. Layers that the stream cannot fill
    close when all that is expected has arrived, as our receiver makes them do.

    Args:
        metas: the stream. Every name must be in `layer_map`.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.

    Attributes:
        names, landings: of each tensor, by its place in the stream.
        layers: names of the parent layers; a `Landing` has the number of its layer.
        closes_at: elements with which each layer closes, by number; infinite if it never closes.
    """

    def __init__(
        self,
        metas: Sequence[ParamMeta],
        layer_map: LayerMap,
        storages: Mapping[str, Storage] | None = None,
    ) -> None:
        self.names = [meta.name for meta in metas]
        self.landings = _prepare(metas, layer_map, storages or {})
        self.layers = list(layer_map.layers)
        self.closes_at: list[float] = [
            inf if layer.deferred else layer.closes_at_numel for layer in layer_map.layers.values()
        ]

    def spans(self) -> list[Span]:
        """Return when each layer is open in the stream's own order, in the order of opening."""
        spans: dict[int, Span] = {}
        self.trace(spans=spans)
        return list(spans.values())

    def trace(
        self,
        order: Iterable[int] | None = None,
        *,
        chunks: Sequence[Storage] | None = None,
        chunk_buffers: int = 1,
        spans: dict[int, Span] | None = None,
    ) -> Trace:
        """Return the high-water marks of each step.

        Args:
            order: places of the tensors in the stream; None: its own order.
            chunks: the chunk in which each tensor travels, by place. Then the last
                `chunk_buffers` of them count as pinned too: a receiver rotates as many buffers, and
                allocates the next before it frees the one that it replaces, as vLLM's consumer
                does (`packed_tensors[i] = torch.empty(...)`). The simulator's storages must name
                each chunk at least twice.
            spans: an empty dictionary, filled with the span of each layer, by its number and in
                the order of opening. None saves their time.
        """
        names, landings = self.names, self.landings
        awaited: list[float | None] = list(self.closes_at)  # elements; None: the layer is closed
        is_open = [total == inf for total in awaited]  # deferred layers are never counted as open
        held, own = [0] * len(awaited), [0] * len(awaited)
        shared: dict[int, list[int | str]] = {}  # keys of the shared storages that a layer holds
        holders: dict[int | str, int] = {}
        sizes: dict[int | str, int] = {}
        buffered = pinned = opened = 0
        arrived: list[str] = []
        marks: tuple[list[int], list[int], list[int]] = ([], [], [])
        add_buffered, add_pinned, add_opened = (column.append for column in marks)
        receiving: deque[int | str] = deque()
        for place in range(len(names)) if order is None else order:
            high = None
            if chunks is not None and (not receiving or chunks[place].key != receiving[-1]):
                chunk = chunks[place]
                receiving.append(chunk.key)
                count = holders[chunk.key] = holders.get(chunk.key, 0) + 1
                if count == 1:
                    sizes[chunk.key] = chunk.nbytes
                    pinned += chunk.nbytes
                if len(receiving) > chunk_buffers:
                    high = (buffered, pinned, opened)
                    key = receiving.popleft()
                    holders[key] -= 1
                    if not holders[key]:
                        pinned -= sizes[key]
            for layer, held_bytes, numel, storage, storage_bytes in landings[place]:
                left = awaited[layer]
                if left is None:
                    continue
                if not is_open[layer]:
                    is_open[layer] = True
                    opened += 1
                buffered += held_bytes
                held[layer] += held_bytes
                if spans is not None:
                    span = spans.get(layer)
                    if span is None:
                        span = spans[layer] = Span(self.layers[layer], len(arrived))
                    span.arrivals.append(len(arrived))
                    span.held_bytes.append(held[layer])
                if storage is None:
                    pinned += storage_bytes
                    own[layer] += storage_bytes
                else:
                    shared.setdefault(layer, []).append(storage)
                    count = holders[storage] = holders.get(storage, 0) + 1
                    if count == 1:
                        sizes[storage] = storage_bytes
                        pinned += storage_bytes
                left -= numel
                if left > 0:
                    awaited[layer] = left
                    continue
                if spans is not None:
                    spans[layer].closed = len(arrived)
                high = _higher(high, buffered, pinned, opened)
                awaited[layer] = None
                opened -= 1
                buffered -= held[layer]
                pinned -= own[layer]
                for key in shared.pop(layer, ()):
                    holders[key] -= 1
                    if not holders[key]:
                        pinned -= sizes[key]
            # Between two releases, holding only adds up.
            now = _higher(high, buffered, pinned, opened) if high else (buffered, pinned, opened)
            arrived.append(names[place])
            add_buffered(now[0])
            add_pinned(now[1])
            add_opened(now[2])
        return Trace.of_columns(arrived, *marks)


Marks = tuple[int, int, int]


def _higher(high: Marks | None, buffered: int, pinned: int, opened: int) -> Marks:
    """Return the high-water marks of one step, so far."""
    if high is None:
        return buffered, pinned, opened
    return max(high[0], buffered), max(high[1], pinned), max(high[2], opened)


def _prepare(
    metas: Iterable[ParamMeta], layer_map: LayerMap, storages: Mapping[str, Storage]
) -> list[tuple[Landing, ...]]:
    """Return the landings of each tensor."""
    # vLLM holds nothing for the others: loaders write their tensors where they stay.
    numbers = {
        name: number
        for number, (name, layer) in enumerate(layer_map.layers.items())
        if layer.loading == "layerwise"
    }
    holders = Counter(storage.key for storage in storages.values())
    contributions = layer_map.contributions
    landings: list[tuple[Landing, ...]] = []
    for meta in metas:
        name = meta.name
        given = storages.get(name)
        lands = contributions[name]
        if len(numbers) < len(layer_map.layers):
            lands = tuple([c for c in lands if c.parent_layer in numbers])
        if len(lands) == 1 and (given is None or holders[given.key] == 1):
            ((layer, _, numel, held_bytes, aliases),) = lands
            size = held_bytes
            if aliases:
                size = given.nbytes if given else meta.nbytes
            landings.append(((numbers[layer], held_bytes, numel, None, size),))
            continue
        source = given or Storage(name, meta.nbytes)
        landings.append(
            tuple(
                (
                    numbers[c.parent_layer],
                    c.held_bytes,
                    c.loaded_numel,
                    source.key if c.aliases_source else f"{name}#{i}",
                    source.nbytes if c.aliases_source else c.held_bytes,
                )
                for i, c in enumerate(lands)
            )
        )
    return landings


def open_at(spans: Iterable[Span], index: int) -> list[tuple[str, int]]:
    """Return (layer, held bytes) when tensor `index` has been buffered, largest first."""
    held = [(span.layer, span.held_at(index)) for span in spans if span.covers(index)]
    return sorted(held, key=lambda item: -item[1])


def open_at_each(spans: Sequence[Span], indices: Iterable[int]) -> Iterator[list[tuple[str, int]]]:
    """Yield `open_at` for ascending `indices`, in one sweep.

    Args:
        spans: in the order of opening.
    """
    waiting = iter(spans)
    upcoming = next(waiting, None)
    active: list[Span] = []
    for index in indices:
        while upcoming is not None and upcoming.opened <= index:
            active.append(upcoming)
            upcoming = next(waiting, None)
        active = [span for span in active if span.covers(index)]
        yield open_at(active, index)


@dataclass(frozen=True)
class OpenLayer:
    """A parent layer in the middle of a stream. `loaded_numel` of `total_numel` have arrived."""

    name: str
    kind: str
    loaded_numel: int
    total_numel: int
    buffered_bytes: int


def replay(
    metas: Iterable[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> Trace:
    """Predict the trace of a stream. Linear in the number of tensors.

    Args:
        metas: the stream, in order. Every name must be in `layer_map`.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
    """
    return Simulator(list(metas), layer_map, storages).trace()


def open_layers_at(index: int, metas: Sequence[ParamMeta], layer_map: LayerMap) -> list[OpenLayer]:
    """Return the layers that are open when tensor `index` has been buffered, before any closes by
    it, in the order in which they opened."""
    found = []
    for span in Simulator(metas[: index + 1], layer_map).spans():
        layer = layer_map.layers[span.layer]
        if layer.deferred or not span.covers(index):
            continue
        loaded_numel = sum(
            c.loaded_numel
            for at in dict.fromkeys(span.arrivals)  # a tensor may land in a layer more than once
            for c in layer_map.contributions[metas[at].name]
            if c.parent_layer == layer.name
        )
        found.append(
            OpenLayer(layer.name, layer.kind, loaded_numel, layer.total_numel, span.peak_bytes)
        )
    return found
