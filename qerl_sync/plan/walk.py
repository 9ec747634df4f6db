"""The walk behind every prediction: a stream, tensor by tensor, through vLLM's layerwise reload.

One flat loop, since a command walks through models of 20,000 tensors a dozen times. It does what
`replay.Replay` does with a ledger, event by event; a property test holds the two together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qerl_sync.buffers.trace import Trace, TraceStep
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap


class Span:
    """The time in which one parent layer holds bytes.

    Attributes:
        layer: its name.
        opened, closed: indices of the tensors that open and complete it, both included. `closed` is
            None if it is held to the end of the stream.
        arrivals: indices of its tensors, ascending.
        held_bytes: what it holds after each of them.
    """

    __slots__ = (
        "arrivals",
        "awaited",
        "closed",
        "held",
        "held_bytes",
        "keys",
        "layer",
        "opened",
        "own",
    )

    def __init__(self, layer: str, opened: int, awaited: int | None) -> None:
        self.layer = layer
        self.opened = opened
        self.closed: int | None = None
        self.arrivals: list[int] = []
        self.held_bytes: list[int] = []
        # While it is open: the elements that are still to come (None: it is never processed on
        # arrival), the bytes held, those that nobody else keeps alive, and the shared storages.
        self.awaited = awaited
        self.held = 0
        self.own = 0
        self.keys: list[int | str] = []

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes[-1]

    def covers(self, index: int) -> bool:
        return self.opened <= index and (self.closed is None or index <= self.closed)

    def held_at(self, index: int) -> int:
        """Bytes held when tensor `index` has been buffered; the span must cover it."""
        return self.held_bytes[bisect_right(self.arrivals, index) - 1]


class Walk(NamedTuple):
    """What a stream would hold: its trace, and when each layer is open, in the order of opening."""

    trace: Trace
    spans: list[Span]


# A contribution, prepared: layer, held bytes, elements, storage key, storage bytes. Key None: the
# storage belongs to this contribution alone.
_Landing = tuple[str, int, int, "int | str | None", int]
Marks = tuple[int, int, int]


def walk(
    metas: Sequence[ParamMeta],
    layer_map: LayerMap,
    storages: Mapping[str, Storage] | None = None,
) -> Walk:
    """Hand over `metas` one by one. Linear in the number of tensors.

    Args:
        metas: the stream, in order. Every name must be in `layer_map`.
        storages: the memory behind each tensor; a name that is not in it has a storage of its own.
    """
    return Walker(metas, layer_map, storages).walk(metas)


class Walker:
    """Walks through streams of the same tensors in different orders.

    vLLM keeps what it is given until the elements loaded into a layer reach its total, then
    processes the layer and lets go (`online_process_loader` in vLLM's reload/layerwise.py), and
    drops what arrives for it later. Layers that the stream cannot fill close when all that is
    expected has arrived, as our receiver makes them do.
    """

    def __init__(
        self,
        metas: Sequence[ParamMeta],
        layer_map: LayerMap,
        storages: Mapping[str, Storage] | None = None,
    ) -> None:
        self._landings = _prepare(metas, layer_map, storages or {})
        self._awaited = {
            name: None if layer.deferred else layer.closes_at_numel
            for name, layer in layer_map.layers.items()
        }

    def walk(self, metas: Iterable[ParamMeta]) -> Walk:
        landings, awaited = self._landings, self._awaited
        buffered = pinned = opened = 0
        spans: list[Span] = []
        open_spans: dict[str, Span] = {}
        closed: set[str] = set()
        holders: dict[int | str, int] = {}
        sizes: dict[int | str, int] = {}
        steps: list[TraceStep] = []
        index = -1
        for meta in metas:
            index += 1
            name = meta.name
            high = None
            for layer, held_bytes, numel, key, storage_bytes in landings[name]:
                span = open_spans.get(layer)
                if span is None:
                    if layer in closed:
                        continue
                    span = open_spans[layer] = Span(layer, index, awaited[layer])
                    spans.append(span)
                    opened += span.awaited is not None
                buffered += held_bytes
                span.held += held_bytes
                span.arrivals.append(index)
                span.held_bytes.append(span.held)
                if key is None:
                    pinned += storage_bytes
                    span.own += storage_bytes
                else:
                    span.keys.append(key)
                    count = holders[key] = holders.get(key, 0) + 1
                    if count == 1:
                        sizes[key] = storage_bytes
                        pinned += storage_bytes
                if span.awaited is None:
                    continue
                span.awaited -= numel
                if span.awaited <= 0:
                    high = _higher(high, buffered, pinned, opened)
                    span.closed = index
                    del open_spans[layer]
                    closed.add(layer)
                    buffered -= span.held
                    opened -= 1
                    pinned -= span.own
                    for key in span.keys:
                        holders[key] -= 1
                        if not holders[key]:
                            pinned -= sizes[key]
            # Between two layers that close, holding only adds up.
            marks = _higher(high, buffered, pinned, opened) if high else (buffered, pinned, opened)
            steps.append(TraceStep(name, *marks))
        return Walk(Trace(tuple(steps)), spans)


def _higher(high: Marks | None, buffered: int, pinned: int, opened: int) -> Marks:
    """High-water marks of one step, so far."""
    if high is None:
        return buffered, pinned, opened
    return max(high[0], buffered), max(high[1], pinned), max(high[2], opened)


def _prepare(
    metas: Sequence[ParamMeta], layer_map: LayerMap, storages: Mapping[str, Storage]
) -> dict[str, list[_Landing]]:
    """The contributions of each name, flat."""
    landings: dict[str, list[_Landing]] = {}
    for meta in metas:
        name = meta.name
        contributions = layer_map.contributions[name]
        given = storages.get(name)
        if given is None and len(contributions) == 1 and name not in landings:
            c = contributions[0]
            size = meta.nbytes if c.aliases_source else c.held_bytes
            landings[name] = [(c.parent_layer, c.held_bytes, c.loaded_numel, None, size)]
            continue
        source = given or Storage(name, meta.nbytes)
        landings[name] = [
            (
                c.parent_layer,
                c.held_bytes,
                c.loaded_numel,
                source.key if c.aliases_source else f"{name}#{i}",
                source.nbytes if c.aliases_source else c.held_bytes,
            )
            for i, c in enumerate(contributions)
        ]
    return landings


def open_at(spans: Iterable[Span], index: int) -> list[tuple[str, int]]:
    """(layer, held bytes) when tensor `index` has been buffered, largest first."""
    held = [(span.layer, span.held_at(index)) for span in spans if span.covers(index)]
    return sorted(held, key=lambda item: -item[1])


def open_at_each(spans: Sequence[Span], indices: Iterable[int]) -> Iterator[list[tuple[str, int]]]:
    """`open_at` for ascending `indices`, in one sweep.

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
