"""Seconds by phase, and the spans of time that they are sums of."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """One piece of work. `start` is in seconds since the epoch, by the clock of its host."""

    name: str
    detail: str
    start: float
    seconds: float


def slowest(spans: Iterable[Span]) -> list[Span]:
    """Return the ten longest, the longest first."""
    return sorted(spans, key=lambda span: -span.seconds)[:10]


class _Block:
    """Time one block. Syncs enter several for each tensor, where a generator's context costs more
    than what it times."""

    __slots__ = ("_detail", "_is_phase", "_name", "_start", "_watch")

    def __init__(self, watch: Stopwatch, name: str, detail: str, *, is_phase: bool) -> None:
        self._watch, self._name, self._detail, self._is_phase = watch, name, detail, is_phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        seconds = time.perf_counter() - self._start
        watch = self._watch
        if self._is_phase:
            watch.seconds[self._name] += seconds
            if kind is not None:
                watch.failed_in = watch.failed_in or self._name
        if watch.records:
            start = watch.epoch + self._start
            watch.spans.append(Span(self._name, self._detail, start, seconds))


class Stopwatch:
    """`with watch("load"):` adds the seconds of its block to that phase.

    Args:
        record: keep each block as a span too.

    Attributes:
        spans: the blocks so far, in the order in which they ended; empty unless recorded.
        records: spans are kept.
        failed_in: the innermost phase that an exception has left; empty if none has.
        epoch: when the monotonic clock was at 0, in seconds since the epoch.
    """

    def __init__(self, phases: Iterable[str] = (), *, record: bool = False) -> None:
        self.seconds = dict.fromkeys(phases, 0.0)
        self.spans: list[Span] = []
        self.failed_in = ""
        self.records = record
        # Spans of several processes are drawn on one axis, which a monotonic clock does not have.
        self.epoch = time.time() - time.perf_counter()

    def __call__(self, phase: str, detail: str = "") -> _Block:
        return _Block(self, phase, detail, is_phase=True)

    def span(self, name: str, detail: str = "") -> _Block:
        """Record this block, which belongs to no phase of its own."""
        return _Block(self, name, detail, is_phase=False)
